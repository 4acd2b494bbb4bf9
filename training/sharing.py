"""Owns what each process of a run learns: its part of every batch of all. Knows no model.

A batch of all has batch_size rows for each process, in the order of one process alone; every process takes as
many of them as the others, or one fewer. Where fewer rows are left than there are processes, those without a
row are idle: they compute one of the batch's with nothing to learn, because all must take part in a step.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.data_loader import DataLoaderShard
from torch.utils.data import Dataset, Sampler

from training.batches import IGNORED, Batch
from training.processes import Processes


@dataclass(frozen=True, slots=True)
class Idle:
    """An index for a process without a row: that row is computed, and nothing is learned of it."""

    row: int


class Shares(Sampler[list[int | Idle]]):
    """The indices of this process, batch by batch; equally many batches in every process.

    Args:
        order: of all rows.
        batch_size: rows of one process.

    Attributes:
        batch_size: likewise; accelerate asks for both, to find out how full the last batch is.
        num_processes: of the run.
    """

    def __init__(self, order: Sampler[int] | Sequence[int], batch_size: int, processes: Processes) -> None:
        self.batch_size = batch_size
        self.num_processes = processes.count
        self._order = order
        self._rank = processes.rank

    def __len__(self) -> int:
        assert isinstance(self._order, Sized), "an order has all rows"
        return math.ceil(len(self._order) / (self.batch_size * self.num_processes))

    def __iter__(self) -> Iterator[list[int | Idle]]:
        indices, together = list(self._order), self.batch_size * self.num_processes
        for first in range(0, len(indices), together):
            rows = indices[first : first + together]
            begin, end = (len(rows) * rank // self.num_processes for rank in (self._rank, self._rank + 1))
            yield [*rows[begin:end]] or [Idle(rows[0])]


class SharedRows(Dataset[dict[str, Any]]):
    """Rows by index, marked where the index is Idle."""

    def __init__(self, rows: Any) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int | Idle) -> dict[str, Any]:
        if isinstance(index, Idle):
            return dict(self._rows[index.row]) | {"idle": True}
        return dict(self._rows[index])


def shares_of(
    rows: Any,
    order: Sampler[int] | Sequence[int],
    collate: Callable[[Sequence[Mapping[str, Any]]], Batch],
    batch_size: int,
    processes: Processes,
    *,
    pin_memory: bool,
) -> DataLoaderShard:
    """Batches of this process, on the CPU.

    Args:
        rows: a dataset of mappings.
        order: in which all processes together go through them.
        batch_size: rows of one process.
    """

    def collated(features: Sequence[Mapping[str, Any]]) -> Batch:
        batch = collate(features)
        return nothing_to_learn(batch) if "idle" in features[0] else batch

    return DataLoaderShard(
        SharedRows(rows),
        batch_sampler=Shares(order, batch_size, processes),
        collate_fn=collated,
        pin_memory=pin_memory,
    )


def nothing_to_learn(batch: Batch) -> Batch:
    """The same work, of which no token counts and no gradient comes."""
    labels, mask = batch["labels"], batch["attention_mask"]
    assert isinstance(labels, torch.Tensor), "every collator gives labels"
    assert isinstance(mask, torch.Tensor), "every collator gives a mask"
    return batch | {
        "labels": torch.full_like(labels, IGNORED),
        "attention_mask": torch.zeros_like(mask),
        "visible": batch.get("visible", mask),
    }
