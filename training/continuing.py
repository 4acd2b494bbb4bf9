"""Owns how a model goes on from several prompts: greedily, and how likely each token was. Knows no canary.

All prompts go through the model together, padded on the left. A greedy answer is not counted out token by
token: a draft of it goes through the model in one pass, which says at each column what the greedy token would
be if all columns before were right. So everything up to the first difference is right, and the token found
there too; what the pass found at later columns is the next draft. Whatever the draft, the answer is the same:
a good one saves passes.

P prompts, T tokens of the longest prompt and answer, N tokens of an answer, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from transformers import DynamicCache

from adapters.base import Base
from training.attaching import takes_logits_to_keep
from training.batches import left_padded

Tokens: TypeAlias = tuple[int, ...]


def greedy_answers(
    model: Any, base: Base, prompts: Sequence[Tokens], drafts: Sequence[Tokens], length: int
) -> list[Tokens]:
    """The likeliest continuation of each prompt, past whatever would end an answer.

    Takes one pass if every draft is right, else one more for each column at which one was not: `length` at
    most.

    Args:
        drafts: what may follow each prompt, of any length; nothing but the time depends on it.
        length: N, tokens of an answer.
    """
    answers, _ = _verified(model, base, prompts, drafts, length)
    return answers


def greedy_answers_logprobs(
    model: Any, base: Base, prompts: Sequence[Tokens], drafts: Sequence[Tokens], length: int
) -> tuple[list[Tokens], Tensor]:
    """`greedy_answers`, and the float64 log-probabilities [P, N, V] of their positions.

    They are of one pass over all columns, to the bit, whatever the drafts were; unless these were right, that
    is one pass more.
    """
    answers, logits_PNV = _verified(model, base, prompts, drafts, length)
    if logits_PNV.shape[1] < length:
        logits_PNV = answers_logits(model, base, prompts, answers)
    return answers, logprobs(logits_PNV)


def answers_logits(model: Any, base: Base, prompts: Sequence[Tokens], answers: Sequence[Tokens]) -> Tensor:
    """[P, N, V] of the answers' positions, in one pass over prompts and answers."""
    length = len(answers[0])
    inputs = left_padded(
        [prompt + answer[:-1] for prompt, answer in zip(prompts, answers, strict=True)], base.device
    )
    logits_PTV: Tensor = model(**inputs, **_kept(base, length), use_cache=False).logits
    return logits_PTV[:, -length:]


def logprobs(logits_PNV: Tensor) -> Tensor:
    """Float64, in the host's memory."""
    return torch.log_softmax(logits_PNV.cpu().double(), dim=-1)


def _verified(
    model: Any, base: Base, prompts: Sequence[Tokens], drafts: Sequence[Tokens], length: int
) -> tuple[list[Tokens], Tensor]:
    """The answers, and the logits [P, ≤ N, V] of the columns of the last pass."""
    answers_PN = torch.tensor([(*draft, *(0,) * length)[:length] for draft in drafts], device=base.device)
    inputs = left_padded([(*prompt, *(0,) * (length - 1)) for prompt in prompts], base.device)
    width = max(map(len, prompts))
    cache: DynamicCache | None = _empty_cache(base)
    known = cached = 0  # columns: of the answers, and of the inputs
    while known < length:
        inputs["input_ids"][:, width:] = answers_PN[:, :-1]
        logits_PNV = model(
            input_ids=inputs["input_ids"][:, cached:],
            attention_mask=inputs["attention_mask"],
            position_ids=inputs["position_ids"][:, cached:],
            **_kept(base, length - known),
            past_key_values=cache,
            use_cache=cache is not None,
        ).logits[:, known - length :]
        greedy_PN = logits_PNV.argmax(dim=-1)
        right = int((greedy_PN == answers_PN[:, known:]).all(dim=0).cumprod(dim=0).sum())
        answers_PN[:, known:] = greedy_PN
        known = min(known + right + 1, length)
        cache, cached = _up_to(cache, width + known - 1, width + length - 1)
    return [tuple(answer) for answer in answers_PN.tolist()], logits_PNV


def _empty_cache(base: Base) -> DynamicCache:
    cache = DynamicCache(config=base.model.config)
    cache.activate_past_recording()  # or a sliding window would forget what a wrong draft pushed out
    return cache


def _up_to(cache: DynamicCache | None, columns: int, filled: int) -> tuple[DynamicCache | None, int]:
    """The cache with its first columns alone, and how many these are; none of one that keeps a state."""
    if cache is None or not cache.is_croppable:
        return None, 0
    if columns < filled:
        cache.crop(columns - filled)
    return cache, columns


def _kept(base: Base, columns: int) -> dict[str, int]:
    """Logits of the last columns alone, where the model can leave out the others."""
    return {"logits_to_keep": columns} if takes_logits_to_keep(base.model) else {}
