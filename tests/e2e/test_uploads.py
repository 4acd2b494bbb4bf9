"""Uploading: what is right becomes an adapter, what is not leaves no trace."""

import json
import shutil
import struct
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch

from quickchange import (
    AdapterState,
    AlreadyExistsError,
    Client,
    DataLossError,
    DeadlineExceededError,
    FailedPreconditionError,
    InvalidArgumentError,
    OutOfRangeError,
    QuickchangeError,
    ResourceExhaustedError,
)
from quickchange.errors import from_rpc
from quickchange.v1 import adapters_pb2_grpc
from tests.e2e.process import ServerProcess, eventually
from tests.e2e.spoiling import with_config, with_tensors
from tests.e2e.uploading import FILES, chunk, contents, messages_of, refused, staged, stalled


@pytest.fixture
def stub(server: ServerProcess) -> Iterator[adapters_pb2_grpc.AdapterServiceStub]:
    with grpc.insecure_channel(server.grpc) as channel:
        yield adapters_pb2_grpc.AdapterServiceStub(channel)


@pytest.fixture
def copy(adapters: Mapping[str, Path], tmp_path: Path) -> Path:
    """A folder with adapter a, to be spoilt."""
    return Path(shutil.copytree(adapters["a"], tmp_path / "copy"))


@pytest.fixture
def unchanged(server: ServerProcess, pushed: Mapping[str, str]) -> Iterator[None]:
    """The catalogue and every file of the store are the same afterwards, and the server still answers."""
    with server.client() as client:
        before = [a.etag for a in client.adapters.list()], contents(server.store)
        yield
        eventually(lambda: contents(server.store) == before[1])
        assert [a.etag for a in client.adapters.list()] == before[0]
        assert client.generate("x", adapter="a", max_new_tokens=1).adapter.digest == pushed["a"]


def test_a_pushed_adapter_is_there_with_its_facts(
    client: Client, pushed: Mapping[str, str], server: ServerProcess
) -> None:
    adapter = client.adapters.get("a@1")
    assert (adapter.name, adapter.digest, adapter.state) == ("a", pushed["a"], AdapterState.READY)
    assert (adapter.rank, adapter.method) == (4, "lora")
    assert set(adapter.target_modules) == {"q_proj", "v_proj", "down_proj"}
    assert adapter.base_fingerprint == client.server_info().base_fingerprint
    assert adapter.create_time is not None
    assert time.time() - adapter.create_time.timestamp() < 3600
    assert client.adapters.get("c").method == "rslora"


def test_the_report_says_what_was_matched(client: Client, copy: Path) -> None:
    result = client.adapters.push(copy, "report", labels={"team": "x"}, description="an adapter")
    assert result.created
    assert len(result.report.matched_modules) == 2 * 3
    assert (result.report.rank, result.report.dtype) == (4, "F32")
    assert result.report.delta_norm > 0
    assert (dict(result.adapter.labels), result.adapter.description) == ({"team": "x"}, "an adapter")
    assert client.adapters.delete("report@1") == 1


def test_the_same_content_twice_is_one_version(client: Client, adapters: Mapping[str, Path]) -> None:
    first = client.adapters.push(adapters["b"], "twice")
    second = client.adapters.push(adapters["b"], "twice")
    assert (first.created, second.created) == (True, False)
    assert first.adapter.version == second.adapter.version == 1
    other = client.adapters.push(adapters["a"], "twice")
    assert (other.created, other.adapter.version) == (True, 2)
    client.adapters.delete("twice", all_versions=True)


def test_a_fixed_version_with_other_content_is_refused(client: Client, adapters: Mapping[str, Path]) -> None:
    client.adapters.push(adapters["a"], "fixed", version=7)
    assert not client.adapters.push(adapters["a"], "fixed", version=7).created
    with pytest.raises(AlreadyExistsError) as caught:
        client.adapters.push(adapters["b"], "fixed", version=7)
    assert caught.value.reason == "ADAPTER_EXISTS"
    client.adapters.delete("fixed", all_versions=True)


def test_two_uploads_of_one_name_at_once_are_two_versions(
    client: Client, adapters: Mapping[str, Path]
) -> None:
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda name: client.adapters.push(adapters[name], "race"), "ab"))
    assert {result.adapter.version for result in results} == {1, 2}
    for result in results:
        stored = client.adapters.get(f"race@{result.adapter.version}")
        assert stored.digest == result.adapter.digest
    client.adapters.delete("race", all_versions=True)


