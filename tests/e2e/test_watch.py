"""Watching adapters: every change is told, also those of another server, and nobody is held up."""

import asyncio
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import grpc
import pytest

from quickchange import AdapterEvent, AsyncClient, Client, Residency, UnavailableError
from quickchange.errors import from_rpc
from quickchange.v1 import adapters_pb2, adapters_pb2_grpc
from tests.e2e.process import ServerProcess

StartServer = Callable[..., ServerProcess]
PROMPT = "watch me"


def until(events: Iterator[AdapterEvent], wanted: Callable[[AdapterEvent], object]) -> list[AdapterEvent]:
    """Events up to the first that is wanted."""
    seen: list[AdapterEvent] = []
    for event in events:
        seen.append(event)
        if wanted(event):
            return seen
    raise AssertionError("the watch ended")


def test_every_change_is_told(client: Client, adapters: Mapping[str, Path], tmp_path: Path) -> None:
    with client.adapters.watch() as events:
        client.adapters.push(adapters["a"], "seen", labels={"k": "1"})
        added = until(events, lambda e: e.adapter.name == "seen")[-1].adapter
        assert (added.reference, dict(added.labels), added.state) == ("seen@1", {"k": "1"}, "ready")
        if added.residency is not Residency.DISK:  # the same content under another name was asked
            client.adapters.unload("seen")
            until(events, lambda e: e.adapter.name == "seen" and e.adapter.residency is Residency.DISK)

        client.adapters.alias("seen", "prod", 1)
        until(events, lambda e: e.adapter.name == "seen" and e.adapter.aliases == ("prod",))
        client.adapters.set_labels("seen", {"k": "2"})
        until(events, lambda e: e.adapter.name == "seen" and dict(e.adapter.labels) == {"k": "2"})
        client.adapters.pin("seen")
        until(events, lambda e: e.adapter.name == "seen" and e.adapter.pinned)

        client.adapters.load("seen")
        until(events, lambda e: e.adapter.name == "seen" and e.adapter.residency is Residency.DEVICE)
        client.adapters.unload("seen")
        until(events, lambda e: e.adapter.name == "seen" and e.adapter.residency is Residency.DISK)

        client.adapters.delete("seen@1")
        gone = until(events, lambda e: e.deleted and e.adapter.name == "seen")[-1].adapter
        assert (gone.version, gone.digest) == (1, added.digest)


def test_it_begins_with_what_is_there(client: Client, pushed: Mapping[str, str]) -> None:
    client.generate(PROMPT, adapter="a", max_new_tokens=1)
    there = {adapter.reference for adapter in client.adapters.list()}
    with client.adapters.watch(send_initial=True) as events:
        initial = [next(events) for _ in there]
    assert {event.adapter.reference for event in initial} == there
    assert not any(event.deleted for event in initial)
    residency = {event.adapter.name: event.adapter.residency for event in initial}
    assert residency["a"] is Residency.DEVICE


def test_nothing_is_lost_between_the_beginning_and_the_changes(
    client: Client, adapters: Mapping[str, Path]
) -> None:
    """Versions come and go while watches begin; each watch ends up with what there is."""
    for round_ in range(5):
        with client.adapters.watch(send_initial=True) as events:
            next(events)  # it has begun; what follows happens anywhere in its first answers
            name = f"between-{round_}"
            client.adapters.push(adapters["a"], name)
            client.adapters.push(adapters["b"], name)
            client.adapters.delete(f"{name}@1")
            known: set[str] = set()
            for event in events:
                (known.discard if event.deleted else known.add)(event.adapter.reference)
                if event.deleted and event.adapter.reference == f"{name}@1":
                    break
            if f"{name}@2" not in known:
                until(events, lambda e, name=name: e.adapter.reference == f"{name}@2")
        client.adapters.delete(f"{name}@2")


async def test_watching_with_asyncio(
    server: ServerProcess, client: Client, adapters: Mapping[str, Path]
) -> None:
    async with AsyncClient(server.grpc) as watcher, watcher.adapters.watch() as events:
        pushing = asyncio.create_task(asyncio.to_thread(client.adapters.push, adapters["c"], "later"))
        async for event in events:
            if event.adapter.reference == "later@1":
                break
        await pushing
    client.adapters.delete("later@1")


def test_a_reader_that_never_reads_holds_up_nobody_and_gets_the_last_state(
    server: ServerProcess, client: Client, pushed: Mapping[str, str], adapters: Mapping[str, Path]
) -> None:
    client.adapters.push(adapters["b"], "busy")
    with grpc.insecure_channel(server.grpc, options=[("grpc.http2.lookahead_bytes", 1024)]) as channel:
        stub = adapters_pb2_grpc.AdapterServiceStub(channel)
        asleep = stub.WatchAdapters(adapters_pb2.WatchAdaptersRequest(send_initial=True))
        next(asleep)
        before = server.memory_kib
        with client.adapters.watch() as events:
            for change in range(600):  # of 8 KiB each, far more than the connection buffers
                client.adapters.set_labels("busy", {f"k{i}": f"{change}".ljust(250, "x") for i in range(32)})
            last = "599".ljust(250, "x")
            until(events, lambda e: e.adapter.labels.get("k0") == last)
        assert server.memory_kib - before < 20_000
        told = 0
        for response in asleep:
            told += 1
            if response.adapter.labels.get("k0") == last:
                break
        assert told < 600
        asleep.cancel()
    client.adapters.delete("busy@1")


def test_a_drain_ends_a_watch_that_had_nothing_to_tell(own_server: StartServer) -> None:
    server = own_server()
    with grpc.insecure_channel(server.grpc) as channel:
        stub = adapters_pb2_grpc.AdapterServiceStub(channel)
        watches = [stub.WatchAdapters(adapters_pb2.WatchAdaptersRequest()) for _ in range(4)]
        for watch in watches:
            assert watch.initial_metadata() is not None  # comes once it has begun
        server.signal(signal.SIGTERM)
        for watch in watches:
            with pytest.raises(grpc.RpcError) as caught:
                next(watch)
            error = from_rpc(caught.value)
            assert (error.code, error.reason) == ("UNAVAILABLE", "DRAINING")
    assert server.wait(20) == 0


def test_a_watch_misses_nothing_once_it_has_begun(
    server: ServerProcess, client: Client, adapters: Mapping[str, Path]
) -> None:
    with grpc.insecure_channel(server.grpc) as channel:
        watch = adapters_pb2_grpc.AdapterServiceStub(channel).WatchAdapters(
            adapters_pb2.WatchAdaptersRequest(), timeout=60
        )
        watch.initial_metadata()
        client.adapters.push(adapters["a"], "begun")
        assert any(event.adapter.name == "begun" for event in watch)
        watch.cancel()
    client.adapters.delete("begun@1")


def test_a_drain_ends_a_watch(own_server: StartServer, adapters: Mapping[str, Path]) -> None:
    server = own_server()
    with server.client() as client:
        client.adapters.push(adapters["a"], "a")
        with client.adapters.watch(send_initial=True) as events:
            next(events)
            server.signal(signal.SIGTERM)
            with pytest.raises(UnavailableError) as caught:
                next(events)
        assert caught.value.reason == "DRAINING"
        assert server.wait(20) == 0
