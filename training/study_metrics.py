"""Owns which metrics a study's report shows, in which units. Knows no cells."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from training.metrics import (
    BLEU_,
    CHRF_,
    ENDED,
    EXACT,
    JSON_EQUAL,
    JSON_VALID,
    LOSS,
    METRICS,
    Metric,
)
from training.study_result import Score

_SHOWN: Final = (EXACT, JSON_EQUAL, BLEU_, CHRF_, JSON_VALID, ENDED, LOSS)
_FOREMOST: Final = (JSON_EQUAL, EXACT, CHRF_, BLEU_, LOSS)
_POINTS: Final = (BLEU_, CHRF_)


def shown_metrics(scores: Iterable[Mapping[str, Score]]) -> list[Metric]:
    """Those that the tables show and at least one of these has a value of."""
    there = _with_values(scores)
    return [metric for metric in _SHOWN if metric.name in there]


def all_metrics(scores: Iterable[Mapping[str, Score]]) -> list[str]:
    """Names of all that are there, known ones first."""
    there = {name for one in scores for name in one}
    return [name for name in METRICS if name in there] + sorted(there - METRICS.keys())


def foremost(metrics: Sequence[Metric]) -> Metric | None:
    """The one that quality is judged by first: the strictest that the rows have."""
    return next((metric for metric in _FOREMOST if metric in metrics), None)


def drawn_metrics(metrics: Sequence[Metric]) -> list[Metric]:
    """The foremost one, and chrF, which also tells apart answers that are nearly right."""
    first = foremost(metrics)
    return [metric for metric in _FOREMOST if metric is first or (metric is CHRF_ and metric in metrics)]


def unit_scale(metric: Metric) -> float:
    """What a figure is multiplied by to be shown: rates are shown in per cent."""
    return 100.0 if metric.is_rate else 1.0


def most(metric: Metric) -> float:
    """The highest figure there can be, in the unit it is shown in."""
    return 100.0 if metric.is_rate or metric in _POINTS else math.inf


def metric_title(metric: Metric) -> str:
    """With its unit, for the head of a column and for an axis."""
    if metric.is_rate:
        return f"{metric.title}, %"
    return f"{metric.title}, of 100" if metric in _POINTS else metric.title


def _with_values(scores: Iterable[Mapping[str, Score]]) -> set[str]:
    return {name for one in scores for name, score in one.items() if score.value is not None}
