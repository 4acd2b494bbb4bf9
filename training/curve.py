"""Draws how the loss fell, as a PNG. Knows points, not where they come from."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_SMOOTHING: Final = 0.8
_SIZE_INCHES: Final = (8.0, 4.5)


@dataclass(frozen=True, slots=True)
class LossPoint:
    """One optimizer step: mean loss of its learned tokens in nats, and its learning rate."""

    step: int
    loss: float
    learning_rate: float


@dataclass(frozen=True, slots=True)
class EvalPoint:
    """Mean loss of the held-out rows after a step."""

    step: int
    loss: float


def draw_loss_curve(
    losses: Sequence[LossPoint], evals: Sequence[EvalPoint], path: Path, *, title: str
) -> None:
    """Writes the PNG: the loss of every step, its moving mean, held-out losses, and the learning rate."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=_SIZE_INCHES, layout="constrained")
    FigureCanvasAgg(figure)
    loss_axis = figure.subplots()
    steps = [point.step for point in losses]
    loss_axis.plot(steps, [point.loss for point in losses], color="#9db8d2", linewidth=1, label="each step")
    loss_axis.plot(steps, smoothed([point.loss for point in losses]), color="#1f4e79", label="moving mean")
    if evals:
        loss_axis.plot(
            [point.step for point in evals], [point.loss for point in evals], "o-", color="#c0504d",
            label="held out",
        )  # fmt: skip
    loss_axis.set(xlabel="optimizer step", ylabel="loss, nats per learned token", title=title)
    loss_axis.set_ylim(bottom=0)
    loss_axis.grid(alpha=0.3)
    loss_axis.legend(loc="upper right")
    rate_axis = loss_axis.twinx()
    rate_axis.plot(steps, [point.learning_rate for point in losses], color="#7f7f7f", linestyle=":")
    rate_axis.set_ylabel("learning rate (dotted)")
    rate_axis.set_ylim(bottom=0)
    figure.savefig(path, dpi=120)


def smoothed(values: Sequence[float]) -> list[float]:
    """Exponentially weighted mean of all values so far, without the pull towards nought at the start."""
    means: list[float] = []
    total = weight = 0.0
    for value in values:
        total = _SMOOTHING * total + value
        weight = _SMOOTHING * weight + 1.0
        means.append(total / weight)
    return means
