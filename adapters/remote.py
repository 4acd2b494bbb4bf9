"""A store as it is published at a URL: snapshots, facts, blobs. Knows neither drivers nor local stores.

URL/catalogue/00000007.json    a snapshot: a manifest and, below it, its SHA-256; the highest number counts
URL/catalogue/latest           number and SHA-256 of a snapshot from which the highest is found
URL/facts/<64 hex>.json        what was found out about a content, by its own SHA-256
URL/blobs/sha256/<64 hex>/…    the files of a content, by its digest

Nothing but `latest` ever changes. A snapshot is created after all that it lists, so whoever reads sees the
old catalogue or the new one; and of two who create the same number, one is told that it lost.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import islice
from pathlib import Path

from adapters.blobs import disk_errors
from adapters.errors import AdapterCorruptError, AdapterError, StaleEtagError, StoreUnreachableError
from adapters.facts import AdapterFacts, StoredFile
from adapters.manifest import FACTS, Manifest, parse_facts, parse_manifest
from adapters.remote_files import RemoteFiles

_CATALOGUE = "catalogue"
_LATEST = "catalogue/latest"
_SNAPSHOT = re.compile(r"(\d{8,15})\.json")
_HINT = re.compile(rb"(\d{1,15}) ([0-9a-f]{64})\n")
_FACTS_AT_ONCE = 256
_KEPT_SNAPSHOTS = 20

GoingOn = Callable[[], bool]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A catalogue as it was published.

    Attributes:
        sha256: tells it from any other, also from one of the same number in a place that was begun anew.
    """

    generation: int
    sha256: str
    manifest: Manifest

    def is_the_one(self, other: "Snapshot") -> bool:
        """Whether both are the same one. A later one may list the same, for readers to try again."""
        return (self.generation, self.sha256) == (other.generation, other.sha256)


def snapshot_of(generation: int, manifest: Manifest) -> Snapshot:
    """A snapshot to publish."""
    return Snapshot(generation, sha256(manifest.to_json()).hexdigest(), manifest)


def name_of(digest: str, member: StoredFile) -> str:
    """Where a member of a content is, from the URL on."""
    if member.name == FACTS:
        return f"facts/{member.sha256}.json"
    return f"blobs/sha256/{digest.removeprefix('sha256:')}/{member.name}"


