"""Batches for methods that put learned positions before the prompt. Knows no model.

Nothing may lie between those positions and the first token, and PEFT counts positions from there by itself:
so rows are padded at their end, which a causal model never looks at, and every column has logits.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from training.batches import IGNORED
from training.encoding import Example


class TrailingPads:
    """Puts examples into one batch, padded on the right.

    Args:
        pad_id: any token; it is masked wherever it pads.
    """

    def __init__(self, pad_id: int) -> None:
        self._pad_id = pad_id

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        examples: list[Example] = [example for (example,) in (f["examples"] for f in features)]
        rows = [torch.tensor(example.token_ids) for example in examples]
        labels = [torch.full_like(row, IGNORED) for row in rows]
        for label, row, example in zip(labels, rows, examples, strict=True):
            for begin, end in example.spans:
                label[begin:end] = row[begin:end]
        return {
            "input_ids": pad_sequence(rows, batch_first=True, padding_value=self._pad_id),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in rows], batch_first=True),
            "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
        }
