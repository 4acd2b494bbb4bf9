"""Owns the loss of reference answers: a forward pass in float32 on the training base. Knows no server.

The wire reports log-probabilities of generated tokens only, so that this figure is never a server's: its
products are float32, whatever the server computes in.

T tokens of a row, N of its answer, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
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


@dataclass(frozen=True, slots=True)
class AnswerTokens:
    """Token ids of a question and its reference answer.

    Attributes:
        answer_from: where the answer begins.
    """

    token_ids: tuple[int, ...]
    answer_from: int

    @property
    def count(self) -> int:
        """N, the tokens of the answer."""
        return len(self.token_ids) - self.answer_from

    @property
    def answer(self) -> tuple[int, ...]:
        return self.token_ids[self.answer_from :]


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
        examples = [answer_tokens(encoder, case, limit) for case in cases]
        return [
            _loss(worn.model, base, example)
            for example in tqdm(examples, desc="loss", unit="row", disable=not progress)
        ]


def answer_tokens(encoder: RowEncoder, case: Case, limit: int) -> AnswerTokens:
    """A case as it is read with its reference answer.

    Raises:
        DataError: it has more tokens than the limit.
    """
    row = Row(case.place, messages=(*case.messages, turn("assistant", case.reference)))
    example = encoder.encode(row)[-1]
    begin, end = example.spans[-1]  # the last answer; a chat may hold several
    if end > limit:
        raise DataError(
            f"{case.place} has {end} tokens, and the base's context has room for {limit}; remove it"
        )
    return AnswerTokens(example.token_ids[:end], begin)


def answer_logits(model: Any, base: Base, tokens: AnswerTokens) -> Tensor:
    """[N, V]: what the model says before each of the N tokens of the reference answer."""
    input_ids = torch.tensor([tokens.token_ids], device=base.device)
    keep = {"logits_to_keep": tokens.count + 1} if takes_logits_to_keep(base.model) else {}
    logits_TV: Tensor = model(input_ids=input_ids, use_cache=False, **keep).logits[0]
    return logits_TV[-tokens.count - 1 : -1]


def _loss(model: Any, base: Base, tokens: AnswerTokens) -> RowLoss:
    logits_NV = answer_logits(model, base, tokens)
    answer = torch.tensor(tokens.answer, device=logits_NV.device)
    nats = F.cross_entropy(logits_NV.double(), answer, reduction="sum")
    return RowLoss(float(nats), tokens.count)
