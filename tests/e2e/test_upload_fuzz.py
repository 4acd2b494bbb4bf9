"""Two hundred uploads that are wrong somewhere: server and store stay exactly as they were."""

import json
import random
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import grpc
import pytest

from quickchange import Client
from quickchange.v1 import adapters_pb2, adapters_pb2_grpc
from tests.e2e.process import ServerProcess, eventually
from tests.e2e.uploading import FILES, contents, messages_of

UPLOADS = 200
REFUSALS = {"INVALID_ARGUMENT", "FAILED_PRECONDITION", "OUT_OF_RANGE", "DATA_LOSS", "RESOURCE_EXHAUSTED"}
NAMES = [
    "",
    "..",
    "../x",
    "/abs",
    "a//b",
    "x\0",
    "ｆull",
    "A",
    "a" * 129,
    "a@1",
    "a:b",
    "sha256",
    "-",
    "é",
    "%2e",
]

Messages = list[adapters_pb2.UploadAdapterRequest]


@pytest.fixture
def stub(server: ServerProcess) -> Iterator[Any]:
    with grpc.insecure_channel(server.grpc) as channel:
        yield adapters_pb2_grpc.AdapterServiceStub(channel)


def bad_name(chance: random.Random, messages: Messages) -> None:
    messages[0].header.name = chance.choice(NAMES)


def bad_file_name(chance: random.Random, messages: Messages) -> None:
    messages[0].header.files[chance.randrange(2)].name = chance.choice(
        [*NAMES, "adapter_model.bin", FILES[0] + "\0"]
    )
    messages[0].header.files[0].sha256 = "0" * 64  # in case that name is right for this file


def bad_size(chance: random.Random, messages: Messages) -> None:
    file = messages[0].header.files[chance.randrange(2)]
    file.size_bytes = chance.choice([0, 1, file.size_bytes - 1, file.size_bytes + 1, 1 << 40, (1 << 64) - 1])


def bad_checksum(chance: random.Random, messages: Messages) -> None:
    messages[0].header.files[chance.randrange(2)].sha256 = chance.choice(["", "0" * 64, "F" * 64, "é" * 64])


def bad_header(chance: random.Random, messages: Messages) -> None:
    header = messages[0].header
    match chance.randrange(5):
        case 0:
            header.version = chance.choice([0, 2**31 + 1, 2**32 - 1])
        case 1:
            header.labels[chance.choice(["", "A", "x" * 64, "\n"])] = "x"
        case 2:
            header.description = chance.choice(["x" * 5000, "\x00", "\x1b[2J"])
        case 3:
            header.upload_id = chance.choice(["../x", "x" * 129, " ", "\0"])
        case _:
            del header.files[chance.randrange(2)]


def bad_offset(chance: random.Random, messages: Messages) -> None:
    some = messages[chance.randrange(2, len(messages))].chunk
    some.write_offset = chance.choice([some.write_offset + 1, 1 << 63, (1 << 64) - 1])


def bad_chunk(chance: random.Random, messages: Messages) -> None:
    some = messages[chance.randrange(1, len(messages))].chunk
    match chance.randrange(4):
        case 0:
            some.crc32c ^= 1 << chance.randrange(32)
        case 1:
            some.file_index = chance.choice([2, 2**32 - 1])
        case 2:
            some.data = b""
        case _:
            some.data = bytes((1 << 20) + 1)


def bad_order(chance: random.Random, messages: Messages) -> None:
    match chance.randrange(5):
        case 0:
            del messages[0]
        case 1:
            messages.insert(chance.randrange(1, len(messages)), messages[0])
        case 2:
            del messages[chance.randrange(2, len(messages))]
        case 3:
            messages.insert(2, adapters_pb2.UploadAdapterRequest())
        case _:
            messages.reverse()


