"""Moves an adapter's factors between the memory of the host and that of the device. Knows no budgets.

On a CPU the two are the same memory, and nothing is copied. On CUDA a stream of its own copies beside the
engine's work, and the thread that asked for the copy waits for it, which is never the engine's.
"""

import torch
from torch import Tensor

from adapters.factors import AdapterFactors, host_memory


class FactorCopies:
    """To one device and back."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch has no types here

    @property
    def are_needed(self) -> bool:
        """Whether host and device have memory of their own; the host's has to be page-locked then."""
        return self._stream is not None

    def host_bytes(self, size_bytes: int) -> int:
        """What so many bytes take on the host: torch hands page-locked memory out in powers of two."""
        return 1 << (size_bytes - 1).bit_length() if self.are_needed and size_bytes else size_bytes

    def to_device(self, factors: AdapterFactors) -> AdapterFactors:
        """The same on the device, complete when this returns."""
        if self._stream is None:
            return factors
        with torch.cuda.stream(self._stream):
            memory = factors.memory.to(self._device, non_blocking=True)
            # The engine's own stream reads it: it is not given away again before that is over.
            memory.record_stream(torch.cuda.default_stream(self._device))
        return self._completed(self._stream, factors, memory)

    def to_host(self, factors: AdapterFactors) -> AdapterFactors:
        """The same on the host, complete when this returns."""
        if self._stream is None:
            return factors
        memory = host_memory(len(factors.memory), factors.memory.dtype, page_locked=True)
        with torch.cuda.stream(self._stream):
            memory.copy_(factors.memory, non_blocking=True)
        return self._completed(self._stream, factors, memory)

    @staticmethod
    def _completed(stream: torch.cuda.Stream, factors: AdapterFactors, memory: Tensor) -> AdapterFactors:
        stream.record_event().synchronize()
        return factors.moved_to(memory)
