"""Uploading and naming adapters with the blocking client: real files, a real socket."""

import hashlib
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import google_crc32c
import grpc
import pytest

import quickchange
from quickchange import (
    AdapterDirectoryError,
    AdapterMethod,
    AdapterState,
    Client,
    DataLossError,
    Residency,
)
from quickchange.upload import CHUNK_BYTES
from quickchange.v1 import adapters_pb2
from tests.quickchange.scripted import DIGEST, Script, queue_full, rich


def test_push_sends_the_allowed_files_with_their_checksums(
    client: Client, script: Script, folder: Path
) -> None:
    result = client.adapters.push(folder, "sql", labels={"team": "a"}, description="SQL", version=4)
    header, *chunks = script.uploads[0]
    contents = {
        name: (folder / name).read_bytes() for name in ("adapter_config.json", "adapter_model.safetensors")
    }
    assert [(f.name, f.size_bytes, f.sha256) for f in header.header.files] == [
        (name, len(data), hashlib.sha256(data).hexdigest()) for name, data in contents.items()
    ]
    assert (header.header.name, header.header.version, header.header.description) == ("sql", 4, "SQL")
    assert dict(header.header.labels) == {"team": "a"}
    assert len(header.header.upload_id) == 32
    received = [b"", b""]
    for message in chunks:
        chunk = message.chunk
        assert chunk.write_offset == len(received[chunk.file_index])
        assert 0 < len(chunk.data) <= CHUNK_BYTES
        assert chunk.crc32c == google_crc32c.value(chunk.data)
        received[chunk.file_index] += chunk.data
    assert received == list(contents.values())
    assert result.created
    assert (result.adapter.reference, result.adapter.digest) == ("sql@4", DIGEST)
    assert (result.report.matched_modules, result.report.delta_norm) == (("q",), 0.5)


def test_push_sends_the_manifest_if_there_is_one(client: Client, script: Script, folder: Path) -> None:
    (folder / "quickchange.json").write_text('{"format": 1}')
    result = client.adapters.push(folder, "sql", validate_only=True)
    header = script.uploads[0][0].header
    assert [file.name for file in header.files][2] == "quickchange.json"
    assert header.validate_only
    assert not header.HasField("version")
    assert (result.adapter.version, result.created) == (0, False)


def test_push_reports_progress_to_the_end(client: Client, folder: Path) -> None:
    steps: list[tuple[int, int]] = []
    client.adapters.push(folder, "sql", progress=lambda sent, total: steps.append((sent, total)))
    total = sum(
        (folder / name).stat().st_size for name in ("adapter_config.json", "adapter_model.safetensors")
    )
    assert steps[0] == (0, total)
    assert steps[-1] == (total, total)
    assert [sent for sent, _ in steps] == sorted(sent for sent, _ in steps)
    assert len(steps) == 4  # before, the small file, and two chunks of the large one


def test_push_holds_a_chunk_not_a_file(client: Client, script: Script, folder: Path) -> None:
    (folder / "adapter_model.safetensors").write_bytes(os.urandom(24 * 1024 * 1024))
    script.keep_uploads = False
    tracemalloc.start()
    try:
        client.adapters.push(folder, "sql")
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert script.upload_bytes > 24 * 1024 * 1024
    assert peak_bytes < 12 * 1024 * 1024  # the server of this test included


def _without_folder(folder: Path) -> Path:
    return folder / "nothing"


def _without_config(folder: Path) -> Path:
    (folder / "adapter_config.json").unlink()
    return folder


def _without_weights(folder: Path) -> Path:
    (folder / "adapter_model.safetensors").unlink()
    return folder


def _with_pickle_only(folder: Path) -> Path:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    return folder


@pytest.mark.parametrize(
    ("spoil", "reason", "words"),
    [
        (_without_folder, "NO_SUCH_FOLDER", "is not a folder"),
        (_without_config, "MISSING_FILE", "has no adapter_config.json"),
        (_without_weights, "MISSING_FILE", "has no adapter_model.safetensors"),
        (_with_pickle_only, "PICKLE_WEIGHTS", "save_pretrained"),
    ],
)
def test_push_of_no_adapter_says_what_is_missing(
    client: Client, script: Script, folder: Path, spoil: Callable[[Path], Path], reason: str, words: str
) -> None:
    with pytest.raises(AdapterDirectoryError) as caught:
        client.adapters.push(spoil(folder), "sql")
    assert caught.value.reason == reason
    assert words in str(caught.value)
    assert script.uploads == []


@pytest.mark.parametrize("after", [1, 2])
def test_push_surfaces_an_answer_that_comes_early(
    client: Client, script: Script, folder: Path, after: int
) -> None:
    (folder / "adapter_model.safetensors").write_bytes(bytes(32 * 1024 * 1024))
    script.refuse_upload_after = after
    with pytest.raises(quickchange.FailedPreconditionError, match="another base") as caught:
        client.adapters.push(folder, "sql")
    assert caught.value.reason == "WRONG_BASE"
    assert len(script.uploads) == 1


