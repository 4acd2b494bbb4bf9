"""Who is how many times as fast as whom, and the few other ratios that the report ends with."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tests.bench.contender import Result

OURS = "quickchange"
SET_ADAPTER = "PEFT set_adapter"


@dataclass(frozen=True, slots=True)
class Ratio:
    """One rate over another, of the same passes; above 1 the first is faster.

    Attributes:
        value: median of the passes' own ratios.
    """

    what: str
    load: str
    value: float
    lowest: float
    highest: float

    @classmethod
    def of(cls, what: str, one: Result, other: Result) -> "Ratio":
        pairs = zip(one.figures.rates, other.figures.rates, strict=True)
        each = [a / b for a, b in pairs if b]
        value = statistics.median(each) if each else float("nan")
        return cls(what, one.cell.load, value, min(each, default=value), max(each, default=value))


def ratios_of(results: Sequence[Result]) -> list[Ratio]:
    """Ours against everybody, and our own scenarios against each other."""
    ours = [result for result in results if result.contender == OURS]
    return [*_against_peers(ours, results), *_among_ours(ours)]


def ratio_of_residents(results: Sequence[Result]) -> list[Ratio]:
    """The base on a server that holds adapters, over the base on one that holds none."""
    holding, empty = (
        [result for result in results if result.contender == name]
        for name in dict.fromkeys(result.contender for result in results)
    )
    what = f"base only, {holding[0].contender} / {empty[0].contender}"
    return [Ratio.of(what, one, other) for one, other in zip(holding, empty, strict=True)]


def ratios_of_merged(results: Sequence[Result]) -> list[Ratio]:
    """Every place of an adapter over the bare base, which comes first."""
    bare = {result.cell: result for result in results if result.contender == results[0].contender}
    return [
        Ratio.of(f"{result.contender} / {results[0].contender}", result, bare[result.cell])
        for result in results
        if bare[result.cell] is not result
    ]


def _against_peers(ours: Sequence[Result], results: Sequence[Result]) -> list[Ratio]:
    ratios = []
    for mine in ours:
        if mine.cell.rate is not None:
            continue  # both answer what comes; their rates say nothing
        for other in results:
            same = other.cell == mine.cell or other.contender == SET_ADAPTER
            if other.contender != OURS and same and mine.cell.peers:
                ratios.append(Ratio.of(f"{mine.cell.scenario} / {other.contender}", mine, other))
    return ratios


def _among_ours(ours: Sequence[Result]) -> list[Ratio]:
    closed = [result for result in ours if result.cell.rate is None]
    bases = {result.cell.concurrency: result for result in closed if not result.cell.adapters}
    ratios = []
    for result in closed:
        base = bases.get(result.cell.concurrency)
        if base is not None and base is not result and result.cell.kind != "shared prefix":
            ratios.append(Ratio.of(f"{result.cell.scenario} / base only", result, base))
    own = _find(closed, lambda r: r.cell.kind == "own prompts")
    shared = _find(closed, lambda r: r.cell.kind == "shared prefix")
    if own is not None and shared is not None:
        ratios.append(Ratio.of("shared prefix / own prompts", shared, own))
    return ratios


def _find(results: Sequence[Result], fits: Callable[[Result], bool]) -> Result | None:
    return next((result for result in results if fits(result)), None)
