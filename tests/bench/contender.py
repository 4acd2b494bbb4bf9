"""Who can be measured in a cell, and the order in which they are. Knows nobody in particular."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from tests.bench.answers import Ask, Figures, Load
from tests.bench.arrivals import Prompts
from tests.bench.cells import Cell, shuffled
from tests.bench.noise import QUIET_SHARE, CpuClock
from tests.bench.processes import Process

WARM_UP_TOKENS = 4


class Contender(Protocol):
    """Something that answers, in a process of its own that is stopped while others have their turn."""

    @property
    def name(self) -> str: ...

    @property
    def process(self) -> Process: ...

    def takes(self, cell: Cell) -> bool:
        """Whether it can be measured there."""

    def measure(self, cell: Cell, asks: Sequence[Ask]) -> Load:
        """Sends the requests as the cell says."""


@dataclass(frozen=True, slots=True)
class Result:
    """One contender in one cell."""

    contender: str
    cell: Cell
    figures: Figures


@dataclass(slots=True)
class Tournament:
    """Measures contenders cell by cell; within a cell they take turns, another one first each time.

    A slow phase of the machine so hits all of them, and the ratios of one pass compare what ran within
    minutes. Requests are the same for all in a cell, and new in every pass.

    Args:
        names: of adapters that every contender has, in order.
        tell: is told of each measurement.
    """

    names: Sequence[str]
    prompts: Prompts
    tell: Callable[[str], None]
    _turn: int = field(default=0, init=False)

    def play(self, contenders: Sequence[Contender], cells: Sequence[Cell], passes: int) -> list[Result]:
        """Returns results in the order of the cells."""
        loads: dict[tuple[str, Cell], list[Load]] = {}
        total, done = self._count(contenders, cells) * passes, 0
        for contender in contenders:
            contender.process.pause()
        for number in range(passes):
            for cell in shuffled(cells, seed=number):
                asks = cell.asks(self.names, self.prompts, seed=number)
                for contender in self._in_turn([each for each in contenders if each.takes(cell)]):
                    load = self._measure(contender, cell, asks)
                    loads.setdefault((contender.name, cell), []).append(load)
                    done += 1
                    self.tell(_line(f"{done}/{total}", contender.name, cell, load))
        for contender in contenders:
            contender.process.resume()
        return [
            Result(contender.name, cell, Figures.of(loads[contender.name, cell]))
            for cell in cells
            for contender in contenders
            if (contender.name, cell) in loads
        ]

    def _measure(self, contender: Contender, cell: Cell, asks: Sequence[Ask]) -> Load:
        contender.process.resume()
        try:
            self._warm_up(contender, cell, asks)
            before = CpuClock.read(contender.process)
            load = contender.measure(cell, asks)
            return replace(load, foreign_share=before.foreign_share(CpuClock.read(contender.process)))
        finally:
            contender.process.pause()

    def _warm_up(self, contender: Contender, cell: Cell, asks: Sequence[Ask]) -> None:
        """A short one first: what was paused has its memory in no cache."""
        first = asks[: max(1, cell.concurrency // 2)]
        new = [Ask(self.prompts.take(cell.prompt_tokens), ask.adapter) for ask in first]
        contender.measure(
            replace(cell, requests=len(new), new_tokens=WARM_UP_TOKENS, rate=None, moments_s=()), new
        )

    def _in_turn(self, contenders: Sequence[Contender]) -> list[Contender]:
        self._turn += 1
        first = self._turn % max(1, len(contenders))
        return [*contenders[first:], *contenders[:first]]

    @staticmethod
    def _count(contenders: Sequence[Contender], cells: Sequence[Cell]) -> int:
        return sum(contender.takes(cell) for contender in contenders for cell in cells)


class Progress:
    """Lines on standard error, with the time since the start."""

    def __init__(self, write: Callable[[str], object]) -> None:
        self._write = write
        self._began_s = time.monotonic()

    def __call__(self, line: str) -> None:
        minutes, seconds = divmod(int(time.monotonic() - self._began_s), 60)
        self._write(f"{minutes:3d}:{seconds:02d}  {line}\n")


def _line(place: str, name: str, cell: Cell, load: Load) -> str:
    notes = f", {sum(load.failures.values())} FAILED" if load.failures else ""
    if load.foreign_share > QUIET_SHARE:
        notes += f", {load.foreign_share:.0%} of the processors went to others"
    where = f"{cell.scenario}, {cell.load}"
    return f"{place:>8}  {name:<18} {where:<42} {load.tokens_per_second:7.1f} tokens/s{notes}"
