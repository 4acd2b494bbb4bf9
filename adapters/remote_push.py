"""Publishes a local store at a URL: first what is missing there, then the catalogue. Knows no readers.

root/published.json    by URL, the SHA-256 of the snapshots that hold nothing unknown to this store
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from hashlib import file_digest
from pathlib import Path

from adapters.blobs import disk_errors
from adapters.durable import replace_text
from adapters.errors import (
    AdapterCorruptError,
    AdapterNotFoundError,
    InvalidAdapterError,
    StaleEtagError,
    StoreUnreachableError,
)
from adapters.facts import StoredFile
from adapters.files import open_regular
from adapters.listing import damaged, manifest_of
from adapters.manifest import FACTS, ListedVersion, Manifest, facts_json
from adapters.remote import RemotePlace, Snapshot, name_of, snapshot_of
from adapters.rows import Rows
from adapters.store import AdapterStore

Report = Callable[[int, int], None]

_AT_ONCE = 8
_PUBLISHED = "published.json"


@dataclass(frozen=True, slots=True)
class PushReport:
    """What a push did.

    Attributes:
        generation: of the snapshot that is at the URL now.
        created: False if it was there already, and nothing was to do.
        uploaded_bytes: of files that were missing there, or not right.
        left_out: versions that are FAILED here, and not sound at the URL either.
    """

    generation: int
    created: bool
    versions: int
    contents: int
    uploaded_bytes: int
    left_out: tuple[str, ...]


def push_store(
    store: AdapterStore,
    place: RemotePlace,
    *,
    overwrite: bool = False,
    verify: bool = False,
    report: Report = lambda *_: None,
) -> PushReport:
    """Makes the place show this store as it is at one moment, while others use both.

    It can be cut anywhere: until the snapshot is created, readers see the old one, and the next push goes on
    with what was uploaded.

    Args:
        overwrite: also a catalogue that this store does not know, instead of an error.
        verify: reads what is there already, and uploads it again if a byte is wrong.
        report: called with the bytes so far and in all.

    Raises:
        StaleEtagError: somebody else published there, since this store did or meanwhile.
        AdapterCorruptError: a file is damaged here, and its versions are FAILED now; or the catalogue there.
        ReadOnlyStoreError, StoreUnreachableError
    """
    place.files.check_writable()
    place.files.sweep()
    with store.read_all() as rows:
        highest = place.highest()
        before = _newest(place, highest, overwrite)
        there = _sizes(place)
        manifest, left_out = _to_publish(rows, before, there)
        is_same = before is not None and before.manifest.to_json() == manifest.to_json()
        if before is not None and not is_same and not overwrite:
            _check_known(store.root, place.url, before)
        missing = _missing(place, manifest, there, verify)
        uploaded_bytes = _upload(store, place, rows, missing, report)
    created = uploaded_bytes > 0 or not is_same  # a new snapshot also has readers try again what failed
    snapshot = snapshot_of(highest + 1, manifest) if created or before is None else before
    if created:
        known = [before.sha256] if before and not overwrite else []
        _remember(
            store.root, place.url, [*known, snapshot.sha256]
        )  # now: the process may end before it knows
        place.publish(snapshot)
    _remember(store.root, place.url, [snapshot.sha256])
    place.point_at(snapshot)
    return PushReport(
        snapshot.generation,
        created,
        len(manifest.versions),
        len(manifest.contents),
        uploaded_bytes,
        tuple(version.reference for version in left_out),
    )


def remember(store: AdapterStore, place: RemotePlace, snapshot: Snapshot) -> None:
    """Notes that a store has all that a snapshot lists, so that it may publish its successor."""
    _remember(store.root, place.url, [snapshot.sha256])


def _newest(place: RemotePlace, highest: int, overwrite: bool) -> Snapshot | None:
    if not highest:
        return None
    try:
        return place.snapshot(highest)
    except AdapterCorruptError:
        if overwrite:
            return None
        raise


def _to_publish(
    rows: Rows, before: Snapshot | None, there: Mapping[str, int]
) -> tuple[Manifest, list[ListedVersion]]:
    """What is READY here, and what is FAILED here but sound there."""
    manifest, failed = manifest_of(rows)
    known = before.manifest.contents if before else {}
    sound: list[ListedVersion] = []
    left_out: list[ListedVersion] = []
    for version in failed:
        members = known.get(version.digest, ())
        is_there = members and all(there.get(name_of(version.digest, m)) == m.size_bytes for m in members)
        (sound if is_there else left_out).append(version)
    versions = sorted([*manifest.versions, *sound], key=lambda version: (version.name, version.version))
    contents = dict(manifest.contents) | {version.digest: known[version.digest] for version in sound}
    return replace(manifest, versions=tuple(versions), contents=contents), left_out


def _missing(
    place: RemotePlace, manifest: Manifest, there: Mapping[str, int], verify: bool
) -> dict[str, list[StoredFile]]:
    """By digest, the members that have to be uploaded."""
    found: dict[str, list[StoredFile]] = {}
    for digest, members in manifest.contents.items():
        for member in members:
            name = name_of(digest, member)
            if there.get(name) != member.size_bytes or (verify and not _is_sound(place, name, member)):
                found.setdefault(digest, []).append(member)
    return found


def _is_sound(place: RemotePlace, name: str, member: StoredFile) -> bool:
    try:
        return place.files.hash_of(name) == member.sha256
    except FileNotFoundError:
        return False


def _upload(
    store: AdapterStore,
    place: RemotePlace,
    rows: Rows,
    missing: Mapping[str, list[StoredFile]],
    report: Report,
) -> int:
    """The bytes uploaded, each file's size confirmed by the place."""
    total_bytes = sum(member.size_bytes for members in missing.values() for member in members)
    done_bytes = 0
    with ThreadPoolExecutor(_AT_ONCE, "store-push") as pool:
        try:
            uploads = {
                pool.submit(place.files.put, name, source): size_bytes
                for name, source, size_bytes in _sources(store, rows, missing)
            }
            for upload in as_completed(uploads):
                upload.result()
                done_bytes += uploads[upload]
                report(done_bytes, total_bytes)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    _check_arrived(place, missing)
    return done_bytes


