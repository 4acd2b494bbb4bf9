"""What the demo trains, and what it keeps of it for later runs. Knows no server."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from quickchange.demo.workspace import Workspace
from training.data import file_sha256
from training.recipe import Recipe
from training.tasks import Task, dates_task, language_task, sentiment_task

if TYPE_CHECKING:
    from adapters.base import Base

# One pass over a few hundred short rows: a minute on two cores is enough for a visible lesson, not for more.
_COMMON: Final[dict[str, Any]] = {
    "base": "smollm2",
    "method": "qlora",
    "rank": 8,
    "epochs": 1.0,
    "batch_size": 8,
    "warmup_ratio": 0.1,
    "seed": 0,
}
_FAST_SHARE: Final = 4
_HELD_OUT: Final = 40
_FAST_HELD_OUT: Final = 12


@dataclass(frozen=True, slots=True)
class Lesson:
    """A task and how it is learned.

    Attributes:
        label: of its files: the adapter's name, and which version of it.
    """

    label: str
    task: Task
    settings: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Trained:
    """An adapter on disk.

    Attributes:
        cached: it is from an earlier run.
        losses: of every step.
    """

    lesson: Lesson
    folder: Path
    cached: bool
    seconds: float
    tokens: int
    losses: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Curriculum:
    """Three adapters that are served side by side, and a second version of the last one."""

    first: tuple[Lesson, ...]
    successor: Lesson


def curriculum(reviews: Path, *, fast: bool) -> Curriculum:
    """The lessons of the demo.

    Args:
        reviews: the archive of rated reviews.
        fast: a quarter of the rows, for a quick look.
    """
    share = _FAST_SHARE if fast else 1
    held_out = _FAST_HELD_OUT if fast else _HELD_OUT
    sentiment = sentiment_task(reviews, rows=240 // share, held_out=held_out)
    dates = dates_task(rows=300 // share, held_out=held_out)
    language = language_task(rows=256 // share, held_out=held_out)
    own_names = language_task(rows=256 // share, held_out=held_out, own_names=True)
    return Curriculum(
        first=(
            Lesson("sentiment", sentiment, {"learning_rate": 1e-3}),
            Lesson("dates", dates, {"learning_rate": 2e-3, "alpha": 32.0}),
            Lesson("language-1", language, {"learning_rate": 2e-3}),
        ),
        successor=Lesson("language-2", own_names, {"learning_rate": 2e-3}),
    )


def trained(lesson: Lesson, workspace: Workspace, fingerprint: str, base: Callable[[], "Base"]) -> Trained:
    """The lesson's adapter: from an earlier run if data, recipe and base are the same, else trained now.

    Args:
        fingerprint: of the base.
        base: gives the base for training; asked only if something is to be trained.
    """
    data = workspace.data / f"{lesson.label}.jsonl"
    lesson.task.write(data)
    out = workspace.adapters / f"{lesson.label}-{_key(lesson, data, fingerprint)}"
    cached = out.is_dir()
    if not cached:
        from training.train import train

        train(Recipe(data=data, out=out, **(_COMMON | lesson.settings)), base())
    return _read(lesson, out, cached=cached)


def _key(lesson: Lesson, data: Path, fingerprint: str) -> str:
    """Changes with everything that the adapter depends on."""
    parts = {"data": file_sha256(data), "base": fingerprint, "settings": _COMMON | lesson.settings}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


def _read(lesson: Lesson, folder: Path, *, cached: bool) -> Trained:
    from training.outcome import REPORT_FILE, artefacts_folder

    fit = json.loads((artefacts_folder(folder) / REPORT_FILE).read_text())["fit"]
    losses = tuple(point["loss"] for point in fit["losses"])
    return Trained(lesson, folder, cached, fit["seconds"], fit["tokens"], losses)
