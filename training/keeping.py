"""Owns what is kept of a run while it goes on: checkpoints in time, and the best weights so far.

Both are callbacks of transformers' Trainer. Knows no rows and no adapter's file form.
"""

import threading
import time
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback

from training.processes import Processes
from training.unfinished import Checkpoint, UnfinishedRun

_BEST_FILE: Final = "best.safetensors"


class BestKeeper(TrainerCallback):  # type: ignore[misc]  # transformers is not typed
    """Keeps the trained weights that had the lowest held-out loss, and ends a run that gets no better.

    Args:
        patience: how many evaluations in a row may bring nothing before the run ends.
        checkpoint: where a run goes on from; its best weights count on.

    Attributes:
        stopped_early: whether this ended the run.
    """

    def __init__(self, patience: int, checkpoint: Checkpoint | None) -> None:
        self.stopped_early = False
        self._patience = patience
        self._best: dict[str, Tensor] = {}
        self._best_loss = float("inf")
        self._best_step = 0
        self._fruitless = 0
        if checkpoint is not None and (path := checkpoint.folder / _BEST_FILE).is_file():
            self._load(path)

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any
    ) -> None:
        if metrics["eval_loss"] < self._best_loss:
            self._best_loss, self._best_step, self._fruitless = metrics["eval_loss"], state.global_step, 0
            self._best = {name: tensor.detach().cpu().clone() for name, tensor in _trained(kwargs["model"])}
        else:
            self._fruitless += 1
        if self._fruitless >= self._patience:
            self.stopped_early = control.should_training_stop = True

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._best and state.is_world_process_zero:
            facts = {"loss": self._best_loss, "step": self._best_step, "fruitless": self._fruitless}
            save_file(self._best, _folder(args, state) / _BEST_FILE, {k: repr(v) for k, v in facts.items()})

    def restore(self, model: nn.Module) -> int | None:
        """Puts the best weights back; returns their step, None if nothing was ever evaluated."""
        if not self._best:
            return None
        with torch.no_grad():
            for name, parameter in _trained(model):
                parameter.copy_(self._best[name])
        return self._best_step

    def _load(self, path: Path) -> None:
        from safetensors import safe_open

        self._best = load_file(path)
        with safe_open(path, framework="pt") as file:
            facts = file.metadata()
        self._best_loss, self._best_step = float(facts["loss"]), int(facts["step"])
        self._fruitless = int(facts["fruitless"])


class CheckpointKeeper(TrainerCallback):  # type: ignore[misc]  # transformers is not typed
    """Has a checkpoint written every so often, and marks it as whole when it is.

    Must come after every callback that adds to a checkpoint.

    Args:
        every_s: seconds of training between two, by the main process' clock; 0 for none but at a stop.
        stop: set by whoever wants the run to end after its step, with a checkpoint; in any of the processes.

    Attributes:
        stopped: whether it ended so.
    """

    def __init__(
        self, run: UnfinishedRun, every_s: float, stop: threading.Event, processes: Processes
    ) -> None:
        self.stopped = False
        self._run = run
        self._processes = processes
        self._every_s = every_s
        self._stop = stop
        self._before_s = run.checkpoint.seconds if run.checkpoint is not None else 0.0
        self._began_s = self._saved_s = time.perf_counter()
        self._saved = False

    @property
    def seconds(self) -> float:
        """Of optimization, those before a kill included."""
        return self._before_s + time.perf_counter() - self._began_s

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._began_s = self._saved_s = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        last = state.global_step >= state.max_steps
        passed = self._processes.is_main and time.perf_counter() - self._saved_s >= self._every_s
        stop, due = self._processes.any_of(self._stop.is_set(), passed)
        if stop and not last:
            self.stopped = control.should_training_stop = control.should_save = True
        elif self._every_s:  # a run long enough for a checkpoint has one of its end too: writing may fail
            control.should_save = control.should_save or (self._saved if last else due)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._processes.wait()  # each writes the state of its own random numbers
        if self._processes.is_main:
            self._run.complete(state.global_step, self.seconds)
        self._saved_s = time.perf_counter()
        self._saved = True


def _trained(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def _folder(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"
