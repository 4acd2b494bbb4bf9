"""quickchange.v1.AdapterService: the catalogue and residency over the wire. Knows no formats of files."""

import logging
from contextlib import ExitStack, aclosing
from operator import gt
from typing import Any, BinaryIO, Final

import google_crc32c
import grpc.aio

from adapters.errors import InvalidAdapterError
from adapters.facts import AdapterRecord, AdapterState
from adapters.files import open_regular
from adapters.names import is_visible
from adapters.retention import RetentionPolicy
from adapters.tier import Whereabouts
from quickchange.v1 import adapters_pb2, adapters_pb2_grpc
from server.engine import Engine
from server.errors import InvalidRequestError
from server.services import convert, reports
from server.services.audit import Subject, audited, subjects_of, who_calls
from server.services.catalogue import Catalogue, Changes, check_own
from server.services.changes import ChangeFeed
from server.services.housekeeping import Housekeeper
from server.services.ingest import Sender, UploadDesk
from server.services.interceptors import caller
from server.services.workers import Workers
from server.tokens import Scope

log = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]

DEFAULT_PAGE_SIZE: Final = 100
MAX_PAGE_SIZE: Final = 1000
DOWNLOAD_CHUNK_BYTES: Final = 256 * 1024


class AdapterService(adapters_pb2_grpc.AdapterServiceServicer):
    """Adapters from upload to deletion."""

    def __init__(
        self,
        engine: Engine,
        catalogue: Catalogue,
        desk: UploadDesk,
        feed: ChangeFeed,
        housekeeper: Housekeeper,
        workers: Workers,
    ) -> None:
        self._engine = engine
        self._catalogue = catalogue
        self._desk = desk
        self._feed = feed
        self._housekeeper = housekeeper
        self._workers = workers

    async def UploadAdapter(
        self, request_iterator: Any, context: Context
    ) -> adapters_pb2.UploadAdapterResponse:
        known = caller()
        sender = Sender(who_calls(context), known.tenant, known.adapter_bytes)
        ingested = await self._desk.take(request_iterator, sender)
        if ingested.record is None:
            plan = ingested.plan
            adapter = convert.validated(plan.name, plan.labels, plan.description, ingested.facts)
        else:
            adapter = self._message(ingested.record)
        return adapters_pb2.UploadAdapterResponse(
            adapter=adapter, created=ingested.created, report=reports.report(ingested.report)
        )

    async def QueryUpload(
        self, request: adapters_pb2.QueryUploadRequest, context: Context
    ) -> adapters_pb2.QueryUploadResponse:
        offsets = await self._desk.committed(request.upload_id, caller().tenant)
        return adapters_pb2.QueryUploadResponse(committed_offsets=offsets)

    async def CancelUpload(
        self, request: adapters_pb2.CancelUploadRequest, context: Context
    ) -> adapters_pb2.CancelUploadResponse:
        await self._desk.cancel(request.upload_id, caller().tenant)
        return adapters_pb2.CancelUploadResponse()

    async def GetAdapter(
        self, request: adapters_pb2.GetAdapterRequest, context: Context
    ) -> adapters_pb2.GetAdapterResponse:
        record = await self._catalogue.get(request.adapter, tenant=caller().tenant)
        return adapters_pb2.GetAdapterResponse(adapter=self._message(record))

    async def ListAdapters(
        self, request: adapters_pb2.ListAdaptersRequest, context: Context
    ) -> adapters_pb2.ListAdaptersResponse:
        if request.page_size > MAX_PAGE_SIZE:
            raise InvalidRequestError("page_size", f"is {request.page_size}, at most {MAX_PAGE_SIZE}")
        records, next_token = await self._workers.run(
            self._catalogue.store.list,
            name=request.name if request.HasField("name") else None,
            state=_state_of(request),
            labels=dict(request.labels),
            tenant=caller().tenant,
            page_size=request.page_size or DEFAULT_PAGE_SIZE,
            page_token=request.page_token,
        )
        tiers = self._catalogue.tiers()
        return adapters_pb2.ListAdaptersResponse(
            adapters=[convert.adapter(record, tiers.get(record.facts.digest, "disk")) for record in records],
            next_page_token=next_token,
        )

    async def UpdateAdapter(
        self, request: adapters_pb2.UpdateAdapterRequest, context: Context
    ) -> adapters_pb2.UpdateAdapterResponse:
        changes, known = _changes_of(request), caller()
        with audited("update", who_calls(context), request.adapter) as change:
            if changes.pinned is not None:
                known.require(Scope.ADMIN, "pinning")
            record = await self._catalogue.update(request.adapter, changes, tenant=known.tenant)
            change.subjects = [_subject_of(record)]
        log.info("adapter updated adapter=%s digest=%s", record.reference, record.facts.digest)
        return adapters_pb2.UpdateAdapterResponse(adapter=self._message(record))

    async def DeleteAdapter(
        self, request: adapters_pb2.DeleteAdapterRequest, context: Context
    ) -> adapters_pb2.DeleteAdapterResponse:
        etag = request.etag if request.HasField("etag") else None
        with audited("delete", who_calls(context), request.adapter) as change:
            deleted = await self._catalogue.delete(
                request.adapter, all_versions=request.all_versions, etag=etag, tenant=caller().tenant
            )
            change.subjects = [_subject_of(record) for record in deleted]
        log.info("adapter deleted adapter=%r versions=%d", request.adapter, len(deleted))
        return adapters_pb2.DeleteAdapterResponse(deleted_versions=len(deleted))

    async def LoadAdapter(
        self, request: adapters_pb2.LoadAdapterRequest, context: Context
    ) -> adapters_pb2.LoadAdapterResponse:
        wanted = convert.tier_to_load(request.tier)
        tenant = caller().tenant
        with audited("load", who_calls(context), request.adapter) as change:
            async with self._catalogue.preparing(request.adapter, tenant=tenant) as record:
                named = _named(record)
                check_own(named.name, tenant)
                change.subjects = [_subject_of(named)]
                digest = named.facts.digest
                is_merged = self._catalogue.is_merged(digest)
                tier = "device" if is_merged else await self._engine.load(digest, wanted)
        return adapters_pb2.LoadAdapterResponse(adapter=convert.adapter(named, tier))

    async def UnloadAdapter(
        self, request: adapters_pb2.UnloadAdapterRequest, context: Context
    ) -> adapters_pb2.UnloadAdapterResponse:
        keep_on_host = convert.is_kept_on_host(request.tier)
        tenant = caller().tenant
        with audited("unload", who_calls(context), request.adapter) as change:
            record = await self._catalogue.get(request.adapter, tenant=tenant)
            check_own(record.name, tenant)
            change.subjects = [_subject_of(record)]
            digest = record.facts.digest
            if self._catalogue.is_merged(digest):
                tier: Whereabouts = "device"
            else:
                tier = await self._engine.unload(digest, keep_on_host=keep_on_host)
        return adapters_pb2.UnloadAdapterResponse(adapter=convert.adapter(record, tier))

    async def WatchAdapters(  # type: ignore[override]  # writes to the context, see StatusInterceptor
        self, request: adapters_pb2.WatchAdaptersRequest, context: Context
    ) -> None:
        known = caller()
        since = await self._feed.now()
        await context.send_initial_metadata(())  # says that no change is missed from here on
        async with aclosing(self._feed.events(since, send_initial=request.send_initial)) as events:
            async for event in events:
                known.check_standing()
                if is_visible(event.name, known.tenant):
                    await context.write(convert.adapter_event(event))

    async def DownloadAdapter(  # type: ignore[override]  # writes to the context, see StatusInterceptor
        self, request: adapters_pb2.DownloadAdapterRequest, context: Context
    ) -> None:
        with ExitStack() as open_files:
            async with self._catalogue.preparing(request.adapter, tenant=caller().tenant) as record:
                named = _named(record)
                offsets = _offsets_of(request, named)
                files = await self._workers.run(self._open, named, open_files)
            await context.write(adapters_pb2.DownloadAdapterResponse(header=self._download_header(named)))
            for index, (file, offset) in enumerate(zip(files, offsets, strict=True)):
                await self._workers.run(file.seek, offset)
                while data := await self._workers.run(file.read, DOWNLOAD_CHUNK_BYTES):
                    await context.write(_download_chunk(index, offset, data))
                    offset += len(data)

    async def CollectGarbage(
        self, request: adapters_pb2.CollectGarbageRequest, context: Context
    ) -> adapters_pb2.CollectGarbageResponse:
        policy = _policy_of(request, self._housekeeper.policy)
        with audited("collect", who_calls(context)) as change:
            collection = await self._catalogue.collect(policy, dry_run=request.dry_run)
            change.is_none = request.dry_run
            change.subjects = subjects_of(collection)
        log.info(
            "collected versions=%d freed_bytes=%d dry_run=%s",
            len(collection.versions),
            collection.freed_bytes,
            request.dry_run,
        )
        return convert.collection(collection)

    def _open(self, record: AdapterRecord, open_files: ExitStack) -> list[BinaryIO]:
        """Open files outlive a deletion, so the download is whole whatever happens meanwhile."""
        folder = self._catalogue.store.path_of(record.facts.digest)
        return [open_files.enter_context(open_regular(folder / file.name)) for file in record.files]

    def _download_header(self, record: AdapterRecord) -> adapters_pb2.DownloadHeader:
        files = [
            adapters_pb2.UploadFile(name=file.name, size_bytes=file.size_bytes, sha256=file.sha256)
            for file in record.files
        ]
        return adapters_pb2.DownloadHeader(adapter=self._message(record), files=files)

    def _message(self, record: AdapterRecord) -> adapters_pb2.Adapter:
        return convert.adapter(record, self._catalogue.tier_of(record.facts.digest))


