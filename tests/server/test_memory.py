"""What adapters may take of device and host, asked for or not."""

from typing import Any

import pytest
import torch

from adapters import host_memory
from adapters.host_memory import HostMemory
from adapters.tier import TierBudgets
from server.config import GIB, MIB, EngineSettings
from server.memory import plan_memory

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def free(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host with 32 GiB free, and a GPU with 10."""
    monkeypatch.setattr(host_memory, "now", lambda: HostMemory(32 * GIB, 64 * GIB))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10 * GIB, 16 * GIB))


def adapters(device: torch.device, **settings: Any) -> TierBudgets:
    return plan_memory(
        EngineSettings(**settings), kv_bytes_per_token=1024, max_context_tokens=512, device=device
    ).adapters


def test_a_gpu_has_a_host_tier_and_a_cpu_has_none() -> None:
    assert adapters(CUDA) == TierBudgets(device_bytes=int(1.5 * GIB), host_bytes=8 * GIB)
    assert adapters(CPU) == TierBudgets(device_bytes=2 * GIB, host_bytes=0)


def test_a_very_large_host_is_not_taken_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "now", lambda: HostMemory(1024 * GIB, 1024 * GIB))
    assert adapters(CUDA).host_bytes == 16 * GIB


@pytest.mark.parametrize("device", [CPU, CUDA])
@pytest.mark.parametrize("host_bytes", [0, 64 * MIB])
def test_what_is_asked_for_is_what_there_is(device: torch.device, host_bytes: int) -> None:
    asked = adapters(device, adapter_device_bytes=MIB, adapter_host_bytes=host_bytes)
    assert asked == TierBudgets(MIB, host_bytes)
