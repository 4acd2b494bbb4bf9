"""Owns what is seen of a run while it goes on: losses, a bar, trackers, the end of one that diverges."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from tensorboardX import SummaryWriter
from tqdm import tqdm
from transformers import TrainerCallback
from transformers.integrations import get_available_reporting_integrations

from training.curve import EvalPoint, LossPoint
from training.errors import DivergedError, RecipeError
from training.stopwatch import Stopwatch

TENSORBOARD: Final = "tensorboard"


class Recorder(TrainerCallback):  # type: ignore[misc]  # transformers is not typed
    """Shows every loss in a bar, and stops a run whose loss is no number."""

    def __init__(self, progress: bool, since_step: Stopwatch) -> None:
        self._progress, self._since_step = progress, since_step
        self._bar: tqdm[Any] | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._bar = tqdm(
            total=state.max_steps, initial=state.global_step, desc="train", unit="step",
            disable=not self._progress,
        )  # fmt: skip

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._since_step.restart()
        if self._bar is not None:
            self._bar.update(1)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        loss = logs.get("loss")
        if loss is None:
            return
        if not math.isfinite(loss):
            raise DivergedError(
                f"the loss is {loss} at step {state.global_step}; lower learning_rate, or raise warmup_ratio"
            )
        if self._bar is not None:
            self._bar.set_postfix(loss=f"{loss:.3f}", refresh=False)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._bar is not None:
            self._bar.close()


def losses(log_history: Sequence[dict[str, Any]]) -> tuple[LossPoint, ...]:
    """The loss of every step, from the state of a Trainer; a run that went on has those before too."""
    return tuple(
        LossPoint(entry["step"], entry["loss"], entry["learning_rate"])
        for entry in log_history
        if "loss" in entry
    )


def evals(log_history: Sequence[dict[str, Any]]) -> tuple[EvalPoint, ...]:
    """Every held-out loss, likewise."""
    return tuple(
        EvalPoint(entry["step"], entry["eval_loss"]) for entry in log_history if "eval_loss" in entry
    )


def check_trackers(names: Sequence[str]) -> None:
    """Raises RecipeError if a tracker is not installed, or does not exist."""
    there = sorted(get_available_reporting_integrations())
    for name in names:
        if name not in there:
            raise RecipeError(
                f"trackers names {name!r}, which is not installed or does not exist; install its package, or "
                f"choose of {', '.join(there) or 'none'}"
            )


def event_writer(folder: Path, first_step: int) -> SummaryWriter:
    """Writes TensorBoard's event files into `folder`; steps from `first_step` on replace a killed run's."""
    return SummaryWriter(str(folder), purge_step=first_step)
