"""Owns what a run is told of its memory before its first step, and what it came to. Trains nothing.

A base that is loaded states its shape as plans read it; rows are those that will be learned.
"""

from dataclasses import dataclass
from typing import Final

import torch

from adapters.base import Base
from adapters.room import memory_free_on
from training.data import TrainingData
from training.errors import ShortOfMemoryError
from training.footprint import Footprint, heap_keeps_blocks
from training.measured_rows import heaviest_rows
from training.memory import Memory, predict_memory
from training.pace import Device
from training.plan import proposal_text, propose
from training.planned_step import planned_step
from training.recipe import Recipe
from training.shape import read_shape

_RATE: Final = 1e11
"""Any: proposals only compare their times."""


@dataclass(frozen=True, slots=True)
class MemoryReport:
    """What was predicted of a run, and what was measured; bytes.

    Attributes:
        moment: of the predicted peak.
        parts: of it, by name.
        predicted_added: without what was taken when the run began: process and base.
        measured_added: the measured peak over what was taken when the run began.
        error: of the predicted addition, relative to the measured one.
        how: the peak was measured.
    """

    moment: str
    parts: dict[str, int]
    predicted_peak: int
    measured_peak: int
    predicted_added: int
    measured_added: int
    error: float
    how: str


def foresee(
    recipe: Recipe, base: Base, data: TrainingData, products: torch.dtype, processes: int = 1
) -> Memory:
    """The predicted peak of a run, in each of its processes.

    Args:
        processes: on a CPU they share what is free; on CUDA each has a device of its own.

    Raises:
        ShortOfMemoryError: less is free than the run would add, and the recipe does not say to go on.
    """
    shape = read_shape(base.folder, base.name)
    cuda = base.device.type == "cuda"
    work = planned_step(
        recipe,
        shape,
        heaviest_rows(data, recipe, shape, processes),
        "cuda" if cuda else "cpu",
        product_bytes=products.itemsize,
        heap_keeps=not cuda and heap_keeps_blocks(),
    )
    memory = predict_memory(shape, work)
    free = memory_free_on(base.device) // (1 if cuda else processes)
    if memory.added_bytes > free and not recipe.exceed_memory:
        whole = free + memory.total_bytes - memory.added_bytes
        proposal = propose(shape, work, Device("here", work.place, whole, _RATE, None, True))
        remedy = f"it fits with {proposal_text(proposal)}" if proposal else "no setting makes it fit here"
        raise ShortOfMemoryError(
            f"training would take {memory.added_bytes / 1e9:.1f} GB more, and {free / 1e9:.1f} GB are free; "
            f"{remedy}; exceed_memory goes on all the same"
        )
    return memory


def compared(memory: Memory, footprint: Footprint, peak_bytes: int) -> MemoryReport:
    """Prediction and measurement, side by side."""
    added = peak_bytes - footprint.before_bytes
    return MemoryReport(
        moment=memory.moment,
        parts=dict(memory.parts),
        predicted_peak=memory.total_bytes,
        measured_peak=peak_bytes,
        predicted_added=memory.added_bytes,
        measured_added=added,
        error=memory.added_bytes / max(added, 1) - 1,
        how=footprint.how,
    )
