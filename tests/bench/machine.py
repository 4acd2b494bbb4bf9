"""The machine that a run was on, as far as figures depend on it."""

import os

import torch

from adapters import host_memory
from kernels.library import status
from server.doctor import this_processor


def machine() -> dict[str, object]:
    return {
        "processor": this_processor().name,
        "cores": os.cpu_count(),
        "memory_bytes": host_memory.now().total_bytes,
        "torch": torch.__version__,
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "native_kernels": status().isa,
        "load_average": os.getloadavg(),
    }
