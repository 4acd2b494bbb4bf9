"""Pictures of a report: throughput over clients and over adapters, latency of everybody."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import pyplot

from tests.bench.contender import Result
from tests.bench.ratios import OURS
from tests.bench.report import Report

matplotlib.use("Agg")

PERCENTILES = ("p50", "p95", "p99")


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
    axes = figure.subplots()
    for who, scenario in dict.fromkeys((r.contender, r.cell.scenario) for r in results if r.cell.peers):
        line = [r for r in results if (r.contender, r.cell.scenario) == (who, scenario)]
        xs = [r.cell.concurrency for r in line]
        style = "o-" if who == OURS else "x--"
        axes.plot(xs, [r.figures.tokens_per_second for r in line], style, label=f"{who}, {scenario}")
    axes.set_xlabel("clients at once")
    _finish_rates(axes)


def throughput_over_adapters(results: Sequence[Result], figure: Any) -> None:
    axes = figure.subplots()
    for who in dict.fromkeys(r.contender for r in results):
        line = sorted((r for r in results if r.contender == who), key=lambda r: r.cell.adapters)
        rates = [r.figures.tokens_per_second for r in line]
        axes.plot([r.cell.adapters for r in line], rates, "o-", label=who)
    axes.set_xlabel(f"different adapters among {results[0].cell.concurrency} clients; 0 is the base alone")
    _finish_rates(axes)


def latencies(results: Sequence[Result], figure: Any) -> None:
    """Bars: three percentiles of three latencies, for each contender and load."""
    panels = figure.subplots(1, 3)
    names = ("first_token_s", "inter_token_s", "total_s")
    for axes, name, title in zip(panels, names, ("first token", "inter-token", "whole answer"), strict=True):
        width = 0.8 / len(results)
        for index, result in enumerate(results):
            spread = getattr(result.figures, name)
            heights = [getattr(spread, percentile) * 1e3 for percentile in PERCENTILES]
            places = [place + index * width for place in range(len(PERCENTILES))]
            axes.bar(places, heights, width, label=f"{result.contender}, {result.cell.load}")
        axes.set_xticks([place + 0.4 for place in range(len(PERCENTILES))], PERCENTILES)
        axes.set_yscale("log")
        axes.set_title(f"{title}, ms")
        axes.grid(True, axis="y", alpha=0.3)
    panels[0].legend(fontsize=7)
    figure.suptitle(results[0].cell.scenario)


def _finish_rates(axes: Any) -> None:
    axes.set_ylabel("output tokens per second")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=7)
    axes.grid(True, alpha=0.3)


def _save(draw: Callable[[Sequence[Result], Any], None], results: Sequence[Result], path: Path) -> Path:
    figure = pyplot.figure(figsize=(9, 5), layout="constrained")
    draw(results, figure)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path
