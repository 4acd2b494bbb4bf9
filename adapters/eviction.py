"""Which adapter leaves a tier first. Knows keys, bytes and seconds; no tensors, no files."""

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, Protocol

Eviction = Literal["lru", "cost"]

_HALF_LIFE_USES = 1000
"""After so many uses of any adapter, one use counts half: what was popular is let go of in the end."""
_KEYS_REMEMBERED = 4096


class EvictionPolicy(Protocol):
    """Ranks what is in one tier; whoever owns the tier decides who of them may go at all."""

    def enter(self, key: str, size_bytes: int, reload_s: float) -> None:
        """It is there now; getting it again would take so long."""

    def use(self, key: str) -> None:
        """A request began to use it."""

    def leave(self, key: str, *, evicted: bool) -> None:
        """It is not there any more; evicted: because others needed the room."""

    def order(self) -> Iterable[str]:
        """All that is there; who should go first comes first."""


class LeastRecentlyUsed:
    """Whoever was not used for longest goes first."""

    def __init__(self) -> None:
        self._keys: OrderedDict[str, None] = OrderedDict()

    def enter(self, key: str, size_bytes: int, reload_s: float) -> None:
        self._keys[key] = None

    def use(self, key: str) -> None:
        self._keys.move_to_end(key)

    def leave(self, key: str, *, evicted: bool) -> None:
        del self._keys[key]

    def order(self) -> Iterable[str]:
        return tuple(self._keys)


class Popularity:
    """How often each key was used lately, whether it is in a tier or not; of a bounded number of keys."""

    def __init__(self) -> None:
        self._clock = 0
        self._counts: OrderedDict[str, tuple[float, int]] = OrderedDict()  # count at that clock; oldest first

    def count(self, key: str) -> float:
        """Uses, each worth half after 1000 later ones of any key."""
        count, clock = self._counts.get(key, (0.0, self._clock))
        fading: float = 0.5 ** ((self._clock - clock) / _HALF_LIFE_USES)
        return count * fading

    def use(self, key: str) -> None:
        """Counts one more."""
        count = self.count(key) + 1.0
        self._clock += 1
        self._counts[key] = (count, self._clock)
        self._counts.move_to_end(key)
        if len(self._counts) > _KEYS_REMEMBERED:
            self._counts.popitem(last=False)


@dataclass(slots=True)
class _Worth:
    """Attributes: seconds_per_byte: what a byte of it saves each time that it is wanted and there."""

    seconds_per_byte: float
    priority: float


class CostAware:
    """Whoever saves least loading time for its bytes goes first.

    GreedyDual-Size-Frequency (Cherkasova, HPL-98-69): priority = age + uses · reload seconds / bytes, where
    age is the priority of the last one that had to go, so that nobody stays for merits of long ago. Unlike
    there, uses are remembered when an adapter has left, and fade: with a changing workload forgetting them
    was worse than LRU (docs/performance.md).
    """

    def __init__(self, popularity: Popularity) -> None:
        """
        Args:
            popularity: shared by all tiers, since an adapter keeps it when it moves.
        """
        self._popularity = popularity
        self._age = 0.0
        self._worths: dict[str, _Worth] = {}

    def enter(self, key: str, size_bytes: int, reload_s: float) -> None:
        self._worths[key] = _Worth(reload_s / max(size_bytes, 1), 0.0)
        self._rate(key)

    def use(self, key: str) -> None:
        self._popularity.use(key)
        self._rate(key)

    def leave(self, key: str, *, evicted: bool) -> None:
        worth = self._worths.pop(key)
        if evicted:
            self._age = max(self._age, worth.priority)

    def order(self) -> Iterable[str]:
        return sorted(self._worths, key=lambda key: self._worths[key].priority)

    def _rate(self, key: str) -> None:
        worth = self._worths[key]
        worth.priority = self._age + self._popularity.count(key) * worth.seconds_per_byte


def policies(eviction: Eviction, tiers: int) -> list[EvictionPolicy]:
    """One policy for each of so many tiers."""
    if eviction == "lru":
        return [LeastRecentlyUsed() for _ in range(tiers)]
    popularity = Popularity()
    return [CostAware(popularity) for _ in range(tiers)]
