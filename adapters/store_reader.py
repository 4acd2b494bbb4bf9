"""What a store of adapters answers: from its catalogue, and where its files are. Changes neither."""

import contextlib
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from adapters.adoption import check_clashes
from adapters.blobs import BlobFolder, disk_errors
from adapters.catalogue import Catalogue
from adapters.errors import AdapterCorruptError, InvalidAdapterError
from adapters.facts import AdapterFacts, AdapterRecord, AdapterState, StoredFile
from adapters.files import BUNDLE_FILE
from adapters.leases import Lease
from adapters.lookup import find, no_such_content, read_token, token_after
from adapters.manifest import ListedVersion
from adapters.names import NewestOf, Reference, check_digest, is_visible, parse_reference
from adapters.quarantine import Quarantined, QuarantineFolder
from adapters.rows import Content, Entry, Rows

MAX_PAGE_SIZE = 1000
_HOLD_ATTEMPTS = 3
NO_LABELS: Mapping[str, str] = {}

Records = list[AdapterRecord]
Page = tuple[list[AdapterRecord], str]
Quarantine = list[Quarantined]


class StoreReader:
    """The half of a store that changes nothing. Thread-safe; every method may touch the disk."""

    def __init__(
        self, root: Path, catalogue: Catalogue, blobs: BlobFolder, quarantine: QuarantineFolder
    ) -> None:
        self.root, self._catalogue, self._blobs, self._quarantine = root, catalogue, blobs, quarantine

    def resolve(self, reference: str, tenant: str | None = None) -> AdapterRecord:
        """The version that a request for this reference gets now; "name" is the newest READY one.

        Args:
            tenant: for whom; what is another tenant's is not there. None sees everything.

        Raises:
            InvalidAdapterError: not a reference.
            AdapterNotFoundError: no such name, version, alias or digest.
            AdapterCorruptError: it is there, but FAILED.
        """
        parsed = parse_reference(reference)
        if isinstance(parsed, NewestOf) and is_visible(parsed.name, tenant):
            with self._catalogue.reading() as rows:
                ready = rows.newest(parsed.name, AdapterState.READY)
            if ready is not None:
                return ready
        record = self._found(parsed, tenant)
        if record.state is not AdapterState.READY:
            raise AdapterCorruptError(
                f"{record.reference} is {record.state}: {record.error}", reason="ADAPTER_FAILED"
            )
        return record

    def hold(self, reference: str, tenant: str | None = None) -> tuple[AdapterRecord, Lease | None]:
        """As `resolve`, and its files stay until the lease is released, whoever deletes the adapter.

        Returns:
            The lease is None if the files are not there; a load will say what is wrong with them.
        """
        for _ in range(_HOLD_ATTEMPTS):
            record = self.resolve(reference, tenant)
            lease = self._blobs.hold(record.facts.digest)
            if lease is not None:
                return record, lease
            # Removed since it was resolved, or replaced by a sound copy: the catalogue says which.
        return self.resolve(reference, tenant), None

    def keep(self, digest: str) -> Lease | None:
        """One more lease on a content; touches no file while another one lasts."""
        return self._blobs.hold(digest)

    def get(self, reference: str, tenant: str | None = None) -> AdapterRecord:
        """The version a reference names, whatever its state; "name" is the newest. Errors as `resolve`."""
        return self._found(parse_reference(reference), tenant)

    def versions(self, name: str) -> Records:
        """Every version of a name, in order; none if there is no such name."""
        with self._catalogue.reading() as rows:
            return rows.versions(name)

    def facts_of(self, digest: str) -> AdapterFacts:
        """Facts of a content, as long as its files are there: also after its last version was deleted."""
        return self._content(digest).facts

    def declared_base_of(self, digest: str) -> str | None:
        """The base that a content says it was made for; None if it does not say."""
        content = self._content(digest)
        is_told = any(file.name == BUNDLE_FILE for file in content.files)
        return content.facts.base_fingerprint if is_told else None

    def list(
        self,
        *,
        name: str | None = None,
        state: AdapterState | None = None,
        labels: Mapping[str, str] = NO_LABELS,
        tenant: str | None = None,
        page_size: int = 100,
        page_token: str = "",
    ) -> Page:
        """Versions by name and number, a page at a time, and the token of the next page; empty on the last.

        Args:
            labels: each must be there with this value.
            tenant: for whom; None sees everything.
            page_size: at least 1; more than 1000 are never given.
        """
        if page_size < 1:
            raise InvalidAdapterError(f"page_size {page_size} must be at least 1", reason="BAD_PAGE_SIZE")
        limit = min(page_size, MAX_PAGE_SIZE)
        with self._catalogue.reading() as rows:
            found = rows.page(
                after=read_token(page_token),
                name=name,
                state=state,
                labels=labels,
                tenant=tenant,
                limit=limit + 1,
            )
        if len(found) <= limit:
            return found, ""
        return found[:limit], token_after(found[limit - 1])

    def ready(self) -> Iterator[Entry]:
        """Every READY version, by name and number, without what was found out about its tensors."""
        after = ("", 0)
        while True:
            with self._catalogue.reading() as rows:  # a page at a time: others read in between
                page = list(rows.entries(after=after, limit=MAX_PAGE_SIZE))
            yield from (entry for entry in page if entry.state is AdapterState.READY)
            if len(page) < MAX_PAGE_SIZE:
                return
            after = (page[-1].name, page[-1].version)

    @contextlib.contextmanager
    def read_all(self) -> Iterator[Rows]:
        """All that is listed, from one moment; while the block runs, no process removes a content's files."""
        with self._blobs.holding_all(), self._catalogue.reading() as rows:
            yield rows

    def check_clashes(self, versions: Sequence[ListedVersion], *, renumber: bool) -> None:
        """Says now what `adopt` would say later: AdapterExistsError."""
        with self._catalogue.reading() as rows:
            check_clashes(rows, versions, renumber=renumber)

    def missing(self, digests: Iterable[str]) -> set[str]:
        """Those of the contents that are not here, or not READY."""
        with self._catalogue.reading() as rows:
            found = {digest: rows.content(digest) for digest in digests}
        return {d for d, content in found.items() if content is None or content.state != AdapterState.READY}

    def path_of(self, digest: str) -> Path:
        """The folder with a content's files, which never change; AdapterNotFoundError if there is none."""
        return self._blobs.path_of(digest)

    def verify(self, digest: str) -> None:
        """Reads a content's files again; AdapterCorruptError if a byte is not what was published."""
        self._blobs.verify(digest, self._content(digest).files)

    def free_bytes(self) -> int:
        """What the store's disk still takes."""
        with disk_errors():
            return shutil.disk_usage(self.root).free

    def total_bytes(self) -> int:
        """Bytes of published files, also of deleted versions until they are removed, and of damaged files."""
        with self._catalogue.reading() as rows:
            return self._total_bytes(rows)

    def bytes_of_tenant(self, tenant: str) -> int:
        """Bytes of all versions whose names are the tenant's."""
        with self._catalogue.reading() as rows:
            return rows.bytes_of_tenant(tenant)

    def has_version_of(self, name: str, files: Sequence[StoredFile]) -> bool:
        """Whether a version of this name has exactly these files, so that publishing them makes none."""
        with self._catalogue.reading() as rows:
            return any(rows.with_digest(digest, name) for digest in rows.digests_of(files))

    def quarantined(self) -> Quarantine:
        """Damaged files that were moved out of the way, the oldest first."""
        with disk_errors():
            return self._quarantine.all()

    def _total_bytes(self, rows: Rows) -> int:
        away_bytes = sum(size_bytes for _, size_bytes, _ in self._away(rows))
        return rows.total_bytes() - away_bytes + self._quarantine.total_bytes()

    def _away(self, rows: Rows) -> Iterator[tuple[str, int, bool]]:
        """Of the FAILED contents those whose files are lost or in quarantine; see Rows.failed."""
        return (failed for failed in rows.failed() if not self._blobs.has(failed[0]))

    def _content(self, digest: str) -> Content:
        with self._catalogue.reading() as rows:
            content = rows.content(check_digest(digest))
        if content is None:
            raise no_such_content(digest)
        return content

    def _found(self, parsed: Reference, tenant: str | None) -> AdapterRecord:
        with self._catalogue.reading() as rows:
            return find(rows, parsed, tenant)
