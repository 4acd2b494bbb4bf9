"""Which adapters are in memory: disk → host → device, by bytes; references, pins, moves. Knows no requests.

An adapter is in one tier at a time. Everything here belongs to the engine's thread; files are read and bytes
copied in the loader's, so that neither the engine nor the event loop ever waits for them.
"""

import logging
import time
from collections.abc import Callable, Iterator, Sequence, Set
from concurrent.futures import Future
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Literal

import torch

from adapters.bundle import check_base
from adapters.copies import FactorCopies
from adapters.device_tier import DeviceTier
from adapters.errors import OUT_OF_MEMORY, AdapterError, AdapterNotFoundError, CapacityError
from adapters.eviction import Eviction, policies
from adapters.factors import bytes_of
from adapters.host_tier import HostTier
from adapters.layers import AdapterSlots
from adapters.layout import BaseLayout
from adapters.loader import AdapterLoader, Loaded
from adapters.memory import is_out_of_memory
from adapters.store import AdapterStore
from adapters.tier import Resident, TierBudgets, TierName, Whereabouts

log = logging.getLogger(__name__)

_SIZES_KEPT = 4096

Source = Literal["disk", "host"]


@dataclass(frozen=True, slots=True)
class LoadOutcome:
    """How a load ended; error is None if the adapter is in the tier now.

    Attributes:
        seconds: since it was asked for.
    """

    digest: str
    tier: TierName
    source: Source
    seconds: float
    error: AdapterError | None


@dataclass(frozen=True, slots=True)
class _Loading:
    future: "Future[Loaded]"
    tier: TierName
    source: Source
    began_s: float


