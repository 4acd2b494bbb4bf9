"""Whether the engine's thread still gets on. Knows neither what it computes nor who has to be told.

The thread marks its progress; a thread of the watchdog's own looks for marks. Without one for a while the
engine is doubted, which costs nothing and ends with the next mark; without one for much longer it hangs,
which is for ever. How long "a while" is follows from what steps cost: a long prompt on a slow processor is
no hang.

Time counts in ticks of the watchdog, not by the clock: a process that is paused, or that gets no processor,
does not find itself hanging when it goes on.
"""

import faulthandler
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

log = logging.getLogger(__name__)

_TICK_S: Final = 0.05
_LEAST_DOUBT_S: Final = 0.7
"""Doubted and told within one second, where a step takes less than a few tenths."""
_SLOWER: Final = 5.0
"""So many times what the dearest step of late would take per token is still healthy."""
_MEMORY: Final = 0.9
"""Of how dear a step was, what the next one remembers: about twenty steps."""
_LONGEST: Final = 10
"""So many times the bound is the longest that anything may take, whatever was learned."""
_LAST_WORDS_S: Final = 5.0
"""From a hang to the end of the process, if its orderly end does not come first."""
HUNG_EXIT_STATUS: Final = 1


class Progress:
    """What the engine's thread is at. Written by that thread alone, read by any.

    Attributes:
        marks: another number whenever something ended.
    """

    def __init__(self) -> None:
        self.marks = 0
        self._expected_s = 0.0
        self._token_s: float | None = None

    @property
    def patience_s(self) -> float:
        """How long what it does now may take before it is doubted."""
        return max(_LEAST_DOUBT_S, _SLOWER * self._expected_s)

    def mark(self) -> None:
        """Something ended; what begins takes no time worth mentioning, until `computing` says otherwise."""
        self.marks += 1

    @contextmanager
    def computing(self, tokens: int) -> Iterator[None]:
        """One forward pass over so many tokens."""
        self._expected_s = tokens * (self._token_s or 0.0)
        self.marks += 1
        began_s = time.monotonic()
        try:
            yield
        finally:
            self._learn((time.monotonic() - began_s) / tokens)
            self._expected_s = 0.0
            self.marks += 1

    def _learn(self, token_s: float) -> None:
        if self._token_s is None:  # the first pass holds whatever is slow only once
            self._token_s = 0.0
        else:
            self._token_s = max(token_s, _MEMORY * self._token_s)


class Watchdog:
    """A thread that looks whether another one gets on."""

    def __init__(
        self,
        progress: Progress,
        bound_s: float,
        *,
        alive: Callable[[], bool],
        on_doubt: Callable[[bool], None],
        on_hang: Callable[[], None],
    ) -> None:
        """
        Args:
            bound_s: without any progress for so long the thread hangs, unless it does what may take longer.
            alive: whether the thread is still there; one that ended does not hang.
            on_doubt: called with True when progress is overdue, with False when it came after all.
            on_hang: called once; the process ends `_LAST_WORDS_S` later, if it is still there.
        """
        self._progress, self._bound_s = progress, bound_s
        self._alive, self._on_doubt, self._on_hang = alive, on_doubt, on_hang
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> None:
        """Begins to look."""
        self._thread.start()

    def close(self) -> None:
        """Looks no more; a hang that was found still ends the process."""
        self._over.set()

    def _watch(self) -> None:
        seen, stalled_s, doubted = self._progress.marks, 0.0, False
        while not self._over.wait(_TICK_S) and self._alive():
            if self._progress.marks != seen:
                seen, stalled_s = self._progress.marks, 0.0
                if doubted:
                    doubted = False
                    log.warning("the engine gets on again")
                    self._on_doubt(False)
                continue
            stalled_s += _TICK_S
            patience_s = min(self._progress.patience_s, _LONGEST * self._bound_s)
            if not doubted and stalled_s >= patience_s:
                doubted = True
                log.warning("no progress of the engine seconds=%.2f; not ready until it gets on", stalled_s)
                self._on_doubt(True)
            if stalled_s >= max(patience_s, self._bound_s):
                self._end(stalled_s)
                return

    def _end(self, stalled_s: float) -> None:
        log.error("the engine hangs: no progress seconds=%.1f; where every thread is follows", stalled_s)
        faulthandler.dump_traceback(sys.stderr)
        self._on_hang()
        time.sleep(_LAST_WORDS_S)
        log.error("ending the process: the engine hangs, and nothing else could end it in order")
        exit_now()


def end_within(seconds: float) -> None:
    """Ends the process then, if whatever ends it in order got stuck."""
    timer = threading.Timer(seconds, _give_up, [seconds])
    timer.daemon = True
    timer.start()


def _give_up(seconds: float) -> None:
    log.error("ending the process: it did not stop within seconds=%g; where every thread is follows", seconds)
    faulthandler.dump_traceback(sys.stderr)
    exit_now()


def exit_now() -> None:
    """Ends the process without waiting for threads that may never end."""
    logging.shutdown()
    os._exit(HUNG_EXIT_STATUS)
