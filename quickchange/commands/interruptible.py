"""Work that Ctrl-C may hit at any moment without harm. Knows no command."""

import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any, TypeVar

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")


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


def interruptible_result(work: Callable[[], ResultT]) -> ResultT:
    """What `work` returns, done by a thread of its own; after an interrupt it is left to itself."""
    (result,) = interruptible(work() for _ in range(1))
    return result


@contextmanager
def stop_on_signals() -> Iterator[threading.Event]:
    """Within the block the first SIGINT or SIGTERM sets the event; the second has its usual effect."""
    stop = threading.Event()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def request(number: int, frame: Any) -> None:
        stop.set()
        _restore(before)

    if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
        for number in before:
            signal.signal(number, request)
    try:
        yield stop
    finally:
        if threading.current_thread() is threading.main_thread():
            _restore(before)


def _restore(handlers: dict[signal.Signals, Any]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)
