"""What an upload_id is good for, message by message: going on, asking, cancelling, repeating."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import grpc
import pytest

from quickchange import Client, NotFoundError, QuickchangeError
from quickchange.errors import from_rpc
from quickchange.v1 import adapters_pb2, adapters_pb2_grpc
from tests.e2e.process import ServerProcess, eventually
from tests.e2e.uploading import chunk, cut, messages_of, refused, shelf

Messages = list[adapters_pb2.UploadAdapterRequest]


@pytest.fixture
def stub(server: ServerProcess) -> Iterator[Any]:
    with grpc.insecure_channel(server.grpc) as channel:
        yield adapters_pb2_grpc.AdapterServiceStub(channel)


@pytest.fixture
def whole(adapters: Mapping[str, Path], client: Client) -> Iterator[Callable[..., Messages]]:
    """All messages of an upload of one name, which is free again afterwards."""

    def build(upload_id: str, **changes: Any) -> Messages:
        return messages_of(adapters["b"], "by-id", upload_id=upload_id, **changes)

    yield build
    if list(client.adapters.list(name="by-id")):
        client.adapters.delete("by-id", all_versions=True)


def offsets(stub: Any, upload_id: str) -> list[int]:
    return list(stub.QueryUpload(adapters_pb2.QueryUploadRequest(upload_id=upload_id)).committed_offsets)


def cancel(stub: Any, upload_id: str) -> None:
    stub.CancelUpload(adapters_pb2.CancelUploadRequest(upload_id=upload_id))


def failed(call: Any, *arguments: Any) -> QuickchangeError:
    with pytest.raises(grpc.RpcError) as caught:
        call(*arguments)
    return from_rpc(caught.value)


def rest_of(messages: Messages, committed: list[int]) -> Messages:
    """The header, and the chunks that begin at or after what the server has."""
    return [
        m for m in messages if m.HasField("header") or m.chunk.write_offset >= committed[m.chunk.file_index]
    ]


def test_an_upload_that_died_half_way_goes_on_and_shows_nothing_before_its_end(
    stub: Any, server: ServerProcess, client: Client, whole: Callable[..., Messages]
) -> None:
    messages = whole("half")
    received = cut(stub, server, messages, len(messages) // 2)
    eventually(lambda: sum(offsets(stub, "half")) == received)
    assert list(client.adapters.list(name="by-id")) == []
    assert failed(stub.GetAdapter, adapters_pb2.GetAdapterRequest(adapter="by-id")).code == "NOT_FOUND"
    rest = rest_of(messages, offsets(stub, "half"))
    assert len(rest) < len(messages)
    response = stub.UploadAdapter(iter(rest), timeout=30)
    assert response.created
    blob = server.store / "blobs/sha256" / response.adapter.digest.removeprefix("sha256:")
    assert (blob / "adapter_model.safetensors").stat().st_size == messages[0].header.files[1].size_bytes


def test_bytes_are_counted_when_they_come_and_streams_when_they_end(
    stub: Any, server: ServerProcess, whole: Callable[..., Messages]
) -> None:
    before = server.scrape()
    messages = whole("counted")
    cut(stub, server, messages, 3)
    eventually(lambda: sum(offsets(stub, "counted")))
    stub.UploadAdapter(iter(rest_of(messages, offsets(stub, "counted"))), timeout=30)
    stub.UploadAdapter(iter(messages[:1]), timeout=30)
    after = server.scrape()
    for name, growth in {
        'adapter_uploads_total{result="CANCELLED"}': 1,
        'adapter_uploads_total{result="created"}': 1,
        'adapter_uploads_total{result="repeated"}': 1,
        "adapter_upload_bytes_total": sum(file.size_bytes for file in messages[0].header.files),
    }.items():
        assert after[f"quickchange_{name}"] - before.get(f"quickchange_{name}", 0.0) == growth, name


@pytest.mark.parametrize("what", ["beyond", "before", "crc", "ended early"])
def test_what_goes_wrong_on_the_way_costs_only_itself(
    stub: Any, server: ServerProcess, whole: Callable[..., Messages], what: str
) -> None:
    messages = whole(f"wrong-{what}".replace(" ", "-"))
    upload_id = messages[0].header.upload_id
    cut(stub, server, messages, 4)
    eventually(lambda: sum(offsets(stub, upload_id)))
    committed = offsets(stub, upload_id)
    rest = rest_of(messages, committed)
    bad = adapters_pb2.UploadAdapterRequest()
    bad.CopyFrom(rest[1])
    match what:
        case "beyond":
            bad.chunk.write_offset += 1
            code = "OUT_OF_RANGE"
        case "before":
            bad.chunk.write_offset -= 1
            code = "OUT_OF_RANGE"
        case "crc":
            bad.chunk.crc32c ^= 1
            code = "DATA_LOSS"
        case _:
            bad = rest[1]
            code = "INVALID_ARGUMENT"
            committed = [committed[0], committed[1] + len(bad.chunk.data)]
    assert refused(stub, [rest[0], bad]).code == code
    assert offsets(stub, upload_id) == committed
    assert stub.UploadAdapter(iter(rest_of(messages, committed)), timeout=30).created


def test_bytes_that_are_not_what_was_announced_are_not_kept(
    stub: Any, server: ServerProcess, whole: Callable[..., Messages]
) -> None:
    messages = whole("rotten")
    last = messages[-1].chunk
    messages[-1] = chunk(last.file_index, last.write_offset, bytes(len(last.data)))
    error = refused(stub, messages)
    assert (error.code, error.reason) == ("DATA_LOSS", "CHECKSUM_MISMATCH")
    assert failed(offsets, stub, "rotten").reason == "UPLOAD_NOT_FOUND"
    assert not shelf(server, "rotten").exists()


def test_another_header_under_the_same_id_is_refused_and_harms_nothing(
    stub: Any, server: ServerProcess, whole: Callable[..., Messages]
) -> None:
    messages = whole("same")
    received = cut(stub, server, messages, 4)
    eventually(lambda: sum(offsets(stub, "same")) == received)
    error = refused(stub, whole("same", description="another", version=7)[:1])
    assert (error.code, error.reason) == ("FAILED_PRECONDITION", "UPLOAD_MISMATCH")
    assert "another description, version;" in error.message
    assert sum(offsets(stub, "same")) == received
    assert stub.UploadAdapter(iter(rest_of(messages, offsets(stub, "same"))), timeout=30).created


def test_a_file_may_be_started_again(
    stub: Any, server: ServerProcess, whole: Callable[..., Messages]
) -> None:
    """As clients do that know an upload_id but no QueryUpload."""
    messages = whole("again")
    cut(stub, server, messages, 6)
    assert stub.UploadAdapter(iter(messages), timeout=30).created


def test_a_lost_answer_is_given_again(
    stub: Any, client: Client, whole: Callable[..., Messages], adapters: Mapping[str, Path]
) -> None:
    messages = whole("lost")
    first = stub.UploadAdapter(iter(messages), timeout=30)
    assert offsets(stub, "lost") == [file.size_bytes for file in messages[0].header.files]
    for again in (messages[:1], messages):  # with nothing more to send, and by an old client that sends all
        second = stub.UploadAdapter(iter(again), timeout=30)
        assert (second.adapter, second.created) == (first.adapter, True)
    result = client.adapters.push(adapters["b"], "by-id")
    assert (result.adapter.version, result.created) == (first.adapter.version, False)
    error = failed(cancel, stub, "lost")
    assert (error.code, error.reason) == ("FAILED_PRECONDITION", "UPLOAD_COMPLETE")
    client.adapters.delete(result.adapter.reference)
    assert failed(offsets, stub, "lost").code == "NOT_FOUND"
    assert stub.UploadAdapter(iter(messages), timeout=30).adapter.version == first.adapter.version + 1


def test_a_cancelled_upload_is_gone_at_once(
    stub: Any, client: Client, server: ServerProcess, whole: Callable[..., Messages]
) -> None:
    cut(stub, server, whole("unwanted"), 4)
    eventually(lambda: sum(offsets(stub, "unwanted")))
    client.adapters.cancel_upload("unwanted")
    assert not shelf(server, "unwanted").exists()
    with pytest.raises(NotFoundError) as caught:
        client.adapters.cancel_upload("unwanted")
    assert caught.value.reason == "UPLOAD_NOT_FOUND"


def test_cancelling_ends_a_stream_that_is_under_way(
    stub: Any, server: ServerProcess, whole: Callable[..., Messages]
) -> None:
    messages, over = whole("live"), []

    def endless() -> Iterator[Any]:
        yield from messages[:4]
        eventually(lambda: over, 60)

    call = stub.UploadAdapter.future(endless())
    eventually(lambda: list(shelf(server, "live").glob("files/*")))
    cancel(stub, "live")
    error = failed(call.result)
    over.append(True)
    assert (error.code, error.reason) == ("ABORTED", "UPLOAD_CANCELLED")
    assert not shelf(server, "live").exists()


def test_validating_keeps_nothing(stub: Any, server: ServerProcess, whole: Callable[..., Messages]) -> None:
    messages = whole("dry", validate_only=True)
    cut(stub, server, messages, 4)
    eventually(lambda: sum(offsets(stub, "dry")))
    response = stub.UploadAdapter(iter(rest_of(messages, offsets(stub, "dry"))), timeout=30)
    assert (response.created, response.adapter.version) == (False, 0)
    assert not shelf(server, "dry").exists()


@pytest.mark.parametrize("bad", ["../../escape", "/etc/passwd", "a/b", ".", "x\0y", "a" * 129, "ｉd", "a b"])
def test_an_id_is_no_path(stub: Any, server: ServerProcess, whole: Callable[..., Messages], bad: str) -> None:
    before = sorted(path.name for path in (server.store / "uploads").iterdir())
    for call in (lambda: offsets(stub, bad), lambda: cancel(stub, bad)):
        assert [v.field for v in failed(call).field_violations] == ["upload_id"]
    assert [v.field for v in refused(stub, whole(bad)).field_violations] == ["header.upload_id"]
    assert sorted(path.name for path in (server.store / "uploads").iterdir()) == before
