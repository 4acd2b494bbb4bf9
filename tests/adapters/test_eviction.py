"""Who leaves first: by age, and by what its bytes save."""

import pytest

from adapters.eviction import CostAware, Eviction, LeastRecentlyUsed, Popularity, policies

MB = 1_000_000


def test_the_longest_unused_goes_first() -> None:
    policy = LeastRecentlyUsed()
    for key in "abc":
        policy.enter(key, MB, 0.01)
    policy.use("a")
    assert list(policy.order()) == ["b", "c", "a"]
    policy.leave("c", evicted=True)
    assert list(policy.order()) == ["b", "a"]


def test_what_is_dear_and_small_and_wanted_stays() -> None:
    policy = CostAware(Popularity())
    policy.enter("large", 10 * MB, 0.02)
    policy.enter("small", MB, 0.02)
    policy.enter("slow", MB, 0.2)
    for key in ("large", "small", "slow"):
        policy.use(key)
    assert list(policy.order()) == ["large", "small", "slow"]
    for _ in range(30):
        policy.use("large")
    assert list(policy.order()) == ["small", "large", "slow"]


def test_merits_of_long_ago_do_not_keep_anybody() -> None:
    """One that was used a hundred times leaves while newcomers of the same size go on being used once."""
    policy = CostAware(Popularity())
    policy.enter("old", MB, 0.01)
    for _ in range(100):
        policy.use("old")
    policy.enter("0", MB, 0.01)
    for number in range(1, 1000):
        first = next(iter(policy.order()))
        policy.leave(first, evicted=True)
        if first == "old":
            break
        policy.enter(str(number), MB, 0.01)
        policy.use(str(number))
    else:
        raise AssertionError("it never left")
    assert number > 50  # and yet not at once


def test_popularity_outlives_a_stay_and_fades() -> None:
    popularity = Popularity()
    first, second = CostAware(popularity), CostAware(popularity)
    first.enter("a", MB, 0.01)
    for _ in range(9):
        first.use("a")
    first.leave("a", evicted=False)
    second.enter("b", MB, 0.01)
    second.use("b")
    second.enter("a", MB, 0.01)  # in another tier, unused there
    assert list(second.order()) == ["b", "a"]
    before = popularity.count("a")
    for _ in range(1000):
        popularity.use("b")
    assert popularity.count("a") == pytest.approx(before / 2)


def test_popularity_of_very_many_is_bounded() -> None:
    popularity = Popularity()
    for number in range(10_000):
        popularity.use(str(number))
    assert popularity.count("0") == 0
    assert popularity.count("9999") == 1


@pytest.mark.parametrize("eviction", ["lru", "cost"])
def test_each_tier_has_a_policy_of_its_own(eviction: Eviction) -> None:
    device, host = policies(eviction, 2)
    device.enter("a", MB, 0.01)
    host.enter("b", MB, 0.01)
    assert (list(device.order()), list(host.order())) == (["a"], ["b"])