@pytest.mark.usefixtures("unchanged")
def test_validate_only_publishes_nothing(client: Client, copy: Path) -> None:
    result = client.adapters.push(copy, "dry", validate_only=True)
    assert not result.created
    assert (result.adapter.version, result.adapter.rank) == (0, 4)
    assert result.adapter.digest == client.adapters.get("a").digest


# What is wrong with the adapter itself


def spoil_shape(tensors: dict[str, torch.Tensor]) -> None:
    name = sorted(tensors)[0]
    tensors[name] = torch.zeros(tensors[name].shape[0], tensors[name].shape[1] + 1)


def add_unknown(tensors: dict[str, torch.Tensor]) -> None:
    tensors["base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight"] = torch.ones(4, 64)


def add_nan(tensors: dict[str, torch.Tensor]) -> None:
    tensors[sorted(tensors)[0]][0, 0] = float("nan")


def drop_one(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[sorted(tensors)[0]]


def zero_all(tensors: dict[str, torch.Tensor]) -> None:
    for tensor in tensors.values():
        tensor.zero_()


def pickled(folder: Path) -> None:
    torch.save({"x": torch.ones(2)}, folder / "adapter_model.safetensors")


def wrong_base(folder: Path) -> None:
    manifest = {"format": 1, "base_fingerprint": "sha256:" + "0" * 64}
    (folder / "quickchange.json").write_text(json.dumps(manifest))


def huge_header(folder: Path) -> None:
    (folder / "adapter_model.safetensors").write_bytes(struct.pack("<Q", 1 << 60) + b"{}")


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize(
    ("spoil", "error", "words"),
    [
        (wrong_base, FailedPreconditionError, "sha256:0000"),
        (pickled, InvalidArgumentError, ""),
        (huge_header, InvalidArgumentError, ""),
        (lambda f: with_tensors(f, spoil_shape), InvalidArgumentError, "lora_A"),
        (lambda f: with_tensors(f, add_unknown), InvalidArgumentError, "layers.9"),
        (lambda f: with_tensors(f, add_nan), InvalidArgumentError, "lora_A"),
        (lambda f: with_tensors(f, drop_one), InvalidArgumentError, "lora_"),
        (lambda f: with_tensors(f, zero_all), InvalidArgumentError, ""),
        (lambda f: with_config(f, init_lora_weights="olora"), QuickchangeError, "olora"),
        (lambda f: with_config(f, use_dora=True), FailedPreconditionError, "dora"),
        (lambda f: with_config(f, r=5), InvalidArgumentError, ""),
        (lambda f: with_config(f, no_such_field=1), QuickchangeError, "no_such_field"),
        (lambda f: (f / "adapter_config.json").write_text("[" * 100_000), InvalidArgumentError, ""),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_bad_adapter_is_refused(
    client: Client, copy: Path, spoil: Callable[[Path], None], error: type[QuickchangeError], words: str
) -> None:
    spoil(copy)
    with pytest.raises(error) as caught:
        client.adapters.push(copy, "bad")
    assert caught.value.code in ("INVALID_ARGUMENT", "FAILED_PRECONDITION")
    assert words in caught.value.message
    assert "Traceback" not in caught.value.message
    assert "/" not in caught.value.message  # no path of the server


# What is wrong with the upload


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize(
    "name", ["../evil", "/etc", "a/b", "", "x\0y", "ｎame", "-", "a" * 200, "a@1", "a:b"]
)
def test_a_bad_name_is_refused(stub: Any, adapters: Mapping[str, Path], name: str) -> None:
    error = refused(stub, messages_of(adapters["a"], name))
    assert error.code == "INVALID_ARGUMENT"


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize("file", ["../adapter_config.json", "adapter_model.bin", "a.py", ""])
def test_a_bad_file_name_is_refused(stub: Any, adapters: Mapping[str, Path], file: str) -> None:
    messages = messages_of(adapters["a"], "bad")
    messages[0].header.files[0].name = file
    error = refused(stub, messages)
    assert [violation.field for violation in error.field_violations] == ["header.files[0].name"]


@pytest.mark.usefixtures("unchanged")
def test_a_missing_file_is_refused(stub: Any, adapters: Mapping[str, Path]) -> None:
    messages = messages_of(adapters["a"], "bad")
    del messages[0].header.files[1]
    error = refused(stub, messages)
    assert [violation.field for violation in error.field_violations] == ["header.files"]


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize(
    "which", ["offset", "repeated", "crc", "sha", "short", "long", "no header", "two headers"]
)
def test_a_bad_stream_is_refused(stub: Any, adapters: Mapping[str, Path], which: str) -> None:
    messages = messages_of(adapters["a"], "bad")
    expected: type[QuickchangeError] = InvalidArgumentError
    match which:
        case "offset":
            messages[3].chunk.write_offset += 1
            expected = OutOfRangeError
        case "repeated":
            messages.insert(3, messages[3])
            expected = OutOfRangeError
        case "crc":
            messages[3].chunk.crc32c ^= 1
            expected = DataLossError
        case "sha":
            data = bytearray(messages[-1].chunk.data)
            data[0] ^= 1
            messages[-1] = chunk(messages[-1].chunk.file_index, messages[-1].chunk.write_offset, bytes(data))
            expected = DataLossError
        case "short":
            del messages[-1]
        case "long":
            messages.append(chunk(1, messages[0].header.files[1].size_bytes, b"x"))
        case "no header":
            del messages[0]
        case "two headers":
            messages.insert(1, messages[0])
    error = refused(stub, messages)
    assert isinstance(error, expected), error


@pytest.mark.usefixtures("unchanged")
def test_an_upload_over_the_limit_is_refused(stub: Any, adapters: Mapping[str, Path]) -> None:
    messages = messages_of(adapters["a"], "bad")
    messages[0].header.files[1].size_bytes = 1 << 40
    error = refused(stub, messages)
    assert (error.code, error.reason) == ("RESOURCE_EXHAUSTED", "UPLOAD_TOO_LARGE")


@pytest.mark.usefixtures("unchanged")
def test_a_stalled_upload_times_out(stub: Any, adapters: Mapping[str, Path], server: ServerProcess) -> None:
    over: list[bool] = []
    call = stub.UploadAdapter.future(
        stalled(messages_of(adapters["a"], "slow"), lambda: bool(over)), timeout=30
    )
    eventually(lambda: staged(server))
    with pytest.raises(grpc.RpcError) as caught:
        call.result()
    over.append(True)
    error = from_rpc(caught.value)
    assert isinstance(error, DeadlineExceededError)
    assert error.reason == "UPLOAD_STALLED"


@pytest.mark.usefixtures("unchanged")
def test_a_cancelled_upload_leaves_nothing(
    stub: Any, adapters: Mapping[str, Path], server: ServerProcess
) -> None:
    over: list[bool] = []
    call = stub.UploadAdapter.future(stalled(messages_of(adapters["a"], "gone"), lambda: bool(over)))
    eventually(lambda: staged(server))
    call.cancel()
    over.append(True)
    eventually(lambda: not staged(server))


@pytest.mark.usefixtures("unchanged")
def test_uploads_beyond_the_limit_are_told_to_come_back(
    stub: Any, adapters: Mapping[str, Path], server: ServerProcess
) -> None:
    over: list[bool] = []
    messages = messages_of(adapters["a"], "many")
    calls = [stub.UploadAdapter.future(stalled(messages, lambda: bool(over))) for _ in range(2)]
    eventually(lambda: len(staged(server)) == 2)
    error = refused(stub, messages)
    for call in calls:
        call.cancel()
    over.append(True)
    assert isinstance(error, ResourceExhaustedError)
    assert error.reason == "TOO_MANY_UPLOADS"
    assert error.retry_after_s is not None


def test_uploads_are_counted(server: ServerProcess, client: Client, copy: Path) -> None:
    before = server.scrape()
    client.adapters.push(copy, "counted")
    size = sum((copy / file).stat().st_size for file in FILES)
    with_tensors(copy, add_nan)
    size += sum((copy / file).stat().st_size for file in FILES)
    with pytest.raises(InvalidArgumentError) as caught:
        client.adapters.push(copy, "counted")
    after = server.scrape()
    client.adapters.delete("counted", all_versions=True)
    reason = caught.value.reason
    for name, growth in {
        'adapter_uploads_total{result="created"}': 1,
        f'adapter_uploads_total{{result="{reason}"}}': 1,
        f'adapter_validation_failures_total{{reason="{reason}"}}': 1,
        "adapter_upload_bytes_total": size,
    }.items():
        assert after[f"quickchange_{name}"] - before.get(f"quickchange_{name}", 0.0) == growth, name
