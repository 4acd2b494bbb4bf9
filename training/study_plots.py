"""Draws a study's plots as PNGs. Decides nothing that the tables do not say."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from training import quantities
from training.curve import smoothed
from training.document import Picture
from training.labels import label_points
from training.metrics import Metric
from training.study_costs import PEAK, TIME, Cost
from training.study_groups import Estimate, Group, estimate, groups_by_rank, measured_groups, trials_by_method
from training.study_looks import Look, group_looks, method_looks
from training.study_metrics import drawn_metrics, metric_title
from training.study_result import StudyResult

_MEASURED_COLOUR: Final = "#0072b2"
_PREDICTED_COLOUR: Final = "#e69f00"
_BASE_COLOUR: Final = "#777777"
_DPI: Final = 150
_WIDTH: Final = 8.0  # inches, as are heights
_MARGIN: Final = 1.2
_LINE_HEIGHT: Final = 0.32
_PANEL_HEIGHT: Final = 4.5
_LEGEND_LINE_HEIGHT: Final = 0.19
_SMALL: Final = 8.5  # points
_MOST_LABELS: Final = 16
_RANK_SPREAD: Final = 0.4  # of a doubling of the rank
_WIDE_RANGE: Final = 8.0  # largest over smallest: from there on an axis is logarithmic


@dataclass(frozen=True, slots=True)
class _Scene:
    """What there is to draw."""

    result: StudyResult
    groups: Sequence[Group]
    metrics: Sequence[Metric]
    looks: Mapping[str, Look]

    @property
    def titles(self) -> str:
        return " and ".join(metric.title for metric in self.metrics)

    def untrained(self, metric: Metric) -> Estimate | None:
        """The base's figure."""
        score = self.result.base_scores.get(metric.name)
        return None if score is None else estimate([score], metric)


@dataclass(frozen=True, slots=True)
class _Plot:
    height: float
    caption: str
    draw: Callable[[Any, _Scene], None]


def draw_plots(result: StudyResult, metrics: Sequence[Metric], folder: Path) -> dict[str, Picture]:
    """Writes NAME.png of those that there are values for.

    Returns:
        by name: quality, quality-time, quality-memory, rank, memory, losses, rates.
    """
    import matplotlib

    groups = measured_groups(result.cells)
    drawn = [metric for metric in drawn_metrics(metrics) if any(group.quality(metric) for group in groups)]
    scene = _Scene(result, groups, drawn, group_looks(groups))
    pictures = {}
    with matplotlib.rc_context({"text.parse_math": False, "axes.axisbelow": True}):  # a name is no formula
        for name, plot in _plots(scene).items():
            file = f"{name}.png"
            _save(plot, scene, folder / file)
            pictures[name] = Picture(file, plot.caption)
    return pictures


def _plots(scene: _Scene) -> dict[str, _Plot]:
    plots: dict[str, _Plot] = {}
    panels, lines = len(scene.metrics), len(scene.groups) + bool(scene.result.base_scores)
    intervals = f"{scene.titles}, with intervals of 95 %"
    against = f"{scene.titles} against {{}}: further up and to the left is better"
    if scene.metrics:
        plots["quality"] = _Plot(_MARGIN + _LINE_HEIGHT * lines, intervals, _draw_quality)
        plots["quality-time"] = _Plot(_PANEL_HEIGHT * panels, against.format(TIME.title), _draw_time)
        plots["quality-memory"] = _Plot(_PANEL_HEIGHT * panels, against.format(PEAK.title), _draw_peak)
    if scene.metrics and groups_by_rank(scene.groups):
        plots["rank"] = _Plot(_beside_legend(len(scene.groups)), f"{intervals}, by rank", _draw_ranks)
    if scene.groups:
        height = _MARGIN + 1.6 * _LINE_HEIGHT * len(scene.groups)
        plots["memory"] = _Plot(height, "Memory that training adds, measured and predicted", _draw_memory)
        plots["losses"] = _Plot(
            _beside_legend(len(scene.groups)),
            "Loss of the rows that are learned, mean over seeds and moving mean over steps",
            _draw_losses,
        )
    if trials := trials_by_method(scene.result.cells):
        plots["rates"] = _Plot(
            _beside_legend(2 * len(trials)),
            "Held-out loss of every learning rate tried; rings are round those taken",
            _draw_rates,
        )
    return plots


def _beside_legend(entries: int) -> float:
    """The height of a plot beside whose legend there must be room."""
    return max(_PANEL_HEIGHT, _MARGIN + _LEGEND_LINE_HEIGHT * entries)


