"""The way out of the engine for one request: a mailbox in the event loop. Knows neither torch nor grpc."""

import asyncio
from collections import deque
from collections.abc import Callable

from server.request import Delta, Failed, Finished, TokenEvent


class RequestStream:
    """Async iterator over a request's events; the last is Finished or Failed.

    Lives in one event loop: only `cancel` may be called from another thread. A slow reader costs at most the
    request's own tokens, since consecutive deltas are merged while nobody reads them.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, on_cancel: Callable[[], None]) -> None:
        self.loop = loop
        self._on_cancel = on_cancel
        self._mailbox: deque[TokenEvent] = deque()
        self._arrived = asyncio.Event()
        self._ended = False

    def put(self, event: TokenEvent) -> None:
        """Adds an event; called in the loop's thread only."""
        if isinstance(event, Delta) and self._mailbox and isinstance(self._mailbox[-1], Delta):
            event = _merged(self._mailbox.pop(), event)
        self._mailbox.append(event)
        self._arrived.set()

    def cancel(self) -> None:
        """Asks the engine to drop the request within one step; harmless after the end. Any thread."""
        self._on_cancel()

    def __aiter__(self) -> "RequestStream":
        return self

    async def __anext__(self) -> TokenEvent:
        if self._ended:
            raise StopAsyncIteration
        while not self._mailbox:
            self._arrived.clear()
            await self._arrived.wait()
        event = self._mailbox.popleft()
        self._ended = isinstance(event, Finished | Failed)
        return event


def _merged(first: TokenEvent, second: Delta) -> Delta:
    assert isinstance(first, Delta)
    return Delta(
        text=first.text + second.text,
        token_ids=first.token_ids + second.token_ids,
        logprobs=first.logprobs + second.logprobs,
    )
