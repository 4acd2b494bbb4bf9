"""Published adapters: names and versions over content-addressed files. Knows no torch and no file format.

A publish becomes visible in one SQL transaction, after its files are durable and in place. So a process may
be killed at any point: it leaves the old state or the new, and left-overs that the next start removes.

Several processes of one machine may have a store open: SQLite puts their changes in order, and a content that
one of them uses (`hold`) is not removed by another.
"""

import contextlib
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self

from adapters.adoption import Adopted, adopt
from adapters.blobs import BlobFolder, disk_errors
from adapters.catalogue import Catalogue
from adapters.changes import ChangeLog
from adapters.errors import AdapterCorruptError, AdapterError
from adapters.facts import AdapterFacts, AdapterRecord, AdapterState, StoredFile
from adapters.lookup import (
    check_alias_is_at,
    check_etag,
    doomed,
    find,
    free_version,
    no_such_alias,
    no_such_content,
    same_content,
)
from adapters.manifest import ListedVersion
from adapters.names import (
    VersionOf,
    check_alias,
    check_description,
    check_digest,
    check_labels,
    check_name,
    check_version,
    parse_reference,
)
from adapters.quarantine import QuarantineFolder
from adapters.quota import StoreQuota
from adapters.recovery import fail, recover, remove_unused
from adapters.replica_mark import refuse_replica
from adapters.retention import Collection, RetentionPolicy, outdated
from adapters.retention import doomed as doomed_by
from adapters.rows import Content, Rows
from adapters.store_reader import NO_LABELS, StoreReader
from adapters.transaction import Transaction
from adapters.uploads import UploadShelf

__all__ = ["AdapterFacts", "AdapterRecord", "AdapterState", "AdapterStore", "StoredFile"]

_NO_LIMITS = StoreQuota()

Digests = list[str]


