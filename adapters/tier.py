"""One tier of memory: what is in it, who uses it, and who has to go. By bytes; knows no tensors, no files."""

from collections.abc import Iterator, Set
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

from adapters.eviction import EvictionPolicy

TierName = Literal["host", "device"]
Whereabouts = Literal["disk", "host", "device"]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class TierBudgets:
    """Memory for adapters; on a CPU both are the same memory. Without host_bytes there is no host tier."""

    device_bytes: int
    host_bytes: int


@dataclass(frozen=True, slots=True)
class Resident:
    """An adapter in memory."""

    digest: str
    size_bytes: int
    pinned: bool
    tier: TierName


@dataclass(slots=True)
class _Entry(Generic[T]):
    held: T
    size_bytes: int
    references: int = 0


class Tier(Generic[T]):
    """Holds things by key within a budget of bytes; what is on its way counts from the start of the way.

    Room is made by the caller: `victims_for` says who has to go, `take` lets one go. Whoever is referenced or
    pinned is never chosen.
    """

    def __init__(self, budget_bytes: int, policy: EvictionPolicy, pinned: Set[str]) -> None:
        """
        Args:
            pinned: keys that do not go to make room; looked at whenever that matters.
        """
        self.budget_bytes = budget_bytes
        self._policy = policy
        self._pinned = pinned
        self._entries: dict[str, _Entry[T]] = {}
        self._reserved: dict[str, int] = {}
        self._used_bytes = 0

    @property
    def used_bytes(self) -> int:
        """Bytes of what is here and of what is on its way."""
        return self._used_bytes

    @property
    def idle_bytes(self) -> int:
        """Bytes that could be free at once."""
        return sum(entry.size_bytes for key, entry in self._entries.items() if self._may_go(key))

    @property
    def pinned_bytes(self) -> int:
        """Bytes here that are never free."""
        return sum(entry.size_bytes for key, entry in self._entries.items() if self.is_pinned(key))

    @property
    def is_expecting(self) -> bool:
        """Whether something is on its way here."""
        return bool(self._reserved)

    def __contains__(self, key: object) -> bool:
        return key in self._entries

    def __iter__(self) -> Iterator[tuple[str, int]]:
        """Key and bytes of all that is here."""
        for key, entry in self._entries.items():
            yield key, entry.size_bytes

    def is_pinned(self, key: str) -> bool:
        return key in self._pinned

    def size_of(self, key: str) -> int:
        return self._entries[key].size_bytes

    def references_to(self, key: str) -> int:
        return self._entries[key].references

    def look(self, key: str) -> T:
        """What is held under a key, without any effect."""
        return self._entries[key].held

    def acquire(self, key: str) -> T:
        """What is held under a key, referenced until `release`."""
        entry = self._entries[key]
        entry.references += 1
        return entry.held

    def release(self, key: str) -> None:
        """Gives one reference back."""
        entry = self._entries[key]
        assert entry.references > 0, f"{key} released more often than acquired"
        entry.references -= 1

    def use(self, key: str) -> None:
        """Tells the policy that a request began to use it."""
        self._policy.use(key)

    def victims_for(self, size_bytes: int, spared: Set[str] = frozenset()) -> list[str] | None:
        """Who has to go so that so many bytes are free; None if even all who may go are not enough.

        Args:
            spared: keys that stay besides those that are referenced or pinned.
        """
        missing = self._used_bytes + size_bytes - self.budget_bytes
        if missing <= 0:
            return []
        victims = []
        for key in self._policy.order():
            if key not in spared and self._may_go(key):
                victims.append(key)
                missing -= self._entries[key].size_bytes
                if missing <= 0:
                    return victims
        return None

    def reserve(self, key: str, size_bytes: int) -> None:
        """Charges what is on its way; `settle` or `cancel` follows."""
        self._reserved[key] = size_bytes
        self._charge(size_bytes)

    def settle(self, key: str, held: T, reload_s: float) -> None:
        """What was on its way is here.

        Args:
            reload_s: what getting it again would take.
        """
        size_bytes = self._reserved.pop(key)
        self._entries[key] = _Entry(held, size_bytes)
        self._policy.enter(key, size_bytes, reload_s)

    def cancel(self, key: str) -> None:
        """What was on its way does not come."""
        self._used_bytes -= self._reserved.pop(key)

    def take(self, key: str, *, evicted: bool = False) -> T:
        """Takes out what nobody references; evicted: because others need the room."""
        entry = self._entries.pop(key)
        assert not entry.references, f"{key} is in use"
        self._policy.leave(key, evicted=evicted)
        self._used_bytes -= entry.size_bytes
        return entry.held

    def _may_go(self, key: str) -> bool:
        return not self._entries[key].references and not self.is_pinned(key)

    def _charge(self, size_bytes: int) -> None:
        self._used_bytes += size_bytes
        assert self._used_bytes <= self.budget_bytes, "room was to be made first"
