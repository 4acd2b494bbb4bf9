"""Transfers that break and go on: cut sockets, dead connections, killed servers and clients; their memory."""

import hashlib
import itertools
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest

from quickchange import AsyncClient, Client, NotFoundError, UnavailableError
from quickchange.adapter_client import AdapterClient
from quickchange.calls import Calls
from quickchange.cli import main
from quickchange.commands.output import size
from quickchange.connection import Endpoint
from quickchange.partial import partial_of
from quickchange.upload import UploadPlan
from quickchange.v1 import adapters_pb2, adapters_pb2_grpc
from tests.e2e.process import ServerProcess, environment, eventually, killed_after, running
from tests.e2e.proxy import cutting
from tests.e2e.wide import build_wide_model, write_wide_adapter

MIB = 1 << 20
CUTS = 20
VALIDATION_KIB = (
    256 * 1024
)  # the pair of one module, some 40 MiB here, blocks of it, chunks, and what malloc keeps
RECEIVED = "quickchange_adapter_upload_bytes_total"
SETTINGS = {
    "engine.max_running_requests": 2,
    "engine.kv_bytes": "16MiB",
    "engine.max_adapter_rank": 4096,
    "engine.adapter_device_bytes": "64MiB",
    "grpc.upload_idle_timeout_s": 600,
}


@pytest.fixture(scope="module")
def wide_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wide_model(tmp_path_factory.mktemp("wide"))


@pytest.fixture(scope="module")
def wide_adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_wide_adapter(tmp_path_factory.mktemp("adapters") / "wide", 40 * MIB)


