"""A copy of a store at a URL: the whole catalogue, and the files that were needed so far. Knows no requests.

To everybody who reads it is a store. It changes by `refresh` alone, in one transaction for each snapshot, and
files come by `fetch`, whole and checked, or not at all. What is listed may have no files yet: `hold` gives no
lease then.
"""

import logging
from hashlib import sha256
from pathlib import Path
from typing import Any, NoReturn

from adapters.blobs import BlobFolder
from adapters.catalogue import Catalogue
from adapters.errors import (
    AdapterCorruptError,
    CapacityError,
    ReadOnlyStoreError,
    StoreUnreachableError,
)
from adapters.facts import AdapterState, StoredFile
from adapters.fetching import fetch_content
from adapters.lookup import no_such_content
from adapters.manifest import FACTS, Manifest, facts_json
from adapters.mirror import files_of, mirror
from adapters.quarantine import QuarantineFolder
from adapters.recovery import recover
from adapters.remote import GoingOn, RemotePlace, Snapshot
from adapters.replica_mark import claim_replica, mark_replica
from adapters.rows import Content, Rows
from adapters.store import AdapterStore
from adapters.transaction import Transaction

log = logging.getLogger(__name__)


def _drop(
    rows: Transaction, blobs: BlobFolder, quarantine: QuarantineFolder, content: Content, error: str
) -> None:
    """Files that are missing or not whole are fetched when they are needed."""
    blobs.take_out(content.facts.digest)


