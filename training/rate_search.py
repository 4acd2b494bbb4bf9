"""Owns the choice of a method's learning rate from short runs with several. Runs nothing itself.

It has no memory: what to try next follows from what was tried, so that a search goes on after a stop.
"""

import math
from collections.abc import Collection, Sequence
from typing import Final

from training.methods import method_named
from training.study_plan import RateSearch
from training.study_result import RateTrial

_MOST_EXTENSIONS: Final = 2
_HIGHEST: Final = 1.0  # of a recipe's learning rate
_LOWEST: Final = 1e-8
_DEFAULT_STEP: Final = 3.0


def next_rate(method: str, search: RateSearch, tried: Sequence[RateTrial]) -> float | None:
    """The learning rate to try next; None once the search is over.

    First the grid. Then, while the best rate is at an end of what was tried, one beyond that end: the best of
    a range whose end it is may be far from the best there is.
    """
    grid = _grid(method, search)
    rates = {trial.learning_rate for trial in tried}
    for rate in grid:
        if rate not in rates:
            return rate
    if len(grid) == 1 or len(rates) - len(grid) >= _MOST_EXTENSIONS:
        return None
    beyond = _beyond(best(tried), rates, _step(search))
    return beyond if beyond is not None and _LOWEST <= beyond <= _HIGHEST else None


def best(tried: Sequence[RateTrial]) -> float | None:
    """The rate with the lowest held-out loss; None if every run diverged."""
    measured = [
        (trial.held_out_loss, trial.learning_rate) for trial in tried if trial.held_out_loss is not None
    ]
    return min(measured)[1] if measured else None


def first_rate(method: str, search: RateSearch) -> float:
    """The one to take where there is nothing to choose."""
    return _grid(method, search)[0]


def needs_trials(method: str, search: RateSearch) -> bool:
    return method not in search.given and len(search.factors) > 1


def rounded(rate: float) -> float:
    """To three digits, so that one rate has one name."""
    return float(f"{rate:.3g}")


def _grid(method: str, search: RateSearch) -> list[float]:
    if method in search.given:
        return [float(search.given[method])]
    own = method_named(method).learning_rate
    return sorted({min(rounded(own * factor), _HIGHEST) for factor in search.factors})


def _beyond(chosen: float | None, rates: Collection[float], step: float) -> float | None:
    """One step outwards from an end at which the best is; downwards if every run diverged."""
    if chosen is None or chosen == min(rates):
        return rounded(min(rates) / step)
    return rounded(max(rates) * step) if chosen == max(rates) else None


def _step(search: RateSearch) -> float:
    """The ratio of neighbours in the grid, on the whole."""
    low, high = min(search.factors), max(search.factors)
    return math.pow(high / low, 1 / (len(search.factors) - 1)) if high > low else _DEFAULT_STEP
