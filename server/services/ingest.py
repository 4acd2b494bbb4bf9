"""An adapter's way in: received, checked against the base, published. Knows messages, not the call."""

import asyncio
import logging
from collections import OrderedDict
from dataclasses import dataclass
from functools import partial
from typing import Final, NamedTuple

from adapters.errors import (
    AdapterError,
    CanaryMismatchError,
    InvalidAdapterError,
    UnsupportedAdapterError,
    UploadOffsetError,
    WrongBaseError,
)
from adapters.facts import AdapterFacts
from adapters.report import ValidationReport
from adapters.store import AdapterStore
from adapters.uploads import shelf_key
from server.config import ServerSettings
from server.errors import (
    DrainingError,
    EngineDownError,
    InvalidRequestError,
    UploadAbortedError,
    UploadNotFoundError,
    UploadStateError,
)
from server.metrics import Metrics
from server.services.admission import Admission
from server.services.audit import Change, Subject, Who, audited
from server.services.catalogue import check_own
from server.services.drafts import Draft, Ingested, Parked, ResumableDraft, outcome_of
from server.services.inbox import Inbox, Messages, UploadStalledError
from server.services.places import Places
from server.services.replay import CanaryDelayedError
from server.services.room import Room
from server.services.statuses import reason_of
from server.services.upload_plan import UploadPlan, check_upload_id, plan_of
from server.services.uploads import ChunkCorruptError, UploadIncompleteError
from server.services.workers import Workers

log = logging.getLogger(__name__)

_REFUSED_BY_A_CHECK: Final = (
    InvalidAdapterError,
    UnsupportedAdapterError,
    WrongBaseError,
    CanaryMismatchError,
)
_CUT: Final = (
    asyncio.CancelledError,
    UploadStalledError,
    UploadAbortedError,
    UploadOffsetError,
    UploadIncompleteError,
    ChunkCorruptError,
    CanaryDelayedError,
    DrainingError,
    EngineDownError,
)
"""What breaks an upload on its way, or keeps this server from deciding on it at its end. The bytes are sound,
and a resumable one keeps them: none is sent twice because a server was busy or restarted."""

_OPERATOR: Final = ""  # owner of the uploads that are no tenant's
_LONGEST_SWEEP_S: Final = 60.0


class Sender(NamedTuple):
    """Whose upload it is.

    Attributes:
        tenant: whose adapters these may be; None for any.
        adapter_bytes: what the tenant may have in all; None is no limit.
    """

    who: Who
    tenant: str | None
    adapter_bytes: int | None


