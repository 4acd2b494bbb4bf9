"""What the engine tells about itself. Knows neither torch nor grpc."""

import time
from dataclasses import dataclass, field

from server.batch import Batch

_SMOOTHING = 0.1


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


@dataclass(slots=True)
class StepCounters:
    """Running totals; written by the engine's thread, read by any."""

    steps: int = 0
    mixed_steps: int = 0
    max_adapters_in_step: int = 0
    tokens_computed: int = 0
    seconds_per_request: float = 1.0
    _last_request_s: float | None = field(default=None)

    def count(self, batch: Batch) -> None:
        """Adds one step."""
        self.steps += 1
        self.mixed_steps += batch.is_mixed
        self.max_adapters_in_step = max(self.max_adapters_in_step, batch.adapter_count)
        self.tokens_computed += batch.token_count

    def count_request(self) -> None:
        """Adds one request's end; keeps a moving mean of the time between two ends."""
        now_s = time.monotonic()
        if self._last_request_s is not None:
            gap_s = min(now_s - self._last_request_s, 60.0)  # idle time says nothing about the drain rate
            self.seconds_per_request += _SMOOTHING * (gap_s - self.seconds_per_request)
        self._last_request_s = now_s