class RemotePlace:
    """Every method may raise StoreUnreachableError. Thread-safe.

    Attributes:
        files: what lies there, by names from the URL on.
    """

    def __init__(self, url: str) -> None:
        """
        Raises:
            InvalidAdapterError: this is no URL, or one that nothing here can read.
        """
        self.files = RemoteFiles(url)
        self.url = self.files.url

    def latest(self, known: Snapshot | None = None) -> Snapshot | None:
        """The newest snapshot; None if there is none. `known`, if that is it, without reading it again.

        Raises:
            AdapterCorruptError: it is damaged, or not there.
        """
        hint = self._hint()
        generation = hint[0] if hint else 0
        is_known = known is not None and hint == (known.generation, known.sha256)
        raw = None if is_known or not generation else self.files.read(_snapshot_name(generation))
        while (newer := self.files.read(_snapshot_name(generation + 1))) is not None:
            raw, generation = newer, generation + 1
        if raw is not None:
            return self._parsed(generation, raw)
        if hint is not None and not is_known:
            raise self._damaged(_snapshot_name(generation), "is not there")
        return known if is_known else None

    def highest(self) -> int:
        """The number of the newest snapshot, found by listing them all; 0 if there is none."""
        return max(self._generations(), default=0)

    def snapshot(self, generation: int) -> Snapshot:
        """One snapshot; AdapterCorruptError if it is damaged or not there."""
        raw = self.files.read(_snapshot_name(generation))
        if raw is None:
            raise self._damaged(_snapshot_name(generation), "is not there")
        return self._parsed(generation, raw)

    def facts(self, members: Mapping[str, StoredFile]) -> dict[str, AdapterFacts | AdapterError]:
        """Facts by digest, or what is wrong with them.

        Args:
            members: by digest, the FACTS of a manifest.
        """
        found: dict[str, AdapterFacts | AdapterError] = {}
        rest = iter(members.items())
        while some := list(islice(rest, _FACTS_AT_ONCE)):
            raw = self.files.read_all([name_of(digest, member) for digest, member in some])
            for digest, member in some:
                found[digest] = self._facts_in(raw[name_of(digest, member)], digest, member)
        return found

    def fetch(self, digest: str, files: Sequence[StoredFile], folder: Path, going_on: GoingOn) -> None:
        """Puts the files of a content into a folder, each of the size and hash that it must have.

        Args:
            going_on: asked now and then; False ends it with StoreUnreachableError.

        Raises:
            AdapterCorruptError: one is not there, or is not what was published.
            CapacityError: the disk does not take it.
        """
        for file in files:
            name = name_of(digest, file)
            size_bytes, found = self._fetch(name, file.size_bytes, folder / file.name, going_on)
            if size_bytes != file.size_bytes:
                raise self._damaged(name, f"does not have the {file.size_bytes} bytes that were published")
            if found != file.sha256:
                raise self._damaged(name, f"has SHA-256 {found} instead of {file.sha256}")

    def publish(self, snapshot: Snapshot) -> None:
        """Makes a snapshot the newest one, in one step.

        Raises:
            StaleEtagError: there is one of this number already.
        """
        raw = snapshot.manifest.to_json()
        sealed = raw + b"\n" + snapshot.sha256.encode() + b"\n"
        if not self.files.create(_snapshot_name(snapshot.generation), sealed):
            raise StaleEtagError(
                f"another push to {self.url} was faster: snapshot {snapshot.generation} is not this one. "
                "Nothing of this push is visible; run `quickchange store pull`, then push again",
                reason="PUSH_LOST",
            )

    def point_at(self, snapshot: Snapshot) -> None:
        """Lets readers begin with this snapshot, and removes very old ones."""
        self.files.put(_LATEST, f"{snapshot.generation} {snapshot.sha256}\n".encode())
        for generation in self._generations():
            if generation <= snapshot.generation - _KEPT_SNAPSHOTS:
                self.files.remove(_snapshot_name(generation))

    def _fetch(self, name: str, size_bytes: int, target: Path, going_on: GoingOn) -> tuple[int, str]:
        """Size and hash of what was written: no more than is wanted, and what comes first of too much."""
        hashed, written = sha256(), 0
        with disk_errors():
            sink = target.open("xb")
        with sink:
            try:
                for chunk in self.files.chunks(name):
                    if not going_on():
                        raise StoreUnreachableError(f"{name} was not fetched: the server is stopping")
                    written += len(chunk)
                    if written > size_bytes:
                        break
                    hashed.update(chunk)
                    with disk_errors():
                        sink.write(chunk)
            except FileNotFoundError:
                raise self._missing(name) from None
            with disk_errors():
                sink.flush()
        return written, hashed.hexdigest()

    def _hint(self) -> tuple[int, str] | None:
        raw = self.files.read(_LATEST)
        if raw is None:
            return None
        match = _HINT.fullmatch(raw)
        if match is None:
            raise self._damaged(_LATEST, "is damaged")
        return int(match[1]), match[2].decode()

    def _generations(self) -> list[int]:
        matches = (_SNAPSHOT.fullmatch(name) for name in self.files.names_in(_CATALOGUE))
        return [int(match[1]) for match in matches if match]

    def _parsed(self, generation: int, raw: bytes) -> Snapshot:
        name = _snapshot_name(generation)
        text, _, seal = raw.removesuffix(b"\n").rpartition(b"\n")
        if sha256(text).hexdigest().encode() != seal:
            raise self._damaged(name, "is damaged")
        try:
            return Snapshot(generation, seal.decode(), parse_manifest(text))
        except AdapterError as error:
            raise self._damaged(name, f"is of another version of this program ({error})") from None

    def _facts_in(
        self, raw: bytes | None, digest: str, member: StoredFile
    ) -> AdapterFacts | AdapterCorruptError:
        name = name_of(digest, member)
        if raw is None:
            return self._missing(name)
        if sha256(raw).hexdigest() != member.sha256:
            return self._damaged(name, "is damaged")
        try:
            return parse_facts(raw, digest)
        except AdapterError as error:
            return self._damaged(name, f"is of another version of this program ({error})")

    def _missing(self, name: str) -> AdapterCorruptError:
        """StoreUnreachableError is raised instead if nothing is there: a folder that is not mounted, say."""
        if self.files.read(_LATEST) is None:
            raise StoreUnreachableError(f"there is no store at {self.url}; is it mounted?")
        return self._damaged(name, "is not there")

    def _damaged(self, name: str, what: str) -> AdapterCorruptError:
        return AdapterCorruptError(
            f"{name} at {self.url} {what}; run `quickchange store push --verify` where the store is"
        )


def _snapshot_name(generation: int) -> str:
    return f"{_CATALOGUE}/{generation:08}.json"
