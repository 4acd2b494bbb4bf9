"""One upload in the making: where its bytes are, and what stays of it after a cut. Knows no calls.

Every method blocks; one thread at a time.
"""

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from adapters.blobs import disk_errors
from adapters.durable import sync_folder
from adapters.errors import AdapterNotFoundError, CapacityError
from adapters.facts import AdapterFacts, AdapterRecord
from adapters.report import ValidationReport, report_from
from adapters.store import AdapterStore
from adapters.uploads import ShelfPlace, Shelved
from quickchange.v1 import adapters_pb2
from server.config import MIB
from server.errors import UploadAbortedError, UploadStateError
from server.services.upload_plan import UploadPlan
from server.services.uploads import Received, StagedUpload

log = logging.getLogger(__name__)

SAVE_EVERY_BYTES: Final = 16 * MIB
"""The most that a killed process costs the uploader; each save waits for the disk."""


@dataclass(frozen=True, slots=True)
class Ingested:
    """A whole upload that passed every check; record is None if it was only to be validated."""

    plan: UploadPlan
    facts: AdapterFacts
    report: ValidationReport
    record: AdapterRecord | None
    created: bool


@dataclass(frozen=True, slots=True)
class Parked:
    """Digests of a resumable upload between two streams, so that its bytes need not be read again.

    Attributes:
        mark: of the save that they belong to; another process may have gone on meanwhile.
    """

    mark: str
    received: Received


class Draft:
    """An upload that cannot be resumed: all of it goes with its stream."""

    def __init__(self, store: AdapterStore, plan: UploadPlan) -> None:
        self._store = store
        self.plan = plan
        self._folder: Path | None = None
        self._staged: StagedUpload | None = None

    @property
    def folder(self) -> Path:
        """Where the files are."""
        assert self._folder is not None
        return self._folder

    @property
    def remaining_bytes(self) -> int:
        """What is still to come."""
        return self.plan.size_bytes if self._staged is None else self._staged.remaining_bytes

    @property
    def shelved_bytes(self) -> int:
        """What of it is on the shelf."""
        return 0

    def open(self) -> Ingested | None:
        """Makes it ready for chunks.

        Returns:
            What became of it, if it was published by an earlier stream.

        Raises:
            UploadStateError, UploadAbortedError, CapacityError
        """
        self._folder = self._store.new_staging()
        self._staged = StagedUpload(self._folder, self.plan.files)
        return None

    def write(self, chunk: adapters_pb2.UploadChunk) -> None:
        """Errors as StagedUpload.write."""
        self._open_files.write(chunk)

    def finish(self) -> None:
        """Checks that each file is whole; errors as StagedUpload.finish."""
        self._open_files.finish()

    def published(self, ingested: Ingested) -> None:
        """Notes what became of it: its files are in the store now."""
        self.discard()

    def keep(self) -> None:
        """Ends it after a cut; what can be gone on with stays."""
        self.discard()

    def discard(self) -> None:
        """Removes it, if there is anything of it; harmless to repeat."""
        if self._staged is not None:
            self._staged.close()
        if self._folder is not None:
            self._store.discard(self._folder)

    def close(self) -> None:
        """Lets go of what a process holds; harmless to repeat."""
        if self._staged is not None:
            self._staged.close()

    @property
    def _open_files(self) -> StagedUpload:
        assert self._staged is not None
        return self._staged


