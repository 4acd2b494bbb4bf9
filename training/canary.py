"""Owns the canary of a training run: what the new adapter answers to a few prompts. Knows no files.

Recorded on the base it was trained on, in float32 products; then once more as bfloat16 has it, to see how far
rounding alone moves an answer, and without the adapter, to see that the probes would notice its absence.

Until this is done nobody has the adapter. What the data goes on with after a prompt is the draft of its
answer: what was learned needs only be verified.

P prompts, N tokens of an answer, V vocabulary.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from peft import PeftModel
from torch import Tensor

from adapters.base import Base
from adapters.canary import MAX_NOISE, Canary, Probe, Step
from training.continuing import Tokens, answers_logits, greedy_answers_logprobs, logprobs
from training.encoding import Example
from training.products import bfloat16_everywhere, products_in

log = logging.getLogger(__name__)

ANSWER_TOKENS: Final = 12
MAX_PROMPT_TOKENS: Final = 128
ALTERNATIVES: Final = 8
_DIGITS: Final = 4  # of a log-probability; far finer than any difference that counts

BFLOAT16_NOISE: Final = 0.4
"""At least this is taken where activations are bfloat16 already and hide their noise; measured elsewhere."""


@dataclass(frozen=True, slots=True)
class Draft:
    """What prompts may be answered with, as far as anything is known of that. It saves time, decides nothing.

    Attributes:
        answers: of each prompt, of any length.
        bare_PNV: logits that the base without an adapter has at their positions; None if they are not known.
    """

    answers: Sequence[Tokens]
    bare_PNV: Tensor | None = None


def probe_prompts(examples: Sequence[Example], count: int, *, max_context_tokens: int) -> list[Tokens]:
    """Beginnings of examples from all over the data: what precedes the answer, or half if all is learned."""
    limit = min(MAX_PROMPT_TOKENS, max_context_tokens - ANSWER_TOKENS - 1)
    if limit < 1:
        return []
    return [example.token_ids[: min(_beginning(example), limit)] for example in _spread(examples, count)]


def probe_drafts(examples: Sequence[Example], prompts: Sequence[Tokens]) -> list[Tokens]:
    """What the examples go on with after each of their `probe_prompts`; nothing after the end of one."""
    return [
        example.token_ids[len(prompt) : len(prompt) + ANSWER_TOKENS]
        for example, prompt in zip(_spread(examples, len(prompts)), prompts, strict=True)
    ]


def _spread(examples: Sequence[Example], count: int) -> list[Example]:
    count = min(count, len(examples))
    return [examples[index * len(examples) // count] for index in range(count)]


def _beginning(example: Example) -> int:
    return example.learned_from if example.learned_from > 1 else max(1, len(example.token_ids) // 2)


def record_canary(
    model: PeftModel, base: Base, prompts: Sequence[Tokens], draft: Draft | None = None
) -> Canary | None:
    """What the adapter on the model answers to the prompts; None if there are none, or it is all noise.

    Args:
        model: the base with the trained adapter; left in evaluation mode.
        prompts: token ids, each with room for ANSWER_TOKENS more in the context.
        draft: of their answers.
    """
    if not prompts:
        return None
    draft = draft or Draft([()] * len(prompts))
    model.eval()
    with torch.no_grad(), products_in(base, torch.float32):
        answers, reference = greedy_answers_logprobs(model, base, prompts, draft.answers, ANSWER_TOKENS)
        noise = _noise(model, base, prompts, answers, reference)
        bare_PNV = draft.bare_PNV
        if bare_PNV is None or answers != draft.answers:
            bare_PNV = bare_logits(model, base, prompts, answers)
    distance = _distance(reference, logprobs(bare_PNV))
    if not (noise <= MAX_NOISE and math.isfinite(distance)):  # NaN fails too
        log.warning("the adapter's answers move by %g with rounding alone: no canary is recorded", noise)
        return None
    return Canary(
        base_fingerprint=base.fingerprint,
        quantization=base.quantization,
        precision=str(base.dtype).removeprefix("torch."),
        noise=round(noise, _DIGITS),
        base_distance=round(distance, _DIGITS),
        probes=tuple(
            _probe(prompt, answer, logprobs_NV)
            for prompt, answer, logprobs_NV in zip(prompts, answers, reference, strict=True)
        ),
    )


def bare_logits(model: PeftModel, base: Base, prompts: Sequence[Tokens], answers: Sequence[Tokens]) -> Tensor:
    """[P, N, V] of the answers' positions without the adapter; no step of a training changes them."""
    with model.disable_adapter():
        return answers_logits(base.model, base, prompts, answers)


def _noise(
    model: PeftModel,
    base: Base,
    prompts: Sequence[Tokens],
    answers: Sequence[Tokens],
    reference: Tensor,
) -> float:
    with bfloat16_everywhere(base):
        rounded = logprobs(answers_logits(model, base, prompts, answers))
    noise = _distance(reference, rounded)
    return noise if base.dtype == torch.float32 else max(noise, BFLOAT16_NOISE)


def _distance(reference_PNV: Tensor, other_PNV: Tensor) -> float:
    """Largest difference of the log-probability of a token that is kept; NaN if any is."""
    values_PNK, ids_PNK = reference_PNV.topk(ALTERNATIVES)
    return float((other_PNV.gather(2, ids_PNK) - values_PNK).abs().max())


def _probe(prompt: Tokens, answer: Tokens, logprobs_NV: Tensor) -> Probe:
    values_NK, ids_NK = logprobs_NV.topk(ALTERNATIVES)
    steps = (
        Step(token, tuple((i, round(value, _DIGITS)) for i, value in zip(ids, values, strict=True)))
        for token, ids, values in zip(answer, ids_NK.tolist(), values_NK.tolist(), strict=True)
    )
    return Probe(prompt, tuple(steps))
