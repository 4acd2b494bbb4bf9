"""Downloading adapters: whole or not at all, over as many processes as it takes; real files and sockets."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import google_crc32c
import grpc
import pytest

import quickchange
from quickchange import AdapterDirectoryError, Client, DataLossError, UnavailableError, answers
from quickchange.connection import Endpoint
from quickchange.download import Download
from quickchange.partial import partial_of
from quickchange.types import Adapter
from quickchange.v1 import adapters_pb2
from tests.quickchange.scripted import Script, downloaded, rich

Messages = list[adapters_pb2.DownloadAdapterResponse]

WEIGHTS = b"a" * 2500


def test_pull_writes_what_was_promised(client: Client, script: Script, tmp_path: Path) -> None:
    script.files = {"adapter_config.json": b"{}", "adapter_model.safetensors": os.urandom(5000)}
    steps: list[tuple[int, int]] = []
    target = tmp_path / "new" / "sql"
    result = client.adapters.pull("sql:prod", target, progress=lambda *step: steps.append(step))
    assert {path.name: path.read_bytes() for path in target.iterdir()} == script.files
    assert (result.adapter.reference, result.directory, result.size_bytes) == ("sql@3", target, 5002)
    assert steps[-1] == (5002, 5002)
    assert script.requests[0].adapter == "sql:prod"
    assert [path.name for path in target.parent.iterdir()] == ["sql"]


def test_pull_into_an_empty_folder(client: Client, script: Script, tmp_path: Path) -> None:
    script.files = {"adapter_config.json": b"{}"}
    client.adapters.pull("sql", tmp_path)
    assert (tmp_path / "adapter_config.json").read_bytes() == b"{}"


def test_pull_never_overwrites(client: Client, script: Script, folder: Path) -> None:
    before = sorted(path.name for path in folder.iterdir())
    with pytest.raises(AdapterDirectoryError, match="not an empty folder"):
        client.adapters.pull("sql", folder)
    with pytest.raises(AdapterDirectoryError, match="not an empty folder"):
        client.adapters.pull("sql", folder / "adapter_config.json")
    assert sorted(path.name for path in folder.iterdir()) == before
    assert script.requests == []


def _flip_data(messages: Messages) -> None:
    messages[1].chunk.data = bytes([messages[1].chunk.data[0] ^ 1]) + messages[1].chunk.data[1:]


def _flip_data_and_crc(messages: Messages) -> None:
    _flip_data(messages)
    messages[1].chunk.crc32c = google_crc32c.value(messages[1].chunk.data)


def _skip_chunk(messages: Messages) -> None:
    del messages[2]


def _cut_end(messages: Messages) -> None:
    del messages[-1]


def _repeat_last(messages: Messages) -> None:
    extra = adapters_pb2.DownloadAdapterResponse()
    extra.CopyFrom(messages[-1])
    extra.chunk.write_offset += len(extra.chunk.data)
    messages.append(extra)


def _escape(messages: Messages) -> None:
    messages[0].header.files[0].name = "../escaped"


def _list_twice(messages: Messages) -> None:
    messages[0].header.files.append(messages[0].header.files[0])


def _second_header(messages: Messages) -> None:
    messages.append(messages[0])


def _unlisted_file(messages: Messages) -> None:
    messages[1].chunk.file_index = 7


def _only_chunks(messages: Messages) -> None:
    del messages[0]


def test_a_download_goes_on_with_the_same_adapter_only(tmp_path: Path) -> None:
    one = downloaded({"adapter_model.safetensors": b"a" * 2500})
    other = downloaded({"adapter_model.safetensors": b"b" * 2500})
    cut = UnavailableError("cut")
    attempts = Endpoint.resolve("x:1", None, None, timeout_s=9, retry_window_s=9).attempts(repeatable=True)
    with Download(tmp_path / "sql") as download:
        assert download.request("sql").adapter == "sql"
        with pytest.raises(UnavailableError):
            download.after(cut, attempts)  # nothing began: the stream's own attempts are over
        for message in one[:2]:
            download.receive(message)
        assert download.after(cut, attempts) is not attempts  # it got further
        again = download.request("sql")
        assert (again.adapter, list(again.committed_offsets)) == ("sql@3", [1000])
        with pytest.raises(DataLossError, match="went on with another adapter"):
            download.receive(other[0])
        download.request("sql")
        for message in (one[0], *one[2:]):
            download.receive(message)
        download.commit()
    assert (tmp_path / "sql" / "adapter_model.safetensors").read_bytes() == b"a" * 2500


@pytest.mark.parametrize(
    "spoil",
    [
        _flip_data,
        _flip_data_and_crc,
        _skip_chunk,
        _cut_end,
        _repeat_last,
        _escape,
        _list_twice,
        _second_header,
        _unlisted_file,
        _only_chunks,
    ],
)
def test_pull_keeps_nothing_of_a_broken_download(
    client: Client, script: Script, tmp_path: Path, spoil: Callable[[Messages], None]
) -> None:
    script.download = downloaded({"adapter_model.safetensors": os.urandom(2500)})
    spoil(script.download)
    with pytest.raises(DataLossError, match="the download"):
        client.adapters.pull("sql", tmp_path / "sql")
    assert list(tmp_path.iterdir()) == []


def test_pull_of_nothing_leaves_no_folder(client: Client, script: Script, tmp_path: Path) -> None:
    script.failures = [rich(grpc.StatusCode.NOT_FOUND, "no adapter sql", "ADAPTER_NOT_FOUND")]
    with pytest.raises(quickchange.NotFoundError):
        client.adapters.pull("sql", tmp_path / "sql")
    assert list(tmp_path.iterdir()) == []


def leave_in_part(directory: Path, messages: Messages) -> Adapter:
    """A download that ends, as its process is killed, after these messages; the adapter it is of."""
    download = Download(directory)
    download.request("sql")
    for message in messages:
        download.receive(message)
    adapter = answers.adapter(messages[0].header.adapter)
    with pytest.raises(UnavailableError), download:
        raise UnavailableError("cut")
    return adapter


def test_a_later_pull_goes_on_from_what_an_earlier_one_left(tmp_path: Path) -> None:
    header, first, *rest = downloaded({"adapter_model.safetensors": WEIGHTS})
    adapter = leave_in_part(tmp_path / "sql", [header, first])
    assert not (tmp_path / "sql").exists()
    with Download(tmp_path / "sql") as download:
        assert download.has_kept
        download.go_on_with(adapter)
        request = download.request("sql")
        assert (request.adapter, list(request.committed_offsets)) == ("sql@3", [1000])
        for message in (header, *rest):
            download.receive(message)
        result = download.commit()
    assert (result.size_bytes, result.resumed_bytes) == (2500, 1000)
    assert [path.name for path in tmp_path.iterdir()] == ["sql"]
    assert {path.name: path.read_bytes() for path in result.directory.iterdir()} == {
        "adapter_model.safetensors": WEIGHTS
    }


def test_the_client_asks_for_what_is_missing_of_the_same_adapter(
    client: Client, script: Script, tmp_path: Path
) -> None:
    script.download = downloaded({"adapter_model.safetensors": WEIGHTS})
    leave_in_part(tmp_path / "sql", script.download[:3])
    del script.download[1:3]
    assert client.adapters.pull("sql", tmp_path / "sql").resumed_bytes == 2000
    asked, begun = script.requests
    assert (asked.adapter, begun.adapter, list(begun.committed_offsets)) == ("sql", "sql@3", [2000])


def test_what_was_left_of_another_version_is_forgotten(tmp_path: Path) -> None:
    adapter = leave_in_part(tmp_path / "sql", downloaded({"adapter_model.safetensors": WEIGHTS})[:2])
    with Download(tmp_path / "sql") as download:
        download.go_on_with(replace(adapter, digest="sha256:" + "cd" * 32))
        assert list(download.request("sql").committed_offsets) == []
        for message in downloaded({"adapter_config.json": b"{}"}):
            download.receive(message)
        result = download.commit()
    assert result.resumed_bytes == 0
    assert [path.name for path in result.directory.iterdir()] == ["adapter_config.json"]


@pytest.mark.parametrize("damage", ["cut", "flip", "lengthen", "header", "no header"])
def test_what_was_left_is_never_trusted(client: Client, script: Script, tmp_path: Path, damage: str) -> None:
    """Bytes that a crash of the machine took are sent again, or the pull after this one begins anew."""
    script.download = downloaded({"adapter_model.safetensors": WEIGHTS})
    leave_in_part(tmp_path / "sql", script.download[:2])
    kept = partial_of(tmp_path / "sql")
    weights = kept / "adapter_model.safetensors"
    match damage:
        case "cut":
            weights.write_bytes(b"")
        case "flip":
            weights.write_bytes(b"b" * 1000)
            del script.download[1]
        case "lengthen":
            weights.write_bytes(b"a" * 2501)
        case "header":
            (kept / "download.json").write_text("{")
        case "no header":
            (kept / "download.json").unlink()
    if damage == "flip":
        with pytest.raises(DataLossError, match="SHA-256"):
            client.adapters.pull("sql", tmp_path / "sql")
        assert list(tmp_path.iterdir()) == []
        return
    result = client.adapters.pull("sql", tmp_path / "sql")
    assert result.resumed_bytes == 0
    assert (result.directory / "adapter_model.safetensors").read_bytes() == WEIGHTS


def test_what_was_left_survives_a_server_that_is_away(free_port: int, tmp_path: Path) -> None:
    leave_in_part(tmp_path / "sql", downloaded({"adapter_model.safetensors": WEIGHTS})[:2])
    with Client(f"127.0.0.1:{free_port}", retry_window_s=0) as client, pytest.raises(UnavailableError):
        client.adapters.pull("sql", tmp_path / "sql")
    assert (partial_of(tmp_path / "sql") / "adapter_model.safetensors").stat().st_size == 1000


def test_two_pulls_into_one_folder_do_not_mix(tmp_path: Path) -> None:
    messages = downloaded({"adapter_model.safetensors": WEIGHTS})
    with Download(tmp_path / "sql") as first, Download(tmp_path / "sql") as late:
        for download in (first, late):
            download.request("sql")
        first.receive(messages[0])
        with pytest.raises(AdapterDirectoryError, match="another process downloads into"):
            late.receive(messages[0])
        with pytest.raises(AdapterDirectoryError, match="another process downloads into"):
            Download(tmp_path / "sql")
        for message in messages[1:]:
            first.receive(message)
        first.commit()
    assert (tmp_path / "sql" / "adapter_model.safetensors").read_bytes() == WEIGHTS


def test_nothing_is_collected_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    partial_of(tmp_path / "sql").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(AdapterDirectoryError, match="is not a folder; remove it"):
        Download(tmp_path / "sql")


def test_the_current_folder_cannot_be_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AdapterDirectoryError, match="current folder"):
        Download(Path())
