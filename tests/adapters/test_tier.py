"""A tier under any sequence of arrivals, uses and departures, with either policy."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from adapters.eviction import policies
from adapters.tier import Tier

BUDGET = 100
KEYS = st.sampled_from("abcdefgh")


class TierMachine(RuleBasedStateMachine):
    """Keeps its own account beside the tier's."""

    @initialize(eviction=st.sampled_from(["lru", "cost"]))
    def begin(self, eviction: str) -> None:
        self.pinned: set[str] = set()
        self.tier: Tier[str] = Tier(BUDGET, policies(eviction, 1)[0], self.pinned)
        self.sizes: dict[str, int] = {}
        self.references: dict[str, int] = {}
        self.coming: dict[str, int] = {}

    @rule(key=KEYS, size=st.integers(1, BUDGET))
    def arrive(self, key: str, size: int) -> None:
        if key in self.sizes or key in self.coming:
            return
        victims = self.tier.victims_for(size)
        unmovable = sum(n for k, n in self.sizes.items() if self.references[k] or k in self.pinned)
        # Nobody starves: room is found exactly when what cannot be moved leaves it.
        assert (victims is not None) == (size + unmovable + sum(self.coming.values()) <= BUDGET)
        for victim in victims or ():
            assert not self.references[victim]
            assert victim not in self.pinned
            assert self.tier.take(victim, evicted=True) == victim
            del self.sizes[victim], self.references[victim]
        if victims is not None:
            self.tier.reserve(key, size)
            self.coming[key] = size

    @precondition(lambda self: self.coming)
    @rule(ends_well=st.booleans(), reload_s=st.floats(1e-4, 10))
    def end_of_the_way(self, ends_well: bool, reload_s: float) -> None:
        key, size = self.coming.popitem()
        if ends_well:
            self.tier.settle(key, key, reload_s)
            self.sizes[key], self.references[key] = size, 0
        else:
            self.tier.cancel(key)

    @rule(key=KEYS)
    def acquire(self, key: str) -> None:
        if key in self.sizes:
            self.tier.use(key)
            assert self.tier.acquire(key) == key
            self.references[key] += 1

    @rule(key=KEYS)
    def release(self, key: str) -> None:
        if self.references.get(key):
            self.tier.release(key)
            self.references[key] -= 1

    @rule(key=KEYS, pin=st.booleans())
    def pin(self, key: str, pin: bool) -> None:
        (self.pinned.add if pin else self.pinned.discard)(key)

    @rule(key=KEYS)
    def leave(self, key: str) -> None:
        if key in self.sizes and not self.references[key]:
            self.tier.take(key)
            del self.sizes[key], self.references[key]

    @invariant()
    def accounts_agree(self) -> None:
        if not hasattr(self, "tier"):
            return
        assert dict(self.tier) == self.sizes
        assert self.tier.used_bytes == sum(self.sizes.values()) + sum(self.coming.values()) <= BUDGET
        assert self.tier.pinned_bytes == sum(n for k, n in self.sizes.items() if k in self.pinned)
        assert {key: self.tier.references_to(key) for key in self.sizes} == self.references


TestTier = TierMachine.TestCase
TestTier.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