class AdapterResidency:
    """The tiers in memory. Bytes are charged when a move begins, by the adapter's own size.

    Attributes:
        changes: another number whenever `residents` would give another answer.
    """

    def __init__(
        self,
        store: AdapterStore,
        layout: BaseLayout,
        slots: AdapterSlots,
        *,
        device: torch.device,
        dtype: torch.dtype,
        budgets: TierBudgets,
        eviction: Eviction,
        wake: Callable[[], None],
        on_eviction: Callable[[TierName], None],
    ) -> None:
        """
        Args:
            dtype: type in which factors are kept and applied.
            wake: called from a loader's thread when `collect` should be called.
            on_eviction: called for every adapter that has to leave a tier.
        """
        self.changes = 0
        self.budgets = budgets
        self._wake, self._on_eviction = wake, on_eviction
        self._pinned: set[str] = set()
        of_device, of_host = policies(eviction, tiers=2)
        self._device = DeviceTier(slots, budgets.device_bytes, of_device, self._pinned)
        self._host = HostTier(budgets.host_bytes, of_host, self._pinned)
        self._copies = FactorCopies(device)
        self._loader = AdapterLoader(store, layout, self._copies, dtype)
        self._loading: dict[str, _Loading] = {}
        self._refused: dict[str, AdapterError] = {}
        # Asked for in every step while an adapter waits for room; a content never changes.
        self._bytes_of = lru_cache(maxsize=_SIZES_KEPT)(partial(_bytes_of, store, layout, dtype))

    # What there is

    @property
    def used_bytes(self) -> int:
        """Bytes on the device and on their way there."""
        return self._device.used_bytes

    @property
    def host_used_bytes(self) -> int:
        """Bytes in the host tier and on their way there."""
        return self._host.used_bytes

    def residents(self) -> Iterator[Resident]:
        """Every adapter in memory."""
        for digest, size_bytes in self._device:
            yield Resident(digest, size_bytes, digest in self._pinned, "device")
        for digest, size_bytes in self._host:
            yield Resident(digest, size_bytes, digest in self._pinned, "host")

    def whereabouts(self, digest: str) -> Whereabouts:
        """The tier it is in now."""
        return "device" if digest in self._device else "host" if digest in self._host else "disk"

    def is_resident(self, digest: str) -> bool:
        """Whether it is on the device."""
        return digest in self._device

    def is_loading(self, digest: str) -> bool:
        """Whether a load is under way, or has ended badly and is not collected yet: the wait is bounded."""
        return digest in self._loading or digest in self._refused

    # Use by requests

    def acquire(self, digest: str) -> int | None:
        """A slot holding the adapter, referenced until `release`; None while it is not there.

        Begins the load if there is room or room can be made.
        """
        if digest not in self._device:
            self.prefetch(digest)
            return None
        self._device.use(digest)
        return self._device.acquire(digest).slot

    def release(self, digest: str) -> None:
        """Gives one reference back."""
        self._device.release(digest)

    def in_the_way(self, digest: str, order: Sequence[str]) -> Set[str]:
        """Adapters in use, the first of `order`, without which this one would fit.

        None while others are loading: they end soon, and may make room or need it.
        """
        if self._device.is_expecting:
            return frozenset()
        return self._device.in_the_way(self._bytes_of(digest), order)

    # Moves

    def prefetch(self, digest: str, spared: Set[str] = frozenset()) -> None:
        """Begins a load to the device unless it is there, under way, or there is no room now.

        What makes it impossible is told by `collect`.

        Args:
            spared: others that stay where they are.
        """
        if digest in self._device or self.is_loading(digest):
            return
        try:
            size_bytes = self._bytes_of(digest)
            self._device.check_fits(size_bytes)
        except AdapterError as error:
            self._refused[digest] = error
            self._wake()
            return
        if digest in self._host:
            self._promote(digest, size_bytes, spared)
        elif self._make_room_on_device(size_bytes, spared):
            self._device.reserve(digest, size_bytes)
            self._began(digest, self._loader.read(digest, "device"), "device", "disk")

    def prepare(self, order: Sequence[str]) -> None:
        """Begins loads of adapters that are needed soon, the first of `order` soonest.

        None of them drives out one in use or one that is needed sooner. What does not fit on the device now
        comes to the host, and from then on nothing else goes to the device, where it would be in the way.
        """
        sooner: set[str] = set()
        is_room_on_device = True
        for digest in order:
            if is_room_on_device:
                self.prefetch(digest, sooner)
                is_room_on_device = self.is_resident(digest) or self.is_loading(digest)
            if not is_room_on_device:
                try:
                    self.prefetch_to_host(digest, sooner)
                except AdapterError:  # no host tier, most often; the rest is told when it is its turn
                    return
                if self.whereabouts(digest) == "disk" and not self.is_loading(digest):
                    return
            sooner.add(digest)

    def prefetch_to_host(self, digest: str, spared: Set[str] = frozenset()) -> None:
        """Begins a load to the host unless it is in memory, under way, or there is no room now.

        Args:
            spared: others that stay where they are.

        Raises:
            CapacityError: there can be no room for it, or there is no host tier.
            WrongBaseError, AdapterNotFoundError
        """
        if self.whereabouts(digest) != "disk" or self.is_loading(digest):
            return
        size_bytes = self._copies.host_bytes(self._bytes_of(digest))
        self._host.check_fits(size_bytes)
        if self._make_room_on_host(size_bytes, spared):
            self._host.reserve(digest, size_bytes)
            self._began(digest, self._loader.read(digest, "host"), "host", "disk")

    def pin(self, digest: str, pinned: bool) -> None:
        """A pinned adapter does not leave its tier to make room."""
        if pinned:
            self._pinned.add(digest)
        else:
            self._pinned.discard(digest)
        self.changes += 1

    def demote(self, digest: str) -> None:
        """Lets an adapter go from the device to the host, or to disk where the host has no room for it.

        Nothing happens while a request uses it.
        """
        if digest in self._device and not self._device.references_to(digest):
            self._leave_device(digest, evicted=False)

    def evict(self, digest: str) -> bool:
        """Takes an adapter out of memory unless it is in use or moving; True if none of it is there then."""
        self._take_arrivals()
        if digest in self._loading:
            return False
        for tier in (self._device, self._host):
            if digest in tier and tier.references_to(digest):
                return False
        if digest in self._device:
            self._device.leave(digest, evicted=False)
            self.changes += 1
        if digest in self._host:
            self._host.take(digest)
            self.changes += 1
        return True

    @property
    def has_news(self) -> bool:
        """Whether `collect` would change something."""
        ended = any(load.future.done() for load in self._loading.values())
        return ended or bool(self._refused) or self._host.has_arrivals

    def collect(self) -> list[LoadOutcome]:
        """Puts adapters that have arrived where they belong; reports every ended load once."""
        self._take_arrivals()
        outcomes = [
            LoadOutcome(digest, "device", "disk", 0.0, error) for digest, error in self._refused.items()
        ]
        self._refused.clear()
        for digest, load in list(self._loading.items()):
            if load.future.done():
                del self._loading[digest]
                outcomes.append(self._settle(digest, load))
        return outcomes

    def close(self) -> None:
        """Ends the loader's threads after what they are doing now."""
        self._loader.close()

    # Leaving

    def _make_room_on_device(self, size_bytes: int, spared: Set[str]) -> bool:
        """Lets others go until so many bytes are free; none if that cannot be."""
        victims = self._device.victims_for(size_bytes, spared)
        for digest in victims or ():
            self._leave_device(digest, evicted=True, spared=spared)
            self._on_eviction("device")
        return victims is not None

    def _make_room_on_host(self, size_bytes: int, spared: Set[str]) -> bool:
        victims = self._host.victims_for(size_bytes, spared)
        for digest in victims or ():
            self._host.take(digest, evicted=True)
            self._on_eviction("host")
            self.changes += 1
        return victims is not None

    def _leave_device(self, digest: str, *, evicted: bool, spared: Set[str] = frozenset()) -> None:
        loaded = self._device.leave(digest, evicted=evicted)
        self.changes += 1
        size_bytes = self._copies.host_bytes(self._bytes_of(digest))
        if self._make_room_on_host(size_bytes, spared):
            future = self._loader.demote(loaded)
            self._host.enter(digest, size_bytes, future, loaded.disk_s)
            future.add_done_callback(lambda _: self._wake())

    def _take_arrivals(self) -> None:
        self.changes += self._host.take_arrivals()

    # Arriving

    def _promote(self, digest: str, size_bytes: int, spared: Set[str]) -> None:
        on_host = self._host.acquire(digest)  # so that it does not have to go for those whom it drives out
        if self._make_room_on_device(size_bytes, spared):
            self._device.reserve(digest, size_bytes)
            self._began(digest, self._loader.promote(digest, on_host), "device", "host")
        else:
            self._host.release(digest)

    def _began(self, digest: str, future: "Future[Loaded]", tier: TierName, source: Source) -> None:
        self._loading[digest] = _Loading(future, tier, source, time.monotonic())
        future.add_done_callback(lambda _: self._wake())

    def _settle(self, digest: str, load: _Loading) -> LoadOutcome:
        seconds = time.monotonic() - load.began_s
        error = _error_of(digest, load.future.exception())
        if error is None and load.tier == "device":
            try:
                self._device.enter(digest, load.future.result())
            except MemoryError as failure:
                error = _error_of(digest, failure)
        if load.source == "host":
            self._host.release(digest)
        if error is not None:
            (self._device if load.tier == "device" else self._host).cancel(digest)
        elif load.tier == "host":
            self._host.settle(digest, load.future, load.future.result().disk_s)
        elif load.source == "host":
            self._host.fetched(digest)
        self.changes += 1
        log.info(
            "adapter %s digest=%s tier=%s source=%s seconds=%.3f",
            "loaded" if error is None else "not loaded",
            digest,
            load.tier,
            load.source,
            seconds,
        )
        return LoadOutcome(digest, load.tier, load.source, seconds, error)


def _bytes_of(store: AdapterStore, layout: BaseLayout, dtype: torch.dtype, digest: str) -> int:
    """Of an adapter of this base; WrongBaseError for any other, before somebody makes room for it."""
    check_base(store.declared_base_of(digest), layout)
    return bytes_of(store.facts_of(digest), layout, dtype)


def _error_of(digest: str, error: BaseException | None) -> AdapterError | None:
    """Why a load failed, as callers may see it; None if it did not."""
    if error is None or isinstance(error, AdapterError):
        return error
    if not isinstance(error, OSError | RuntimeError | MemoryError):  # disk, device or host memory
        raise error
    log.error("adapter load failed digest=%s", digest, exc_info=error)
    if is_out_of_memory(error):
        return CapacityError(
            f"there was not enough memory for adapter {digest}; try again later, or start the server with a "
            "lower --adapter-device-bytes or --kv-bytes",
            reason=OUT_OF_MEMORY,
        )
    failure = AdapterNotFoundError if isinstance(error, FileNotFoundError) else CapacityError
    return failure(f"adapter {digest} could not be loaded; see the server's log")
