"""Owns the figures of an evaluation: each metric with its interval, and the pairwise difference of two.

Knows samples, neither who answered nor how it is shown.

N rows, K statistics of a row, B resamples.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from training.intervals import Array, Interval, Resampling, percentiles, wilson
from training.metrics import Metric, Sample


@dataclass(frozen=True, slots=True)
class Figure:
    """A metric of all rows.

    Attributes:
        rows: how many count.
    """

    name: str
    value: float
    interval: Interval
    rows: int


@dataclass(frozen=True, slots=True)
class Difference:
    """A metric of one minus that of another on the same rows.

    Attributes:
        interval: by a bootstrap of pairs.
        wins, losses, ties: rows on which the one did better, did worse, or neither.
    """

    name: str
    value: float
    interval: Interval
    wins: int
    losses: int
    ties: int


def figures(samples: Sequence[Sample], resampling: Resampling) -> list[Figure]:
    """Each with its interval: Wilson's for rates, a bootstrap over rows for the others."""
    return [
        Figure(sample.metric.name, sample.figure, _interval(sample, resampling), int(sample.counted.sum()))
        for sample in samples
    ]


def differences(ours: Sequence[Sample], theirs: Sequence[Sample], resampling: Resampling) -> list[Difference]:
    """Of every metric that both have."""
    others = {sample.metric.name: sample for sample in theirs}
    return [
        difference(sample, others[sample.metric.name], resampling)
        for sample in ours
        if sample.metric.name in others
    ]


def difference(ours: Sample, theirs: Sample, resampling: Resampling) -> Difference:
    metric = ours.metric
    drawn_B = _resampled(ours, resampling) - _resampled(theirs, resampling)
    wins, losses, ties = _tally(metric, ours, theirs)
    return Difference(
        metric.name, ours.figure - theirs.figure, percentiles(drawn_B), wins=wins, losses=losses, ties=ties
    )


def _interval(sample: Sample, resampling: Resampling) -> Interval:
    if sample.metric.is_rate:
        hits, total = sample.stats_NK.sum(axis=0)
        return wilson(float(hits), float(total))
    return percentiles(_resampled(sample, resampling))


def _resampled(sample: Sample, resampling: Resampling) -> Array:
    return np.array([sample.metric.figure(sums_K) for sums_K in resampling.sums(sample.stats_NK)])


def _tally(metric: Metric, ours: Sample, theirs: Sample) -> tuple[int, int, int]:
    """Wins, losses, ties; where neither way is better all are ties."""
    sign = {"higher": 1, "lower": -1, "neither": 0}[metric.better]
    counted = ours.counted | theirs.counted
    deltas = [
        sign * (metric.figure(one_K) - metric.figure(other_K))
        for one_K, other_K in zip(ours.stats_NK[counted], theirs.stats_NK[counted], strict=True)
    ]
    wins, losses = sum(delta > 0 for delta in deltas), sum(delta < 0 for delta in deltas)
    return wins, losses, len(deltas) - wins - losses


def plain_interval(interval: Interval) -> list[float | None]:
    """Two numbers that JSON has."""
    return [finite(interval.low), finite(interval.high)]


def finite(value: float) -> float | None:
    """None for what JSON has no number for."""
    return value if math.isfinite(value) else None


def plain_figure(figure: Figure) -> dict[str, Any]:
    return {
        "value": finite(figure.value),
        "interval": plain_interval(figure.interval),
        "rows": figure.rows,
    }


def plain_difference(difference: Difference) -> dict[str, Any]:
    return {
        "value": finite(difference.value),
        "interval": plain_interval(difference.interval),
        "wins": difference.wins,
        "losses": difference.losses,
        "ties": difference.ties,
    }
