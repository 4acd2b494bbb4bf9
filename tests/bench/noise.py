"""How much of the processors went to programs that were not measured. Knows no contender."""

import os
import time
from dataclasses import dataclass

import psutil

from tests.bench.processes import Process

QUIET_SHARE = 0.05
"""Up to so much, the figures of a run stand for the machine."""


@dataclass(frozen=True, slots=True)
class CpuClock:
    """Processor seconds so far: of the whole machine, and of what is measured with this client."""

    at_s: float
    busy_s: float
    own_s: float

    @classmethod
    def read(cls, process: Process) -> "CpuClock":
        times = psutil.cpu_times()
        idle_s = times.idle + getattr(times, "iowait", 0.0)  # what a hypervisor took counts as busy
        mine = os.times()
        return cls(time.perf_counter(), sum(times) - idle_s, process.cpu_seconds() + mine.user + mine.system)

    def foreign_share(self, later: "CpuClock") -> float:
        """Part of all processor time between two readings that others had, 0 to 1."""
        foreign_s = (later.busy_s - self.busy_s) - (later.own_s - self.own_s)
        capacity_s = (later.at_s - self.at_s) * (os.cpu_count() or 1)
        return min(1.0, max(0.0, foreign_s / capacity_s)) if capacity_s else 0.0
