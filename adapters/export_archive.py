"""A whole store, or some of its names, as one file. Knows the archive's form, not what is in an adapter."""

import io
import os
import tempfile
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from adapters.blobs import disk_errors
from adapters.errors import AdapterCorruptError, AdapterNotFoundError, InvalidAdapterError
from adapters.facts import StoredFile
from adapters.files import open_regular
from adapters.listing import damaged, manifest_of
from adapters.manifest import FACTS, MANIFEST, SEAL, Manifest, facts_json
from adapters.rows import Rows
from adapters.store import AdapterStore
from adapters.tar import TarWriter

Report = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class ExportReport:
    """What an archive holds, and which versions were left out because they are FAILED."""

    versions: int
    contents: int
    size_bytes: int
    left_out: tuple[str, ...]


def export_store(
    store: AdapterStore, target: Path, *, names: Collection[str] = (), report: Report = lambda *_: None
) -> ExportReport:
    """Writes an archive that appears whole or not at all, of one moment, while others use the store.

    Memory does not grow with the adapters' files; every file is checked on its way.

    Args:
        names: of the adapters; none for all of them.
        report: called with the bytes so far and in all.

    Raises:
        AdapterNotFoundError: there is no adapter of such a name.
        AdapterCorruptError: a file is damaged; its versions are FAILED now, and left out the next time.
        CapacityError: the disk does not take it.
        InvalidAdapterError: the target is there already, or its folder is not.
    """
    if target.exists():
        raise InvalidAdapterError(f"{target} is there already; give another name", reason="FILE_EXISTS")
    if not target.parent.is_dir():
        raise InvalidAdapterError(f"{target.parent} is no folder; make it first", reason="NO_FOLDER")
    with store.read_all() as rows, disk_errors():
        manifest, failed = manifest_of(rows, names)
        descriptor, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
        draft = Path(name)
        try:
            with os.fdopen(descriptor, "wb") as file:
                _write(store, rows, manifest, TarWriter(file), report)
                file.flush()
                os.fsync(file.fileno())
                size_bytes = file.tell()
            os.link(draft, target)  # unlike a rename it never replaces what is there
        finally:
            draft.unlink()
    left_out = tuple(version.reference for version in failed)
    return ExportReport(len(manifest.versions), len(manifest.contents), size_bytes, left_out)


def _write(store: AdapterStore, rows: Rows, manifest: Manifest, tar: TarWriter, report: Report) -> None:
    total_bytes = sum(member.size_bytes for members in manifest.contents.values() for member in members)
    done_bytes = 0
    raw = manifest.to_json()
    seal = tar.add(MANIFEST, len(raw), io.BytesIO(raw)).encode()
    for digest, members in manifest.contents.items():
        for member in members:
            _add(store, rows, tar, digest, member)
            done_bytes += member.size_bytes
            report(done_bytes, total_bytes)
    tar.add(SEAL, len(seal), io.BytesIO(seal))
    tar.end()


def _add(store: AdapterStore, rows: Rows, tar: TarWriter, digest: str, member: StoredFile) -> None:
    name = f"{digest.removeprefix('sha256:')}/{member.name}"
    if member.name == FACTS:
        content = rows.content(digest)
        assert content is not None, "it was there when the members were listed, in the same moment"
        tar.add(name, member.size_bytes, io.BytesIO(facts_json(content.facts)))
        return
    try:
        with open_regular(store.path_of(digest) / member.name) as file:
            copied = tar.add(name, member.size_bytes, file)
    except (AdapterCorruptError, AdapterNotFoundError, InvalidAdapterError) as error:
        raise damaged(store, digest, str(error)) from error
    if copied != member.sha256:
        raise damaged(store, digest, f"{member.name} has SHA-256 {copied} instead of {member.sha256}")
