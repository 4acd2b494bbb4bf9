"""Adapters in memory of the host, ready to be copied to the device. Knows neither files nor slots."""

import logging
from collections.abc import Set
from concurrent.futures import Future

from adapters.errors import CapacityError
from adapters.eviction import EvictionPolicy
from adapters.loader import Loaded
from adapters.tier import Tier

log = logging.getLogger(__name__)


class HostTier(Tier["Future[Loaded]"]):
    """Holds futures: whoever comes from the device is here from the moment it leaves there.

    While its copy is under way an adapter references itself, so that its room is not given to another.
    """

    def __init__(self, budget_bytes: int, policy: EvictionPolicy, pinned: Set[str]) -> None:
        super().__init__(budget_bytes, policy, pinned)
        self._coming: dict[str, Future[Loaded]] = {}

    def check_fits(self, size_bytes: int) -> None:
        """Whether so much can be made free at all.

        Raises:
            CapacityError
        """
        budget, pinned = self.budget_bytes, self.pinned_bytes
        if not budget:
            raise CapacityError(
                "this server keeps no adapters in host memory; start it with --adapter-host-bytes, or load "
                "to the device",
                reason="NO_HOST_TIER",
            )
        if size_bytes + pinned > budget:
            raise CapacityError(
                f"the adapter needs {size_bytes} bytes of host memory, and pinned ones hold {pinned} of the "
                f"{budget} for all; unpin one or start the server with a larger --adapter-host-bytes",
                reason="ADAPTERS_PINNED" if pinned else "ADAPTER_TOO_LARGE",
            )

    def enter(self, digest: str, size_bytes: int, future: "Future[Loaded]", disk_s: float) -> None:
        """It left the device, and its copy comes with the future; there is room."""
        self.reserve(digest, size_bytes)
        self.settle(digest, future, disk_s)
        self.acquire(digest)
        self._coming[digest] = future

    @property
    def has_arrivals(self) -> bool:
        """Whether `take_arrivals` would change something."""
        return any(self._has_arrived(digest) for digest in self._coming)

    def take_arrivals(self) -> int:
        """Settles copies that have ended; those that failed are not here any more. Returns how many."""
        arrived = [digest for digest in self._coming if self._has_arrived(digest)]
        for digest in arrived:
            future = self._coming.pop(digest)
            self.release(digest)
            if (error := future.exception()) is not None:  # no memory: it is on disk as ever
                log.error("adapter not kept on the host digest=%s", digest, exc_info=error)
                self.take(digest)
        return len(arrived)

    def fetched(self, digest: str) -> None:
        """It is on the device; whoever fetched it has given back its reference."""
        if self._coming.pop(digest, None) is not None:
            self.release(digest)
        self.take(digest)

    def _has_arrived(self, digest: str) -> bool:
        """Not while somebody fetches it, who knows what to do if it never came."""
        return self._coming[digest].done() and self.references_to(digest) == 1
