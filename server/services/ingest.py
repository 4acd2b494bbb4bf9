"""An adapter's way in: received, checked against the base, published. Knows messages, not the call."""

import asyncio
import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from adapters.errors import (
    CanaryMismatchError,
    InvalidAdapterError,
    UnsupportedAdapterError,
    WrongBaseError,
)
from adapters.facts import AdapterFacts, AdapterRecord
from adapters.report import ValidationReport
from adapters.store import AdapterStore
from quickchange.v1 import adapters_pb2
from server.config import GrpcSettings
from server.errors import DrainingError, InvalidRequestError
from server.metrics import Metrics
from server.services.admission import Admission
from server.services.statuses import reason_of
from server.services.uploads import (
    StagedUpload,
    TooManyUploadsError,
    UploadPlan,
    UploadStalledError,
    plan_of,
)
from server.services.workers import Workers

log = logging.getLogger(__name__)

Messages = AsyncIterator[adapters_pb2.UploadAdapterRequest]

_RETRY_AFTER_S = 1.0
_REFUSED_BY_A_CHECK = (InvalidAdapterError, UnsupportedAdapterError, WrongBaseError, CanaryMismatchError)


@dataclass(frozen=True, slots=True)
class Ingested:
    """A whole upload that passed every check; record is None if it was only to be validated."""

    plan: UploadPlan
    facts: AdapterFacts
    report: ValidationReport
    record: AdapterRecord | None
    created: bool


class UploadDesk:
    """Takes a few uploads at a time; nothing of one is visible before all of it is right."""

    def __init__(
        self,
        store: AdapterStore,
        admission: Admission,
        settings: GrpcSettings,
        metrics: Metrics,
        workers: Workers,
    ) -> None:
        self._store = store
        self._admission = admission
        self._settings = settings
        self._metrics = metrics
        self._workers = workers
        self._active = 0
        self._closed = False
        self._idle = asyncio.Event()
        self._idle.set()

    def close(self) -> None:
        """Refuses new uploads from now on."""
        self._closed = True

    async def wait_until_idle(self) -> None:
        """Returns when no upload is under way."""
        await self._idle.wait()

    async def take(self, messages: Messages) -> Ingested:
        """Receives one upload and publishes it.

        Raises:
            ServerError, AdapterError: and nothing of the upload is left.
        """
        self._enter()
        received = _Received()
        try:
            ingested = await self._receive(messages, received)
        except Exception as error:
            self._metrics.count_upload(reason_of(error), received.size_bytes)
            if isinstance(error, _REFUSED_BY_A_CHECK):
                self._metrics.count_validation_failure(reason_of(error))
            raise
        except asyncio.CancelledError:
            self._metrics.count_upload("CANCELLED", received.size_bytes)
            raise
        finally:
            self._leave()
        self._metrics.count_upload(_result_of(ingested), received.size_bytes)
        return ingested

    def _enter(self) -> None:
        if self._closed:
            raise DrainingError("the server is draining; upload to another one")
        if self._active >= self._settings.max_concurrent_uploads:
            raise TooManyUploadsError(
                f"{self._active} uploads are under way, which is the limit; try again later", _RETRY_AFTER_S
            )
        self._active += 1
        self._idle.clear()

    def _leave(self) -> None:
        self._active -= 1
        if not self._active:
            self._idle.set()

    async def _receive(self, messages: Messages, received: "_Received") -> Ingested:
        plan = await self._plan_from(messages)
        folder = await self._workers.run(self._store.new_staging)
        try:
            await self._write(messages, plan, folder, received)
            return await self._admission.admit(folder, partial(self._publish, plan, folder))
        finally:
            await self._workers.run(self._store.discard, folder)

    async def _plan_from(self, messages: Messages) -> UploadPlan:
        first = await self._next(messages)
        if first is None or first.WhichOneof("message") != "header":
            raise InvalidRequestError("header", "is missing; it must be the first message")
        return plan_of(first.header, self._settings.max_upload_bytes)

    async def _write(self, messages: Messages, plan: UploadPlan, folder: Path, received: "_Received") -> None:
        upload = await self._workers.run(StagedUpload, folder, plan)
        try:
            while (message := await self._next(messages)) is not None:
                if message.WhichOneof("message") != "chunk":
                    raise InvalidRequestError("chunk", "is missing; only chunks may follow the header")
                await self._workers.run(upload.write, message.chunk)
                received.size_bytes += len(message.chunk.data)
            await self._workers.run(upload.finish)
        finally:
            upload.abandon()

    async def _next(self, messages: Messages) -> adapters_pb2.UploadAdapterRequest | None:
        """The next message; None at the end of the stream."""
        try:
            async with asyncio.timeout(self._settings.upload_idle_timeout_s):
                return await anext(messages, None)
        except TimeoutError:
            raise UploadStalledError(
                f"nothing came for {self._settings.upload_idle_timeout_s:g} s; upload again"
            ) from None

    def _publish(
        self, plan: UploadPlan, folder: Path, facts: AdapterFacts, report: ValidationReport
    ) -> Ingested:
        """In a worker, once every check has passed: the one step that makes it visible."""
        if plan.validate_only:
            return Ingested(plan, facts, report, None, created=False)
        record, created = self._store.publish(
            plan.name,
            folder,
            facts,
            version=plan.version,
            labels=plan.labels,
            description=plan.description,
        )
        log.info("adapter published adapter=%s digest=%s created=%s", record.reference, facts.digest, created)
        return Ingested(plan, facts, report, record, created)


@dataclass(slots=True)
class _Received:
    size_bytes: int = 0


def _result_of(ingested: Ingested) -> str:
    if ingested.record is None:
        return "validated"
    return "created" if ingested.created else "unchanged"
