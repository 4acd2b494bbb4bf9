"""What uploads are held to: rates, waits, quotas, the disk. Each refusal says which, and serving goes on."""

import contextlib
import os
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from quickchange import Client, NotFoundError, ResourceExhaustedError
from quickchange.errors import from_rpc
from quickchange.v1 import adapters_pb2, adapters_pb2_grpc
from tests.adapters.builders import make_adapter, tiny_model
from tests.e2e.conftest import SMALL
from tests.e2e.process import ServerProcess, eventually, running
from tests.e2e.uploading import chunk, contents, cut, messages_of, refused, shelf

DISK_BYTES = 12 << 20
STRICT = SMALL | {
    "grpc.upload_min_bytes_per_s": 1000,
    "grpc.upload_resume_ttl_s": 1,
    "store.max_versions_per_name": 2,
    "store.max_bytes_per_name": 150_000,
    "store.max_bytes": 250_000,
}


@pytest.fixture(scope="module")
def strict(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with running(ServerProcess(base, tmp_path_factory.mktemp("strict"), STRICT)) as process:
        yield process


@pytest.fixture
def strict_client(strict: ServerProcess) -> Iterator[Client]:
    with strict.client() as client:
        yield client
        for name in {adapter.name for adapter in client.adapters.list()}:
            client.adapters.delete(name, all_versions=True)
        eventually(lambda: not list((strict.store / "blobs/sha256").iterdir()))


@pytest.fixture
def strict_stub(strict: ServerProcess) -> Iterator[Any]:
    with grpc.insecure_channel(strict.grpc) as channel:
        yield adapters_pb2_grpc.AdapterServiceStub(channel)


def sized(folder: Path, *ranks: int) -> Iterator[Path]:
    """Adapters for the tests' base, of some 8 KB for every unit of rank."""
    model = tiny_model(folder / "model")
    for rank in ranks:
        yield make_adapter(model, folder / f"{rank}", r=rank, seed=rank, target_modules="all-linear")


def quota_of(error: pytest.ExceptionInfo[ResourceExhaustedError]) -> str:
    """What a QuotaFailure names."""
    cause = error.value.__cause__
    status = rpc_status.from_call(cause)  # type: ignore[arg-type]  # an RpcError of a stub is a call
    quota = error_details_pb2.QuotaFailure()
    assert any(detail.Unpack(quota) for detail in status.details)
    return str(quota.violations[0].subject)


def test_what_is_kept_of_a_broken_upload_goes_after_its_time(
    strict: ServerProcess, strict_stub: Any, adapters: Mapping[str, Path]
) -> None:
    before = contents(strict.store)
    cut(strict_stub, strict, messages_of(adapters["b"], "gone", upload_id="gone"), 4)
    eventually(lambda: not shelf(strict, "gone").exists())
    eventually(lambda: contents(strict.store) == before)
    with pytest.raises(grpc.RpcError) as caught:
        strict_stub.QueryUpload(adapters_pb2.QueryUploadRequest(upload_id="gone"))
    assert from_rpc(caught.value).code == "NOT_FOUND"


def test_a_stalled_upload_can_go_on_for_a_while(
    strict: ServerProcess, strict_stub: Any, adapters: Mapping[str, Path]
) -> None:
    over = threading.Event()
    messages = messages_of(adapters["b"], "stalled", upload_id="stalled")

    def stalling() -> Iterator[Any]:
        yield from messages[:5]
        over.wait(30)

    with pytest.raises(grpc.RpcError) as caught:
        strict_stub.UploadAdapter(stalling(), timeout=30)
    over.set()
    assert from_rpc(caught.value).reason == "UPLOAD_STALLED"
    query = adapters_pb2.QueryUploadRequest(upload_id="stalled")
    assert sum(strict_stub.QueryUpload(query).committed_offsets) > 0
    eventually(lambda: not shelf(strict, "stalled").exists())


def test_a_trickle_is_no_upload(strict_stub: Any, adapters: Mapping[str, Path]) -> None:
    """Never late by itself, and still ended."""
    messages = messages_of(adapters["b"], "slow")
    body = messages[1].chunk.data

    def dripping() -> Iterator[Any]:
        yield messages[0]
        for index in range(len(body)):
            time.sleep(0.05)
            yield chunk(0, index, body[index : index + 1])

    with pytest.raises(grpc.RpcError) as caught:
        strict_stub.UploadAdapter(dripping(), timeout=30)
    error = from_rpc(caught.value)
    assert (error.code, error.reason) == ("DEADLINE_EXCEEDED", "UPLOAD_STALLED")
    assert "bytes per second" in error.message


def test_versions_and_bytes_have_their_quotas(
    strict: ServerProcess, strict_client: Client, tmp_path: Path
) -> None:
    push = strict_client.adapters.push
    two, three, four, ten, eleven, twelve = sized(tmp_path, 2, 3, 4, 10, 11, 12)
    push(two, "sql")
    push(three, "sql")
    refused_push(strict_client, four, "sql", "VERSIONS_QUOTA", "sql has 2 versions, and a name may have 2")
    assert not push(three, "sql").created  # the same again adds nothing
    push(ten, "large")
    refused_push(strict_client, eleven, "large", "NAME_QUOTA", "a name may have 150000")
    push(eleven, "other")
    refused_push(strict_client, twelve, "third", "STORE_QUOTA", "may have 250000")
    assert push(two, "shared").created  # its bytes are there already
    for reference in ("sql@1", "other@1"):
        strict_client.adapters.delete(reference)
    eventually(lambda: strict.scrape()["quickchange_store_bytes"] < 200_000)
    assert push(four, "sql").created


def refused_push(client: Client, folder: Path, name: str, quota: str, words: str) -> None:
    with pytest.raises(ResourceExhaustedError, match=words) as caught:
        client.adapters.push(folder, name)
    assert (caught.value.reason, quota_of(caught)) == (quota, quota)
    assert caught.value.retry_after_s is None  # waiting does not help


def test_the_limits_are_told(strict_client: Client) -> None:
    limits = strict_client.server_info().limits.uploads
    assert (limits.max_chunk_bytes, limits.max_concurrent) == (1 << 20, 2)
    assert (limits.idle_timeout_s, limits.resume_ttl_s, limits.min_bytes_per_s) == (2.0, 1.0, 1000)
    assert (limits.max_store_bytes, limits.max_bytes_per_name) == (250_000, 150_000)
    assert limits.max_versions_per_name == 2


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a disk of its own cannot be mounted here")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_full_disk_ends_uploads_and_nothing_else(
    small_disk: Path, base: Path, adapters: Mapping[str, Path]
) -> None:
    settings = SMALL | {"store.reserve_bytes": "1MiB"}
    with running(ServerProcess(base, small_disk / "store", settings)) as server, server.client() as client:
        client.adapters.push(adapters["a"], "there")
        before = contents(server.store)
        with grpc.insecure_channel(server.grpc) as channel:
            stub = adapters_pb2_grpc.AdapterServiceStub(channel)
            with filled(small_disk, keep_bytes=4 << 20):
                messages = messages_of(adapters["b"], "large", upload_id="large")
                messages[0].header.files[1].size_bytes = 4 << 20
                error = refused(stub, messages)  # before a byte of it came
                assert (error.code, error.reason) == ("RESOURCE_EXHAUSTED", "DISK_RESERVE")
            for keep_bytes in (512 << 10, 0):
                messages = messages_of(adapters["b"], "late", upload_id="late")
                error = full_amid(stub, server, messages, keep_bytes)
                assert (error.code, error.reason) == ("RESOURCE_EXHAUSTED", "DISK_RESERVE")
                assert client.generate("x", adapter="there", max_new_tokens=2).text is not None
        eventually(lambda: contents(server.store) == before)
        assert client.adapters.push(adapters["b"], "there").adapter.version == 2


