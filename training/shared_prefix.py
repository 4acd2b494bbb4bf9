"""Owns batches whose rows begin alike: the common beginning is computed once. Knows no files.

Rows of one task begin with the same system message and the same instruction; a batch computes these tokens
for every row. Here a batch is one sequence, the common beginning and then what is each row's own; every token
sees the beginning and its own row, at the positions it would have alone. The sums are the same: loss and
gradients differ from those of separate rows by rounding.

B rows, P tokens of the common beginning, T tokens of the one sequence, W columns of a padded batch.
"""

import itertools
import logging
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn

from adapters.base import Base
from training.batches import IGNORED, Batch, Collator, labels_of, learned_columns
from training.encoding import Example
from training.products import products_in

log = logging.getLogger(__name__)

_AGREEMENT: Final = 1e-3
"""Largest difference of a token's loss, in nats, between both ways with float32 products."""

_TRIED_ROWS: Final = 3


class SharedPrefixCollator:
    """Puts rows that begin alike into one sequence wherever that is less work, else into a padded batch.

    Args:
        padded: for all other batches.
        answers_only: leaves out the logits of all columns that predict nothing that is learned.
    """

    def __init__(self, base: Base, padded: Collator, *, answers_only: bool) -> None:
        self._padded = padded
        self._answers_only = answers_only
        self._linear_flops, self._attention_flops = _flops(base)

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> Batch:
        examples: list[Example] = [example for (example,) in (f["examples"] for f in features)]
        shared = common_beginning(examples)
        together = shared + sum(len(example.token_ids) - shared for example in examples)
        width = max(len(example.token_ids) for example in examples)
        if self._work(1, together) >= self._work(len(examples), width):
            return self._padded(features)
        batch, labels_BT = one_sequence(examples, shared), labels_after(examples, shared)
        return batch | learned_columns(labels_BT) if self._answers_only else batch

    def _work(self, rows: int, tokens: int) -> float:
        return rows * tokens * (self._linear_flops + tokens * self._attention_flops)


def common_beginning(examples: Sequence[Example]) -> int:
    """Tokens that all rows begin with, and before the one that predicts the first that any row learns."""
    first_learned = min(example.learned_from for example in examples)
    columns = zip(*(example.token_ids for example in examples), strict=False)
    alike = sum(1 for _ in itertools.takewhile(lambda tokens: len(set(tokens)) == 1, columns))
    return max(0, min(alike, first_learned - 1))


def one_sequence(examples: Sequence[Example], shared: int) -> Batch:
    """The batch as one sequence of `shared` tokens and every row's others.

    `attention_mask` counts the tokens of the rows, as if each were computed alone; `visible` is what the
    model is given for it: [1, 1, T, T], true where a column is seen.
    """
    own = [example.token_ids[shared:] for example in examples]
    beginning = list(range(shared))
    positions = beginning + [position for ids in own for position in range(shared, shared + len(ids))]
    row_T = torch.tensor([-1] * shared + [row for row, ids in enumerate(own) for _ in ids])
    return {
        "input_ids": torch.tensor(
            [[*examples[0].token_ids[:shared], *(token for ids in own for token in ids)]]
        ),
        "position_ids": torch.tensor([positions]),
        "labels": labels_after(examples, shared),
        "attention_mask": torch.ones(
            1, sum(len(example.token_ids) for example in examples), dtype=torch.long
        ),
        "visible": _visible(row_T),
        "use_cache": False,
    }


def labels_after(examples: Sequence[Example], shared: int) -> Tensor:
    """[1, T]: of the beginning nothing is learned, of every row what follows it."""
    return torch.tensor(
        [[IGNORED] * shared + [n for example in examples for n in labels_of(example)[shared:]]]
    )


def _flops(base: Base) -> tuple[float, float]:
    """Forward, of one token in all linear layers but the head, and of one token that sees one other token."""
    layers = [shape for name, shape in base.layout.modules.items() if name != base.layout.head]
    linear = sum(2 * shape.in_features * shape.out_features for shape in layers)
    config = base.model.config.get_text_config()
    return float(linear), 4.0 * config.num_hidden_layers * config.hidden_size


def _visible(row_T: Tensor) -> Tensor:
    same_TT = row_T[:, None] == row_T[None, :]
    causal_TT = torch.ones(len(row_T), len(row_T), dtype=torch.bool).tril()
    return ((same_TT | (row_T == -1)[None, :]) & causal_TT)[None, None]


def can_share(base: Base, examples: Sequence[Example]) -> bool:
    """Whether this model's loss is the same both ways, tried with a few rows.

    Attention that is not full, positions that are not given, or another attention function would be wrong
    without a word.
    """
    if base.model.config._attn_implementation != "sdpa":
        return False
    few = sorted(examples, key=lambda example: len(example.token_ids))[:_TRIED_ROWS]
    shared = common_beginning(few)
    if len(few) < _TRIED_ROWS or shared == 0:
        return False
    try:
        with torch.no_grad(), products_in(base, torch.float32):
            together = _losses(base, one_sequence(few, shared))
            alone = torch.cat([_losses(base, one_sequence([example], 0)) for example in few])
    except (RuntimeError, ValueError, TypeError) as error:
        log.info("rows are computed apart: the model does not take a mask of one's own (%s)", error)
        return False
    return bool((together - alone).abs().max() < _AGREEMENT)  # NaN does not agree


def _losses(base: Base, batch: Batch) -> Tensor:
    """Of every learned token, in nats, row by row."""
    tensors = {name: value.to(base.device) for name, value in batch.items() if isinstance(value, Tensor)}
    logits_TV = (
        base.model(
            input_ids=tensors["input_ids"],
            position_ids=tensors["position_ids"],
            attention_mask=tensors["visible"],
            use_cache=False,
        )
        .logits[0]
        .float()
    )
    labels_T = tensors["labels"][0, 1:]
    losses_T = nn.functional.cross_entropy(logits_TV[:-1], labels_T, ignore_index=IGNORED, reduction="none")
    return losses_T[labels_T != IGNORED]
