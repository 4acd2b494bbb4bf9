"""Which adapters are on the device: loads, references, pins and evicts them by bytes. Knows no requests.

Two tiers so far: disk (the store) and device. Everything here belongs to the engine's thread but for the load
itself, which one loader thread does so that neither the engine nor the event loop ever waits for a file.
"""

import heapq
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache

import torch

from adapters.errors import AdapterCorruptError, AdapterError, AdapterNotFoundError, CapacityError
from adapters.factors import device_factors
from adapters.files import CONFIG_FILE, WEIGHTS_FILE
from adapters.layers import AdapterSlots
from adapters.layout import BaseLayout
from adapters.spec import parse_spec
from adapters.store import AdapterStore
from adapters.weights import load_pairs
from kernels.lora import LoraFactors

log = logging.getLogger(__name__)

_SIZES_KEPT = 4096


@dataclass(slots=True)
class _Resident:
    slot: int
    size_bytes: int
    references: int = 0


@dataclass(frozen=True, slots=True)
class _Loading:
    future: "Future[dict[str, LoraFactors]]"
    reserved_bytes: int
    began_s: float


@dataclass(frozen=True, slots=True)
class LoadOutcome:
    """How a load ended; error is None if the adapter is on the device now."""

    digest: str
    seconds: float
    error: AdapterError | None


