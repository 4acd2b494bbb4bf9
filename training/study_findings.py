"""Owns what a study's numbers say in words: what is best, and whether that is sure. Knows no tables.

A difference of quality is sure if the intervals of 95 % do not overlap. Times and sizes have no intervals:
over several seeds their ranges are compared, and of one run each it is unknown.
"""

from collections.abc import Mapping, Sequence
from typing import Final

from training.metrics import Metric
from training.quantities import percent, signed_percent, times
from training.study_costs import LEAST, MEMORY_AIM, PEAK, TIME, Cost
from training.study_groups import Estimate, Group, estimate
from training.study_metrics import foremost, metric_title
from training.study_result import Measured, Score

_NAMED: Final = 4
Item = tuple[str, str]


def headline(groups: Sequence[Group], metrics: Sequence[Metric], base: Mapping[str, Score]) -> list[Item]:
    """What is best on each count, what training gains, and what is cheapest of those not surely worse."""
    qualities = {metric: text for metric in metrics if (text := best_quality(groups, metric))}
    items: list[Item] = []
    first = foremost(list(qualities))
    if first is not None:
        items.append((metric_title(first), qualities.pop(first)))
        if base:
            items.append(("against the untrained base", against_base(groups, first, base)))
        if len(ranking(groups, first)) > 1:
            items += cheapest_good(groups, first)
    items += [(superlative, least(groups, cost)) for cost, superlative in LEAST.items()]
    return items + [(metric_title(metric), text) for metric, text in qualities.items()]


def best_quality(groups: Sequence[Group], metric: Metric) -> str:
    """Which is best, and which of the others it does not surely beat; empty if none has the metric."""
    ranked = ranking(groups, metric)
    if not ranked:
        return ""
    (best, top), others = ranked[0], ranked[1:]
    if not others:
        return f"{best.label} has {top}; no other has a figure to compare"
    level = [group.label for group, figure in others if figure.value == top.value]
    if len(level) == len(others):
        return f"all have {top}"
    said = f"{best.label} is best with {top}"
    if level:
        said = f"{best.label} is best with {top}, and {_names(level)} as good"
    doubtful = [group.label for group, figure in others if not figure.surely_differs(top)]
    beyond = [label for label in doubtful if label not in level]
    if not beyond:
        return f"{said}; the difference from every other is sure"
    if len(doubtful) == len(others):
        return f"{said}; the difference is not sure from any other ({_names(beyond)})"
    beaten = len(others) - len(doubtful)
    return f"{said}; surely better than {beaten} of {len(others)}, but not than {_names(beyond)}"


def against_base(groups: Sequence[Group], metric: Metric, base: Mapping[str, Score]) -> str:
    """How many are surely better than it, and surely worse."""
    score = base.get(metric.name)
    untrained = None if score is None else estimate([score], metric)
    ranked = ranking(groups, metric)
    if untrained is None or not ranked:
        return f"nothing to compare: {metric.title} was not measured of both"
    surely = [(group.label, figure) for group, figure in ranked if figure.surely_differs(untrained)]
    better = [label for label, figure in surely if _is_better(figure.value, untrained.value, metric)]
    worse = [label for label, figure in surely if not _is_better(figure.value, untrained.value, metric)]
    said = f"it has {untrained} in {metric_title(metric)}; surely better: {len(better)} of {len(ranked)}"
    return f"{said}; surely worse: {_names(worse)}" if worse else said


def least(groups: Sequence[Group], cost: Cost) -> str:
    """Which has the least of it, by how much the next has more, and whether that is sure."""
    ranked = sorted(groups, key=lambda group: group.mean(cost.of))
    lowest = ranked[0].mean(cost.of)
    level = [group for group in ranked if group.mean(cost.of) == lowest]
    others = ranked[len(level) :]
    said = f"{_names([group.label for group in level])} with {cost.shown(lowest)}"
    if not others:
        return said
    ratio = f"{times(others[0].mean(cost.of) / lowest)} as much" if lowest > 0 else "more"
    said = f"{said}; the next, {others[0].label}, takes {ratio}"
    highest = max(max(map(cost.of, group.measured)) for group in level)
    overlap = [group.label for group in others if min(map(cost.of, group.measured)) <= highest]
    if overlap:
        return f"{said}; the ranges over seeds overlap with {_names(overlap)}, so that difference is not sure"
    return said


def cheapest_good(groups: Sequence[Group], metric: Metric) -> list[Item]:
    """Of those that are not surely worse than the best: which is fastest, and which needs least memory."""
    good = not_surely_worse(groups, metric)
    if len(good) == len(groups):
        return [("choice", f"none is surely worse than the best in {metric.title}: time and memory decide")]
    if len(good) == 1:
        return [("choice", f"{good[0].label} alone is surely best in {metric.title}")]
    title = f"of the {len(good)} that are not surely worse in {metric.title}"
    return [(f"{LEAST[cost]} {title}", least(good, cost)) for cost in (TIME, PEAK)]


def not_surely_worse(groups: Sequence[Group], metric: Metric) -> list[Group]:
    """The best one, and all whose difference from it is not sure."""
    ranked = ranking(groups, metric)
    return [group for group, figure in ranked if not figure.surely_differs(ranked[0][1])]


def ranking(groups: Sequence[Group], metric: Metric) -> list[tuple[Group, Estimate]]:
    """Those that have the metric, best first."""
    figures = [(group, figure) for group in groups if (figure := group.quality(metric)) is not None]
    return sorted(figures, key=lambda pair: pair[1].value, reverse=metric.better == "higher")


def memory_findings(measured: Mapping[str, Measured]) -> list[Item]:
    """How far the predictions of added memory were off, of every run by name."""
    errors = {name: one.memory_error for name, one in measured.items()}
    worst = max(errors, key=lambda name: abs(errors[name]))
    mean = sum(map(abs, errors.values())) / len(errors)
    within = sum(abs(error) <= MEMORY_AIM for error in errors.values())
    return [
        ("mean error", f"{percent(mean)}, without sign"),
        ("worst error", f"{signed_percent(errors[worst])}, of {worst}"),
        ("aim", f"at most {percent(MEMORY_AIM)}: {within} of {len(errors)} runs are within it"),
    ]


def _is_better(one: float, other: float, metric: Metric) -> bool:
    return one > other if metric.better == "higher" else one < other


def _names(labels: Sequence[str]) -> str:
    if len(labels) <= _NAMED + 1:
        return ", ".join(labels)
    return f"{', '.join(labels[:_NAMED])} and {len(labels) - _NAMED} others"
