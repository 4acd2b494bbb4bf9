"""The way out of the engine for one request: a mailbox in the event loop. Knows neither torch nor grpc."""

import asyncio
from collections import deque
from collections.abc import Callable

from server.request import Delta, Failed, Finished, TokenEvent


class RequestStream:
    """Async iterator over a request's events; the last is Failed, or Finished of the last of its answers.

    Lives in one event loop: only `cancel` may be called from another thread. A slow reader costs at most the
    request's own tokens, since consecutive deltas of an answer are merged while nobody reads them.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, on_cancel: Callable[[], None], answers: int = 1
    ) -> None:
        self.loop = loop
        self._on_cancel = on_cancel
        self._unfinished = answers
        self._mailbox: deque[TokenEvent] = deque()
        self._arrived = asyncio.Event()
        self._ended = False

    def put(self, event: TokenEvent) -> None:
        """Adds an event; called in the loop's thread only."""
        last = self._mailbox[-1] if self._mailbox else None
        if isinstance(event, Delta) and isinstance(last, Delta) and last.index == event.index:
            self._mailbox[-1] = _merged(last, event)
        else:
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
        self._unfinished -= isinstance(event, Finished)
        self._ended = isinstance(event, Failed) or not self._unfinished
        return event


def _merged(first: Delta, second: Delta) -> Delta:
    return Delta(
        text=first.text + second.text,
        token_ids=first.token_ids + second.token_ids,
        logprobs=first.logprobs + second.logprobs,
        index=first.index,
    )
