"""Percentiles and what is made of answers."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.bench.answers import Answer, Figures, Load, percentile

SECONDS = st.lists(st.floats(0, 1e6), min_size=1, max_size=50)


@given(values=SECONDS, q=st.floats(0, 1))
def test_percentiles_are_numpys(values: list[float], q: float) -> None:
    assert percentile(values, q) == pytest.approx(np.quantile(values, q), rel=1e-9, abs=1e-9)


def test_percentiles_interpolate_and_forget_no_outlier() -> None:
    values = [*range(100), 1000.0]
    assert percentile(values, 0.5) == 50
    assert percentile(values, 0.99) == 99
    assert percentile(values, 1.0) == 1000
    assert percentile([3.0, 1.0], 0.25) == 1.5


def test_no_percentile_of_nothing() -> None:
    assert math.isnan(percentile([], 0.5))


def test_an_answer_counts_from_when_it_was_asked() -> None:
    answer = Answer(10.0, (10.5, 10.75, 11.75), tokens=3)
    assert (answer.first_token_s, answer.total_s, answer.gaps_s) == (0.5, 1.75, [0.25, 1.0])


def test_figures_are_of_all_passes_and_rates_of_each() -> None:
    def load(tokens: int, first_s: float) -> Load:
        answer = Answer(0.0, (first_s, first_s + 1), tokens)
        return Load((answer,), Counter({"Broken: pipe": 1}), seconds=2.0)

    figures = Figures.of([load(10, 1.0), load(30, 2.0), load(20, 3.0)])
    assert (figures.requests, figures.failures) == (3, {"Broken: pipe": 3})
    assert figures.rates == (5.0, 15.0, 10.0)
    assert (figures.tokens_per_second, figures.lowest, figures.highest) == (10.0, 5.0, 15.0)
    assert figures.first_token_s.p50 == 2.0


def test_figures_of_failures_alone_are_no_numbers() -> None:
    figures = Figures.of([Load((), Counter({"Refused: no": 2}), seconds=1.0)])
    assert figures.tokens_per_second == 0
    assert math.isnan(figures.first_token_s.p99)
