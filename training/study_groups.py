"""Owns which cells of a study differ in their seed alone, and how sure their figures are. Writes nothing."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from training.metrics import LOSS, Metric
from training.quantities import NOTHING, number
from training.study_metrics import most, unit_scale
from training.study_result import CellResult, Measured, RateTrial, Score

_STUDENT: Final = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""Student's t, two-sided at 0.95, for 1 to 10 degrees of freedom; for more the last is a little too wide."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure in the unit it is shown in.

    Attributes:
        low, high: of 95 %; None if unknown.
        deviation: standard deviation over seeds; None for one seed.
    """

    value: float
    low: float | None
    high: float | None
    deviation: float | None = None

    def __str__(self) -> str:
        text = number(self.value)
        if self.deviation is not None:
            text += f" ± {number(self.deviation, digits=2)}"
        return text if self.low is None else f"{text} [{number(self.low)}, {number(self.high)}]"

    def surely_differs(self, other: "Estimate") -> bool:
        """Whether both have intervals and these do not overlap; stricter than a test of pairs of rows."""
        if self.low is None or self.high is None or other.low is None or other.high is None:
            return False
        return self.high < other.low or other.high < self.low


@dataclass(frozen=True, slots=True)
class Group:
    """Runs of one method at one rank and choice of modules, each with a seed of its own.

    Attributes:
        label: as short as tells it from the study's others.
    """

    label: str
    cells: tuple[CellResult, ...]

    @property
    def method(self) -> str:
        return self.cells[0].method

    @property
    def rank(self) -> int | None:
        return self.cells[0].rank

    @property
    def targets(self) -> str | None:
        return self.cells[0].targets

    @property
    def measured(self) -> list[Measured]:
        """Of the runs that did not fail."""
        return [cell.measured for cell in self.cells if cell.measured is not None]

    def mean(self, of: Callable[[Measured], float]) -> float:
        """Over seeds, of which one at least was measured."""
        return statistics.fmean(map(of, self.measured))

    def losses(self) -> dict[int, float]:
        """Mean over seeds at every step that all of them have, in nats per learned token."""
        runs = [dict(measured.losses) for measured in self.measured]
        steps = [step for step in runs[0] if all(step in run for run in runs)]
        return {step: statistics.fmean(run[step] for run in runs) for step in steps}

    def quality(self, metric: Metric) -> Estimate | None:
        """Over seeds; None if no run has it."""
        scores = [known_scores(measured).get(metric.name) for measured in self.measured]
        return estimate([score for score in scores if score is not None], metric)


def groups_of(cells: Sequence[CellResult]) -> list[Group]:
    """In the order of their first cells."""
    found: dict[tuple[str, int | None, str | None, str], list[CellResult]] = {}
    for cell in cells:
        found.setdefault((cell.method, cell.rank, cell.targets, cell.quantization), []).append(cell)
    same_targets = len({targets for _, _, targets, _ in found if targets is not None}) <= 1
    bases = [(method, rank, targets) for method, rank, targets, _ in found]
    groups = []
    for (method, rank, targets, quantization), members in found.items():
        parts = [method, "" if rank is None else f"r{rank}", "" if same_targets else targets or ""]
        parts.append(quantization if bases.count((method, rank, targets)) > 1 else "")
        groups.append(Group(" ".join(filter(None, parts)), tuple(members)))
    return groups


def measured_groups(cells: Sequence[CellResult]) -> list[Group]:
    """Those of which a run at least did not fail."""
    return [group for group in groups_of(cells) if group.measured]


def groups_by_rank(groups: Sequence[Group]) -> dict[str, list[tuple[int, Group]]]:
    """Groups by ascending rank, of every method and choice of modules that has two at least; by label."""
    found: dict[tuple[str, str | None, str], list[tuple[int, Group]]] = {}
    for group in groups:
        if group.rank is not None:
            terms = (group.method, group.targets, group.cells[0].quantization)
            found.setdefault(terms, []).append((group.rank, group))
    lines = (sorted(line, key=lambda pair: pair[0]) for line in found.values() if len(line) > 1)
    return {_without_rank(line[0][1]): line for line in lines}


def _without_rank(group: Group) -> str:
    return group.label.replace(f" r{group.rank}", "", 1)


def trials_by_method(cells: Sequence[CellResult]) -> dict[str, tuple[RateTrial, ...]]:
    """Every method's search, by ascending learning rate; a search serves all cells of its method."""
    found: dict[str, tuple[RateTrial, ...]] = {}
    for cell in cells:
        if cell.trials:
            found.setdefault(cell.method, tuple(sorted(cell.trials, key=lambda trial: trial.learning_rate)))
    return found


def known_scores(measured: Measured) -> Mapping[str, Score]:
    """Its scores; the loss of the test rows is among them even if it has no interval."""
    if LOSS.name in measured.scores or measured.test_loss is None:
        return measured.scores
    return {**measured.scores, LOSS.name: Score(value=measured.test_loss, low=None, high=None)}


def estimate(scores: Sequence[Score], metric: Metric) -> Estimate | None:
    """The mean of the same metric of several seeds, in the unit it is shown in.

    Its interval joins two errors that do not depend on each other, by the root of the sum of their squares:
    of the choice of rows, the mean of the seeds' intervals, since all were asked the same rows; and of the
    seeds, Student's t times the standard error of their mean.
    """
    scale = unit_scale(metric)
    values = [scale * score.value for score in scores if score.value is not None]
    if not values:
        return None
    mean = statistics.fmean(values)
    deviation = statistics.stdev(values) if len(values) > 1 else None
    lows = [scale * score.low for score in scores if score.low is not None and score.value is not None]
    highs = [scale * score.high for score in scores if score.high is not None and score.value is not None]
    if not len(lows) == len(highs) == len(values):
        return Estimate(mean, None, None, deviation)
    seeds = _seed_error(deviation, len(values))
    low = mean - math.hypot(mean - statistics.fmean(lows), seeds)
    high = mean + math.hypot(statistics.fmean(highs) - mean, seeds)
    return Estimate(mean, max(0.0, low), min(most(metric), high), deviation)


def _seed_error(deviation: float | None, count: int) -> float:
    if deviation is None:
        return 0.0
    return _STUDENT[min(count - 1, len(_STUDENT)) - 1] * deviation / math.sqrt(count)


def shown(figure: Estimate | None) -> str:
    return NOTHING if figure is None else str(figure)
