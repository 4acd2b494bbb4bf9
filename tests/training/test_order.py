"""The order of rows: each once, no trend, by seed and epoch alone; like lengths where rows are padded."""

import random
from itertools import pairwise
from statistics import mean

import pytest

from training.order import RowOrder

CHANCE = random.Random(1)
LENGTHS = [CHANCE.randrange(8, 200) for _ in range(1003)]
STEP = 8

both = pytest.mark.parametrize("padded", [True, False], ids=["padded", "joined"])


def steps_of(padded: bool, epoch: int = 0, seed: int = 0) -> list[list[int]]:
    """Row indices of each step."""
    order = RowOrder(LENGTHS, STEP, seed, padded=padded)
    order.epoch = epoch
    rows = list(order)
    return [rows[first : first + STEP] for first in range(0, len(rows), STEP)]


@both
@pytest.mark.parametrize(
    ("rows", "step"), [(1003, 8), (48, 8), (16, 8), (9, 8), (8, 8), (5, 8), (1, 8), (17, 4)]
)
def test_every_row_comes_once(rows: int, step: int, padded: bool) -> None:
    for epoch in range(3):
        order = RowOrder(LENGTHS[:rows], step, seed=0, padded=padded)
        order.epoch = epoch
        assert sorted(order) == list(range(rows))


@both
def test_seed_and_epoch_alone_decide(padded: bool) -> None:
    assert steps_of(padded) == steps_of(padded)
    assert steps_of(padded) != steps_of(padded, epoch=1)
    assert steps_of(padded) != steps_of(padded, seed=1)


def spread(padded: bool) -> float:
    """Between the longest row of a step and its shortest, on average."""
    return mean(max(own) - min(own) for own in ([LENGTHS[row] for row in step] for step in steps_of(padded)))


def test_padded_rows_of_a_step_are_of_like_length() -> None:
    assert spread(padded=True) < 30  # of 192


def test_rows_without_padding_meet_any_others() -> None:
    assert spread(padded=False) > 120


@both
def test_steps_do_not_grow_shorter_and_shorter(padded: bool) -> None:
    """As where lengths alone are sorted: there 121 of these 125 steps are shorter than the one before."""
    means = [mean(LENGTHS[row] for row in step) for step in steps_of(padded)]
    shorter = sum(after < before for before, after in pairwise(means))
    assert 0.35 < shorter / (len(means) - 1) < 0.65


@both
def test_what_takes_the_most_memory_comes_first_and_what_is_left_over_last(padded: bool) -> None:
    weight = max if padded else sum
    for epoch in range(3):
        steps = steps_of(padded, epoch)
        weights = [weight(LENGTHS[row] for row in step) for step in steps]
        assert weights[0] == max(weights)
        assert [len(step) for step in steps] == [STEP] * (len(LENGTHS) // STEP) + [len(LENGTHS) % STEP]