@pytest.fixture(scope="module")
def wide_server(wide_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with running(ServerProcess(wide_base, tmp_path_factory.mktemp("store"), SETTINGS)) as process:
        yield process


def connect(address: str) -> Client:
    return Client(address, timeout_s=300, retry_window_s=30)


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def assert_stored(server: ServerProcess, adapter: Any, folder: Path) -> None:
    """The store has the very files that the uploader has."""
    blob = server.store / "blobs/sha256" / adapter.digest.removeprefix("sha256:")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert sha256_of(blob / file) == sha256_of(folder / file)


def check_memory_and_cuts(server: ServerProcess, folder: Path, seed: int) -> None:
    """Cut at a random byte twenty times it ends identical, and the server holds next to nothing of it."""
    size_bytes = UploadPlan.of(folder).size_bytes
    chance = random.Random(seed)
    budgets = [chance.randrange(1, size_bytes // CUTS) for _ in range(CUTS)]
    memory_kib = [server.memory_kib]
    received_before = server.scrape().get(RECEIVED, 0.0)

    def watch(sent_bytes: int, total_bytes: int) -> None:
        memory_kib.append(server.memory_kib)

    with cutting(server.grpc, budgets) as proxy, connect(proxy.address) as client:
        result = client.adapters.push(folder, "cut", progress=watch)
    assert proxy.cuts == CUTS
    assert result.created
    assert_stored(server, result.adapter, folder)
    assert max(memory_kib) - memory_kib[0] < 32 * 1024
    received_bytes = server.scrape()[RECEIVED] - received_before
    assert size_bytes <= received_bytes <= size_bytes + CUTS * MIB, "of each cut a chunk at most comes twice"
    with connect(server.grpc) as client:
        assert not client.adapters.push(folder, "cut").created  # straight: the same content
        assert client.adapters.delete("cut", all_versions=True) == 1


def test_an_upload_cut_twenty_times_ends_identical_in_constant_memory(
    wide_server: ServerProcess, wide_adapter: Path
) -> None:
    check_memory_and_cuts(wide_server, wide_adapter, seed=6)


@pytest.mark.slow
def test_300_mb_cut_twenty_times_end_identical_in_constant_memory(
    wide_server: ServerProcess, tmp_path: Path
) -> None:
    check_memory_and_cuts(wide_server, write_wide_adapter(tmp_path / "big", 300 * 10**6), seed=300)


@pytest.mark.slow
def test_300_mb_are_validated_in_constant_memory(wide_server: ServerProcess, tmp_path: Path) -> None:
    """The peak over upload, checks and publishing. Rank 3854 is where products by rank would be the most."""
    folder = write_wide_adapter(tmp_path / "big", 300 * 10**6, seed=301)
    wide_server.forget_peak_memory()
    before_kib = wide_server.memory_kib
    with connect(wide_server.grpc) as client:
        client.adapters.push(folder, "validated")
        peak_kib = wide_server.peak_memory_kib
        client.adapters.delete("validated", all_versions=True)
    assert peak_kib - before_kib < VALIDATION_KIB


def test_a_connection_that_only_its_client_knows_to_be_dead_costs_nothing(
    wide_server: ServerProcess, wide_adapter: Path
) -> None:
    """The server would wait for the old stream for ten minutes; the newer one takes over."""
    before = wide_server.scrape()
    with cutting(wide_server.grpc, [5 * MIB], server_notices=False) as proxy:
        with connect(proxy.address) as client:
            result = client.adapters.push(wide_adapter, "half-dead")
        assert proxy.cuts == 1
        assert_stored(wide_server, result.adapter, wide_adapter)
    after = wide_server.scrape()
    superseded = 'quickchange_adapter_uploads_total{result="UPLOAD_SUPERSEDED"}'
    assert after[superseded] - before.get(superseded, 0.0) == 1
    assert after[RECEIVED] - before[RECEIVED] >= UploadPlan.of(wide_adapter).size_bytes
    with connect(wide_server.grpc) as client:
        client.adapters.delete("half-dead", all_versions=True)


@pytest.mark.slow  # waits for pings
def test_a_peer_that_vanishes_without_a_word_is_noticed(
    wide_server: ServerProcess, wide_adapter: Path
) -> None:
    """Long before the call's time-out: whoever does not answer a ping is gone. The pings come sooner here,
    but not so soon that a server which others keep busy would be taken for one that is gone."""
    options = {"server_notices": False, "client_notices": False}
    with cutting(wide_server.grpc, [5 * MIB], **options) as proxy, connect(proxy.address) as client:
        endpoint = Endpoint.resolve(proxy.address, None, None, timeout_s=240, retry_window_s=200)
        calls = Calls(replace(endpoint, keepalive_s=2, pong_s=3))
        try:
            result = AdapterClient(calls).push(wide_adapter, "vanished")
        finally:
            calls.close()
        assert proxy.cuts == 1
        assert_stored(wide_server, result.adapter, wide_adapter)
        client.adapters.delete("vanished", all_versions=True)


def test_the_default_is_what_is_promised() -> None:
    endpoint = Endpoint.resolve("x:1", None, None, timeout_s=None, retry_window_s=1)
    assert endpoint.keepalive_s + endpoint.pong_s == 40


async def test_the_asyncio_client_goes_on_too(wide_server: ServerProcess, wide_adapter: Path) -> None:
    with cutting(wide_server.grpc, [3 * MIB, 9 * MIB]) as proxy:
        async with AsyncClient(proxy.address, timeout_s=300, retry_window_s=30) as client:
            result = await client.adapters.push(wide_adapter, "async")
            await client.adapters.delete(result.adapter.reference)
    assert proxy.cuts == 2


def assert_pulled(folder: Path, original: Path) -> None:
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert sha256_of(folder / file) == sha256_of(original / file)


def test_a_download_cut_ten_times_ends_identical(
    wide_server: ServerProcess, wide_adapter: Path, tmp_path: Path
) -> None:
    """Of each cut what is on its way is lost, no more: after ten of them nothing has come twice."""
    chance = random.Random(10)
    budgets = [chance.randrange(MIB, 4 * MIB) for _ in range(10)]
    with connect(wide_server.grpc) as client:
        client.adapters.push(wide_adapter, "far")
    received: list[int] = []
    with (
        cutting(wide_server.grpc, budgets, of_answers=True) as proxy,
        connect(proxy.address) as client,
    ):
        result = client.adapters.pull("far", tmp_path / "far", progress=lambda now, _: received.append(now))
        assert proxy.cuts == 10
        assert_pulled(result.directory, wide_adapter)
        client.adapters.delete("far")
    assert received == sorted(received)
    assert [path.name for path in tmp_path.iterdir()] == ["far"]


async def test_the_asyncio_client_s_download_goes_on_too(
    wide_server: ServerProcess, wide_adapter: Path, tmp_path: Path
) -> None:
    with connect(wide_server.grpc) as direct:
        direct.adapters.push(wide_adapter, "far-async")
    with cutting(wide_server.grpc, [3 * MIB], of_answers=True) as proxy:
        async with AsyncClient(proxy.address, timeout_s=300, retry_window_s=30) as client:
            result = await client.adapters.pull("far-async", tmp_path / "far")
            await client.adapters.delete("far-async")
    assert proxy.cuts == 1
    assert_pulled(result.directory, wide_adapter)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_download_whose_process_ends_goes_on_in_another(
    wide_server: ServerProcess,
    wide_adapter: Path,
    tmp_path: Path,
    number: signal.Signals,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The server is silent after 20 MiB, so that the process is surely amid its download when it is ended."""
    destination = tmp_path / "far"
    with connect(wide_server.grpc) as client:
        client.adapters.push(wide_adapter, "far")
    budget = {"of_answers": True, "server_notices": False, "client_notices": False}
    with cutting(wide_server.grpc, [20 * MIB], **budget) as proxy:
        process = subprocess.Popen(
            [sys.executable, "-m", "quickchange", *pull(proxy.address, destination)],
            stderr=subprocess.PIPE,
            text=True,
            env=environment({}),
        )
        with process, killed_after(process):
            eventually(lambda: proxy.cuts == 1 and arrived_bytes(destination) > 15 * MIB)
            process.send_signal(number)
            said = process.communicate(timeout=30)[1]
    assert not destination.exists()
    kept = arrived_bytes(destination)
    assert (f"what has arrived is in {partial_of(destination)}" in said) == (number == signal.SIGINT)
    assert main(pull(wide_server.grpc, destination)) == 0
    assert f"{size(kept)} of it from an earlier pull" in capsys.readouterr().out
    assert_pulled(destination, wide_adapter)
    assert [path.name for path in tmp_path.iterdir()] == ["far"]
    with connect(wide_server.grpc) as client:
        client.adapters.delete("far")


def pull(address: str, destination: Path) -> list[str]:
    return ["adapters", "pull", "far", str(destination), "--server", address]


def arrived_bytes(destination: Path) -> int:
    return sum(path.stat().st_size for path in partial_of(destination).glob("adapter_*"))


def test_a_download_of_what_was_deleted_meanwhile_fails_and_leaves_nothing(
    wide_server: ServerProcess, wide_adapter: Path, tmp_path: Path
) -> None:
    with connect(wide_server.grpc) as direct:
        direct.adapters.push(wide_adapter, "gone")

        def delete() -> None:
            direct.adapters.delete("gone")

        with (
            cutting(wide_server.grpc, [4 * MIB], of_answers=True, before_cut=delete) as proxy,
            connect(proxy.address) as client,
            pytest.raises(NotFoundError, match="no adapter 'gone'"),
        ):
            client.adapters.pull("gone", tmp_path / "gone")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("offsets", [[1], [10**12, 0], [0, 0, 0, 0]])
def test_impossible_offsets_are_refused(
    wide_server: ServerProcess, wide_adapter: Path, offsets: list[int]
) -> None:
    with connect(wide_server.grpc) as client:
        client.adapters.push(wide_adapter, "whole")
        with grpc.insecure_channel(wide_server.grpc) as channel:
            stub = adapters_pb2_grpc.AdapterServiceStub(channel)
            request = adapters_pb2.DownloadAdapterRequest(adapter="whole", committed_offsets=offsets)
            with pytest.raises(grpc.RpcError, match="committed_offsets") as caught:
                list(stub.DownloadAdapter(request))
        client.adapters.delete("whole")
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT


def test_the_client_names_the_id_of_what_it_could_not_end(
    wide_server: ServerProcess, wide_adapter: Path
) -> None:
    with (
        cutting(wide_server.grpc, itertools.chain([24 * MIB], itertools.repeat(1))) as proxy,
        Client(proxy.address, retry_window_s=0.5) as cut_off,
        pytest.raises(UnavailableError) as caught,
    ):
        cut_off.adapters.push(wide_adapter, "named")
    sent: list[int] = []
    with connect(wide_server.grpc) as client:
        client.adapters.push(
            wide_adapter,
            "named",
            upload_id=caught.value.upload_id,
            progress=lambda sent_bytes, total_bytes: sent.append(sent_bytes),
        )
        client.adapters.delete("named", all_versions=True)
    assert sent[0] >= MIB


def test_a_killed_server_has_what_it_said_it_has(wide_base: Path, wide_adapter: Path, tmp_path: Path) -> None:
    plan = UploadPlan.of(wide_adapter)
    header = plan.header("survivor", upload_id="survivor-1")
    store = tmp_path / "store"
    with running(ServerProcess(wide_base, store, SETTINGS)) as first:
        killed_at = kill_amid(first, list(plan.messages(header, (0, 0))), 36)
    with running(ServerProcess(wide_base, store, SETTINGS)) as second, connect(second.grpc) as client:
        assert list(client.adapters.list()) == []
        with grpc.insecure_channel(second.grpc) as channel:
            stub = adapters_pb2_grpc.AdapterServiceStub(channel)
            query = adapters_pb2.QueryUploadRequest(upload_id="survivor-1")
            committed = list(stub.QueryUpload(query).committed_offsets)
        assert 32 * MIB <= sum(committed) <= killed_at
        before = second.scrape().get("quickchange_adapter_upload_bytes_total", 0.0)
        result = client.adapters.push(wide_adapter, "survivor", upload_id="survivor-1")
        assert_stored(second, result.adapter, wide_adapter)
        received = second.scrape()["quickchange_adapter_upload_bytes_total"] - before
        assert received == plan.size_bytes - sum(committed)


def kill_amid(server: ServerProcess, messages: list[Any], count: int) -> int:
    """Kills a server once it took so many messages of an upload; their bytes together."""
    over = threading.Event()
    size_bytes = sum(len(message.chunk.data) for message in messages[:count])

    def some() -> Iterator[Any]:
        yield from messages[:count]
        over.wait(60)

    with grpc.insecure_channel(server.grpc) as channel:
        call = adapters_pb2_grpc.AdapterServiceStub(channel).UploadAdapter.future(some())
        eventually(lambda: written_bytes(server) == size_bytes)
        server.process.kill()
        server.wait()
        over.set()
        with pytest.raises(grpc.RpcError):
            call.result()
    return size_bytes


def written_bytes(server: ServerProcess) -> int:
    return sum(path.stat().st_size for path in server.store.glob("uploads/*/files/*"))
