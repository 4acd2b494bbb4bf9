"""Owns a plan: memory, time and whether it fits, for one way of training, and the cheapest change that fits.

Knows no torch and loads nothing.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from training.memory import Memory, predict_memory
from training.pace import Device, seconds_per_batch
from training.shape import ModelShape
from training.workload import PlannedOptimizer, Workload


@dataclass(frozen=True, slots=True)
class Proposal:
    """A change after which the run fits.

    Attributes:
        settings: of the recipe, with the values to give them.
        slowdown: seconds for the same tokens, relative to the run as it was asked for.
    """

    settings: dict[str, object]
    total_bytes: int
    slowdown: float


@dataclass(frozen=True, slots=True)
class PlannedRun:
    """One way of training.

    Attributes:
        tokens_per_s: padding included.
        seconds: of the whole run; None if nothing says how long it is.
        proposal: None if the run fits, or if no change makes it fit.
    """

    method: str
    storage: str
    memory: Memory
    total_bytes: int
    fits: bool
    tokens_per_s: float
    seconds: float | None
    proposal: Proposal | None


def plan_run(shape: ModelShape, work: Workload, device: Device, total_tokens: float | None) -> PlannedRun:
    """What a run takes on a device.

    Args:
        total_tokens: that go through the model in the whole run; None if unknown.
    """
    memory = predict_memory(shape, work)
    fits = memory.total_bytes <= device.memory_bytes
    rate = work.tokens / seconds_per_batch(shape, work, device)
    return PlannedRun(
        method=work.method,
        storage=work.storage,
        memory=memory,
        total_bytes=memory.total_bytes,
        fits=fits,
        tokens_per_s=rate,
        seconds=None if total_tokens is None else total_tokens / rate,
        proposal=None if fits else propose(shape, work, device),
    )


def propose(shape: ModelShape, work: Workload, device: Device) -> Proposal | None:
    """The change that fits and costs the least time; of equals the one that changes the least.

    A 4-bit base is another method with another result: it is proposed only where nothing else fits.
    """
    own = _cheapest(shape, work, device, _step_changes(work, {}))
    other = _on_four_bits(work)
    if own is not None or other is None:
        return own
    return _cheapest(shape, work, device, _step_changes(other, {"method": other.method}))


def _cheapest(
    shape: ModelShape,
    work: Workload,
    device: Device,
    changes: Iterator[tuple[Workload, dict[str, object]]],
) -> Proposal | None:
    asked_s = seconds_per_batch(shape, work, device) / work.tokens
    fitting = [
        Proposal(
            settings,
            memory.total_bytes,
            seconds_per_batch(shape, changed, device) / changed.tokens / asked_s,
        )
        for changed, settings in changes
        if (memory := predict_memory(shape, changed)).total_bytes <= device.memory_bytes
    ]
    return min(
        fitting, key=lambda proposal: (round(proposal.slowdown, 2), len(proposal.settings)), default=None
    )


def proposal_text(proposal: Proposal) -> str:
    """The settings to change, and what that costs."""
    changes = ", ".join(f"{name} {_shown(value)}" for name, value in proposal.settings.items())
    return f"{changes} ({proposal.total_bytes / 2**30:.1f} GiB, {proposal.slowdown:.2f} times the time)"


def _shown(value: object) -> str:
    return "on" if value is True else str(value)


def _step_changes(work: Workload, so_far: dict[str, object]) -> Iterator[tuple[Workload, dict[str, object]]]:
    """Every combination of fewer rows at once, 8-bit states and checkpointing."""
    smaller: tuple[PlannedOptimizer, ...] = () if work.optimizer.endswith("8bit") else ("paged_adamw_8bit",)
    optimizers = (work.optimizer, *smaller)
    for rows in _halvings(work.batch_rows):
        for optimizer in optimizers:
            for checkpointing in sorted({work.checkpointing, True}):
                changed = replace(
                    work,
                    batch_rows=rows,
                    accumulates=work.accumulates or rows < work.batch_rows,
                    optimizer=optimizer,
                    checkpointing=checkpointing,
                )
                if changed != work or so_far:
                    yield changed, so_far | _differences(work, changed)


def _halvings(rows: int) -> list[int]:
    found = [rows]
    while found[-1] % 2 == 0:
        found.append(found[-1] // 2)
    return found if found[-1] == 1 else [*found, 1]


def _differences(work: Workload, changed: Workload) -> dict[str, object]:
    settings: dict[str, object] = {}
    if changed.batch_rows != work.batch_rows:
        settings["batch_size"] = changed.batch_rows
        settings["gradient_accumulation"] = f"× {work.batch_rows // changed.batch_rows}"
    if changed.optimizer != work.optimizer:
        settings["optimizer"] = changed.optimizer
    if changed.checkpointing != work.checkpointing:
        settings["gradient_checkpointing"] = True
    return settings


def _on_four_bits(work: Workload) -> Workload | None:
    if work.storage != "none" or work.trains not in ("all", "lora", "dora"):
        return None
    if work.trains == "dora":
        return replace(work, method="qdora", storage="nf4")
    return replace(work, method="qlora", trains="lora", storage="nf4")
