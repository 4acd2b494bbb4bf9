"""Watching and collecting, through the clients and the command, against the scripted server."""

import json
import signal
import subprocess
import sys
import threading

import grpc
import pytest

from quickchange import (
    AdapterState,
    AsyncClient,
    CancelledError,
    Client,
    InvalidArgumentError,
    UnavailableError,
)
from quickchange.cli import main
from tests.quickchange.scripted import DIGEST, Script, rich


def test_a_watch_gives_events_until_the_server_goes(client: Client, script: Script) -> None:
    with client.adapters.watch(send_initial=True) as events:
        seen = [next(events) for _ in range(5)]
        with pytest.raises(UnavailableError) as caught:
            next(events)
    assert [event.adapter.reference for event in seen] == ["a0@1", "a1@1", "a2@1", "sql@3", "sql@2"]
    assert [event.deleted for event in seen] == [False] * 4 + [True]
    assert caught.value.reason == "DRAINING"
    assert script.requests[0].send_initial


def test_a_watch_that_may_have_begun_is_not_begun_again(client: Client, script: Script) -> None:
    """What happened in between would be lost without a word."""
    script.failures = [rich(grpc.StatusCode.UNAVAILABLE, "the server is draining", "DRAINING")]
    with client.adapters.watch() as events, pytest.raises(UnavailableError) as caught:
        next(events)
    assert caught.value.reason == "DRAINING"
    assert len(script.requests) == 1


async def test_nor_with_asyncio(target: str, script: Script) -> None:
    script.failures = [rich(grpc.StatusCode.UNAVAILABLE, "the server is draining", "DRAINING")]
    async with AsyncClient(target) as client, client.adapters.watch() as events:
        with pytest.raises(UnavailableError):
            await anext(events.__aiter__())
    assert len(script.requests) == 1


def test_a_watch_outlasts_the_timeout_of_calls(target: str, script: Script) -> None:
    script.endless = True
    with Client(target, timeout_s=0.2) as client, client.adapters.watch() as events:
        assert next(events).adapter.reference == "sql@3"
        gone = next(events)
        assert (gone.deleted, gone.adapter.state) == (True, AdapterState.DELETING)
        threading.Timer(0.5, events.close).start()
        with pytest.raises(CancelledError):
            next(events)
    assert script.ended.wait(5)


async def test_a_watch_with_asyncio(target: str, script: Script) -> None:
    async with AsyncClient(target) as client:
        events = client.adapters.watch()
        seen = [(await anext(events.__aiter__())).adapter.reference for _ in range(2)]
        with pytest.raises(UnavailableError):
            await anext(events.__aiter__())
        script.endless = True
        async with client.adapters.watch() as events:
            assert (await anext(events.__aiter__())).adapter.pinned
    assert seen == ["sql@3", "sql@2"]
    assert script.ended.wait(5)


def test_the_command_prints_a_line_for_each_event(
    target: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("QUICKCHANGE_SERVER", target)
    assert main(["adapters", "watch"]) == 1
    said = capsys.readouterr()
    assert said.out == "sql@3 ready disk pinned :prod team=data\nsql@2 deleted\n"
    assert said.err == "error: the server is draining\n"
    main(["adapters", "watch", "--initial", "--json"])
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [event["deleted"] for event in events] == [False, False, False, False, True]
    assert events[3]["adapter"]["labels"] == {"team": "data"}


def test_an_interrupt_ends_the_command(target: str, script: Script) -> None:
    script.endless = True
    command = [sys.executable, "-m", "quickchange", "adapters", "watch", "--server", target]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("sql@3")
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 130


def test_collecting(client: Client, script: Script) -> None:
    collection = client.adapters.collect_garbage(keep_versions=2, min_age_s=1.5, dry_run=True)
    (gone,) = collection.versions
    assert (gone.reference, gone.digest, gone.freed_bytes, collection.freed_bytes) == (
        "sql@1",
        DIGEST,
        2048,
        3072,
    )
    (damaged,) = collection.quarantined
    assert (damaged.place[:12], damaged.digest, damaged.reason) == ("quarantine/0", DIGEST, "bit rot")
    assert damaged.freed_bytes == 1024
    request = script.requests[0]
    assert (request.keep_versions, request.min_age.ToTimedelta().total_seconds(), request.dry_run) == (
        2,
        1.5,
        True,
    )
    client.adapters.collect_garbage()
    assert not script.requests[1].HasField("keep_versions")
    assert not script.requests[1].HasField("min_age")
    for bad in ({"keep_versions": -1}, {"min_age_s": 1e300}):
        with pytest.raises(InvalidArgumentError):
            client.adapters.collect_garbage(**bad)  # type: ignore[arg-type]  # one argument or the other


async def test_collecting_with_asyncio(target: str) -> None:
    async with AsyncClient(target) as client:
        assert (await client.adapters.collect_garbage(dry_run=True)).freed_bytes == 3072


def test_the_command_tells_what_goes_and_why(
    target: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], script: Script
) -> None:
    monkeypatch.setenv("QUICKCHANGE_SERVER", target)
    assert main(["adapters", "gc", "--keep", "3", "--min-age", "60", "--dry-run"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "ADAPTER  FREES    WHY",
        "sql@1    2.0 KiB  2 newer ones are READY",
        f"quarantine/{'0' * 64}.1: bit rot",
        "1 version would be deleted, 3.0 KiB would be freed",
    ]
    assert (script.requests[0].keep_versions, script.requests[0].min_age.seconds) == (3, 60)
    assert main(["adapters", "gc", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["versions"][0]["version"] == 1