class ReplicaStore(AdapterStore):
    """A folder of copies. Several processes of one machine may share it.

    Attributes:
        generation: of the snapshot that it shows; 0 if it never had one.
    """

    def __init__(self, root: Path, place: RemotePlace, *, reserve_bytes: int = 0) -> None:
        """
        Args:
            reserve_bytes: of the disk, which copies leave free.

        Raises:
            InvalidAdapterError: the folder is a store, or holds copies of another one.
            AdapterCorruptError, CapacityError: as any store.
        """
        self.generation = claim_replica(root, place.url)
        self.place = place
        self._reserve_bytes = reserve_bytes
        self._snapshot: Snapshot | None = None
        super().__init__(root)

    def refresh(self) -> bool:
        """Takes the newest snapshot over; whether it is another one than before.

        What was FAILED is given another chance by a new snapshot, and by a start.

        Raises:
            StoreUnreachableError: it cannot be read, or is not there.
            AdapterCorruptError: it is damaged.
        """
        snapshot = self.place.latest(self._snapshot)
        if snapshot is None:
            raise StoreUnreachableError(
                f"there is no store at {self.place.url}; publish one with `quickchange store push`"
            )
        if self._snapshot is not None and snapshot.is_the_one(self._snapshot):
            return False
        learned = self.place.facts(self._to_learn(snapshot.manifest))
        with self._catalogue.writing() as rows:
            listed = {holding.digest for holding in rows.holdings()} | learned.keys()
            if removed := snapshot.manifest.contents.keys() - listed:
                raise no_such_content(removed.pop())  # since it was looked for; the next refresh looks again
            mirror(rows, snapshot.manifest, learned)
        mark_replica(self.root, self.place.url, snapshot.generation)
        self._snapshot, self.generation = snapshot, snapshot.generation
        return True

    def fetch(self, digest: str, going_on: GoingOn = lambda: True) -> None:
        """Has the files of a content here; nothing happens if they are.

        Args:
            going_on: asked now and then; False ends it with StoreUnreachableError.

        Raises:
            AdapterNotFoundError: no version has it.
            AdapterCorruptError: they are not at the URL, or not what was published; its versions are FAILED.
            StoreUnreachableError, CapacityError: nothing changed.
        """
        content = self._content(digest)
        if content.state is not AdapterState.READY or not self._blobs.fault_of(digest, content.files):
            return
        self._check_room(content)
        staged = self.new_staging()
        try:
            fetch_content(self.place, content.facts, content.files, staged, going_on)
            self._blobs.seal(staged)
            self._install(digest, staged, content)
        except AdapterCorruptError as error:
            log.error("adapter not fetched digest=%s: %s", digest, error)
            super().mark_failed(digest, str(error))
            raise
        finally:
            self.discard(staged)
        log.info("adapter fetched digest=%s bytes=%d", digest, content.facts.size_bytes)

    def mark_failed(self, digest: str, error: str) -> None:
        """The copy is damaged: it goes, and whoever needs it next has it fetched again."""
        log.warning("copy of an adapter dropped digest=%s: %s", digest, error)
        with self._catalogue.writing():
            self._blobs.take_out(digest)
        self._blobs.empty_trash()

    def total_bytes(self) -> int:
        """Bytes of the files that are here."""
        here = set(self._blobs.digests())
        with self._catalogue.reading() as rows:
            return sum(
                file.size_bytes
                for holding in rows.holdings()
                if holding.digest in here
                for file in holding.files
            )

    def check_changeable(self) -> NoReturn:
        """Always raises ReadOnlyStoreError."""
        raise ReadOnlyStoreError(
            f"this server's adapters are those at {self.place.url}, and are changed there: change the store "
            "that is published, then run `quickchange store push`"
        )

    def publish(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raises ReadOnlyStoreError, as every other change."""
        self.check_changeable()

    def update(self, *args: Any, **kwargs: Any) -> NoReturn:
        """See `publish`."""
        self.check_changeable()

    def delete(self, *args: Any, **kwargs: Any) -> NoReturn:
        """See `publish`."""
        self.check_changeable()

    def collect(self, *args: Any, **kwargs: Any) -> NoReturn:
        """See `publish`."""
        self.check_changeable()

    def adopt(self, *args: Any, **kwargs: Any) -> NoReturn:
        """See `publish`."""
        self.check_changeable()

    def _claim(self, root: Path) -> None:
        """It was claimed before anything else."""

    def _put_right(self, catalogue: Catalogue, blobs: BlobFolder, quarantine: QuarantineFolder) -> None:
        recover(catalogue, blobs, quarantine, _drop)

    def _to_learn(self, manifest: Manifest) -> dict[str, StoredFile]:
        """The facts to read: of contents that are new here, or changed, or FAILED."""
        before = self._snapshot.manifest.contents if self._snapshot else {}
        with self._catalogue.reading() as rows:
            ready = {holding.digest for holding in rows.holdings() if holding.state is AdapterState.READY}
            return {
                digest: next(member for member in members if member.name == FACTS)
                for digest, members in manifest.contents.items()
                if digest not in ready
                or (before.get(digest) != members and not _is_known(rows, digest, members))
            }

    def _check_room(self, content: Content) -> None:
        free_bytes = self.free_bytes()
        if free_bytes - content.facts.size_bytes < self._reserve_bytes:
            raise CapacityError(
                f"{content.facts.size_bytes} bytes are to come, and {free_bytes} are free on the disk of the "
                f"copies, which keeps {self._reserve_bytes} in reserve; make room",
                reason="DISK_RESERVE",
            )

    def _install(self, digest: str, staged: Path, fetched: Content) -> None:
        with self._catalogue.writing() as rows:
            known = rows.content(digest)
            if known is None or known.files != fetched.files:
                raise no_such_content(digest)  # a refresh took it away meanwhile
            if self._blobs.fault_of(digest, known.files):
                self._blobs.install(staged, digest)
        self._blobs.empty_trash()


def _is_known(rows: Rows, digest: str, members: tuple[StoredFile, ...]) -> bool:
    """Whether a content is listed as the members say."""
    content = rows.content(digest)
    if content is None or content.files != files_of(members):
        return False
    facts = next(member for member in members if member.name == FACTS)
    return sha256(facts_json(content.facts)).hexdigest() == facts.sha256
