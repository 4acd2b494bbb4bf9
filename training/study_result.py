"""Owns what a study found out about each of its cells, as plain values in files. Trains and draws nothing."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

Engine = Literal["server", "reference"]

FORMAT = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """A metric over the test rows with its 95 % interval.

    Attributes:
        value, low, high: bleu and chrf in points of 100, others in parts of 1; None where there is no number,
            such as the interval of a single row.
    """

    value: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RateTrial:
    """One short run in the search for a method's learning rate.

    Attributes:
        held_out_loss: mean, in nats per learned token; None if the run diverged.
    """

    learning_rate: float
    held_out_loss: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What training and evaluation of a cell came to.

    Attributes:
        train_seconds: of all optimizer steps, without loading and saving.
        tokens_per_s: tokens of the rows that passed, over train_seconds.
        peak_memory_bytes: of the training process.
        added_bytes, predicted_added_bytes: by how much training raised it, and by how much it was to.
        memory_error: predicted over measured, less 1.
        result_bytes: of the weights that were saved.
        losses: step and loss of every optimizer step, in nats per learned token.
        test_loss: mean over the test rows, in nats per learned token; None if it was not measured.
        engine: what answered: the server, or transformers + PEFT where no server applies the method.
        scores: by the name of the metric, as `quickchange evaluate` has them.
    """

    steps: int
    trained_parameters: int
    train_seconds: float
    tokens_per_s: float
    peak_memory_bytes: int
    added_bytes: int
    predicted_added_bytes: int
    memory_error: float
    result_bytes: int
    losses: tuple[tuple[int, float], ...]
    test_loss: float | None
    engine: Engine
    scores: Mapping[str, Score]


@dataclass(frozen=True, slots=True, kw_only=True)
class CellResult:
    """One method at one rank, choice of modules and seed.

    Attributes:
        name: of the cell and its folder, such as "qlora-r16-all-linear-s0".
        rank, targets: None where the method has none.
        quantization: of the base it was trained on.
        trials: of its method's learning rate; empty if the rate was given.
        measured: None if it failed.
        error: why it failed.
    """

    name: str
    method: str
    rank: int | None
    targets: str | None
    seed: int
    quantization: str
    learning_rate: float
    trials: tuple[RateTrial, ...]
    measured: Measured | None
    error: str | None = None

    def to_mapping(self) -> dict[str, Any]:
        """Plain values: cell.json."""
        return {"format": FORMAT, **dataclasses.asdict(self)}

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Self:
        """The result that `to_mapping` came from."""
        given = {name: value for name, value in values.items() if name != "format"}
        measured = given["measured"]
        given["trials"] = tuple(RateTrial(**trial) for trial in given["trials"])
        given["measured"] = None if measured is None else _measured(measured)
        return cls(**given)

    @classmethod
    def from_file(cls, path: Path) -> Self:
        return cls.from_mapping(json.loads(path.read_text(encoding="utf-8")))


def _measured(values: Mapping[str, Any]) -> Measured:
    losses = tuple((int(step), float(loss)) for step, loss in values["losses"])
    scores = {name: Score(**score) for name, score in values["scores"].items()}
    return Measured(**{**values, "losses": losses, "scores": scores})


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyResult:
    """A whole study, as far as it is done.

    Attributes:
        title: of the report.
        settings: of the study, as its file holds them.
        data: rows, of training and test, their sums and where they are from.
        base: name and fingerprint.
        base_scores: of the base without any training; empty if nobody asked it.
        machine: processor, cores, memory and accelerator, and versions of the libraries, for people.
        missing: names of cells that are not done.
    """

    title: str
    settings: Mapping[str, Any]
    data: Mapping[str, Any]
    base: Mapping[str, Any]
    base_scores: Mapping[str, Score]
    machine: Mapping[str, Any]
    cells: tuple[CellResult, ...]
    missing: tuple[str, ...] = ()

    @property
    def failed(self) -> list[CellResult]:
        return [cell for cell in self.cells if cell.measured is None]

    def to_mapping(self) -> dict[str, Any]:
        """Plain values: results.json."""
        return {"format": FORMAT, **dataclasses.asdict(self)}