def test_a_disk_without_a_reserve_may_be_full_to_the_last_byte(
    small_disk: Path, base: Path, adapters: Mapping[str, Path]
) -> None:
    settings = SMALL | {"store.reserve_bytes": 0}
    with running(ServerProcess(base, small_disk / "store", settings)) as server, server.client() as client:
        before = contents(server.store)
        with grpc.insecure_channel(server.grpc) as channel:
            stub = adapters_pb2_grpc.AdapterServiceStub(channel)
            for upload_id in ("", "full"):
                error = full_amid(stub, server, messages_of(adapters["b"], "full", upload_id=upload_id), 0)
                assert (error.code, error.reason) == ("RESOURCE_EXHAUSTED", "NO_CAPACITY")
        eventually(lambda: contents(server.store) == before)
        with pytest.raises(NotFoundError):
            client.adapters.get("full")
        assert client.adapters.push(adapters["b"], "full").created


def full_amid(stub: Any, server: ServerProcess, messages: list[Any], keep_bytes: int) -> Any:
    """The error of an upload in whose middle somebody fills the disk."""
    with contextlib.ExitStack() as stack:

        def sending() -> Iterator[Any]:
            yield from messages[:4]
            eventually(
                lambda: (
                    list(server.store.glob("uploads/*/files/*")) + list(server.store.glob("staging/*/*/*"))
                )
            )
            stack.enter_context(filled(server.store.parent, keep_bytes))
            yield from messages[4:]

        return refused(stub, sending())  # type: ignore[arg-type]  # any iterable will do


@contextlib.contextmanager
def filled(disk: Path, keep_bytes: int) -> Iterator[None]:
    """The disk has no more than so many bytes left."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file:
        status = os.statvfs(disk)
        with contextlib.suppress(OSError):
            left = status.f_bavail * status.f_frsize - keep_bytes
            while left > 0:
                left -= file.write(bytes(min(left, 1 << 16)))
    yield
    filler.unlink()