class AdapterStore(StoreReader):
    """A folder of adapters. Thread-safe; every method may touch the disk, so keep them off an event loop."""

    def __init__(self, root: Path, quota: StoreQuota = _NO_LIMITS) -> None:
        """Opens a store, or begins one, and puts right what a crash left.

        Attributes:
            root: the folder.
            uploads: those that are not whole yet; their files may be published from where they are.

        Raises:
            InvalidAdapterError: the folder holds copies of a store elsewhere.
            AdapterCorruptError: the catalogue cannot be read. A damaged adapter only becomes FAILED.
            CapacityError: the folder cannot be written.
        """
        self._claim(root)
        with disk_errors():
            root.mkdir(mode=0o700, parents=True, exist_ok=True)
            blobs = BlobFolder(root)
        try:
            self.uploads = UploadShelf(root)
            quarantine = QuarantineFolder(root)
            catalogue = Catalogue(root / "catalogue.sqlite3")
            self._put_right(catalogue, blobs, quarantine)
        except BaseException:
            blobs.close()
            raise
        super().__init__(root, catalogue, blobs, quarantine)
        self._quota = quota
        self.changes = ChangeLog(catalogue)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Removes what this process staged and lets go of the files."""
        self._catalogue.close()
        self._blobs.close()

    def new_staging(self) -> Path:
        """An empty folder to put an adapter's files in; give it to `publish` or `discard`."""
        return self._blobs.new_staging()

    def discard(self, staged: Path) -> None:
        """Removes a staging folder; nothing happens if it is gone already."""
        self._blobs.discard(staged)

    def publish(
        self,
        name: str,
        staged: Path,
        facts: AdapterFacts,
        *,
        version: int | None = None,
        labels: Mapping[str, str] = NO_LABELS,
        description: str = "",
    ) -> tuple[AdapterRecord, bool]:
        """Makes a checked adapter a version of a name: durable and visible at once, or not at all.

        The same content under the same name is one version: it is answered as it is, labels and all; if its
        files were damaged, these replace them.

        Args:
            staged: from `new_staging` or `uploads`; consumed by success, left to the caller by an error.
            facts: of exactly these files.
            version: None for the next one.

        Returns:
            The version, and whether it is new.

        Raises:
            AdapterExistsError: the fixed version has other content, or was passed already.
            AdapterCorruptError: the files are not those that `facts` were taken from.
            InvalidAdapterError: name, version, labels or description.
            CapacityError: the disk or a quota does not take it.
        """
        check_name(name)
        if version is not None:
            check_version(version)
        labels, description = check_labels(labels), check_description(description)
        files = self._seal(staged, facts)
        try:
            with self._catalogue.writing() as rows:
                existing = same_content(rows, name, version, facts.digest)
                number = existing.version if existing else free_version(rows, name, version)
                if existing is None:
                    growth_bytes = 0 if self._is_there(rows, facts.digest) else facts.size_bytes
                    self._check_quota(rows, name, facts.size_bytes, growth_bytes)
                self._keep(rows, staged, facts, files)
                if existing is None:
                    rows.add_version(name, number, facts.digest, labels, description)
                record = find(rows, VersionOf(name, number))
        except BaseException:
            self._drop_orphan(facts.digest)
            raise
        self._blobs.discard(staged)
        self._blobs.empty_trash()
        return record, existing is None

    def keep_unlisted(self, staged: Path, facts: AdapterFacts) -> bool:
        """Has a checked adapter's files in place under its digest, without a version: nobody can name it.

        `publish` finds them there; `remove_blob`, or else the next start, removes them again.

        Args:
            staged: from `new_staging`; its files stay for `publish`.

        Returns:
            Whether this content was not there before; if it was, somebody else sees to its end.

        Raises:
            AdapterCorruptError, CapacityError: as `publish`.
        """
        with self._catalogue.reading() as rows:
            is_new = rows.content(facts.digest) is None
        # What may have to replace damaged files of a published content is sealed. The rest lasts for moments,
        # and whoever goes on with an upload that broke must be able to write to it.
        files = self._checked(self._blobs.describe(staged), facts) if is_new else self._seal(staged, facts)
        linked = self._blobs.linked(staged)
        try:
            with self._catalogue.writing() as rows:
                self._keep(rows, linked, facts, files)
        except BaseException:
            self._drop_orphan(facts.digest)
            raise
        finally:
            self._blobs.discard(linked)
        return is_new

    def update(
        self,
        name: str,
        version: int,
        *,
        etag: str | None = None,
        set_aliases: Iterable[str] = (),
        remove_aliases: Iterable[str] = (),
        pinned: bool | None = None,
        labels: Mapping[str, str] | None = None,
        aliases_from: int | None = None,
    ) -> AdapterRecord:
        """Changes what points at a version or describes it, all or nothing.

        Args:
            etag: if given, the one the version must still have.
            set_aliases: taken from whichever version of this name had them.
            labels: replace all labels; None leaves them.
            aliases_from: if given, the version that must have each of set_aliases now; 0 for none.

        Raises:
            StaleEtagError, AdapterNotFoundError, InvalidAdapterError.
        """
        added = [check_alias(alias) for alias in set_aliases]
        removed = [check_alias(alias) for alias in remove_aliases]
        with self._catalogue.writing() as rows:
            record = find(rows, VersionOf(name, version))
            check_etag(record, etag)
            for alias in removed:
                if alias not in record.aliases:
                    raise no_such_alias(record, alias)
                rows.remove_alias(name, alias)
            for alias in added:
                check_alias_is_at(rows, name, alias, aliases_from)
                rows.set_alias(name, alias, version)
            if pinned is not None:
                rows.set_pinned(name, version, pinned)
            if labels is not None:
                rows.set_labels(name, version, check_labels(labels))
            return find(rows, VersionOf(name, version))

    def delete(self, reference: str, all_versions: bool = False, etag: str | None = None) -> Digests:
        """Takes versions out of the catalogue: no new request finds them.

        Returns:
            Contents that no version has any more. Their files stay until `remove_blob`, so that running
            requests can finish.

        Raises:
            InvalidAdapterError: an alias or digest, a bare name with several versions, an etag for several.
            StaleEtagError, AdapterNotFoundError.
        """
        parsed = parse_reference(reference)
        with self._catalogue.writing() as rows:
            records = doomed(rows, parsed, all_versions, etag)
            for record in records:
                rows.remove_version(record.name, record.version)
            digests = {record.facts.digest for record in records}
            return sorted(digest for digest in digests if not rows.is_referenced(digest))

    def remove_blob(self, digest: str) -> bool:
        """Removes the files of a content that no version has; nothing happens if one has it again.

        Returns:
            False if a process still uses them; they stay until this is called again, or a store is opened.
        """
        check_digest(digest)
        with disk_errors(), self._catalogue.writing() as rows:
            removed = remove_unused(rows, self._blobs, digest)
        self._blobs.empty_trash()
        return removed

    def collect(self, policy: RetentionPolicy, *, dry_run: bool) -> Collection:
        """Deletes the versions and the damaged files that a policy lets go; says what earlier deletions left.

        As after `delete`, the files of contents that have no version any more stay until `remove_blob`.

        Args:
            dry_run: changes nothing, and tells what would go.
        """
        now_s = time.time()
        with disk_errors(), self._catalogue.writing() as rows:
            away = {digest: (size, is_referenced) for digest, size, is_referenced in self._away(rows)}
            entries = (replace(e, size_bytes=0) if e.digest in away else e for e in rows.entries())
            versions = doomed_by(entries, policy, now_s)
            gone_bytes = sum(size for size, is_referenced in away.values() if not is_referenced)
            left_over_bytes = rows.unreferenced_bytes() - gone_bytes
            quarantined = outdated(self._quarantine.all(), policy, now_s)
            if not dry_run:
                for version in versions:
                    rows.remove_version(version.name, version.version)
                for entry in quarantined:
                    self._blobs.throw_away(self._quarantine.path_of(entry.place))
        self._blobs.empty_trash()
        return Collection(versions, left_over_bytes, quarantined)

    def recover(self) -> None:
        """Marks what is damaged, and removes what ended processes left and what nobody uses any more."""
        self._blobs.sweep()
        self._put_right(self._catalogue, self._blobs, self._quarantine)

    def adopt(
        self,
        staged: Mapping[str, tuple[Path, AdapterFacts]],
        versions: Sequence[ListedVersion],
        last_versions: Mapping[str, int],
        *,
        renumber: bool,
    ) -> tuple[Adopted, ...]:
        """Takes over versions of another store, all in one step or none; see adoption.py for the rules.

        Args:
            staged: by digest, contents that are not here: a folder from `new_staging`, consumed by success,
                and what was found out about exactly these files.

        Raises:
            AdapterExistsError, AdapterCorruptError, CapacityError.
        """
        sealed = {digest: self._seal(folder, facts) for digest, (folder, facts) in staged.items()}
        try:
            with self._catalogue.writing() as rows:
                for digest, (folder, facts) in staged.items():
                    self._keep(rows, folder, facts, sealed[digest])
                adopted = adopt(rows, versions, last_versions, renumber=renumber)
        except BaseException:
            for digest in staged:
                self._drop_orphan(digest)
            raise
        for folder, _ in staged.values():
            self._blobs.discard(folder)
        self._blobs.empty_trash()
        return adopted

    def mark_failed(self, digest: str, error: str) -> None:
        """Makes every version with this content FAILED, for a reason that its owner will read.

        Its files go to quarantine, now if nobody uses them, else with `put_away`.
        """
        with disk_errors(), self._catalogue.writing() as rows:
            content = rows.content(check_digest(digest))
            if content is None:
                raise no_such_content(digest)
            # What was said first explains what is seen later.
            error = error if content.state is AdapterState.READY else content.error
            fail(rows, self._blobs, self._quarantine, content, error)

    def put_away(self, digest: str) -> bool:
        """Moves the files of a FAILED content to quarantine; nothing happens if it is not FAILED.

        Returns:
            False if a process still uses them; they stay until this is called again, or a store is opened.
        """
        with disk_errors(), self._catalogue.writing() as rows:
            content = rows.content(check_digest(digest))
            if content is None or content.state is not AdapterState.FAILED:
                return True
            return fail(rows, self._blobs, self._quarantine, content, content.error)

    def check_quota(self, name: str, files: Sequence[StoredFile], shelved_bytes: int = 0) -> None:
        """Whether a version with these files would fit, beside what else is being uploaded.

        Args:
            shelved_bytes: of these files that are in `uploads` already.

        Raises:
            CapacityError: it would not; see StoreQuota.
        """
        size_bytes = sum(file.size_bytes for file in files)
        others_bytes = self.uploads.total_bytes() - shelved_bytes
        with self._catalogue.reading() as rows:
            known = rows.digests_of(files)
            if not any(rows.with_digest(digest, name) for digest in known):
                is_there = any(self._is_there(rows, digest) for digest in known)
                self._check_quota(rows, name, size_bytes, others_bytes + (0 if is_there else size_bytes))

    def check_changeable(self) -> None:
        """Raises ReadOnlyStoreError where versions are not published, changed or deleted; here they are."""

    def _claim(self, root: Path) -> None:
        refuse_replica(root)

    def _put_right(self, catalogue: Catalogue, blobs: BlobFolder, quarantine: QuarantineFolder) -> None:
        recover(catalogue, blobs, quarantine, fail)

    def _is_there(self, rows: Rows, digest: str) -> bool:
        return rows.content(digest) is not None and self._blobs.has(digest)

    def _check_quota(self, rows: Rows, name: str, size_bytes: int, growth_bytes: int) -> None:
        total_bytes = self._total_bytes(rows)
        self._quota.check(rows, name, size_bytes, total_bytes=total_bytes, growth_bytes=growth_bytes)

    def _seal(self, staged: Path, facts: AdapterFacts) -> tuple[StoredFile, ...]:
        return self._checked(self._blobs.seal(staged), facts)

    def _checked(self, files: tuple[StoredFile, ...], facts: AdapterFacts) -> tuple[StoredFile, ...]:
        if sum(file.size_bytes for file in files) != facts.size_bytes:
            raise AdapterCorruptError("the staged files changed after they were checked; upload them again")
        return files

    def _keep(
        self, rows: Transaction, staged: Path, facts: AdapterFacts, files: tuple[StoredFile, ...]
    ) -> None:
        """Has the content in place and listed as READY; keeps a sound blob that is there already."""
        known = rows.content(facts.digest)
        is_sound = (
            known is not None
            and known.state is AdapterState.READY
            and not self._blobs.fault_of(facts.digest, known.files)
        )
        if known is None or not is_sound:
            self._blobs.install(staged, facts.digest)
            rows.put_content(Content(facts, files, AdapterState.READY, ""))
        elif known.facts.base_fingerprint != facts.base_fingerprint:
            # The same content was checked again, against the base of today.
            rows.put_content(replace(known, facts=replace(facts, size_bytes=known.facts.size_bytes)))

    def _drop_orphan(self, digest: str) -> None:
        """After a failed publish: its blob is of no use unless an earlier one is listed."""
        with contextlib.suppress(AdapterError, OSError), self._catalogue.writing() as rows:
            if rows.content(digest) is None:
                self._blobs.take_out(digest)
        self._blobs.empty_trash()