def test_push_is_sent_again_whole_when_the_server_comes_back(
    client: Client, script: Script, folder: Path
) -> None:
    script.failures = [rich(grpc.StatusCode.UNAVAILABLE, "restarting", "DRAINING")]
    assert client.adapters.push(folder, "sql").created
    assert len(script.requests) == 2
    assert script.uploads[-1][0].HasField("header")


def test_push_waits_for_its_turn_if_asked(client: Client, script: Script, folder: Path) -> None:
    script.failures = [queue_full(0.01)]
    with pytest.raises(quickchange.ResourceExhaustedError):
        client.adapters.push(folder, "sql")
    script.failures = [queue_full(0.01)]
    assert client.adapters.push(folder, "sql", retries=1).created


@pytest.mark.parametrize("change", [b"", b"x" * 1_300_001])
def test_push_notices_a_file_that_changes_meanwhile(
    client: Client, script: Script, folder: Path, change: bytes
) -> None:
    weights = folder / "adapter_model.safetensors"

    def rewrite(sent_bytes: int, total_bytes: int) -> None:
        weights.write_bytes(change)

    with pytest.raises(DataLossError, match="changed while it was uploaded"):
        client.adapters.push(folder, "sql", progress=rewrite)


def test_get_decodes_every_field(client: Client) -> None:
    adapter = client.adapters.get("sql")
    assert adapter.state is AdapterState.READY
    assert adapter.residency is Residency.DISK
    assert adapter.method is AdapterMethod.RSLORA
    assert (adapter.rank, adapter.alpha, adapter.size_bytes) == (8, 16.0, 2048)
    assert (adapter.aliases, adapter.target_modules) == (("prod",), ("q_proj",))
    assert adapter.create_time is not None
    assert adapter.create_time.isoformat() == "2023-11-14T22:13:20+00:00"
    assert adapter.update_time is None


def test_list_walks_the_pages_as_it_is_read(client: Client, script: Script) -> None:
    script.adapters = 5
    walk = client.adapters.list(name="n", state="ready", labels={"team": "a"})
    assert next(walk).name == "a0"
    assert len(script.requests) == 1
    assert [adapter.name for adapter in walk] == ["a1", "a2", "a3", "a4"]
    assert [request.page_token for request in script.requests] == ["", "2", "4"]
    for request in script.requests:
        assert (request.name, request.state) == ("n", adapters_pb2.ADAPTER_STATE_READY)
        assert dict(request.labels) == {"team": "a"}


def test_list_without_filters_sends_none(client: Client, script: Script) -> None:
    list(client.adapters.list())
    assert not script.requests[0].HasField("state")
    assert not script.requests[0].HasField("name")
    with pytest.raises(quickchange.InvalidArgumentError, match="validating, ready, failed, deleting"):
        list(client.adapters.list(state="brilliant"))


def test_pointing_at_versions(client: Client, script: Script) -> None:
    adapters = client.adapters
    assert adapters.alias("sql", "canary", 3, etag="e0").aliases == ("canary",)
    adapters.remove_alias("sql", "canary")
    assert adapters.pin("sql@3").pinned
    assert not adapters.unpin("sql@3").pinned
    adapters.set_labels("sql@3", {"a": "b"})
    alias, remove, pin, unpin, labels = script.requests
    assert (alias.adapter, list(alias.set_aliases), alias.etag) == ("sql@3", ["canary"], "e0")
    assert not alias.HasField("pinned")
    assert not alias.HasField("labels")
    assert (remove.adapter, list(remove.remove_aliases)) == ("sql:canary", ["canary"])
    assert (pin.pinned, unpin.HasField("pinned"), unpin.pinned) == (True, True, False)
    assert dict(labels.labels.values) == {"a": "b"}


def test_load_unload_delete(client: Client, script: Script) -> None:
    assert client.adapters.load("sql").residency is Residency.DEVICE
    assert client.adapters.unload("sql").residency is Residency.DISK
    assert client.adapters.delete("sql@3") == 1
    assert client.adapters.delete("sql", all_versions=True) == 2


def test_load_and_unload_say_which_tier(client: Client, script: Script) -> None:
    client.adapters.load("sql")
    client.adapters.load("sql", "host")
    client.adapters.unload("sql")
    client.adapters.unload("sql", Residency.HOST)
    assert [adapters_pb2.Residency.Name(request.tier).lower() for request in script.requests] == [
        "residency_device", "residency_host", "residency_disk", "residency_host",
    ]  # fmt: skip
    with pytest.raises(quickchange.InvalidArgumentError, match="attic; there are disk, host, device"):
        client.adapters.load("sql", "attic")


def test_what_cannot_be_repeated_is_not(client: Client, script: Script) -> None:
    gone = rich(grpc.StatusCode.UNAVAILABLE, "engine down", "ENGINE_DOWN")
    for call in (
        lambda: client.adapters.delete("sql@3"),
        lambda: client.adapters.alias("sql", "canary", 3, etag="e0"),
        lambda: client.adapters.remove_alias("sql", "canary"),
    ):
        script.failures = [gone]
        with pytest.raises(quickchange.UnavailableError):
            call()
    script.failures = [gone]
    assert client.adapters.alias("sql", "canary", 3).aliases == ("canary",)
