"""Who uploads right now: a few at a time, and of each upload the newest stream alone. Knows no bytes."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from server.errors import DrainingError, QueueFullError, ServerError, UploadAbortedError
from server.services.inbox import Inbox

_RETRY_AFTER_S = 1.0


class TooManyUploadsError(QueueFullError):
    """Every place for an upload is taken."""

    reason = "TOO_MANY_UPLOADS"
    is_quota = True


@dataclass(slots=True)
class _Turn:
    """The streams of one upload: one has the lock, and no newer one leaves it alone."""

    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    inboxes: list[Inbox] = field(default_factory=list)
    waiting: int = 0


class Places:
    """In one event loop."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._taken = 0
        self._turns: dict[str, _Turn] = {}
        self._closed = False
        self._idle = asyncio.Event()
        self._idle.set()

    def close(self) -> None:
        """Refuses new uploads from now on."""
        self._closed = True

    def check_open(self) -> None:
        """Raises DrainingError after `close`."""
        if self._closed:
            raise DrainingError("the server is draining; upload to another one")

    async def wait_until_idle(self) -> None:
        """Returns when no upload is under way."""
        await self._idle.wait()

    @asynccontextmanager
    async def taken(self, key: str | None, inbox: Inbox) -> AsyncIterator[None]:
        """A place for a stream, given back at the end of the block.

        An older stream of the same upload is stopped, and waited for: its connection may be dead without
        anybody knowing, while its uploader is back already. It never costs the newer one its place.

        Args:
            key: of an upload that can be resumed; None for any other.

        Raises:
            DrainingError, TooManyUploadsError
            UploadAbortedError: a still newer stream came meanwhile.
        """
        self.check_open()
        if self._taken >= self._limit and (key is None or key not in self._turns):
            raise TooManyUploadsError(
                f"{self._taken} uploads are under way, which is the limit; try again later", _RETRY_AFTER_S
            )
        self._taken += 1
        self._idle.clear()
        try:
            if key is None:
                yield
            else:
                newer = UploadAbortedError(
                    "a newer stream with the same upload_id took over", "UPLOAD_SUPERSEDED"
                )
                self.stop(key, newer)
                async with self.turn(key, inbox):
                    yield
        finally:
            self._taken -= 1
            if not self._taken:
                self._idle.set()

    def stop(self, key: str, why: ServerError) -> None:
        """Ends every stream of an upload with this error, unless it is beyond its last chunk."""
        if key in self._turns:
            for inbox in self._turns[key].inboxes:
                inbox.stop(why)

    @asynccontextmanager
    async def turn(self, key: str, inbox: Inbox | None = None) -> AsyncIterator[None]:
        """The upload for the block alone, once all who had it have left."""
        turn = self._turns.setdefault(key, _Turn())
        turn.waiting += 1
        if inbox is not None:
            turn.inboxes.append(inbox)
        try:
            async with turn.lock:
                if inbox is not None:
                    inbox.check()
                yield
        finally:
            turn.waiting -= 1
            if inbox is not None:
                turn.inboxes.remove(inbox)
            if not turn.waiting:
                del self._turns[key]