class UploadDesk:
    """Takes a few uploads at a time; nothing of one is visible before all of it is right."""

    def __init__(
        self,
        store: AdapterStore,
        admission: Admission,
        settings: ServerSettings,
        metrics: Metrics,
        workers: Workers,
    ) -> None:
        self._store = store
        self._admission = admission
        self._settings = settings.grpc
        self._metrics = metrics
        self._workers = workers
        self._places = Places(settings.grpc.max_concurrent_uploads)
        self._room = Room(store, settings.store.reserve_bytes)
        self._parked: OrderedDict[str, Parked] = OrderedDict()

    def close(self) -> None:
        """Refuses new uploads from now on."""
        self._places.close()

    async def wait_until_idle(self) -> None:
        """Returns when no upload is under way."""
        await self._places.wait_until_idle()

    async def sweep(self) -> None:
        """Removes what was kept for resuming and never was, until it is cancelled."""
        settings = self._settings
        while True:
            try:
                count = await self._workers.run(
                    self._store.uploads.sweep, settings.upload_resume_ttl_s, settings.max_resumable_uploads
                )
            except (OSError, AdapterError):
                log.exception("uploads that broke are not removed; trying again")
            else:
                if count:
                    log.info("uploads given up count=%d", count)
            await asyncio.sleep(min(max(settings.upload_resume_ttl_s / 4, 0.1), _LONGEST_SWEEP_S))

    async def take(self, messages: Messages, sender: Sender) -> Ingested:
        """Receives one upload and publishes it.

        Raises:
            ServerError, AdapterError: nothing of the upload is visible. If it can be resumed and broke on its
                way, its bytes stay for a while; otherwise nothing is left.
        """
        received = _Received()
        try:
            with audited("upload", sender.who) as change:
                ingested = await self._receive(messages, received, sender, change)
                change.is_none = ingested.record is None  # it was only to be validated
                change.outcome = received.result or _result_of(ingested)
        except Exception as error:
            self._metrics.count_upload(reason_of(error), received.size_bytes)
            if isinstance(error, _REFUSED_BY_A_CHECK):
                self._metrics.count_validation_failure(reason_of(error))
            raise
        except asyncio.CancelledError:
            self._metrics.count_upload("CANCELLED", received.size_bytes)
            raise
        self._metrics.count_upload(received.result or _result_of(ingested), received.size_bytes)
        return ingested

    async def committed(self, upload_id: str, tenant: str | None) -> tuple[int, ...]:
        """Durable bytes of each file of an upload, in the order of its header.

        Raises:
            InvalidRequestError, UploadNotFoundError
        """
        return await self._workers.run(self._committed, self._key_of(upload_id, tenant), upload_id)

    async def cancel(self, upload_id: str, tenant: str | None) -> None:
        """Ends an upload and removes its bytes.

        Raises:
            InvalidRequestError, UploadNotFoundError
            UploadStateError: it is published already.
            UploadAbortedError: another process is receiving it.
        """
        key = self._key_of(upload_id, tenant)
        self._places.stop(key, UploadAbortedError(f"upload {upload_id} was cancelled", "UPLOAD_CANCELLED"))
        async with self._places.turn(key):
            self._parked.pop(key, None)
            await self._workers.run(self._remove, key, upload_id)

    def _committed(self, key: str, upload_id: str) -> tuple[int, ...]:
        shelved = self._store.uploads.find(key)
        if shelved is None or (shelved.outcome and outcome_of(self._store, shelved.outcome) is None):
            raise _not_found(upload_id)
        return shelved.offsets

    def _key_of(self, upload_id: str, tenant: str | None) -> str:
        return shelf_key(check_upload_id(upload_id, "upload_id"), tenant or _OPERATOR)

    def _remove(self, key: str, upload_id: str) -> None:
        place = self._store.uploads.take(key)
        if place is None:
            raise UploadAbortedError(f"upload {upload_id} is received by another process", "UPLOAD_BUSY")
        try:
            shelved = place.read()
            if shelved is None:
                place.remove()
                raise _not_found(upload_id)
            if shelved.outcome is not None:
                raise UploadStateError(
                    f"upload {upload_id} is published already; delete that version instead", "UPLOAD_COMPLETE"
                )
            place.remove()
        finally:
            place.release()

    async def _receive(
        self, messages: Messages, received: "_Received", sender: Sender, change: Change
    ) -> Ingested:
        self._places.check_open()
        settings = self._settings
        inbox = Inbox(messages, settings.upload_idle_timeout_s, settings.upload_min_bytes_per_s)
        plan = await self._plan_from(inbox)
        change.subjects = [Subject(plan.name if plan.version is None else f"{plan.name}@{plan.version}")]
        check_own(plan.name, sender.tenant)
        if not plan.validate_only:
            self._store.check_changeable()
        is_resumable = plan.upload_id and settings.upload_resume_ttl_s
        key = shelf_key(plan.upload_id, sender.tenant or _OPERATOR) if is_resumable else None
        async with self._places.taken(key, inbox):
            if key is None:
                ingested = await self._fill(Draft(self._store, plan), inbox, received, sender)
            else:
                draft = ResumableDraft(self._store, plan, key, self._parked.pop(key, None))
                try:
                    ingested = await self._fill(draft, inbox, received, sender)
                finally:
                    self._park(key, draft)
        if ingested.record is not None:
            change.subjects = [Subject(ingested.record.reference, ingested.facts.digest)]
        return ingested

    async def _plan_from(self, inbox: Inbox) -> UploadPlan:
        first = await inbox.next()
        if first is None or first.WhichOneof("message") != "header":
            raise InvalidRequestError("header", "is missing; it must be the first message")
        return plan_of(first.header, self._settings.max_upload_bytes)

    async def _fill(self, draft: Draft, inbox: Inbox, received: "_Received", sender: Sender) -> Ingested:
        run = self._workers.run
        with self._room.counting(draft):
            try:
                earlier = await run(draft.open)
                if earlier is not None:
                    received.result = "repeated"
                    return earlier
                await run(self._room.admit, draft, sender.adapter_bytes)
                await self._write(draft, inbox, received)
                return await self._admission.admit(draft.folder, partial(self._publish, draft))
            except _CUT:
                await run(draft.keep)
                raise
            except BaseException:
                await run(draft.discard)
                raise
            finally:
                await run(draft.close)

    async def _write(self, draft: Draft, inbox: Inbox, received: "_Received") -> None:
        while (message := await inbox.next()) is not None:
            if message.WhichOneof("message") != "chunk":
                raise InvalidRequestError("chunk", "is missing; only chunks may follow the header")
            await self._workers.run(self._room.check)
            received.size_bytes += len(message.chunk.data)  # before: a cut may come while it is written
            await self._workers.run(draft.write, message.chunk)
        await self._workers.run(draft.finish)

    def _park(self, key: str, draft: ResumableDraft) -> None:
        """Remembers digests of the latest uploads that broke."""
        if draft.parked is not None:
            self._parked[key] = draft.parked
            while len(self._parked) > self._settings.max_resumable_uploads:
                self._parked.popitem(last=False)

    def _publish(self, draft: Draft, facts: AdapterFacts, report: ValidationReport) -> Ingested:
        """In a worker, once every check has passed: the one step that makes it visible."""
        plan = draft.plan
        if plan.validate_only:
            draft.discard()
            return Ingested(plan, facts, report, None, created=False)
        record, created = self._store.publish(
            plan.name,
            draft.folder,
            facts,
            version=plan.version,
            labels=plan.labels,
            description=plan.description,
        )
        ingested = Ingested(plan, facts, report, record, created)
        draft.published(ingested)
        log.info("adapter published adapter=%s digest=%s created=%s", record.reference, facts.digest, created)
        return ingested


@dataclass(slots=True)
class _Received:
    size_bytes: int = 0
    result: str = ""
    """Of an upload that ended well in an unusual way."""


def _result_of(ingested: Ingested) -> str:
    if ingested.record is None:
        return "validated"
    return "created" if ingested.created else "unchanged"


def _not_found(upload_id: str) -> UploadNotFoundError:
    return UploadNotFoundError(
        f"there is no upload {upload_id}, or no longer; send UploadAdapter from the start"
    )