def _subject_of(record: AdapterRecord) -> Subject:
    return Subject(record.reference, record.facts.digest)


def _named(record: AdapterRecord | None) -> AdapterRecord:
    if record is None:
        raise InvalidAdapterError("adapter is empty, which means the base; name an adapter")
    return record


def _state_of(request: adapters_pb2.ListAdaptersRequest) -> AdapterState | None:
    if not request.HasField("state"):
        return None
    known = {
        adapters_pb2.ADAPTER_STATE_READY: AdapterState.READY,
        adapters_pb2.ADAPTER_STATE_FAILED: AdapterState.FAILED,
    }
    if request.state not in known:
        raise InvalidRequestError("state", f"is {request.state}; adapters here are READY or FAILED")
    return known[request.state]


def _policy_of(request: adapters_pb2.CollectGarbageRequest, default: RetentionPolicy) -> RetentionPolicy:
    return RetentionPolicy(
        keep_versions=request.keep_versions if request.HasField("keep_versions") else default.keep_versions,
        min_age_s=(
            request.min_age.seconds + request.min_age.nanos / 1e9
            if request.HasField("min_age")
            else default.min_age_s
        ),
    )


def _changes_of(request: adapters_pb2.UpdateAdapterRequest) -> Changes:
    return Changes(
        etag=request.etag if request.HasField("etag") else None,
        set_aliases=tuple(request.set_aliases),
        remove_aliases=tuple(request.remove_aliases),
        pinned=request.pinned if request.HasField("pinned") else None,
        labels=dict(request.labels.values) if request.HasField("labels") else None,
        aliases_from=request.aliases_from if request.HasField("aliases_from") else None,
    )


def _offsets_of(request: adapters_pb2.DownloadAdapterRequest, record: AdapterRecord) -> list[int]:
    """Where each file begins to be sent."""
    offsets = list(request.committed_offsets) or [0] * len(record.files)
    sizes = [file.size_bytes for file in record.files]
    if len(offsets) != len(sizes) or any(map(gt, offsets, sizes)):
        raise InvalidRequestError(
            "committed_offsets",
            f"is {offsets}; the files of {record.name}@{record.version} have {sizes} bytes",
        )
    return offsets


def _download_chunk(index: int, offset: int, data: bytes) -> adapters_pb2.DownloadAdapterResponse:
    chunk = adapters_pb2.UploadChunk(
        file_index=index, write_offset=offset, data=data, crc32c=google_crc32c.value(data)
    )
    return adapters_pb2.DownloadAdapterResponse(chunk=chunk)
