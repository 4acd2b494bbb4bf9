"""Pictures of a report: throughput over clients and over adapters, latency of everybody."""

from collections.abc import Callable, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import pyplot

from tests.bench.contender import Result
from tests.bench.noise import QUIET_SHARE
from tests.bench.report import Report

matplotlib.use("Agg")

PERCENTILES = ("p50", "p95", "p99")
STYLES = ("o-", "s--", "^:", "d-.")


def plot_all(report: Report, folder: Path, at: int) -> list[Path]:
    """Draws what there are results for.

    Args:
        at: clients where only one number of them is drawn.
    """
    closed = [r for r in report.results if r.cell.rate is None and r.cell.kind == "in turn"]
    pictures = (
        (throughput_over_clients, closed, "throughput-clients.png"),
        (
            throughput_over_adapters,
            [r for r in closed if r.cell.concurrency == at],
            "throughput-adapters.png",
        ),
        (latencies, [r for r in closed if _is_served(r) and r.cell.concurrency == at], "latency.png"),
        (latencies, [r for r in report.results if r.cell.rate is not None], "latency-open-loop.png"),
    )
    written = []
    for draw, results, name in pictures:
        if len(results) > 1:
            written.append(_save(draw, results, folder / name))
    return written


def _is_served(result: Result) -> bool:
    """The scenario with most adapters, of those that all contenders take."""
    return result.cell.peers and result.cell.adapters > 1


def throughput_over_clients(results: Sequence[Result], figure: Any) -> None:
    """A colour for each contender, a line style for each scenario."""
    axes, drawn = figure.subplots(), [r for r in results if r.cell.peers]
    colours, styles = _colours(drawn), dict(zip(_scenarios(drawn), cycle(STYLES), strict=False))
    for who, scenario in dict.fromkeys((r.contender, r.cell.scenario) for r in drawn):
        line = [r for r in drawn if (r.contender, r.cell.scenario) == (who, scenario)]
        rates = [r.figures.tokens_per_second for r in line]
        xs = [r.cell.concurrency for r in line]
        axes.plot(xs, rates, styles[scenario], color=colours[who], label=f"{who}, {scenario}")
    axes.set_xlabel("clients at once")
    _finish(axes, drawn, sorted({r.cell.concurrency for r in drawn}))


def throughput_over_adapters(results: Sequence[Result], figure: Any) -> None:
    axes, colours = figure.subplots(), _colours(results)
    for who in dict.fromkeys(r.contender for r in results):
        line = sorted((r for r in results if r.contender == who), key=lambda r: r.cell.adapters)
        rates = [r.figures.tokens_per_second for r in line]
        axes.plot([r.cell.adapters for r in line], rates, "o-", color=colours[who], label=who)
    axes.set_xlabel(f"different adapters among {results[0].cell.concurrency} clients; 0 is the base alone")
    _finish(axes, results, sorted({r.cell.adapters for r in results}))


def latencies(results: Sequence[Result], figure: Any) -> None:
    """Three percentiles of three latencies, a line for each contender and load."""
    panels, colours = figure.subplots(1, 3), _colours(results)
    styles = dict(zip(dict.fromkeys(r.cell.load for r in results), cycle(STYLES), strict=False))
    names = ("first_token_s", "inter_token_s", "total_s")
    for axes, name, title in zip(panels, names, ("first token", "inter-token", "whole answer"), strict=True):
        for result in results:
            spread, load = getattr(result.figures, name), result.cell.load
            heights = [getattr(spread, percentile) * 1e3 for percentile in PERCENTILES]
            label = f"{result.contender}, {load}"
            axes.plot(PERCENTILES, heights, styles[load], color=colours[result.contender], label=label)
        axes.set_yscale("log")
        axes.set_title(f"{title}, ms", fontsize=10)
        axes.grid(True, which="both", alpha=0.2)
    figure.legend(*panels[0].get_legend_handles_labels(), fontsize=8, ncols=3, loc="outside lower center")
    figure.suptitle(results[0].cell.scenario + _warning(results), fontsize=11)


def _finish(axes: Any, results: Sequence[Result], ticks: Sequence[int]) -> None:
    axes.set_ylabel("output tokens per second")
    axes.set_xticks(ticks)
    axes.set_ylim(bottom=0)
    axes.set_title(_warning(results).removeprefix("; "), fontsize=10)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    axes.grid(True, alpha=0.3)


def _warning(results: Sequence[Result]) -> str:
    """For whoever sees the picture without the table."""
    worst = max(result.figures.foreign_share for result in results)
    return f"; not a quiet machine: others had up to {worst:.0%}" if worst > QUIET_SHARE else ""


def _colours(results: Sequence[Result]) -> dict[str, str]:
    names = dict.fromkeys(result.contender for result in results)
    return {name: f"C{index}" for index, name in enumerate(names)}


def _scenarios(results: Sequence[Result]) -> list[str]:
    return list(dict.fromkeys(result.cell.scenario for result in results))


def _save(draw: Callable[[Sequence[Result], Any], None], results: Sequence[Result], path: Path) -> Path:
    figure = pyplot.figure(figsize=(9, 5), layout="constrained")
    draw(results, figure)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path
