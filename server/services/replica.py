"""Keeps the copy of a store at a URL in step, and has files fetched that requests need. Knows no messages.

The network is waited for in threads of its own: neither the event loop nor the workers, which serve
everybody, ever wait for it. These threads do not keep a process alive that wants to end.
"""

import asyncio
import logging
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Final, TypeVar

from adapters.errors import AdapterError
from adapters.replica import ReplicaStore

log = logging.getLogger(__name__)

T = TypeVar("T")

_FETCHES_AT_ONCE: Final = 4


class Replica:
    """In one event loop.

    Args:
        refresh_s: from one look at the store to the next.
    """

    def __init__(self, store: ReplicaStore, refresh_s: float) -> None:
        self._store = store
        self._refresh_s = refresh_s
        self._fetching: dict[str, asyncio.Task[None]] = {}
        self._places = asyncio.Semaphore(_FETCHES_AT_ONCE)
        self._closed = threading.Event()
        self._follower: asyncio.Task[None] | None = None
        self._pinning: set[asyncio.Task[None]] = set()
        self._trouble = ""

    def start(self) -> None:
        """Looks at the store from now on, every so often."""
        self._follower = asyncio.create_task(self._follow())

    def close(self) -> None:
        """Follows no longer. What is being fetched stops at its next piece, and leaves nothing."""
        self._closed.set()
        if self._follower is not None:
            self._follower.cancel()

    async def fetch(self, digest: str) -> None:
        """Has the files of a content here; whoever needs the same ones meanwhile waits for the same fetch.

        Raises:
            AdapterError: see ReplicaStore.fetch.
        """
        task = self._fetching.get(digest)
        if task is None:
            task = self._fetching[digest] = asyncio.create_task(self._fetch(digest))
            task.add_done_callback(partial(self._fetched, digest))
        await asyncio.shield(task)  # a caller who gives up takes it from nobody else

    async def _fetch(self, digest: str) -> None:
        async with self._places:
            await _in_thread(lambda: self._store.fetch(digest, lambda: not self._closed.is_set()))

    def _fetched(self, digest: str, task: "asyncio.Task[None]") -> None:
        del self._fetching[digest]
        if not task.cancelled():
            task.exception()  # it may be that nobody waits for it any more

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(self._refresh_s)
            try:
                is_new = await _in_thread(self._store.refresh)
            except AdapterError as error:
                self._tell(str(error))
            except Exception:  # of the disk, say; the next look may succeed
                log.exception("the store could not be refreshed; trying again")
            else:
                self._tell("")
                if is_new:
                    log.info("store refreshed snapshot=%d", self._store.generation)
                    pinning = asyncio.create_task(self._fetch_pinned())  # it may take long
                    self._pinning.add(pinning)
                    pinning.add_done_callback(self._pinning.discard)

    def _tell(self, trouble: str) -> None:
        """One line when the store is lost, and one when it is back."""
        if trouble and trouble != self._trouble:
            log.warning("serving snapshot %d until the store is back: %s", self._store.generation, trouble)
        if self._trouble and not trouble:
            log.info("the store is back")
        self._trouble = trouble

    async def _fetch_pinned(self) -> None:
        for digest in await _in_thread(self._store.changes.pinned):
            try:
                await self.fetch(digest)
            except AdapterError as error:
                log.warning("pinned adapter not fetched digest=%s: %s", digest, error)


async def _in_thread(function: Callable[[], T]) -> T:
    """The function's result; a caller who is cancelled does not wait for it."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: BaseException | None) -> None:
        if future.done():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)  # type: ignore[arg-type]  # there is a result where there is no error

    def run() -> None:
        result, error = None, None
        try:
            result = function()
        except BaseException as raised:
            error = raised
        with suppress(RuntimeError):  # the loop is closed: the process ends
            loop.call_soon_threadsafe(settle, result, error)

    threading.Thread(target=run, name="store-url", daemon=True).start()
    return await future
