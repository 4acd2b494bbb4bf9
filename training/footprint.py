"""Owns what a run's memory really comes to. Knows no recipe.

On a CPU the process' resident size: its peak is set back where Linux allows it (clear_refs), so that
loading does not count, and is read as VmHWM. Elsewhere the peak is ru_maxrss, that of the process since its
start. On CUDA both are the allocator's, which knows tensors and not the context.
"""

import os
import platform
import resource
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import psutil
import torch

How = Literal["VmHWM since the run began", "ru_maxrss of the process", "CUDA allocator since the run began"]

_SET_PEAK_BACK: Final = "5"
_FIXED_THRESHOLD: Final = "MALLOC_MMAP_THRESHOLD_"


@dataclass(frozen=True, slots=True)
class Footprint:
    """A device's memory when a run begins.

    Attributes:
        before_bytes: that are taken already, by the base above all.
        how: the way in which the peak will be measured.
    """

    before_bytes: int
    how: How

    @classmethod
    def begin(cls, device: torch.device) -> "Footprint":
        """Sets the peak back, where that can be done."""
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            taken = torch.cuda.memory_allocated(device)
            return cls(taken, "CUDA allocator since the run began")
        how: How = "VmHWM since the run began" if _set_peak_back() else "ru_maxrss of the process"
        return cls(int(psutil.Process().memory_info().rss), how)


def peak_bytes(device: torch.device) -> int:
    """The most that was taken at once since the run began, or as `How` says."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # the kernel's VmHWM


def heap_keeps_blocks() -> bool:
    """Whether this process' C heap is glibc's as it comes: aligned blocks are not found again once freed."""
    return platform.libc_ver()[0] == "glibc" and _FIXED_THRESHOLD not in os.environ


def _set_peak_back() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text(_SET_PEAK_BACK)
    except OSError:
        return False
    return True
