"""The messages of one upload: not too late, not too slowly, not after a stop. Knows no files."""

import asyncio
import time
from collections.abc import AsyncIterator

from quickchange.v1 import adapters_pb2
from server.errors import DeadlineError, ServerError

Messages = AsyncIterator[adapters_pb2.UploadAdapterRequest]


class UploadStalledError(DeadlineError):
    """The next chunk did not come in time, or all of them come too slowly."""

    reason = "UPLOAD_STALLED"


class Inbox:
    """Reads a stream of messages; in one event loop.

    Args:
        idle_timeout_s: the longest wait for one message, and what the rate is averaged over.
        min_bytes_per_s: the slowest rate that is borne; 0 for any.
    """

    def __init__(self, messages: Messages, idle_timeout_s: float, min_bytes_per_s: int) -> None:
        self._messages = messages
        self._idle_timeout_s = idle_timeout_s
        self._min_bytes_per_s = min_bytes_per_s
        self._waited_s = 0.0
        self._waited_bytes = 0
        self._limit: asyncio.Timeout | None = None
        self._stop: ServerError | None = None

    def stop(self, why: ServerError) -> None:
        """Ends the reading with this error: at once if a message is waited for, else before the next."""
        self._stop = why
        if self._limit is not None:
            self._limit.reschedule(0)

    def check(self) -> None:
        """Raises what the inbox was stopped with, if it was."""
        if self._stop is not None:
            raise self._stop

    async def next(self) -> adapters_pb2.UploadAdapterRequest | None:
        """The next message; None at the end of the stream.

        Raises:
            UploadStalledError: nothing came in time, or too little.
            ServerError: what `stop` was given.
        """
        self.check()
        began_s = time.monotonic()
        try:
            async with asyncio.timeout(self._idle_timeout_s) as self._limit:
                message = await anext(self._messages, None)
        except TimeoutError:
            self.check()
            raise UploadStalledError(
                f"nothing came for {self._idle_timeout_s:g} s; go on with the same upload_id, or upload again"
            ) from None
        finally:
            self._limit = None
        if message is not None:
            self._check_pace(time.monotonic() - began_s, len(message.chunk.data))
        return message

    def _check_pace(self, waited_s: float, size_bytes: int) -> None:
        # Only time in which we waited counts: a slow disk of ours is not the sender's fault.
        self._waited_s += waited_s
        self._waited_bytes += size_bytes
        if self._waited_s < self._idle_timeout_s:
            return
        rate = self._waited_bytes / self._waited_s
        if rate < self._min_bytes_per_s:
            raise UploadStalledError(
                f"{rate:.0f} bytes per second came in the last {self._waited_s:.0f} s, at least "
                f"{self._min_bytes_per_s} must; go on from a faster connection, or send larger chunks"
            )
        self._waited_s, self._waited_bytes = 0.0, 0
