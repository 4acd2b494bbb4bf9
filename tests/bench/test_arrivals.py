"""Arrivals are Poisson's, popularity is Zipf's, prompts are always new."""

import itertools
import statistics
from collections import Counter

import pytest

from tests.bench.arrivals import Prompts, in_turn, poisson_moments, zipf_choices
from tests.bench.cells import Cell

RATE, COUNT = 4.0, 20_000


def test_the_same_seed_gives_the_same_arrivals() -> None:
    assert poisson_moments(RATE, 50, seed=1) == poisson_moments(RATE, 50, seed=1)
    assert poisson_moments(RATE, 50, seed=1) != poisson_moments(RATE, 50, seed=2)


def test_waits_between_arrivals_are_exponential() -> None:
    moments = [0.0, *poisson_moments(RATE, COUNT, seed=3)]
    waits = [later - earlier for earlier, later in itertools.pairwise(moments)]
    assert min(waits) > 0
    assert statistics.mean(waits) == pytest.approx(1 / RATE, rel=0.03)
    assert statistics.stdev(waits) == pytest.approx(1 / RATE, rel=0.03)
    assert statistics.median(waits) == pytest.approx(0.6931 / RATE, rel=0.04)


def test_arrivals_in_a_second_have_their_mean_as_variance() -> None:
    per_second = Counter(int(moment) for moment in poisson_moments(RATE, COUNT, seed=4))
    counts = [per_second[second] for second in range(max(per_second))]
    assert statistics.mean(counts) == pytest.approx(RATE, rel=0.05)
    assert statistics.variance(counts) == pytest.approx(RATE, rel=0.1)


def test_the_kth_adapter_is_asked_for_one_kth_as_often() -> None:
    names = [f"a{i}" for i in range(64)]
    asked = Counter(zipf_choices(names, COUNT, exponent=1.0, seed=5))
    total = sum(1 / k for k in range(1, 65))
    for k in (1, 2, 4, 8):
        assert asked[names[k - 1]] == pytest.approx(COUNT / k / total, rel=0.1)
    assert zipf_choices(names, 9, 1.0, seed=6) == zipf_choices(names, 9, 1.0, seed=6)


def test_in_turn_is_even_and_the_base_without_names() -> None:
    assert in_turn(["a", "b"], 3) == ["a", "b", "a"]
    assert in_turn([], 2) == ["", ""]


def test_no_prompt_comes_twice() -> None:
    prompts = Prompts(range(10, 200), seed=0)
    taken = [prompts.take(16) for _ in range(1000)]
    assert len(set(taken)) == len(taken)
    assert all(10 <= token < 200 for prompt in taken for token in prompt)


def test_a_prefix_is_an_adapters_own_and_new_at_every_call() -> None:
    prompts, names = Prompts(range(10, 1000), seed=0), ["a", "b", "a", "b"]
    first, second = (prompts.asks_with_prefix(names, tokens=128, prefix_tokens=96) for _ in range(2))
    heads = [ask.prompt[:96] for ask in first]
    assert heads[0] == heads[2] != heads[1] == heads[3]
    assert not {ask.prompt[:96] for ask in second} & set(heads)
    assert len({ask.prompt for ask in first}) == 4
    assert all(len(ask.prompt) == 128 for ask in first)


def test_a_cell_asks_for_as_many_adapters_as_it_says() -> None:
    names, prompts = [f"a{i}" for i in range(8)], Prompts(range(10, 1000), seed=0)

    def asked(adapters: int) -> set[str]:
        cell = Cell(adapters, concurrency=4, requests=16, prompt_tokens=8, new_tokens=2)
        return {ask.adapter for ask in cell.asks(names, prompts, seed=0)}

    assert asked(0) == {""}
    assert asked(1) == {"a0"}
    assert asked(3) == {"a0", "a1", "a2"}
