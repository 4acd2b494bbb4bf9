"""Policies over made-up traces with made-up costs: what the measured ones rest on."""

from collections.abc import Mapping

import pytest

from tests.bench.arrivals import in_turn
from tests.bench.tiers import POLICIES, LoadCost, Played, play, played_table, simulate

COSTS = [
    LoadCost(rank, rank * 600_000, disk_ms=8 + rank, cold_disk_ms=0, host_ms=0) for rank in (4, 8, 16, 32, 64)
]


@pytest.fixture(scope="module")
def played() -> list[Played]:
    return simulate(COSTS, adapters=50, requests=2000)


def seconds(played: list[Played], policy: str, noise: float = 0.0) -> Mapping[tuple[str, float, str], float]:
    chosen = [each for each in played if (each.policy, each.noise) == (policy, noise)]
    return {(each.sizes, each.room, each.trace): each.loading_s for each in chosen}


def test_hits_and_bytes_are_counted() -> None:
    names = ["a", "b"]
    sizes, costs = dict.fromkeys(names, 10), dict.fromkeys(names, 0.5)
    together = play(POLICIES["lru"](), in_turn(names, 10), sizes, costs, budget_bytes=20, noise=0)
    alone = play(POLICIES["lru"](), in_turn(names, 10), sizes, costs, budget_bytes=19, noise=0)
    assert together == (0.8, 20, 1.0)
    assert alone == (0.0, 100, 5.0)


def test_the_default_loads_for_less_time_than_lru(played: list[Played]) -> None:
    """Clearly where some are more popular than others, and hardly longer anywhere, also with noisy costs."""
    lru = seconds(played, "lru")
    for cost in (seconds(played, "cost"), seconds(played, "cost", noise=0.7)):
        for case, lru_s in lru.items():
            assert cost[case] < lru_s * (0.97 if "Zipf" in case[2] else 1.02), case


def test_every_policy_has_a_column(played: list[Played]) -> None:
    head = played_table(played).splitlines()[0]
    assert [name.strip() for name in head.split("trace")[1].split("│")] == [*POLICIES, "cost ~", ""]
