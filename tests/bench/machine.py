"""The machine that a run was on, as far as figures depend on it."""

import os
import platform
from pathlib import Path

import psutil
import torch

from kernels.library import status

_CPUINFO = Path("/proc/cpuinfo")


def machine() -> dict[str, object]:
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "torch": torch.__version__,
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "native_kernels": status().isa,
        "load_average": os.getloadavg(),
    }


def _processor() -> str:
    if _CPUINFO.is_file():
        for line in _CPUINFO.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()
