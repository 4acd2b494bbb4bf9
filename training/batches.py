"""Owns the way from examples to tensors: padding, labels, boundaries within a pack. Knows no rows.

B sequences, T columns, K columns whose logits are computed.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor
from transformers import Trainer

from training.encoding import Example
from training.packing import Pack

IGNORED: Final = -100
"""Label of a token that is not learned."""

Batch = dict[str, Tensor | int | bool | None]


class Sequences(torch.utils.data.Dataset[dict[str, Any]]):
    """Packs as the Trainer wants them; it groups sequences of like length by `input_ids`."""

    def __init__(self, packs: Sequence[Pack]) -> None:
        self._packs = packs

    def __len__(self) -> int:
        return len(self._packs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        pack = self._packs[index]
        ids = pack[0].token_ids if len(pack) == 1 else _ids(pack)
        return {"input_ids": ids, "examples": pack}


class Collator:
    """Puts sequences of one example into a batch, padded on the left so that answers end in the last column.

    Args:
        pad_id: any token; it is masked wherever it pads, so it may be the one that ends answers.
        answers_only: leaves out the logits of all columns before the first that predicts an answer.
    """

    def __init__(self, pad_id: int, *, answers_only: bool) -> None:
        self._pad_id = pad_id
        self._answers_only = answers_only

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> Batch:
        examples: list[Example] = [example for (example,) in (f["examples"] for f in features)]
        width = max(len(example.token_ids) for example in examples)
        input_ids = torch.tensor([self._row(e.token_ids, width, self._pad_id) for e in examples])
        mask = torch.tensor([self._row([1] * len(e.token_ids), width, 0) for e in examples])
        labels = torch.tensor([self._row(labels_of(e), width, IGNORED) for e in examples])
        batch: Batch = {
            "input_ids": input_ids,
            "attention_mask": mask,
            "position_ids": (mask.cumsum(dim=1) - 1).clamp(min=0),
            "labels": labels,
        }
        if self._answers_only:
            # The logits before an answer's first token are needed too: they predict it.
            keep = 1 + max(len(e.token_ids) - e.learned_from for e in examples)
            batch |= {"labels": labels[:, -keep:], "logits_to_keep": keep}
        return batch

    @staticmethod
    def _row(values: Sequence[int], width: int, filler: int) -> list[int]:
        return [filler] * (width - len(values)) + list(values)


class PackCollator:
    """Puts packs into a batch, padded on the right; positions begin anew with every example.

    transformers finds the boundaries in these positions, and lets no example see another, if there is
    neither a mask nor a cache.

    Args:
        pad_id: any token.
        answers_only: leaves out the logits of all columns that predict nothing that is learned.
        flat: one row for all packs, without padding, as FlashAttention's variable-length kernels want it.
    """

    def __init__(self, pad_id: int, *, answers_only: bool, flat: bool) -> None:
        self._pad_id = pad_id
        self._answers_only = answers_only
        self._flat = flat

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> Batch:
        packs: list[Pack] = [feature["examples"] for feature in features]
        if self._flat:
            packs = [tuple(example for pack in packs for example in pack)]
        width = max(map(_tokens, packs))
        labels_BT = torch.tensor([_padded(_pack_labels(p), width, [IGNORED] * width) for p in packs])
        batch: Batch = {
            "input_ids": torch.tensor([_padded(_ids(p), width, [self._pad_id] * width) for p in packs]),
            "attention_mask": torch.tensor([_padded([1] * _tokens(p), width, [0] * width) for p in packs]),
            "position_ids": torch.tensor([_padded(_positions(p), width, range(width)) for p in packs]),
            "labels": labels_BT,
            "visible": None,
            "use_cache": False,
        }
        return batch | learned_columns(labels_BT) if self._answers_only else batch


class SequenceTrainer(Trainer):  # type: ignore[misc]  # transformers is not typed
    """Counts tokens by `attention_mask`, as ever, and computes with `visible` instead if a batch has it."""

    def compute_loss(self, model: Any, inputs: Batch, *args: Any, **kwargs: Any) -> Any:
        if "visible" in inputs:
            inputs = {name: value for name, value in inputs.items() if name != "visible"} | {
                "attention_mask": inputs["visible"]
            }
        return super().compute_loss(model, inputs, *args, **kwargs)


def left_padded(sequences: Sequence[Sequence[int]], device: torch.device) -> dict[str, Tensor]:
    """Inputs [B, T] that all end in the last column; what pads is masked, and positions count without it."""
    width = max(map(len, sequences))
    ids_BT = torch.tensor([[0] * (width - len(ids)) + list(ids) for ids in sequences], device=device)
    mask_BT = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in sequences], device=device)
    positions_BT = (mask_BT.cumsum(dim=1) - 1).clamp(min=0)
    return {"input_ids": ids_BT, "attention_mask": mask_BT, "position_ids": positions_BT}


def learned_columns(labels_BT: Tensor) -> Batch:
    """Which columns' logits predict anything, and what.

    The loss compares a column's logits with the label of the next column kept. So there is one label more in
    front, and one column more behind, that are not compared with anything.
    """
    targets_BT = labels_BT[:, 1:]
    columns_K = (targets_BT != IGNORED).any(dim=0).nonzero().squeeze(1)
    first_B1 = torch.full((len(labels_BT), 1), IGNORED)
    labels_BK = torch.cat([first_B1, targets_BT[:, columns_K]], dim=1)
    return {"labels": labels_BK, "logits_to_keep": torch.cat([columns_K, columns_K[-1:]])}


def labels_of(example: Example) -> list[int]:
    """One for every token: itself where it is learned."""
    labels = [IGNORED] * len(example.token_ids)
    for begin, end in example.spans:
        labels[begin:end] = example.token_ids[begin:end]
    return labels


def _pack_labels(pack: Pack) -> list[int]:
    return [label for example in pack for label in labels_of(example)]


def _ids(pack: Pack) -> list[int]:
    return [token for example in pack for token in example.token_ids]


def _positions(pack: Pack) -> list[int]:
    return [position for example in pack for position in range(len(example.token_ids))]


def _tokens(pack: Pack) -> int:
    return sum(len(example.token_ids) for example in pack)


def _padded(values: list[int], width: int, filler: Sequence[int]) -> list[int]:
    return values + list(filler[: width - len(values)])
