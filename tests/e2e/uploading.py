"""Uploads message by message, and what a store holds. No test lives here."""

import hashlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import google_crc32c
import grpc
import pytest

from adapters.uploads import shelf_key
from quickchange import QuickchangeError
from quickchange.errors import from_rpc
from quickchange.v1 import adapters_pb2
from tests.e2e.process import ServerProcess, eventually

FILES = ("adapter_config.json", "adapter_model.safetensors")


def contents(store: Path) -> list[tuple[str, int]]:
    """Every file but those of the database, which may checkpoint at any time."""
    files = (path for path in store.rglob("*") if path.is_file() and ".sqlite" not in path.name)
    return sorted(
        (str(path.relative_to(store)), path.stat().st_size) for path in files if ".db" not in path.name
    )


def staged(server: ServerProcess) -> list[Path]:
    """Folders of uploads that are under way: each process has its own folder in staging."""
    return list((server.store / "staging").glob("*/*"))


def messages_of(folder: Path, name: str, **changes: Any) -> list[adapters_pb2.UploadAdapterRequest]:
    """A right upload in chunks of 4 KiB; `changes` go into the header."""
    bodies = [(folder / file).read_bytes() for file in FILES]
    files = [
        adapters_pb2.UploadFile(name=file, size_bytes=len(body), sha256=hashlib.sha256(body).hexdigest())
        for file, body in zip(FILES, bodies, strict=True)
    ]
    header = adapters_pb2.UploadHeader(**({"name": name, "files": files} | changes))
    messages = [adapters_pb2.UploadAdapterRequest(header=header)]
    for index, body in enumerate(bodies):
        messages += (chunk(index, at, body[at : at + 4096]) for at in range(0, len(body), 4096))
    return messages


def chunk(index: int, offset: int, data: bytes) -> adapters_pb2.UploadAdapterRequest:
    return adapters_pb2.UploadAdapterRequest(
        chunk=adapters_pb2.UploadChunk(
            file_index=index, write_offset=offset, data=data, crc32c=google_crc32c.value(data)
        )
    )


def refused(stub: Any, messages: list[adapters_pb2.UploadAdapterRequest]) -> QuickchangeError:
    with pytest.raises(grpc.RpcError) as caught:
        stub.UploadAdapter(iter(messages), timeout=30)
    return from_rpc(caught.value)


def stalled(messages: list[adapters_pb2.UploadAdapterRequest], go_on: Callable[[], bool]) -> Iterator[Any]:
    """Half an upload, and then nothing."""
    yield from messages[: len(messages) // 2]
    while not go_on():
        time.sleep(0.05)


def shelf(server: ServerProcess, upload_id: str) -> Path:
    """Where a server keeps an upload that broke."""
    return server.store / "uploads" / shelf_key(upload_id, "")


def cut(
    stub: Any, server: ServerProcess, messages: list[adapters_pb2.UploadAdapterRequest], count: int
) -> int:
    """Sends the header and so many chunks, then cancels the call; how many bytes the server got.

    It is the first stream of the upload that gets this far.
    """
    over = threading.Event()
    size_bytes = sum(len(message.chunk.data) for message in messages[: count + 1])
    files = shelf(server, messages[0].header.upload_id) / "files"

    def some() -> Iterator[Any]:
        yield from messages[: count + 1]
        over.wait(30)

    call = stub.UploadAdapter.future(some())
    eventually(lambda: files.exists() and sum(path.stat().st_size for path in files.iterdir()) == size_bytes)
    call.cancel()
    over.set()
    return size_bytes