def _draw_quality(figure: Any, scene: _Scene) -> None:
    panels = figure.subplots(1, len(scene.metrics), sharey=True, squeeze=False)[0]
    for axes, metric in zip(panels, scene.metrics, strict=True):
        for place, group in enumerate(scene.groups):
            look = scene.looks[group.label]
            _draw_point(axes, group.quality(metric), place, look.colour, look.marker)
        if (untrained := scene.untrained(metric)) is not None:
            _draw_point(axes, untrained, len(scene.groups), _BASE_COLOUR, "|")
            axes.axvline(untrained.value, color=_BASE_COLOUR, linestyle=":", linewidth=1)
        axes.set_xlabel(metric_title(metric))
        axes.grid(axis="x", alpha=0.3)
        axes.margins(x=0.08)
    base = ["untrained base"] if scene.result.base_scores else []
    labels = [*(group.label for group in scene.groups), *base]
    panels[0].set_yticks(range(len(labels)), labels)
    panels[0].set_ylim(len(labels) - 0.4, -0.6)


def _draw_point(axes: Any, figure: Estimate | None, place: int, colour: str, marker: str) -> None:
    if figure is not None:
        axes.errorbar(
            figure.value, place, xerr=_reach(figure), fmt=marker, color=colour, markersize=7, capsize=3
        )


def _reach(figure: Estimate) -> list[list[float]] | None:
    """As error bars are given; None for a figure without an interval."""
    if figure.low is None or figure.high is None:
        return None
    return [[max(0.0, figure.value - figure.low)], [max(0.0, figure.high - figure.value)]]


def _draw_time(figure: Any, scene: _Scene) -> None:
    _draw_scatter(figure, scene, TIME, quantities.time_unit)


def _draw_peak(figure: Any, scene: _Scene) -> None:
    _draw_scatter(figure, scene, PEAK, quantities.byte_unit)


def _draw_scatter(
    figure: Any, scene: _Scene, cost: Cost, unit_of: Callable[[float], tuple[float, str]]
) -> None:
    scale, unit = unit_of(max(group.mean(cost.of) for group in scene.groups))
    panels = figure.subplots(len(scene.metrics), 1, squeeze=False)[:, 0]
    labels = []
    for axes, metric in zip(panels, scene.metrics, strict=True):
        points = []
        for group in scene.groups:
            if (quality := group.quality(metric)) is not None:
                look, x = scene.looks[group.label], group.mean(cost.of) / scale
                axes.errorbar(
                    x, quality.value, yerr=_reach(quality), fmt=look.marker, color=look.colour, markersize=7,
                    elinewidth=0.7, alpha=0.9, label=group.method,
                )  # fmt: skip
                points.append((x, quality.value, group.label))
        axes.set(xlabel=f"{cost.title}, {unit}", ylabel=metric_title(metric))
        _limit(axes, [x for x, _, _ in points])
        if metric.better == "lower":
            axes.invert_yaxis()
        axes.grid(alpha=0.3)
        labels.append((axes, points))
    if len(scene.groups) > _MOST_LABELS:  # they would hide each other
        _draw_legend(figure, panels[0])
        return
    figure.draw_without_rendering()  # labels are placed when the layout is final
    for axes, points in labels:
        label_points(axes, points)


def _limit(axes: Any, xs: Sequence[float]) -> None:
    """From nought, or logarithmic where they are far apart, with room for labels."""
    low, high = min(xs), max(xs)
    if low > 0 and high / low > _WIDE_RANGE:
        _set_log(axes, lambda value: f"{value:g}")
        axes.set_xlim(low / 1.5, high * 1.5)
    else:
        axes.set_xlim(0, 1.15 * high if high > 0 else 1)
    axes.margins(y=0.12)