class ResumableDraft(Draft):
    """An upload whose bytes stay on the shelf when its stream breaks.

    Args:
        key: its place on the shelf.
        parked: as `keep` of an earlier stream left it; None if there was none, or it is forgotten.

    Attributes:
        parked: for the next stream, once `keep` was called.
    """

    def __init__(self, store: AdapterStore, plan: UploadPlan, key: str, parked: Parked | None) -> None:
        super().__init__(store, plan)
        self.parked: Parked | None = None
        self._key = key
        self._earlier = parked
        self._place: ShelfPlace | None = None
        self._is_ours = False
        """The place holds nothing but this very upload."""

    @property
    def shelved_bytes(self) -> int:
        return self.plan.size_bytes - self.remaining_bytes

    def open(self) -> Ingested | None:
        self._place = self._store.uploads.take(self._key)
        if self._place is None:
            raise UploadAbortedError(
                f"upload {self.plan.upload_id} is being received by another process; try again", "UPLOAD_BUSY"
            )
        shelved = self._place.read()
        if shelved is not None:
            self._check_same(shelved)
        self._is_ours = True
        if shelved is not None and shelved.outcome is not None:
            outcome = outcome_of(self._store, shelved.outcome)
            if outcome is not None:
                return Ingested(
                    self.plan, outcome.record.facts, outcome.report, outcome.record, outcome.created
                )
            shelved = None  # what it had become was deleted
        received = self._received(shelved)
        self._folder = self._place.files
        self._staged = StagedUpload(self._folder, self.plan.files, received)
        with disk_errors():
            sync_folder(self._folder)
        return None

    def write(self, chunk: adapters_pb2.UploadChunk) -> None:
        super().write(chunk)
        if self._open_files.unsynced_bytes >= SAVE_EVERY_BYTES:
            self._save()

    def published(self, ingested: Ingested) -> None:
        try:
            sizes = tuple(file.size_bytes for file in self.plan.files)
            self._shelf_place.finish(sizes, _outcome_text(ingested))
        except CapacityError as error:
            log.warning("upload forgotten, though published upload_id=%s: %s", self.plan.upload_id, error)
            self.discard()
        self.close()
        self._staged = None  # nothing is left to be kept

    def keep(self) -> None:
        if self._staged is None:
            self.close()
            return
        try:
            self.parked = Parked(self._save(), self._staged.received())
        except CapacityError as error:
            log.warning("upload not kept upload_id=%s: %s", self.plan.upload_id, error)
            self.discard()
        self.close()

    def discard(self) -> None:
        if self._staged is not None:
            self._staged.close()
        if self._place is not None and self._is_ours:
            self._place.remove()
            self._place = None
        self.close()

    def close(self) -> None:
        super().close()
        if self._place is not None:
            self._place.release()

    def _check_same(self, shelved: Shelved) -> None:
        differences = self.plan.differences(shelved.plan)
        if differences:
            raise UploadStateError(
                f"upload {self.plan.upload_id} was begun with another {', '.join(differences)}; send the "
                "header that it was begun with, or choose another upload_id",
                "UPLOAD_MISMATCH",
            )

    def _received(self, shelved: Shelved | None) -> Received:
        if shelved is None:
            self._shelf_place.begin(self.plan.to_json(), len(self.plan.files))
            return Received((0,) * len(self.plan.files))
        if self._earlier is not None and self._earlier.mark == shelved.mark:
            return self._earlier.received
        return Received(shelved.offsets)

    def _save(self) -> str:
        self._open_files.sync()
        return self._shelf_place.save(self._open_files.received().offsets)

    @property
    def _shelf_place(self) -> ShelfPlace:
        assert self._place is not None
        return self._place


@dataclass(frozen=True, slots=True)
class Published:
    """What an upload that is over became, as its uploader was told then."""

    record: AdapterRecord
    report: ValidationReport
    created: bool


def outcome_of(store: AdapterStore, text: str) -> Published | None:
    """What an upload that is over became; None if that was deleted since."""
    outcome = json.loads(text)
    try:
        record = store.get(outcome["reference"])
    except AdapterNotFoundError:
        return None
    if record.facts.digest != outcome["digest"]:
        return None
    return Published(record, report_from(outcome["report"]), outcome["created"])


def _outcome_text(ingested: Ingested) -> str:
    assert ingested.record is not None
    return json.dumps(
        {
            "reference": ingested.record.reference,
            "digest": ingested.facts.digest,
            "report": asdict(ingested.report),
            "created": ingested.created,
        }
    )