def bad_json(chance: random.Random, folder: Path) -> None:
    path = folder / FILES[0]
    config = json.loads(path.read_text())
    text = path.read_text()
    path.write_bytes(
        chance.choice(
            [
                b"[" * 100_000,
                b'{"r":' * 50_000,
                text.encode()[: chance.randrange(1, len(text) - 2)],
                text.encode().replace(b'"r"', b'"\xff"', 1),
                json.dumps(config | {"r": chance.choice([0, -1, 1 << 70, 1e308, None, "4", [4]])}).encode(),
                json.dumps(config | {"lora_alpha": float("nan")}).encode(),
                json.dumps(config | {f"x{chance.random()}": 1}).encode(),
                json.dumps(config | {"target_modules": ["(" * 500 + "a+" * 100]}).encode(),
                b'{"r": 4, "r": 8}',
                b"\x80\x04cos\nsystem\n",
            ]
        )
    )


def bad_tensors(chance: random.Random, folder: Path) -> None:
    path = folder / FILES[1]
    raw = bytearray(path.read_bytes())
    match chance.randrange(6):
        case 0:
            raw[:8] = chance.choice([0, 1, len(raw), 1 << 40, (1 << 64) - 1]).to_bytes(8, "little")
        case 1:
            del raw[chance.randrange(len(raw) // 2) :]
        case 2:
            raw += chance.randbytes(chance.randrange(1, 100))
        case 3:
            at = raw.index(b'"F32"')
            raw[at : at + 5] = chance.choice([b'"F99"', b'"BOOL', b'"I64"', b'"\xff\xff\xff"'])
        case 4:
            at = raw.index(b"data_offsets") + 15
            raw[at : at + 1] = chance.choice([b"9", b"-", b"e", b"\0"])
        case _:
            raw = bytearray(chance.randbytes(chance.randrange(1, 5000)))
    path.write_bytes(raw)


IN_MESSAGES: list[Callable[[random.Random, Messages], None]] = [
    bad_name, bad_file_name, bad_size, bad_checksum, bad_header, bad_offset, bad_chunk, bad_order,
]  # fmt: skip
IN_FILES: list[Callable[[random.Random, Path], None]] = [bad_json, bad_tensors]


def fuzzed(chance: random.Random, folder: Path, original: Path, upload_id: str) -> Messages:
    """An upload with one thing wrong; headers are right about files that are not."""
    for file in FILES:
        (folder / file).write_bytes((original / file).read_bytes())
    spoil_files, spoil_messages = chance.choice(IN_FILES), chance.choice(IN_MESSAGES)
    if in_files := chance.random() < 0.5:
        spoil_files(chance, folder)
    messages = messages_of(folder, "fuzz", upload_id=upload_id)
    if not in_files:
        spoil_messages(chance, messages)
    return messages


def test_two_hundred_fuzzed_uploads_change_nothing(
    stub: Any,
    server: ServerProcess,
    client: Client,
    pushed: Mapping[str, str],
    adapters: Mapping[str, Path],
    tmp_path: Path,
) -> None:
    chance = random.Random(200)
    before = contents(server.store), [(a.reference, a.etag) for a in client.adapters.list()]
    memory_kib = [server.memory_kib]
    for number in range(UPLOADS):
        upload_id = f"fuzz-{number}" if number % 2 else ""
        messages = fuzzed(chance, tmp_path, adapters["a"], upload_id)
        with pytest.raises(grpc.RpcError) as caught:
            stub.UploadAdapter(iter(messages), timeout=30)
        assert caught.value.code().name in REFUSALS, (number, caught.value)
        assert str(server.store) not in caught.value.details()
        if upload_id:  # what broke on its way is kept for whoever knows the id
            cancel(stub, upload_id)
        memory_kib.append(server.memory_kib)
    eventually(lambda: contents(server.store) == before[0])
    assert [(a.reference, a.etag) for a in client.adapters.list()] == before[1]
    assert max(memory_kib) - memory_kib[0] < 64 * 1024
    assert server.process.poll() is None
    assert client.generate("x", adapter="a", max_new_tokens=1).adapter.digest == pushed["a"]


def cancel(stub: Any, upload_id: str) -> None:
    call = stub.CancelUpload.future(adapters_pb2.CancelUploadRequest(upload_id=upload_id))
    assert call.code() in (grpc.StatusCode.OK, grpc.StatusCode.NOT_FOUND)