def _sources(
    store: AdapterStore, rows: Rows, missing: Mapping[str, list[StoredFile]]
) -> Iterator[tuple[str, Path | bytes, int]]:
    """Name, bytes or where they are, and size of what is to be uploaded; every file was checked."""
    for digest, members in missing.items():
        for member in members:
            if member.name == FACTS:
                content = rows.content(digest)
                assert content is not None, "it was there when the members were listed, in the same moment"
                yield name_of(digest, member), facts_json(content.facts), member.size_bytes
            else:
                yield name_of(digest, member), _checked(store, digest, member), member.size_bytes


def _checked(store: AdapterStore, digest: str, member: StoredFile) -> Path:
    """Where a file is, once it was read and found to be what was published."""
    try:
        path = store.path_of(digest) / member.name
        with open_regular(path) as file:
            found = file_digest(file, "sha256").hexdigest()
    except (AdapterNotFoundError, InvalidAdapterError) as error:
        raise damaged(store, digest, str(error)) from error
    if found != member.sha256:
        raise damaged(store, digest, f"{member.name} has SHA-256 {found} instead of {member.sha256}")
    return path


def _check_arrived(place: RemotePlace, missing: Mapping[str, list[StoredFile]]) -> None:
    there = _sizes(place) if missing else {}
    for digest, members in missing.items():
        for member in members:
            name = name_of(digest, member)
            if there.get(name) != member.size_bytes:
                raise StoreUnreachableError(
                    f"{name} has {there.get(name)} bytes at {place.url} after {member.size_bytes} were "
                    "uploaded; push again"
                )


def _sizes(place: RemotePlace) -> dict[str, int]:
    return place.files.sizes_below("blobs") | place.files.sizes_below("facts")


def _check_known(root: Path, url: str, newest: Snapshot) -> None:
    if newest.sha256 not in _known(root).get(url, ()):
        raise StaleEtagError(
            f"snapshot {newest.generation} at {url} was not published from this store, which may lack "
            "some of it; run `quickchange store pull` first, or push with --overwrite to replace it",
            reason="PUSH_CONFLICT",
        )


def _known(root: Path) -> dict[str, list[str]]:
    try:
        known: dict[str, list[str]] = json.loads((root / _PUBLISHED).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise AdapterCorruptError(f"{root / _PUBLISHED} cannot be read ({error}); remove it") from None
    return known


def _remember(root: Path, url: str, snapshots: Iterable[str]) -> None:
    with disk_errors():
        replace_text(root / _PUBLISHED, json.dumps(_known(root) | {url: list(snapshots)}) + "\n")
