"""What the engine tells about itself. Knows neither torch nor grpc."""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from server.batch import Batch

_ENDS = 256
"""Ends that the drain rate is taken over: those of one step come together, and there may be 32 of them."""
_UNKNOWN_S = 1.0


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A look at the engine; the counters are since start."""

    running: int
    waiting: int
    kv_tokens_total: int
    kv_tokens_free: int
    adapter_device_bytes_total: int
    adapter_device_bytes_used: int
    adapter_host_bytes_total: int
    adapter_host_bytes_used: int
    steps: int
    mixed_steps: int
    max_adapters_in_step: int
    tokens_computed: int


class DrainRate:
    """How fast requests end while there are any, and when one that is refused may find room.

    Ends are told by the engine's thread, refusals by the event loop's.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """
        Args:
            clock: seconds that only grow.
        """
        self._clock = clock
        self._ends_s: deque[float] = deque(maxlen=_ENDS)
        self._since_s: float | None = None
        self._next_room_s = 0.0

    def busy(self) -> None:
        """There is something to do, from now on or from before."""
        if self._since_s is None:
            self._since_s = self._clock()

    def idle(self) -> None:
        """Nothing is left to do: the time from here on says nothing about the rate."""
        self._since_s = None
        self._ends_s.clear()

    def count(self) -> None:
        """One request ended."""
        if len(self._ends_s) == _ENDS:
            self._since_s = self._ends_s[0]
        self._ends_s.append(self._clock())

    @property
    def seconds_per_request(self) -> float:
        """Mean time from one end to the next, until now; `_UNKNOWN_S` before one was seen."""
        since_s, count = self._since_s, len(self._ends_s)
        return (self._clock() - since_s) / count if since_s is not None and count else _UNKNOWN_S

    def refuse(self, waiting: int) -> float:
        """After how many seconds a caller who is refused now should come back.

        Everybody is given a moment of his own, one request's time after the one before, so that they do not
        all come back at once; but none later than all that waits now should be gone.

        Args:
            waiting: requests in the queue.
        """
        now_s, each_s = self._clock(), self.seconds_per_request
        self._next_room_s = max(now_s, self._next_room_s) + each_s
        latest_s = max(1, waiting) * each_s
        self._next_room_s = min(self._next_room_s, now_s + latest_s)
        return self._next_room_s - now_s


@dataclass(slots=True)
class StepCounters:
    """Running totals; written by the engine's thread, read by any."""

    steps: int = 0
    mixed_steps: int = 0
    max_adapters_in_step: int = 0
    tokens_computed: int = 0
    drain: DrainRate = field(default_factory=DrainRate)

    def count(self, batch: Batch) -> None:
        """Adds one step."""
        self.steps += 1
        self.mixed_steps += batch.is_mixed
        self.max_adapters_in_step = max(self.max_adapters_in_step, batch.adapter_count)
        self.tokens_computed += batch.token_count