class AdapterResidency:
    """The device tier. Bytes are charged when a load begins, by the adapter's own size, within the budget."""

    def __init__(
        self,
        store: AdapterStore,
        layout: BaseLayout,
        slots: AdapterSlots,
        *,
        device: torch.device,
        dtype: torch.dtype,
        budget_bytes: int,
        wake: Callable[[], None],
        on_eviction: Callable[[], None],
    ) -> None:
        """
        Args:
            dtype: type in which factors are kept and applied.
            budget_bytes: device memory for adapters.
            wake: called from the loader thread when a load has ended and `collect` should be called.
            on_eviction: called for every adapter that has to leave.
        """
        self.budget_bytes = budget_bytes
        self._store, self._layout, self._slots = store, layout, slots
        self._device, self._dtype = device, dtype
        self._wake, self._on_eviction = wake, on_eviction
        self._resident: OrderedDict[str, _Resident] = OrderedDict()  # least recently used first
        self._loading: dict[str, _Loading] = {}
        self._refused: dict[str, AdapterError] = {}
        self._pinned: set[str] = set()
        self._free_slots: list[int] = []
        self._next_slot = 1
        # Asked for in every step while an adapter waits for room; a content never changes.
        self._device_bytes = lru_cache(maxsize=_SIZES_KEPT)(self._read_device_bytes)
        self._loader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="adapter-loader")
        self._verifier = ThreadPoolExecutor(max_workers=1, thread_name_prefix="adapter-verifier")

    @property
    def used_bytes(self) -> int:
        """Bytes on the device and on their way there."""
        return sum(r.size_bytes for r in self._resident.values()) + sum(
            load.reserved_bytes for load in self._loading.values()
        )

    def residents(self) -> Iterator[tuple[str, int, bool]]:
        """Digest, bytes and whether pinned, of every adapter on the device."""
        for digest, resident in self._resident.items():
            yield digest, resident.size_bytes, digest in self._pinned

    def is_resident(self, digest: str) -> bool:
        return digest in self._resident

    def is_loading(self, digest: str) -> bool:
        """Whether a load is under way, or has ended badly and is not collected yet: the wait is bounded."""
        return digest in self._loading or digest in self._refused

    def acquire(self, digest: str) -> int | None:
        """A slot holding the adapter, referenced until `release`; None while it is not there.

        Begins the load if there is room or room can be made.
        """
        resident = self._resident.get(digest)
        if resident is None:
            self.prefetch(digest)
            return None
        resident.references += 1
        self._resident.move_to_end(digest)
        return resident.slot

    def release(self, digest: str) -> None:
        """Gives one reference back."""
        resident = self._resident[digest]
        assert resident.references > 0, f"{digest} released more often than acquired"
        resident.references -= 1

    def prefetch(self, digest: str) -> None:
        """Begins a load unless it is there, under way, or there is no room now."""
        if digest in self._resident or self.is_loading(digest):
            return
        try:
            size_bytes = self._device_bytes(digest)
            if not self._make_room(size_bytes):
                return
        except AdapterError as error:
            self._refused[digest] = error
            self._wake()
            return
        future = self._loader.submit(self._load, digest)
        self._loading[digest] = _Loading(future, size_bytes, time.monotonic())
        future.add_done_callback(lambda _: self._wake())

    def in_the_way(self, digest: str, order: Sequence[str]) -> Set[str]:
        """Adapters in use, the first of `order`, without which this one would fit.

        None while others are loading: they end soon, and may make room or need it.
        """
        if self._loading:
            return frozenset()
        idle = sum(
            r.size_bytes for d, r in self._resident.items() if not r.references and d not in self._pinned
        )
        missing = self.used_bytes - idle + self._device_bytes(digest) - self.budget_bytes
        chosen: set[str] = set()
        for other in order:
            if missing <= 0:
                break
            if other in self._resident and other not in self._pinned:
                chosen.add(other)
                missing -= self._resident[other].size_bytes
        return chosen

    @property
    def has_news(self) -> bool:
        """Whether `collect` would report something."""
        return bool(self._refused) or any(load.future.done() for load in self._loading.values())

    def collect(self) -> list[LoadOutcome]:
        """Puts adapters whose load has ended into their slots; reports every ended load once."""
        outcomes = [LoadOutcome(digest, 0.0, error) for digest, error in self._refused.items()]
        self._refused.clear()
        for digest, load in list(self._loading.items()):
            if load.future.done():
                del self._loading[digest]
                outcomes.append(self._settle(digest, load))
        return outcomes

    def pin(self, digest: str, pinned: bool) -> None:
        """A pinned adapter is not evicted to make room."""
        if pinned:
            self._pinned.add(digest)
        else:
            self._pinned.discard(digest)

    def evict(self, digest: str) -> bool:
        """Takes an adapter off the device unless a request uses it; True if it is not there afterwards."""
        resident = self._resident.get(digest)
        if resident is None:
            return digest not in self._loading
        if resident.references:
            return False
        del self._resident[digest]
        self._slots.clear(resident.slot)
        heapq.heappush(self._free_slots, resident.slot)
        return True

    def close(self) -> None:
        """Ends the loader threads after their current load."""
        self._loader.shutdown(wait=True, cancel_futures=True)
        self._verifier.shutdown(wait=True)

    def _read_device_bytes(self, digest: str) -> int:
        """Upper bound of what the adapter takes on the device, known before it is read."""
        facts = self._store.facts_of(digest)
        return facts.parameter_count * self._dtype.itemsize

    def _make_room(self, size_bytes: int) -> bool:
        """Evicts least recently used adapters until so many bytes are free; evicts none if that cannot be."""
        if size_bytes > self.budget_bytes:
            raise CapacityError(
                f"the adapter needs {size_bytes} bytes on the device and all adapters together may have "
                f"{self.budget_bytes}; start the server with a larger --adapter-device-bytes",
                reason="ADAPTER_TOO_LARGE",
            )
        pinned = sum(r.size_bytes for d, r in self._resident.items() if d in self._pinned)
        if size_bytes + pinned > self.budget_bytes:
            raise CapacityError(
                f"the adapter needs {size_bytes} bytes on the device, and pinned ones hold {pinned} of the "
                f"{self.budget_bytes} for all; unpin one or start the server with a larger "
                "--adapter-device-bytes",
                reason="ADAPTERS_PINNED",
            )
        missing = self.used_bytes + size_bytes - self.budget_bytes
        victims = []
        for digest, resident in self._resident.items():
            if missing <= 0:
                break
            if not resident.references and digest not in self._pinned:
                victims.append(digest)
                missing -= resident.size_bytes
        if missing > 0:
            return False
        for digest in victims:
            self.evict(digest)
            self._on_eviction()
        return True

    def _load(self, digest: str) -> dict[str, LoraFactors]:
        """Runs in the loader thread: disk → checked tensors on the device."""
        # Hashing runs beside the reading, and without the interpreter.
        verified = self._verifier.submit(self._verify, digest)
        try:
            folder = self._store.path_of(digest)
            spec = parse_spec((folder / CONFIG_FILE).read_bytes())
            pairs = load_pairs(folder / WEIGHTS_FILE, spec, self._layout)
            return device_factors(pairs, spec, self._device, self._dtype)
        finally:
            verified.result()  # that the files changed explains any other error

    def _verify(self, digest: str) -> None:
        try:
            self._store.verify(digest)
        except AdapterCorruptError as error:
            self._store.mark_failed(digest, str(error))
            raise

    def _settle(self, digest: str, load: _Loading) -> LoadOutcome:
        seconds = time.monotonic() - load.began_s
        try:
            factors = load.future.result()
        except AdapterError as error:
            return LoadOutcome(digest, seconds, error)
        except (OSError, RuntimeError, MemoryError) as error:  # disk, device or host memory
            log.exception("adapter load failed digest=%s", digest)
            failure = AdapterNotFoundError if isinstance(error, FileNotFoundError) else CapacityError
            return LoadOutcome(
                digest, seconds, failure(f"adapter {digest} could not be loaded; see the server's log")
            )
        slot = heapq.heappop(self._free_slots) if self._free_slots else self._take_new_slot()
        self._slots.fill(slot, factors)
        self._resident[digest] = _Resident(slot, _bytes_of(factors))
        log.info("adapter resident digest=%s slot=%d seconds=%.3f", digest, slot, seconds)
        return LoadOutcome(digest, seconds, None)

    def _take_new_slot(self) -> int:
        self._next_slot += 1
        return self._next_slot - 1


def _bytes_of(factors: Mapping[str, LoraFactors]) -> int:
    return sum(pair.nbytes for pair in factors.values())
