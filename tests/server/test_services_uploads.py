"""What an upload's header and chunks may be, against real files."""

import errno
import hashlib
import os
import resource
from pathlib import Path
from typing import Any

import google_crc32c
import pytest

from adapters.errors import AdapterCorruptError, CapacityError, InvalidAdapterError, UploadOffsetError
from quickchange.v1 import adapters_pb2
from server.errors import InvalidRequestError
from server.services.upload_plan import plan_of
from server.services.uploads import MAX_CHUNK_BYTES, Received, StagedUpload

CONFIG = b'{"r": 8}'
WEIGHTS = bytes(range(256)) * 20


def upload_file(name: str, data: bytes, **changes: Any) -> adapters_pb2.UploadFile:
    fields = {"name": name, "size_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    return adapters_pb2.UploadFile(**(fields | changes))


def header(*files: adapters_pb2.UploadFile, **changes: Any) -> adapters_pb2.UploadHeader:
    default = (upload_file("adapter_config.json", CONFIG), upload_file("adapter_model.safetensors", WEIGHTS))
    return adapters_pb2.UploadHeader(**({"name": "sql", "files": files or default} | changes))


def chunk(index: int, offset: int, data: bytes, crc32c: int | None = None) -> adapters_pb2.UploadChunk:
    checksum = google_crc32c.value(data) if crc32c is None else crc32c
    return adapters_pb2.UploadChunk(file_index=index, write_offset=offset, data=data, crc32c=checksum)


@pytest.fixture
def upload(tmp_path: Path) -> StagedUpload:
    return StagedUpload(tmp_path, plan_of(header(), 1 << 20).files)


def test_a_whole_upload_is_on_disk_as_it_was_sent(upload: StagedUpload, tmp_path: Path) -> None:
    upload.write(chunk(1, 0, WEIGHTS[:100]))
    upload.write(chunk(0, 0, CONFIG))  # files may be interleaved
    upload.write(chunk(1, 100, WEIGHTS[100:]))
    upload.finish()
    assert (tmp_path / "adapter_config.json").read_bytes() == CONFIG
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == WEIGHTS
    upload.close()  # harmless afterwards


@pytest.mark.parametrize(
    ("bad", "error", "words"),
    [
        (chunk(1, 0, WEIGHTS[:100]), UploadOffsetError, "offset 0, the file stands at 100"),
        (chunk(1, 101, WEIGHTS[101:]), UploadOffsetError, "offset 101, the file stands at 100"),
        (chunk(1, 100, WEIGHTS[100:], crc32c=7), AdapterCorruptError, "crc32c does not match"),
        (chunk(1, 100, WEIGHTS[100:] + b"x"), InvalidRequestError, "goes past the 5120 bytes"),
        (chunk(2, 0, b"x"), InvalidRequestError, "is 2, the header names 2 files"),
        (chunk(1, 100, b""), InvalidRequestError, "has 0 bytes"),
        (chunk(1, 100, bytes(MAX_CHUNK_BYTES + 1)), InvalidRequestError, "must have 1 to 1048576"),
    ],
)
def test_a_bad_chunk_is_refused_by_its_name(
    upload: StagedUpload, bad: adapters_pb2.UploadChunk, error: type[Exception], words: str
) -> None:
    upload.write(chunk(1, 0, WEIGHTS[:100]))
    with pytest.raises(error, match=words):
        upload.write(bad)
    upload.write(chunk(1, 100, WEIGHTS[100:]))  # and leaves no mark
    upload.write(chunk(0, 0, CONFIG))
    upload.finish()


def test_a_file_that_ends_too_early_is_refused(upload: StagedUpload) -> None:
    upload.write(chunk(0, 0, CONFIG))
    upload.write(chunk(1, 0, WEIGHTS[:-1]))
    with pytest.raises(InvalidRequestError, match=r"ended after 5119 of 5120 bytes"):
        upload.finish()


def test_other_bytes_than_announced_are_refused(upload: StagedUpload) -> None:
    upload.write(chunk(0, 0, CONFIG))
    upload.write(chunk(1, 0, WEIGHTS[:-1] + b"!"))
    with pytest.raises(AdapterCorruptError, match=r"adapter_model.safetensors: sha256 does not match"):
        upload.finish()


@pytest.mark.parametrize(
    ("bad", "field"),
    [
        (header(upload_file("adapter_config.json", CONFIG)), "header.files"),
        (header(*header().files, upload_file("adapter_config.json", CONFIG)), "header.files"),
        (header(*header().files, upload_file("../evil", CONFIG)), "header.files[2].name"),
        (header(*header().files, upload_file("/etc/passwd", CONFIG)), "header.files[2].name"),
        (header(*header().files, upload_file("adapter_model.bin", CONFIG)), "header.files[2].name"),
        (header(*header().files, upload_file("quickchange.json\0", CONFIG)), "header.files[2].name"),
        (header(*header().files, upload_file("quickchange.json", b"")), "header.files[2].size_bytes"),
        (
            header(*header().files, upload_file("quickchange.json", CONFIG, size_bytes=1 << 40)),
            "header.files[2].size_bytes",
        ),
        (
            header(*header().files, upload_file("quickchange.json", CONFIG, sha256="A" * 64)),
            "header.files[2].sha256",
        ),
        (
            header(*header().files, upload_file("quickchange.json", CONFIG, sha256="")),
            "header.files[2].sha256",
        ),
    ],
)
def test_a_bad_header_is_refused_by_its_field(bad: adapters_pb2.UploadHeader, field: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        plan_of(bad, 1 << 50)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (header(name="../evil"), "BAD_NAME"),
        (header(version=0), "BAD_VERSION"),
        (header(labels={"": "x"}), "BAD_LABELS"),
        (header(labels={str(index): "x" for index in range(33)}), "BAD_LABELS"),
        (header(description="x" * 5000), "BAD_DESCRIPTION"),
    ],
)
def test_what_the_store_would_refuse_is_refused_before_a_byte_comes(
    bad: adapters_pb2.UploadHeader, reason: str
) -> None:
    with pytest.raises(InvalidAdapterError) as caught:
        plan_of(bad, 1 << 50)
    assert caught.value.reason == reason


