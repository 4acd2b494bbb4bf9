"""Owns the tables of a study's report, and its lines of CSV. Says nothing in words."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

from training.document import Table
from training.metrics import Metric
from training.quantities import NOTHING, number, rate, signed, signed_percent, size, times
from training.study_costs import ADDED, COSTS, PARAMETERS, PEAK, RESULT, SPEED, TIME
from training.study_groups import Estimate, Group, estimate, shown, trials_by_method
from training.study_metrics import all_metrics, metric_title
from training.study_result import CellResult, Measured, Score, StudyResult

_TERMS = ("method", "rank", "modules", "learning rate")
_PLAIN_CELL = ("name", "method", "rank", "targets", "seed", "quantization", "learning_rate")
_PLAIN_MEASURED = (
    "engine", "steps", "trained_parameters", "train_seconds", "tokens_per_s", "peak_memory_bytes",
    "added_bytes", "predicted_added_bytes", "memory_error", "result_bytes", "test_loss",
)  # fmt: skip


def quality_table(groups: Sequence[Group], metrics: Sequence[Metric], base: Mapping[str, Score]) -> Table:
    """Every metric with its interval, the untrained base last."""
    seeds = _seeds_column(groups)
    rows = [
        [*_terms(group), *seeds.get(group.label, ()), _engine(group)]
        + [shown(group.quality(metric)) for metric in metrics]
        for group in groups
    ]
    if base:
        figures = [estimate([base[metric.name]] if metric.name in base else [], metric) for metric in metrics]
        blanks = [NOTHING] * (len(_TERMS) - 1 + bool(seeds) + 1)
        rows.append(["untrained base", *blanks, *map(shown, figures)])
    header = [*_TERMS, *(["seeds"] if seeds else []), "answered by"]
    return Table([*header, *map(metric_title, metrics)], rows, text_columns=len(header))


def cost_table(groups: Sequence[Group]) -> Table:
    """Means over seeds of time, memory and sizes, and the prediction of memory beside what was measured."""
    header = [*_TERMS[:3], *(cost.title for cost in (TIME, SPEED, PEAK, ADDED)), "predicted", "error"]
    rows = []
    for group in groups:
        row = [cost.shown(group.mean(cost.of)) for cost in (TIME, SPEED, PEAK, ADDED)]
        row.append(size(group.mean(lambda one: one.predicted_added_bytes)))
        row.append(signed_percent(group.mean(lambda one: one.memory_error)))
        row += [cost.shown(group.mean(cost.of)) for cost in (PARAMETERS, RESULT)]
        rows.append([*_terms(group)[:3], *row])
    return Table([*header, PARAMETERS.title, RESULT.title], rows, text_columns=3)


def relative_table(groups: Sequence[Group], metrics: Sequence[Metric], reference: Group) -> Table:
    """Costs as multiples of the reference's, quality as differences from it."""
    rows = []
    for group in groups:
        if group is not reference:
            costs = [_ratio(group.mean(cost.of), reference.mean(cost.of)) for cost in COSTS]
            rows.append([group.label, *costs, *(_change(group, reference, metric) for metric in metrics)])
    return Table(["method", *(cost.title for cost in COSTS), *map(metric_title, metrics)], rows)


def undone_table(result: StudyResult) -> Table:
    """Cells that failed or are missing."""
    failed = [[cell.name, "failed", cell.error or NOTHING] for cell in result.cells if cell.measured is None]
    missing = [[name, "missing", "not done yet"] for name in result.missing]
    return Table(["run", "state", "why"], failed + missing, text_columns=3)


def trials_table(cells: Sequence[CellResult]) -> Table:
    """Every learning rate that was tried, and which was taken."""
    rows = []
    for method, trials in trials_by_method(cells).items():
        taken = {cell.learning_rate for cell in cells if cell.method == method}
        for trial in trials:
            loss = "diverged" if trial.held_out_loss is None else number(trial.held_out_loss)
            chosen = any(math.isclose(trial.learning_rate, one) for one in taken)
            rows.append([method, "yes" if chosen else NOTHING, rate(trial.learning_rate), loss])
    return Table(["method", "taken", "learning rate", "held-out loss, nats per token"], rows, text_columns=2)


def csv_text(result: StudyResult) -> str:
    """One line for each cell, whatever became of it; columns are named and scaled as in JSON."""
    metrics = all_metrics(cell.measured.scores for cell in result.cells if cell.measured is not None)
    columns = [f"{name}{part}" for name in metrics for part in ("", "_low", "_high")]
    text = io.StringIO()
    writer = csv.DictWriter(text, [*_PLAIN_CELL, "state", "error", *_PLAIN_MEASURED, *columns])
    writer.writeheader()
    for cell in result.cells:
        writer.writerow(_csv_line(cell))
    for name in result.missing:
        writer.writerow({"name": name, "state": "missing"})
    return text.getvalue()


def _csv_line(cell: CellResult) -> dict[str, Any]:
    line = {name: getattr(cell, name) for name in _PLAIN_CELL}
    line |= {"state": "failed" if cell.measured is None else "done", "error": cell.error}
    if cell.measured is not None:
        line |= {name: getattr(cell.measured, name) for name in _PLAIN_MEASURED}
        line |= _csv_scores(cell.measured)
    return line


def _csv_scores(measured: Measured) -> dict[str, float | None]:
    line: dict[str, float | None] = {}
    for name, score in measured.scores.items():
        line |= {name: score.value, f"{name}_low": score.low, f"{name}_high": score.high}
    return line


def _terms(group: Group) -> list[str]:
    rank = NOTHING if group.rank is None else str(group.rank)
    rates = dict.fromkeys(rate(cell.learning_rate) for cell in group.cells)
    return [group.label, rank, group.targets or NOTHING, ", ".join(rates)]


def _seeds_column(groups: Sequence[Group]) -> dict[str, list[str]]:
    """Runs that were measured of those of the group; empty if no group has several."""
    if all(len(group.cells) == 1 for group in groups):
        return {}
    return {group.label: [f"{len(group.measured)} of {len(group.cells)}"] for group in groups}


def _engine(group: Group) -> str:
    return ", ".join(dict.fromkeys(measured.engine for measured in group.measured))


def _ratio(one: float, other: float) -> str:
    return times(one / other) if other > 0 else NOTHING


def _change(group: Group, reference: Group, metric: Metric) -> str:
    one, other = group.quality(metric), reference.quality(metric)
    if one is None or other is None:
        return NOTHING
    return f"{signed(one.value - other.value)}{_doubt(one, other)}"


def _doubt(one: Estimate, other: Estimate) -> str:
    return "" if one.surely_differs(other) else " ?"
