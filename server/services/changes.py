"""What happens to adapters, as it comes to this server's notice, and telling it on. Knows no messages.

The catalogue remembers each version's last change, and the engine where each adapter is. A watcher compares
with what it told last, so it keeps nothing for a slow reader: meanwhile changes replace each other where they
are kept anyway.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Final

from adapters.errors import ChangesLostError
from adapters.facts import AdapterRecord
from adapters.rows import Change
from adapters.store import AdapterStore
from adapters.tier import TierName, Whereabouts
from server.engine import Engine
from server.errors import DrainingError
from server.services.catalogue import Catalogue
from server.services.workers import Workers

log = logging.getLogger(__name__)

_POLL_S: Final = 0.2
"""How late a change is noticed at most: asking for its number takes SQLite some microseconds."""
_AFTER_AN_ERROR_S: Final = 5.0


@dataclass(frozen=True, slots=True)
class Present:
    """A version as it is now."""

    record: AdapterRecord
    residency: Whereabouts

    @property
    def name(self) -> str:
        return self.record.name


@dataclass(frozen=True, slots=True)
class Deleted:
    """A version that is gone."""

    name: str
    version: int
    digest: str


AdapterEvent = Present | Deleted


@dataclass(frozen=True, slots=True)
class Moment:
    """Where adapters were, and the number of their last change."""

    tiers: Mapping[str, TierName]
    sequence: int


class ChangeFeed:
    """Follows the store and the engine; has this server do what other servers' changes ask for."""

    def __init__(self, store: AdapterStore, engine: Engine, catalogue: Catalogue, workers: Workers) -> None:
        self._store = store
        self._engine = engine
        self._catalogue = catalogue
        self._workers = workers
        self._sequence = 0
        self._tiers: Mapping[str, TierName] = {}
        self._news = asyncio.Event()
        self._closed = False
        self._follower: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Takes over what is there, and follows from then on."""
        self._sequence = await self._workers.run(self._store.changes.last)
        await self._catalogue.catch_up()
        self._follower = asyncio.create_task(self._follow())

    def close(self) -> None:
        """Ends every watch."""
        if self._follower is not None:
            self._follower.cancel()
        self._closed = True
        self._tell()

    async def now(self) -> "Moment":
        """From which on `events` tells."""
        return Moment(self._catalogue.tiers(), await self._workers.run(self._store.changes.last))

    async def events(self, since: "Moment", *, send_initial: bool) -> AsyncGenerator[AdapterEvent, None]:
        """Every change since then; of a version that changes faster than this is read, the last one.

        Args:
            send_initial: begins with every version that is there.

        Raises:
            DrainingError: once the server drains.
            ChangesLostError: the reader is too far behind.
        """
        tiers, sequence = since.tiers, since.sequence
        if send_initial:
            async for record in self._everything():
                yield _present(record, tiers)
        while True:
            news, told, tiers = self._news, tiers, self._catalogue.tiers()
            if self._closed:
                raise DrainingError("the server is draining; watch another one")
            for digest in _moved(told, tiers):
                async for record in self._versions_with(digest):
                    yield _present(record, tiers)
            changes = await self._workers.run(self._store.changes.after, sequence)
            for change in changes:
                yield _event_of(change, tiers)
                sequence = change.sequence
            if not changes:
                await news.wait()

    async def _everything(self) -> AsyncIterator[AdapterRecord]:
        token = ""
        while True:
            page, token = await self._workers.run(self._store.list, page_token=token)
            for record in page:
                yield record
            if not token:
                return

    async def _versions_with(self, digest: str) -> AsyncIterator[AdapterRecord]:
        last: AdapterRecord | None = None
        while page := await self._workers.run(self._store.changes.versions_with, digest, last):
            for last in page:
                yield last

    async def _follow(self) -> None:
        while True:
            try:
                await asyncio.sleep(_POLL_S)
                has_news = await self._take_changes()
            except Exception:  # of the disk, say; the next look may succeed, and without any nobody is told
                log.exception("changes of the store could not be read; trying again")
                await asyncio.sleep(_AFTER_AN_ERROR_S)
                continue
            tiers = self._catalogue.tiers()
            if has_news or tiers != self._tiers:
                self._tiers = tiers
                self._tell()

    async def _take_changes(self) -> bool:
        """Whether there were any."""
        last = await self._workers.run(self._store.changes.last)
        if last == self._sequence:
            return False
        try:
            while changes := await self._workers.run(self._store.changes.after, self._sequence):
                await self._catalogue.follow(changes)
                self._sequence = changes[-1].sequence
        except ChangesLostError:  # this process stood still for very long
            self._sequence = last
            await self._catalogue.catch_up()
        return True

    def _tell(self) -> None:
        self._news.set()
        self._news = asyncio.Event()


def _present(record: AdapterRecord, tiers: Mapping[str, TierName]) -> Present:
    return Present(record, tiers.get(record.facts.digest, "disk"))


def _event_of(change: Change, tiers: Mapping[str, TierName]) -> AdapterEvent:
    if change.record is None:
        return Deleted(change.name, change.version, change.digest)
    return _present(change.record, tiers)


def _moved(before: Mapping[str, TierName], now: Mapping[str, str]) -> list[str]:
    """Contents that are in another tier than before; the disk's is not listed."""
    return [digest for digest in {*before, *now} if before.get(digest) != now.get(digest)]