def test_no_files_at_all_are_refused() -> None:
    with pytest.raises(InvalidRequestError, match=r"are none; send adapter_config.json and"):
        plan_of(adapters_pb2.UploadHeader(name="sql"), 1 << 20)


def test_an_upload_over_the_limit_is_refused_before_a_byte_of_it_comes() -> None:
    size = len(CONFIG) + len(WEIGHTS)
    plan_of(header(), size)
    with pytest.raises(CapacityError, match=f"has {size} bytes, at most {size - 1}") as caught:
        plan_of(header(), size - 1)
    assert caught.value.reason == "UPLOAD_TOO_LARGE"


def test_a_full_disk_is_told_as_one(upload: StagedUpload, tmp_path: Path) -> None:
    """The file's descriptor is made to lead to a device that is always full."""
    opened = str(tmp_path / "adapter_model.safetensors")
    (descriptor,) = (int(fd) for fd in os.listdir("/proc/self/fd") if leads_to(fd) == opened)
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, descriptor)
    os.close(full)
    with pytest.raises(CapacityError, match="disk of the adapter store is full"):
        upload.write(chunk(1, 0, WEIGHTS))
    upload.close()


def leads_to(descriptor: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}")
    except FileNotFoundError:  # the listing's own, closed by now
        return ""


def test_nothing_is_written_through_what_is_there_already(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    canary.write_text("untouched")
    staging = tmp_path / "staging"
    staging.mkdir()
    (staging / "adapter_config.json").symlink_to(canary)
    with pytest.raises(CapacityError, match="File exists"):
        StagedUpload(staging, plan_of(header(), 1 << 20).files)
    assert canary.read_text() == "untouched"


def test_memory_does_not_grow_with_the_upload(tmp_path: Path) -> None:
    size = 64 * MAX_CHUNK_BYTES
    block = bytes(MAX_CHUNK_BYTES)
    digest = hashlib.sha256()
    for _ in range(64):
        digest.update(block)
    big = upload_file("adapter_model.safetensors", b"", size_bytes=size, sha256=digest.hexdigest())
    upload = StagedUpload(
        tmp_path, plan_of(header(upload_file("adapter_config.json", CONFIG), big), size * 2).files
    )
    upload.write(chunk(0, 0, CONFIG))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for index in range(64):
        upload.write(chunk(1, index * MAX_CHUNK_BYTES, block))
    upload.finish()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 16 * 1024  # KiB


FILES = plan_of(header(), 1 << 20).files


@pytest.mark.parametrize("remember", [True, False])
def test_an_upload_goes_on_with_or_without_its_digests(tmp_path: Path, remember: bool) -> None:
    first = StagedUpload(tmp_path, FILES)
    first.write(chunk(1, 0, WEIGHTS[:100]))
    first.sync()
    received = first.received()
    received = Received(received.offsets, tuple(digest.copy() for digest in received.digests or ()))
    first.write(chunk(1, 100, WEIGHTS[100:200]))  # written, not saved
    first.close()
    again = StagedUpload(tmp_path, FILES, received if remember else Received((0, 100)))
    with pytest.raises(UploadOffsetError):
        again.write(chunk(1, 200, WEIGHTS[200:]))
    again.write(chunk(1, 100, WEIGHTS[100:]))
    again.write(chunk(0, 0, CONFIG))
    again.finish()
    assert received.offsets == (0, 100)
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == WEIGHTS


def test_a_file_that_a_blob_shares_is_not_written_to(tmp_path: Path) -> None:
    staging, blob = tmp_path / "staging", tmp_path / "blob"
    staging.mkdir()
    first = StagedUpload(staging, FILES)
    first.write(chunk(1, 0, WEIGHTS))
    first.close()
    blob.hardlink_to(staging / "adapter_model.safetensors")
    blob.chmod(0o400)
    again = StagedUpload(staging, FILES, Received((0, len(WEIGHTS))))
    again.write(chunk(1, 0, bytes(len(WEIGHTS))))
    again.close()
    assert blob.read_bytes() == WEIGHTS
    assert blob.stat().st_mode & 0o777 == 0o400
    assert [path.name for path in staging.iterdir() if "copy" in path.name] == []


def test_a_disk_that_fails_to_sync_is_told(upload: StagedUpload, monkeypatch: pytest.MonkeyPatch) -> None:
    upload.write(chunk(1, 0, WEIGHTS))

    def fails(descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fdatasync", fails)
    with pytest.raises(CapacityError) as caught:
        upload.sync()
    assert caught.value.reason == "STORAGE_FAILED"
