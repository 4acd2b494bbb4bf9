"""Owns what is seen of a run while it goes on: every loss, a bar, and the end of a run that diverges."""

import math
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback

from training.curve import EvalPoint, LossPoint
from training.errors import DivergedError


class Recorder(TrainerCallback):  # type: ignore[misc]  # transformers is not typed
    """Keeps every loss, shows it in a bar, and stops a run whose loss is no number."""

    def __init__(self, progress: bool) -> None:
        self.losses: list[LossPoint] = []
        self.evals: list[EvalPoint] = []
        self._progress = progress
        self._bar: tqdm[Any] | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._bar = tqdm(total=state.max_steps, desc="train", unit="step", disable=not self._progress)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._bar is not None:
            self._bar.update(1)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        if "loss" in logs:
            self._on_loss(LossPoint(state.global_step, logs["loss"], logs["learning_rate"]))
        if "eval_loss" in logs:
            self.evals.append(EvalPoint(state.global_step, logs["eval_loss"]))

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._bar is not None:
            self._bar.close()

    def _on_loss(self, point: LossPoint) -> None:
        if not math.isfinite(point.loss):
            raise DivergedError(
                f"the loss is {point.loss} at step {point.step}; lower learning_rate, or raise warmup_ratio"
            )
        self.losses.append(point)
        if self._bar is not None:
            self._bar.set_postfix(loss=f"{point.loss:.3f}", refresh=False)
