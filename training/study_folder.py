"""Owns a study's folder: where everything lies, its terms, the rows that all cells share. Trains nothing.

STUDY/study.json             the terms: what must stay the same when the study goes on
STUDY/lock                   held by the process that works on it
STUDY/data/                  train.jsonl and test.jsonl: the rows that were drawn; source.json: from where
STUDY/base/                  the evaluation of the bare base
STUDY/trials/METHOD/RATE/    a short run in the search for a learning rate
STUDY/cells/NAME/            recipe.yaml, result, result.training, evaluation, logs, cell.json
STUDY/report/                report.md, report.html, plots, results.json, results.csv
"""

import json
import os
import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from adapters.cache import make_once, publish_folder
from adapters.durable import replace_text, try_lock
from training.data import file_sha256
from training.data_report import leakage
from training.errors import StudyError
from training.rows import Row, read_rows
from training.study_plan import Cell, Study

_TERMS_FILE: Final = "study.json"
_LOCK_FILE: Final = "lock"
_SOURCE_FILE: Final = "source.json"
_CELL_FILE: Final = "cell.json"


class StudyFolder:
    """The folder, held by this process alone; made where there is none. Use as a context manager.

    Raises:
        StudyError: another process works on it, it is a study's on other terms, or no study's at all.
        DataError: the rows cannot be read.
    """

    def __init__(self, path: Path, study: Study) -> None:
        self.path = path
        _check_vacant(path)
        path.mkdir(parents=True, exist_ok=True)
        lock = try_lock(path / _LOCK_FILE)
        if lock is None:
            raise StudyError(f"{path} is another process's work; wait for its end, or give another --out")
        self._lock = lock
        try:
            self._agree(study)
            make_once(path / "data", lambda folder: _draw(study, folder))
        except BaseException:
            os.close(lock)
            raise

    def __enter__(self) -> "StudyFolder":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._lock)

    @property
    def train(self) -> Path:
        return self.path / "data" / "train.jsonl"

    @property
    def test(self) -> Path:
        return self.path / "data" / "test.jsonl"

    @property
    def base(self) -> Path:
        return self._made(self.path / "base")

    @property
    def report(self) -> Path:
        return self.path / "report"

    def cell(self, cell: Cell) -> Path:
        return self._made(self.path / "cells" / cell.name)

    def trial(self, method: str, rate: float) -> Path:
        return self._made(self.path / "trials" / method / f"{rate:g}")

    def cell_file(self, cell: Cell) -> Path:
        """Where its result is, once there is one."""
        return self.cell(cell) / _CELL_FILE

    def facts(self) -> dict[str, Any]:
        """About the rows, for the report."""
        learned, asked = read_rows(self.train), read_rows(self.test)
        leaks = leakage(learned, asked)
        source = json.loads((self.path / "data" / _SOURCE_FILE).read_text())
        return {
            "train": source["train"] | {"rows": len(learned)},
            "test": source["test"]
            | {
                "rows": len(asked),
                "rows that training has too": len(leaks.rows),
                "questions that training has too": len(leaks.prompts),
            },
        }

    def publish_report(self, write: Callable[[Path], None]) -> None:
        """Puts a report in the place of the one before, if there is one."""
        shutil.rmtree(self.report, ignore_errors=True)
        publish_folder(self.report, write)

    def _agree(self, study: Study) -> None:
        path, terms = self.path / _TERMS_FILE, study.terms()
        if not path.exists():
            replace_text(path, json.dumps(terms, indent=2) + "\n")
            return
        for name, before in json.loads(path.read_text()).items():
            if terms.get(name) != before:
                raise StudyError(
                    f"{self.path} holds a study with {name} {before!r}, this one has {terms.get(name)!r}; "
                    "give the same to go on (methods, ranks, targets, seeds may be added), or another --out"
                )

    def _made(self, path: Path) -> Path:
        path.mkdir(parents=True, exist_ok=True)
        return path


def _check_vacant(path: Path) -> None:
    if path.exists() and not (path / _TERMS_FILE).exists() and _others(path):
        raise StudyError(f"{path} exists and is no study; give another --out")


def _others(path: Path) -> Sequence[str]:
    """What is there besides the lock of a study that was killed before it had terms."""
    return [] if not path.is_dir() else [each.name for each in path.iterdir() if each.name != _LOCK_FILE]


def _draw(study: Study, folder: Path) -> None:
    _write_rows(folder / "train.jsonl", _drawn(study.data, study.rows, study))
    _write_rows(folder / "test.jsonl", _drawn(study.test, study.test_rows, study))
    source = {
        "train": {"file": study.data.name, "sha256": file_sha256(study.data)},
        "test": {"file": study.test.name, "sha256": file_sha256(study.test)},
    }
    (folder / _SOURCE_FILE).write_text(json.dumps(source, indent=2) + "\n")


def _drawn(path: Path, count: int | None, study: Study) -> list[Row]:
    rows = read_rows(path)
    if not rows:
        raise StudyError(f"{path} has no rows")
    if count is not None and count > len(rows):
        raise StudyError(f"{path} has {len(rows)} rows, {count} are wanted")
    chosen = range(len(rows)) if count is None else sorted(_chance(study).sample(range(len(rows)), count))
    return [rows[index] for index in chosen]


def _chance(study: Study) -> random.Random:
    return random.Random(study.seeds[0])  # noqa: S311  which rows are drawn is no secret


def _write_rows(path: Path, rows: Sequence[Row]) -> None:
    lines = (json.dumps(_plain(row), ensure_ascii=False) for row in rows)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _plain(row: Row) -> Mapping[str, Any]:
    return {"text": row.text} if row.text else {"messages": [dict(message) for message in row.messages]}
