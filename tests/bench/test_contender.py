"""Contenders take turns, are paused while others are measured, and get the same requests."""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.bench.answers import Answer, Ask, Load
from tests.bench.arrivals import Prompts
from tests.bench.cells import Cell
from tests.bench.contender import WARM_UP_TOKENS, Tournament
from tests.bench.noise import CpuClock
from tests.bench.processes import Process, running, wait_until

CELLS = [Cell(2, concurrency, 4, prompt_tokens=8, new_tokens=16) for concurrency in (1, 2)]


@dataclass
class Recording:
    """Notes what it was asked."""

    name: str
    process: Process
    log: list[tuple[str, Cell, tuple[Ask, ...]]]

    def takes(self, cell: Cell) -> bool:
        return True

    def measure(self, cell: Cell, asks: Sequence[Ask]) -> Load:
        self.log.append((self.name, cell, tuple(asks)))
        return Load(tuple(Answer(0.0, (1.0, 2.0), cell.new_tokens) for _ in asks), seconds=2.0)


def play(tmp_path: Path, passes: int) -> list[tuple[str, Cell, tuple[Ask, ...]]]:
    log: list[tuple[str, Cell, tuple[Ask, ...]]] = []
    with (
        running(["sleep", "60"], tmp_path / "a") as first,
        running(["sleep", "60"], tmp_path / "b") as second,
    ):
        contenders = [Recording("a", first, log), Recording("b", second, log)]
        tournament = Tournament(["x", "y"], Prompts(range(10, 1000), 0), tell=lambda _: None)
        results = tournament.play(contenders, CELLS, passes)
    assert [(r.contender, r.cell) for r in results] == [(n, c) for c in CELLS for n in ("a", "b")]
    assert all(len(result.figures.rates) == passes for result in results)
    return log


def measured(log: list[tuple[str, Cell, tuple[Ask, ...]]]) -> list[tuple[str, Cell, tuple[Ask, ...]]]:
    return [entry for entry in log if entry[1].new_tokens != WARM_UP_TOKENS]


def test_contenders_get_the_same_requests_and_each_cell_new_ones(tmp_path: Path) -> None:
    entries = measured(play(tmp_path, passes=2))
    pairs = list(zip(entries[::2], entries[1::2], strict=True))
    assert all(one[1:] == other[1:] for one, other in pairs)
    prompts = [ask.prompt for one, _ in pairs for ask in one[2]]
    assert len(set(prompts)) == len(prompts) == 16


def test_somebody_else_is_first_in_the_next_cell(tmp_path: Path) -> None:
    firsts = [entry[0] for entry in measured(play(tmp_path, passes=2))[::2]]
    assert firsts[0] != firsts[1]
    assert sorted(firsts) == ["a", "a", "b", "b"]


def test_warming_up_uses_prompts_of_its_own(tmp_path: Path) -> None:
    log = play(tmp_path, passes=1)
    warm = {ask.prompt for _, cell, asks in log if cell.new_tokens == WARM_UP_TOKENS for ask in asks}
    cold = {ask.prompt for _, cell, asks in measured(log) for ask in asks}
    assert warm
    assert not warm & cold


def test_a_paused_process_does_not_run_and_still_stops(tmp_path: Path) -> None:
    with running(["sleep", "60"], tmp_path / "log") as process:
        (child,) = [each for each in psutil.Process().children() if each.name() == "sleep"]
        process.pause()
        wait_until(process, lambda: child.status() == psutil.STATUS_STOPPED, timeout_s=10)
        process.resume()
        wait_until(process, lambda: child.status() != psutil.STATUS_STOPPED, timeout_s=10)
        process.pause()
    assert not child.is_running()


def test_what_other_programs_use_is_seen_and_what_is_measured_is_not(tmp_path: Path) -> None:
    burn = [sys.executable, "-c", "while True: pass"]
    with running(["sleep", "60"], tmp_path / "a") as idle, running(burn, tmp_path / "b") as busy:
        before_idle, before_busy = CpuClock.read(idle), CpuClock.read(busy)
        time.sleep(1.0)
        seen_by_idle = before_idle.foreign_share(CpuClock.read(idle))
        seen_by_busy = before_busy.foreign_share(CpuClock.read(busy))
    assert seen_by_idle > seen_by_busy
