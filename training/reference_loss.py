"""Owns the loss of reference answers: a forward pass in float32 on the training base. Knows no server.

The wire reports log-probabilities of generated tokens only, so that this figure is never a server's: its
products are float32, whatever the server computes in.

T tokens of a row, V vocabulary.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from adapters.base import Base
from training.applied import applied, encoder_for
from training.attaching import takes_logits_to_keep
from training.cases import Case
from training.encoding import RowEncoder
from training.errors import DataError
from training.metrics import RowLoss
from training.products import products_in
from training.rows import Row, turn


def reference_losses(
    base: Base, adapter: Path | None, cases: Sequence[Case], *, progress: bool
) -> list[RowLoss]:
    """Of every case, with an adapter folder on the base or without.

    Args:
        base: loaded with purpose="train" and dtype="float32"; given back without the adapter.

    Raises:
        DataError: a row does not fit into the base's context.
        AdapterError: the adapter does not fit the base.
    """
    from tqdm import tqdm

    encoder = encoder_for(base, adapter)
    with applied(base, adapter) as worn, torch.no_grad(), products_in(base, torch.float32):
        limit = base.max_context_tokens - worn.virtual_tokens
        examples = [_tokens(encoder, case, limit) for case in cases]
        return [
            _loss(worn.model, base, *example)
            for example in tqdm(examples, desc="loss", unit="row", disable=not progress)
        ]


def _tokens(encoder: RowEncoder, case: Case, limit: int) -> tuple[tuple[int, ...], int]:
    """Token ids of question and answer, and where the answer begins."""
    row = Row(case.place, messages=(*case.messages, turn("assistant", case.reference)))
    example = encoder.encode(row)[-1]
    begin, end = example.spans[-1]  # the last answer; a chat may hold several
    if end > limit:
        raise DataError(
            f"{case.place} has {end} tokens, and the base's context has room for {limit}; remove it"
        )
    return example.token_ids[:end], begin


def _loss(model: Any, base: Base, token_ids: Sequence[int], answer_from: int) -> RowLoss:
    input_ids = torch.tensor([token_ids], device=base.device)
    count = len(token_ids) - answer_from
    keep = {"logits_to_keep": count + 1} if takes_logits_to_keep(base.model) else {}
    logits_TV = model(input_ids=input_ids, use_cache=False, **keep).logits[0, -count - 1 : -1]
    nats = F.cross_entropy(logits_TV.double(), input_ids[0, -count:], reduction="sum")
    return RowLoss(float(nats), count)
