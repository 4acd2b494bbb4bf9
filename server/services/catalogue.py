"""The adapter store as the services use it: off the event loop, and in step with what the engine holds.

Knows neither messages of the wire nor files' contents.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager

from adapters.errors import UnsupportedAdapterError
from adapters.facts import AdapterRecord, AdapterState
from adapters.store import AdapterStore
from server.engine import Engine
from server.metrics import OTHER_LABEL, ResidentAdapter
from server.services.workers import Workers

log = logging.getLogger(__name__)


class Catalogue:
    """Resolves references, and lets an adapter go only when nobody needs it any more; in one event loop."""

    def __init__(self, store: AdapterStore, engine: Engine, workers: Workers) -> None:
        self.store = store
        self._engine = engine
        self._workers = workers
        self._preparing: set[asyncio.Future[None]] = set()
        self._removals: set[asyncio.Task[None]] = set()
        self._names: dict[str, str] = {}

    async def resolve(self, reference: str) -> AdapterRecord:
        """Whatever the reference means now, in any state."""
        return await self._workers.run(self.store.resolve, reference)

    async def usable(self, reference: str) -> AdapterRecord:
        """
        Raises:
            UnsupportedAdapterError: it is there, and broken.
        """
        record = await self.resolve(reference)
        if record.state is not AdapterState.READY:
            raise UnsupportedAdapterError(
                f"{record.reference} is {record.state}: {record.error}; upload it again",
                reason="ADAPTER_NOT_READY",
            )
        self._names[record.facts.digest] = record.name
        return record

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

    def remove_when_unused(self, digests: Iterable[str]) -> None:
        """Adapters that no name refers to any more: their bytes go once no request uses them."""
        for digest in digests:
            task = asyncio.create_task(self._remove(digest))
            self._removals.add(task)
            task.add_done_callback(self._removals.discard)

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
        """Tells the engine which adapters are pinned, after a start."""
        for record in await self._workers.run(self._pinned):
            self._names[record.facts.digest] = record.name
            await self._engine.pin(record.facts.digest, True)

    def residents(self) -> list[ResidentAdapter]:
        """What is in memory, by name; any thread."""
        return [
            ResidentAdapter(
                self._names.get(resident.digest, OTHER_LABEL), "device", resident.pinned, resident.size_bytes
            )
            for resident in self._engine.residents()
        ]

    def _pinned(self) -> list[AdapterRecord]:
        return [record for record in self.all_records() if record.pinned]

    def all_records(self) -> list[AdapterRecord]:
        """Every record, page by page; blocks."""
        records, token = self.store.list()
        while token:
            page, token = self.store.list(page_token=token)
            records.extend(page)
        return records
