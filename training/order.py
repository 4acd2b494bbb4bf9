"""Owns the order in which rows are learned: shuffled anew in every epoch.

The order is a function of seed and epoch alone, so that a run that goes on from a checkpoint sees the very
batches that it would have seen. Knows no model.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Final

import torch
from torch.utils.data import Sampler
from transformers import TrainerCallback
from transformers.trainer_pt_utils import get_length_grouped_indices

_EPOCHS: Final = 1_000_003  # no two pairs of seed and epoch of any real run share a generator


class RowOrder(Sampler[int]):
    """Indices of all rows, at random; where batches are padded, rows of like length share a step.

    The step that takes the most memory is the first, where too little of it shows at once; one that is not
    full is the last.

    Args:
        lengths: of each row, in tokens.
        rows_per_step: rows of one optimizer step, over all its passes.
        padded: whether every row of a batch takes as many columns as its longest.

    Attributes:
        epoch: the next iteration's; set by whoever counts them.
        rows_per_step, padded: as given.
    """

    def __init__(self, lengths: Sequence[int], rows_per_step: int, seed: int, *, padded: bool) -> None:
        self.epoch = 0
        self._lengths = list(lengths)
        self.rows_per_step = rows_per_step
        self._seed = seed
        self.padded = padded

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._seed * _EPOCHS + self.epoch)
        rows = self.rows_per_step
        order = self._grouped(generator) if self.padded else _shuffled(len(self._lengths), generator)
        steps = [order[first : first + rows] for first in range(0, len(order), rows)]
        full, rest = steps[: len(order) // rows], steps[len(order) // rows :]
        mixed = [full[place] for place in _shuffled(len(full), generator)]
        if mixed:
            mixed.insert(0, mixed.pop(max(range(len(mixed)), key=lambda place: self._weight(mixed[place]))))
        return iter([row for step in (*mixed, *rest) for row in step])

    def _grouped(self, generator: torch.Generator) -> list[int]:
        """Long rows before short ones, again and again: in that order the last steps would be of short rows
        alone, and what a model saw last weighs most.
        """
        order: list[int] = get_length_grouped_indices(self._lengths, self.rows_per_step, generator=generator)
        return order

    def _weight(self, step: Sequence[int]) -> int:
        lengths = [self._lengths[row] for row in step]
        return max(lengths) if self.padded else sum(lengths)


def _shuffled(count: int, generator: torch.Generator) -> list[int]:
    order: list[int] = torch.randperm(count, generator=generator).tolist()
    return order


class EpochCounter(TrainerCallback):  # type: ignore[misc]  # transformers is not typed
    """Tells the order which epoch begins, also where a run goes on in the middle of one."""

    def __init__(self, order: RowOrder, steps_per_epoch: int) -> None:
        self._order = order
        self._steps_per_epoch = steps_per_epoch

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._order.epoch = state.global_step // self._steps_per_epoch
