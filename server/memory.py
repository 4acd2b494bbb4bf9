"""How much memory keys and values, and adapters, may take. Knows devices, not requests."""

import logging
from dataclasses import dataclass

import torch

from adapters import host_memory
from adapters.room import memory_free_on
from adapters.tier import TierBudgets
from server.config import GIB, MIB, EngineSettings

log = logging.getLogger(__name__)

_KV_SHARE = 0.25
_ADAPTER_SHARE = 0.15
_HOST_SHARE = 0.25
_USEFUL_SHARE = 2
"""Most blocks worth having, relative to as many full contexts as run at once: the rest keeps prefixes."""
_CUDA_RESERVE_BYTES = 1 * GIB
"""Left for activations and workspaces."""
_CPU_KV_LIMIT_BYTES = 4 * GIB
_CPU_ADAPTER_LIMIT_BYTES = 2 * GIB
_HOST_TIER_LIMIT_BYTES = 16 * GIB
"""A host is shared with other programs: more is taken only when a flag asks for it."""


@dataclass(frozen=True, slots=True)
class Budgets:
    """Blocks of keys and values, and bytes of adapters by tier."""

    block_count: int
    block_tokens: int
    adapters: TierBudgets


class OutOfMemoryAtStartError(Exception):
    """Not even one request fits; the message says how much is needed and how much is there."""


def plan_memory(
    settings: EngineSettings, *, kv_bytes_per_token: int, max_context_tokens: int, device: torch.device
) -> Budgets:
    """Sizes the caches from what the settings ask for, or else from the memory that is free now.

    Raises:
        OutOfMemoryAtStartError: the key/value budget does not hold one block, or is more than there is.
    """
    free = memory_free_on(device)
    block_bytes = kv_bytes_per_token * settings.block_tokens
    kv_bytes = settings.kv_bytes or _default_kv_bytes(free, device)
    running_blocks = settings.max_running_requests * -(-max_context_tokens // settings.block_tokens)
    blocks = min(kv_bytes // block_bytes, _USEFUL_SHARE * running_blocks)
    if blocks < 1:
        raise OutOfMemoryAtStartError(
            f"keys and values of one block need {block_bytes} bytes and {kv_bytes} are allowed; "
            "raise --kv-bytes or lower --block-tokens"
        )
    if blocks * block_bytes > free:
        raise OutOfMemoryAtStartError(
            f"keys and values are to have {blocks * block_bytes / GIB:.1f} GiB and {free / GIB:.1f} GiB are "
            "free; lower --kv-bytes, --max-running-requests or --max-context-tokens"
        )
    adapters = TierBudgets(
        device_bytes=settings.adapter_device_bytes or _default_adapter_bytes(free, device),
        host_bytes=_host_tier_bytes(settings, device),
    )
    log.info(
        "memory free_mib=%d kv_mib=%d kv_tokens=%d adapter_mib=%d adapter_host_mib=%d",
        free // MIB,
        blocks * block_bytes // MIB,
        blocks * settings.block_tokens,
        adapters.device_bytes // MIB,
        adapters.host_bytes // MIB,
    )
    return Budgets(blocks, settings.block_tokens, adapters)


def _default_kv_bytes(free: int, device: torch.device) -> int:
    if device.type == "cuda":
        adapters = _default_adapter_bytes(free, device)
        return max(0, free - adapters - _CUDA_RESERVE_BYTES)
    return min(int(free * _KV_SHARE), _CPU_KV_LIMIT_BYTES)


def _default_adapter_bytes(free: int, device: torch.device) -> int:
    share = int(free * _ADAPTER_SHARE)
    return share if device.type == "cuda" else min(share, _CPU_ADAPTER_LIMIT_BYTES)


def _host_tier_bytes(settings: EngineSettings, device: torch.device) -> int:
    """On a CPU none, unless asked for: it would be the same memory as the device tier's, where adapters are
    of more use."""
    if settings.adapter_host_bytes is not None:
        return settings.adapter_host_bytes
    if device.type == "cpu":
        return 0
    return min(int(host_memory.now().available_bytes * _HOST_SHARE), _HOST_TIER_LIMIT_BYTES)
