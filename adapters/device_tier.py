"""Adapters on the device, each in a slot of the model's layers. Knows neither files nor the host tier."""

import heapq
from collections.abc import Sequence, Set
from dataclasses import dataclass

from adapters.errors import CapacityError
from adapters.eviction import EvictionPolicy
from adapters.layers import AdapterSlots
from adapters.loader import Loaded
from adapters.tier import Tier


@dataclass(frozen=True, slots=True)
class OnDevice:
    """An adapter and the slot that holds it."""

    slot: int
    loaded: Loaded


class DeviceTier(Tier[OnDevice]):
    """Fills a slot for whoever arrives, and empties it when it leaves."""

    def __init__(
        self, slots: AdapterSlots, budget_bytes: int, policy: EvictionPolicy, pinned: Set[str]
    ) -> None:
        super().__init__(budget_bytes, policy, pinned)
        self._slots = slots
        self._free_slots: list[int] = []
        self._next_slot = 1

    def check_fits(self, size_bytes: int) -> None:
        """Whether so much can be made free at all.

        Raises:
            CapacityError
        """
        budget, pinned = self.budget_bytes, self.pinned_bytes
        if size_bytes > budget:
            raise CapacityError(
                f"the adapter needs {size_bytes} bytes on the device and all adapters together may have "
                f"{budget}; start the server with a larger --adapter-device-bytes",
                reason="ADAPTER_TOO_LARGE",
            )
        if size_bytes + pinned > budget:
            raise CapacityError(
                f"the adapter needs {size_bytes} bytes on the device, and pinned ones hold {pinned} of the "
                f"{budget} for all; unpin one or start the server with a larger --adapter-device-bytes",
                reason="ADAPTERS_PINNED",
            )

    def in_the_way(self, size_bytes: int, order: Sequence[str]) -> Set[str]:
        """Adapters in use, the first of `order`, without which so much would fit."""
        missing = self.used_bytes - self.idle_bytes + size_bytes - self.budget_bytes
        chosen: set[str] = set()
        for other in order:
            if missing <= 0:
                break
            if other in self and not self.is_pinned(other):
                chosen.add(other)
                missing -= self.size_of(other)
        return chosen

    def enter(self, digest: str, loaded: Loaded) -> None:
        """What was on its way is in a slot.

        Raises:
            MemoryError: there is none for that; nothing changed.
        """
        slot = heapq.heappop(self._free_slots) if self._free_slots else self._take_new_slot()
        try:
            self._slots.fill(slot, loaded.factors.by_module)
        except MemoryError:
            self._slots.clear(slot)
            heapq.heappush(self._free_slots, slot)
            raise
        self.settle(digest, OnDevice(slot, loaded), loaded.disk_s)

    def leave(self, digest: str, *, evicted: bool) -> Loaded:
        """Empties the slot of an adapter that nobody references; its memory lives as long as the answer."""
        there = self.take(digest, evicted=evicted)
        self._slots.clear(there.slot)
        heapq.heappush(self._free_slots, there.slot)
        return there.loaded

    def _take_new_slot(self) -> int:
        self._next_slot += 1
        return self._next_slot - 1
