"""Owns the folder of a run that has not ended, OUT.unfinished: whose it is, and which checkpoints are whole.

Knows no model and no data. A run that is killed at any moment leaves checkpoints of which each is whole or
does not count; a run that ends well leaves no such folder.

OUT.unfinished/run.json        what must stay the same for the run to go on
OUT.unfinished/lock            held by the process that works on it, of several the main one
OUT.unfinished/checkpoint-N/   after N steps, as transformers' Trainer writes it; whole once it has whole.json
OUT.unfinished/tensorboard/    event files
"""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from adapters.cache import flush_tree
from adapters.durable import replace_text, sync_folder, try_lock
from training.errors import CheckpointError
from training.processes import Processes

Start = Literal["new", "resume", "restart"]
"""What a run does with a checkpoint that an earlier one left: refuse, go on from it, or remove it."""

CHECKPOINTS_KEPT: Final = 2
EVENTS_FOLDER: Final = "tensorboard"
_PREFIX: Final = "checkpoint-"
_RUN_FILE: Final = "run.json"
_WHOLE_FILE: Final = "whole.json"
_LOCK_FILE: Final = "lock"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A whole one.

    Attributes:
        step: optimizer steps done.
        seconds: spent on optimization until then, those before a kill included.
    """

    folder: Path
    step: int
    seconds: float


def unfinished_folder(out: Path) -> Path:
    """Where a run towards OUT keeps what it needs to go on."""
    return out.with_name(f"{out.name}.unfinished")


class UnfinishedRun:
    """The folder, held by this process alone. Use as a context manager.

    Left without `finished()`, the folder stays if it has a checkpoint to go on from, else it is removed.

    Args:
        start: what to do with the checkpoint of an earlier run.

    Raises:
        CheckpointError: another process works on it, or there is a checkpoint and start is "new".
    """

    def __init__(self, out: Path, start: Start = "new") -> None:
        self.folder = unfinished_folder(out)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = self._locked()
        self._finished = False
        self.checkpoint: Checkpoint | None = newest_checkpoint(self.folder)
        if start == "new" and self.checkpoint is not None:
            os.close(self._lock)
            raise CheckpointError(
                f"{self.folder} holds a run that stopped after step {self.checkpoint.step}; go on with "
                "--resume, or begin anew with --restart"
            )
        if start == "restart" or self.checkpoint is None:
            self.checkpoint = None
            self._clear()

    def __enter__(self) -> "UnfinishedRun":
        return self

    def __exit__(self, *_: object) -> None:
        if self._finished or newest_checkpoint(self.folder) is None:
            shutil.rmtree(self.folder, ignore_errors=True)
        os.close(self._lock)

    @property
    def events(self) -> Path:
        """Where TensorBoard's event files go."""
        return self.folder / EVENTS_FOLDER

    def identify(self, identity: Mapping[str, Any]) -> None:
        """Says what run this is; one that goes on must be the same.

        Args:
            identity: plain JSON values.

        Raises:
            CheckpointError: the checkpoint is of a run with other values.
        """
        plain = json.loads(json.dumps(identity))
        if self.checkpoint is None:
            replace_text(self.folder / _RUN_FILE, json.dumps(plain, indent=2) + "\n")
            return
        recorded = self.recorded()
        if not recorded:
            raise CheckpointError(f"{self.folder / _RUN_FILE} cannot be read; begin anew with --restart")
        for name, before in recorded.items():
            if plain.get(name) != before:
                raise CheckpointError(
                    f"{self.folder} holds a run with {name} {before!r}, this one has {plain.get(name)!r}; "
                    "give the same to go on, or begin anew with --restart"
                )

    def recorded(self) -> dict[str, Any]:
        """What `identify` wrote; empty before."""
        try:
            values = json.loads((self.folder / _RUN_FILE).read_text())
        except (OSError, ValueError):
            return {}
        return dict(values)

    def complete(self, step: int, seconds: float) -> None:
        """Marks the checkpoint that was written after `step` as whole, once its bytes are on the disk."""
        folder = self.folder / f"{_PREFIX}{step}"
        flush_tree(folder)
        replace_text(folder / _WHOLE_FILE, json.dumps({"step": step, "seconds": seconds}) + "\n")
        sync_folder(self.folder)

    def finished(self) -> None:
        """The run's result is safe: the folder may go."""
        self._finished = True

    def _locked(self) -> int:
        lock = try_lock(self.folder / _LOCK_FILE)
        if lock is None:
            raise CheckpointError(
                f"another process works on {self.folder}; wait for it or give another --out"
            )
        return lock

    def _clear(self) -> None:
        for path in self.folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != _LOCK_FILE:
                path.unlink()


class FollowedRun(UnfinishedRun):
    """The folder as the other processes of the run see it: read, and left to the main one.

    Args:
        checkpoint: that the main process goes on from.
    """

    def __init__(self, out: Path, checkpoint: Checkpoint | None) -> None:
        self.folder = unfinished_folder(out)
        self.checkpoint = checkpoint

    def __exit__(self, *_: object) -> None:
        """The main process keeps or removes it."""


def opened_run(out: Path, start: Start, processes: Processes) -> UnfinishedRun:
    """The run, held by the main process and followed by the others.

    Raises:
        CheckpointError: as UnfinishedRun; in the others ElsewhereError.
    """
    held = processes.alone(lambda: UnfinishedRun(out, start))
    checkpoint = processes.from_main(None if held is None else held.checkpoint)
    return FollowedRun(out, checkpoint) if held is None else held


def newest_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest whole checkpoint in OUT.unfinished; None if there is none."""
    whole = [found for path in folder.glob(f"{_PREFIX}*") if (found := _read(path)) is not None]
    return max(whole, key=lambda checkpoint: checkpoint.step, default=None)


def _read(folder: Path) -> Checkpoint | None:
    try:
        values = json.loads((folder / _WHOLE_FILE).read_text())
        return Checkpoint(folder, int(values["step"]), float(values["seconds"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