def _set_log(axes: Any, shown: Callable[[float], str]) -> None:
    """A logarithmic axis with ticks at 1, 2 and 5, written as people write them."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: shown(value)))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _draw_ranks(figure: Any, scene: _Scene) -> None:
    from matplotlib.ticker import NullFormatter

    lines = groups_by_rank(scene.groups)
    panels = figure.subplots(1, len(scene.metrics), squeeze=False)[0]
    ranks = sorted({rank for line in lines.values() for rank, _ in line})
    for axes, metric in zip(panels, scene.metrics, strict=True):
        for order, (label, line) in enumerate(lines.items()):
            figures = [(rank, quality) for rank, group in line if (quality := group.quality(metric))]
            # beside each other, so that intervals do not hide each other
            aside = 2 ** (min(0.06, _RANK_SPREAD / len(lines)) * (order - (len(lines) - 1) / 2))
            look, xs = scene.looks[line[0][1].label], [rank * aside for rank, _ in figures]
            axes.plot(
                xs, [quality.value for _, quality in figures], look.line, color=look.colour,
                marker=look.marker, label=label,
            )  # fmt: skip
            for x, (_, quality) in zip(xs, figures, strict=True):
                axes.errorbar(
                    x, quality.value, yerr=_reach(quality), color=look.colour, capsize=3, elinewidth=1
                )
        axes.set_xscale("log", base=2)
        axes.set_xticks(ranks, [str(rank) for rank in ranks])
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set(xlabel="rank", ylabel=metric_title(metric))
        axes.grid(alpha=0.3)
    _draw_legend(figure, panels[0])


def _draw_memory(figure: Any, scene: _Scene) -> None:
    axes = figure.subplots()
    measured = [group.mean(lambda one: one.added_bytes) for group in scene.groups]
    predicted = [group.mean(lambda one: one.predicted_added_bytes) for group in scene.groups]
    scale, unit = quantities.byte_unit(max(*measured, *predicted))
    for values, aside, colour, label in (
        (measured, -0.2, _MEASURED_COLOUR, "measured"),
        (predicted, 0.2, _PREDICTED_COLOUR, "predicted"),
    ):
        places = [place + aside for place in range(len(values))]
        axes.barh(places, [value / scale for value in values], 0.38, color=colour, label=label)
    for place, group in enumerate(scene.groups):
        error = quantities.signed_percent(group.mean(lambda one: one.memory_error))
        end = max(measured[place], predicted[place]) / scale
        axes.annotate(error, (end, place), (4, 0), textcoords="offset points", va="center", fontsize=_SMALL)
    axes.set_yticks(range(len(scene.groups)), [group.label for group in scene.groups])
    axes.set_ylim(len(scene.groups) - 0.4, -0.6)
    axes.margins(x=0.12)
    axes.set_xlabel(f"memory that training adds, {unit}, and by how much the prediction was off")
    axes.grid(axis="x", alpha=0.3)
    _draw_legend(figure, axes)


def _draw_losses(figure: Any, scene: _Scene) -> None:
    axes = figure.subplots()
    for group in scene.groups:
        look, losses = scene.looks[group.label], group.losses()
        axes.plot(
            list(losses), smoothed(list(losses.values())), look.line, color=look.colour, linewidth=1.3,
            label=group.label,
        )  # fmt: skip
    axes.set(xlabel="optimizer step", ylabel="loss, nats per learned token")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    _draw_legend(figure, axes)


def _draw_rates(figure: Any, scene: _Scene) -> None:
    axes = figure.subplots()
    cells = scene.result.cells
    looks = method_looks(cells)
    for method, trials in trials_by_method(cells).items():
        look = looks[method]
        found = {
            trial.learning_rate: trial.held_out_loss for trial in trials if trial.held_out_loss is not None
        }
        axes.plot(
            list(found), list(found.values()), look.line, color=look.colour, marker=look.marker, label=method
        )
        diverged = [trial.learning_rate for trial in trials if trial.held_out_loss is None]
        axes.plot(
            diverged, [0.97] * len(diverged), "x", color=look.colour, markersize=9, markeredgewidth=2,
            transform=axes.get_xaxis_transform(), label=f"{method}, diverged" if diverged else None,
        )  # fmt: skip
        taken = {cell.learning_rate for cell in cells if cell.method == method}
        ringed = [rate for rate in found if any(math.isclose(rate, one) for one in taken)]
        axes.plot(
            ringed,
            [found[rate] for rate in ringed],
            "o",
            color=look.colour,
            markersize=15,
            markerfacecolor="none",
        )
    _set_log(axes, quantities.rate)
    axes.margins(x=0.08, y=0.15)
    axes.set(xlabel="learning rate", ylabel="held-out loss, nats per learned token")
    axes.grid(alpha=0.3)
    _draw_legend(figure, axes)


def _draw_legend(figure: Any, axes: Any) -> None:
    """Beside the plot, where it hides nothing."""
    handles, labels = axes.get_legend_handles_labels()
    entries: dict[str, Any] = {}
    for label, handle in zip(labels, handles, strict=True):
        entries.setdefault(label, handle)  # a method of several points is named once
    figure.legend(entries.values(), entries.keys(), loc="outside right upper", fontsize=_SMALL)


def _save(plot: _Plot, scene: _Scene, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, plot.height), layout="constrained")
    FigureCanvasAgg(figure)
    plot.draw(figure, scene)
    figure.savefig(path, dpi=_DPI)
