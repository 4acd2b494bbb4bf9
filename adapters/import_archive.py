"""Takes an archive of a store into another: all that is wanted, checked, or nothing. Decides no clashes.

Nothing of the archive is believed: members come in the order and under the names that the manifest promises,
every file has its size and hash, and a content's digest is computed anew from its files.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from adapters.adoption import Adopted
from adapters.blobs import disk_errors
from adapters.bundle import read_bundle
from adapters.errors import AdapterCorruptError
from adapters.facts import AdapterFacts, StoredFile
from adapters.files import open_regular
from adapters.listing import chosen_of
from adapters.manifest import (
    FACTS,
    MANIFEST,
    MAX_FACTS_BYTES,
    MAX_MANIFEST_BYTES,
    SEAL,
    Manifest,
    parse_facts,
    parse_manifest,
)
from adapters.measures import stored_digest
from adapters.store import AdapterStore
from adapters.tar import TarReader, refuse

Report = Callable[[int, int], None]
_SEAL_BYTES = 64


@dataclass(slots=True)
class _Staged:
    folder: Path
    facts: AdapterFacts | None = None


def import_store(
    store: AdapterStore,
    archive: Path,
    *,
    names: Collection[str] = (),
    renumber: bool = False,
    report: Report = lambda *_: None,
) -> tuple[Adopted, ...]:
    """Publishes an archive's versions under their names and numbers, in one step, while others use the store.

    Memory does not grow with the adapters' files. The same content under the same number is left as it is.

    Args:
        names: of the adapters; none for all of them.
        renumber: a version whose number is taken, or was used and deleted, gets the next one.
        report: called with the bytes so far and in all.

    Raises:
        AdapterExistsError: a number is taken by other content, or was used and deleted.
        InvalidAdapterError: this is no archive of a store, or it holds what it should not.
        AdapterCorruptError: it is damaged, or ends too early.
        AdapterNotFoundError: it has no adapter of such a name.
        CapacityError: the disk does not take it.
    """
    staged: dict[str, _Staged] = {}
    try:
        with open_regular(archive) as file:
            tar = TarReader(file)
            raw = _small(tar, MANIFEST, MAX_MANIFEST_BYTES)
            manifest = parse_manifest(raw)
            versions = chosen_of(manifest, names, "the archive")
            store.check_clashes(versions, renumber=renumber)
            wanted = store.missing({version.digest for version in versions})
            _read_contents(store, tar, manifest, wanted, staged, report)
            if _small(tar, SEAL, _SEAL_BYTES) != sha256(raw).hexdigest().encode():
                raise AdapterCorruptError("the archive's manifest is damaged; copy or export it again")
        contents = {d: (s.folder, s.facts) for d, s in staged.items() if s.facts is not None}
        last_versions = {
            name: last
            for name, last in manifest.last_versions.items()
            if not renumber and (not names or name in names)
        }
        return store.adopt(contents, versions, last_versions, renumber=renumber)
    finally:
        for each in staged.values():
            store.discard(each.folder)


def _read_contents(
    store: AdapterStore,
    tar: TarReader,
    manifest: Manifest,
    wanted: Collection[str],
    staged: dict[str, _Staged],
    report: Report,
) -> None:
    total_bytes = sum(member.size_bytes for members in manifest.contents.values() for member in members)
    done_bytes = 0
    for digest, members in manifest.contents.items():
        if digest in wanted:
            staged[digest] = _Staged(store.new_staging())
        for member in members:
            _expect(tar, f"{digest.removeprefix('sha256:')}/{member.name}", member.size_bytes)
            if digest in wanted:
                _take(tar, digest, member, staged[digest])
            else:
                tar.skip(member.size_bytes)
            done_bytes += member.size_bytes
            report(done_bytes, total_bytes)
        if digest in wanted:
            _check(digest, members, staged[digest])


def _take(tar: TarReader, digest: str, member: StoredFile, staged: _Staged) -> None:
    hashed = sha256()
    if member.name == FACTS:
        if member.size_bytes > MAX_FACTS_BYTES:
            refuse(f"has {member.size_bytes} bytes of facts of {digest}")
        raw = b"".join(tar.chunks(member.size_bytes))
        hashed.update(raw)
    else:
        with disk_errors(), (staged.folder / member.name).open("xb") as sink:
            for chunk in tar.chunks(member.size_bytes):
                hashed.update(chunk)
                sink.write(chunk)
    if hashed.hexdigest() != member.sha256:
        raise AdapterCorruptError(
            f"{member.name} of {digest} is damaged in the archive; copy or export it again"
        )
    if member.name == FACTS:
        staged.facts = parse_facts(raw, digest)


def _check(digest: str, members: tuple[StoredFile, ...], staged: _Staged) -> None:
    """Whether the files are the content that they are said to be."""
    found = stored_digest(staged.folder)
    if found != digest:
        refuse(f"has the content {found} under the digest {digest}")
    size_bytes = sum(member.size_bytes for member in members if member.name != FACTS)
    if staged.facts is None or staged.facts.size_bytes != size_bytes:
        refuse(f"has facts of {digest} that are not of its files")
    bundle = read_bundle(staged.folder)
    if bundle is not None and bundle.base_fingerprint != staged.facts.base_fingerprint:
        refuse(
            f"has {digest} as checked for base {staged.facts.base_fingerprint[:100]}, and it was made for "
            f"{bundle.base_fingerprint}"
        )


def _expect(tar: TarReader, name: str, size_bytes: int) -> None:
    member = tar.next()
    if member != (name, size_bytes):
        refuse(f"has {member.name[:100]!r} where {name} with {size_bytes} bytes was promised")


def _small(tar: TarReader, name: str, max_bytes: int) -> bytes:
    member = tar.next()
    if member.name != name or member.size_bytes > max_bytes:
        refuse(f"has {member.name[:100]!r} where {name} should be")
    return b"".join(tar.chunks(member.size_bytes))
