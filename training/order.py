"""Owns the order in which rows are learned: shuffled anew in every epoch, rows of like length together.

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


class LengthBuckets(Sampler[int]):
    """Indices of all rows, so ordered that the rows of a batch differ little in length.

    Args:
        lengths: of each row, in tokens.
        rows_per_step: rows of one optimizer step, over all its passes.

    Attributes:
        epoch: the next iteration's; set by whoever counts them.
    """

    def __init__(self, lengths: Sequence[int], rows_per_step: int, seed: int) -> None:
        self.epoch = 0
        self._lengths = list(lengths)
        self._rows_per_step = rows_per_step
        self._seed = seed

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._seed * _EPOCHS + self.epoch)
        order = get_length_grouped_indices(self._lengths, self._rows_per_step, generator=generator)
        return iter(_steps_shuffled(order, self._rows_per_step, generator))


def _steps_shuffled(order: Sequence[int], rows: int, generator: torch.Generator) -> list[int]:
    """The same steps in another order: grouping alone has long rows before short ones, again and again.

    What a model saw last weighs most, and steps of ever shorter rows pull it their way. The longest row stays
    in the first step, where too little memory shows at once; a step that is not full stays the last.
    """
    steps = [list(order[first : first + rows]) for first in range(0, len(order), rows)]
    full = max(len(order) // rows, 1)
    middle = steps[1:full]
    shuffled = [middle[place] for place in torch.randperm(len(middle), generator=generator).tolist()]
    return [row for step in (steps[0], *shuffled, *steps[full:]) for row in step]


class EpochCounter(TrainerCallback):  # type: ignore[misc]  # transformers is not typed
    """Tells the order which epoch begins, also where a run goes on in the middle of one."""

    def __init__(self, order: LengthBuckets, steps_per_epoch: int) -> None:
        self._order = order
        self._steps_per_epoch = steps_per_epoch

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._order.epoch = state.global_step // self._steps_per_epoch
