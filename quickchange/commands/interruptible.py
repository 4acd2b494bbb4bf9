"""Reading a stream so that Ctrl-C at any moment is harmless. Knows no command."""

import threading
from collections.abc import Iterable, Iterator
from queue import SimpleQueue
from typing import TypeVar

ItemT = TypeVar("ItemT")


class _End:
    """The iterable is exhausted."""


def interruptible(items: Iterable[ItemT]) -> Iterator[ItemT]:
    """The same items, read by a thread of their own.

    An interrupt that hits the main thread while gRPC holds one of its locks may leave it locked, and then the
    next call on that connection, or its end, waits for ever. Waiting for a SimpleQueue has no such moment.
    """
    queue: SimpleQueue[ItemT | Exception | _End] = SimpleQueue()

    def read() -> None:
        try:
            for item in items:
                queue.put(item)
        except Exception as error:
            queue.put(error)
        else:
            queue.put(_End())

    threading.Thread(target=read, daemon=True).start()
    while not isinstance(item := queue.get(), _End):
        if isinstance(item, Exception):
            raise item
        yield item
