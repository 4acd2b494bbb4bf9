"""The adapter store as the services use it: off the event loop, and in step with what the engine holds.

Knows neither messages of the wire nor files' contents.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass

from adapters.bundle import Bundle, read_bundle
from adapters.errors import AdapterError
from adapters.facts import AdapterRecord, AdapterState
from adapters.store import MAX_PAGE_SIZE, AdapterStore
from server.engine import Engine
from server.metrics import OTHER_LABEL, ResidentAdapter
from server.services.workers import Workers

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Changes:
    """What is to change about a version; None leaves a thing as it is."""

    etag: str | None
    set_aliases: tuple[str, ...]
    remove_aliases: tuple[str, ...]
    pinned: bool | None
    labels: Mapping[str, str] | None


class Catalogue:
    """Resolves references, and lets an adapter go only when nobody needs it any more; in one event loop."""

    def __init__(self, store: AdapterStore, engine: Engine, workers: Workers) -> None:
        self.store = store
        self._engine = engine
        self._workers = workers
        self._preparing: set[asyncio.Future[None]] = set()
        self._removals: set[asyncio.Task[None]] = set()
        self._names: dict[str, str] = {}

    async def usable(self, reference: str) -> AdapterRecord:
        """The READY version that a request for this reference gets now."""
        record = await self._workers.run(self.store.resolve, reference)
        self._names[record.facts.digest] = record.name
        return record

    async def get(self, reference: str) -> AdapterRecord:
        """The version that a reference names, in any state."""
        return await self._workers.run(self.store.get, reference)

    async def chat_template_of(self, record: AdapterRecord) -> str | None:
        """The template that the adapter brought; None if it brought none."""
        bundle = await self._workers.run(self._bundle_of, record.facts.digest)
        return bundle.chat_template if bundle else None

    @asynccontextmanager
    async def preparing(self, reference: str) -> AsyncIterator[AdapterRecord | None]:
        """The adapter of a request that is not submitted yet; None for an empty reference, which is the base.

        While the block runs, a deletion waits, so that what was resolved can also be loaded.
        """
        over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._preparing.add(over)
        try:
            yield await self.usable(reference) if reference else None
        finally:
            self._preparing.discard(over)
            over.set_result(None)

    async def update(self, reference: str, changes: Changes) -> AdapterRecord:
        """The version after the changes, which come all or none."""
        record = await self._workers.run(self._update, reference, changes)
        if changes.pinned is not None:
            await self._sync_pin(record.facts.digest)
        return record

    async def delete(self, reference: str, *, all_versions: bool, etag: str | None) -> int:
        """Takes versions away from new requests, and their bytes away once no request uses them; how many."""
        doomed, orphans = await self._workers.run(self._delete, reference, all_versions, etag)
        for digest in {record.facts.digest for record in doomed if record.pinned}:
            await self._sync_pin(digest)
        for digest in orphans:
            task = asyncio.create_task(self._remove(digest))
            self._removals.add(task)
            task.add_done_callback(self._removals.discard)
        return len(doomed)

    async def _remove(self, digest: str) -> None:
        try:
            # Whoever resolved it before the deletion has submitted by then, and the engine knows of it.
            if self._preparing:
                await asyncio.wait(self._preparing)
            await self._engine.forget(digest)
            await self._workers.run(self.store.remove_blob, digest)
            self._names.pop(digest, None)
            log.info("adapter removed digest=%s", digest)
        except Exception:
            log.exception("adapter not removed digest=%s; the next start does it", digest)

    async def apply_pins(self) -> None:
        """Tells the engine which adapters are pinned, after a start, and has them loaded."""
        records = [record for record in await self._workers.run(self.all_records) if record.pinned]
        for record in records:
            self._names[record.facts.digest] = record.name
            await self._engine.pin(record.facts.digest, True)
        for record in records:
            await self._load_pinned(record)

    async def _load_pinned(self, record: AdapterRecord) -> None:
        if record.state is not AdapterState.READY:
            log.warning("pinned adapter not loaded adapter=%s: it is %s", record.reference, record.state)
            return
        try:
            await self._engine.load(record.facts.digest)
        except AdapterError as error:
            log.warning("pinned adapter not loaded adapter=%s: %s", record.reference, error)
        else:
            log.info("pinned adapter loaded adapter=%s", record.reference)

    async def _sync_pin(self, digest: str) -> None:
        """A content is pinned while any version that has it is."""
        records = await self._workers.run(self.all_records)
        pinned = any(record.pinned for record in records if record.facts.digest == digest)
        await self._engine.pin(digest, pinned)

    def residents(self) -> list[ResidentAdapter]:
        """What is in memory, by name; any thread."""
        return [
            ResidentAdapter(
                self._names.get(resident.digest, OTHER_LABEL),
                resident.tier,
                resident.pinned,
                resident.size_bytes,
            )
            for resident in self._engine.residents()
        ]

    # In a worker

    def all_records(self, name: str | None = None) -> list[AdapterRecord]:
        """Every version, of one name or of all; blocks."""
        records, token = self.store.list(name=name, page_size=MAX_PAGE_SIZE)
        while token:
            page, token = self.store.list(name=name, page_size=MAX_PAGE_SIZE, page_token=token)
            records.extend(page)
        return records

    def _bundle_of(self, digest: str) -> Bundle | None:
        return read_bundle(self.store.path_of(digest))

    def _update(self, reference: str, changes: Changes) -> AdapterRecord:
        record = self.store.get(reference)
        return self.store.update(
            record.name,
            record.version,
            etag=changes.etag,
            set_aliases=changes.set_aliases,
            remove_aliases=changes.remove_aliases,
            pinned=changes.pinned,
            labels=changes.labels,
        )

    def _delete(
        self, reference: str, all_versions: bool, etag: str | None
    ) -> tuple[list[AdapterRecord], list[str]]:
        doomed = self.all_records(reference) if all_versions else [self.store.get(reference)]
        return doomed, self.store.delete(reference, all_versions, etag)
