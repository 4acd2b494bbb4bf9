"""The order of rows: every row once, like lengths together, no trend, and a function of seed and epoch."""

import random
from itertools import pairwise

import pytest

from training.order import LengthBuckets

CHANCE = random.Random(1)
LENGTHS = [CHANCE.randrange(8, 200) for _ in range(1003)]
STEP = 8


def steps_of(epoch: int = 0, seed: int = 0) -> list[list[int]]:
    """Row indices of each step."""
    order = LengthBuckets(LENGTHS, STEP, seed)
    order.epoch = epoch
    rows = list(order)
    return [rows[first : first + STEP] for first in range(0, len(rows), STEP)]


@pytest.mark.parametrize(
    ("rows", "step"), [(1003, 8), (48, 8), (16, 8), (9, 8), (8, 8), (5, 8), (1, 8), (17, 4)]
)
def test_every_row_comes_once(rows: int, step: int) -> None:
    for epoch in range(3):
        order = LengthBuckets(LENGTHS[:rows], step, seed=0)
        order.epoch = epoch
        assert sorted(order) == list(range(rows))


def test_seed_and_epoch_alone_decide() -> None:
    assert steps_of() == steps_of()
    assert steps_of() != steps_of(epoch=1)
    assert steps_of() != steps_of(seed=1)


def test_rows_of_a_step_are_of_like_length() -> None:
    spreads = [max(own) - min(own) for own in ([LENGTHS[row] for row in step] for step in steps_of())]
    assert sum(spreads) / len(spreads) < 30  # of 192; eight rows at random differ by some 150


def test_steps_do_not_grow_shorter_and_shorter() -> None:
    """As where lengths alone are sorted: there 121 of these 125 steps are shorter than the one before."""
    means = [sum(LENGTHS[row] for row in step) / len(step) for step in steps_of()]
    shorter = sum(after < before for before, after in pairwise(means))
    assert 0.35 < shorter / (len(means) - 1) < 0.65


def test_the_longest_row_is_in_the_first_step_and_what_is_left_over_in_the_last() -> None:
    for epoch in range(3):
        steps = steps_of(epoch)
        assert max(LENGTHS) in [LENGTHS[row] for row in steps[0]]
        assert [len(step) for step in steps] == [STEP] * (len(LENGTHS) // STEP) + [len(LENGTHS) % STEP]
