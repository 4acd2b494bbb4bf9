"""PEFT as two contenders over one process: `set_adapter` request by request, and mixed batches."""

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.bench.answers import Answer, Ask, Load
from tests.bench.cells import Cell
from tests.bench.processes import Process, StartError, running
from tests.bench.subject import Pool, Subject

SET_ADAPTER, MIXED = "PEFT set_adapter", "PEFT mixed batch"
_WAYS = {SET_ADAPTER: "set_adapter", MIXED: "mixed batch"}


@dataclass(frozen=True, slots=True)
class Peft:
    """One way of PEFT.

    Attributes:
        adapters: how many it has.
        most_requests: of one run; one after another they take long, and a longer queue changes no rate.
    """

    name: str
    process: Process
    adapters: int
    most_requests: int = 4

    def takes(self, cell: Cell) -> bool:
        """Different adapters in turn: alone one after another, at once as one batch."""
        suits = cell.peers and cell.kind == "in turn" and cell.rate is None and cell.adapters > 1
        alone = cell.concurrency == 1
        return suits and cell.adapters <= self.adapters and alone == (self.name == SET_ADAPTER)

    def measure(self, cell: Cell, asks: Sequence[Ask]) -> Load:
        chosen = asks[: self.most_requests if self.name == SET_ADAPTER else cell.concurrency]
        requests = [{"prompt": ask.prompt, "adapter": ask.adapter} for ask in chosen]
        job = {"way": _WAYS[self.name], "requests": requests, "new_tokens": cell.new_tokens}
        done = self._ask(job)
        answers = [Answer(began_s, tuple(pieces_s), len(pieces_s)) for began_s, *pieces_s in done["moments"]]
        return Load(tuple(answers), seconds=done["seconds"])

    def _ask(self, job: dict[str, Any]) -> dict[str, Any]:
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        answer: dict[str, Any] = json.loads(self.process.line())
        return answer


@contextmanager
def peft(subject: Subject, pool: Pool, scratch: Path) -> Iterator[tuple[Peft, Peft]]:
    """Both ways, over one process that holds the base and all adapters of the pool."""
    adapters = {name: str(folder) for name, folder in pool.folders.items()}
    job = {"base": subject.source, "device": subject.device, "adapters": adapters}
    with running([sys.executable, "-m", "tests.bench.peers.peft_program"], scratch / "peft.log") as process:
        process.stdin.write(json.dumps(job) + "\n")
        process.stdin.flush()
        if process.line().strip() != "ready":
            raise StartError(f"PEFT did not load the base; see {process.log}")
        ways = Peft(SET_ADAPTER, process, len(adapters)), Peft(MIXED, process, len(adapters))
        yield ways
