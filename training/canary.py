"""Owns the canary of a training run: what the new adapter answers to a few prompts. Knows no files.

Recorded on the base it was trained on, in float32 products; then once more as bfloat16 has it, to see how far
rounding alone moves an answer, and without the adapter, to see that the probes would notice its absence.

T tokens of prompt and answer, N tokens of the answer, V vocabulary.
"""

import logging
import math
from collections.abc import Sequence
from typing import Any, Final

import torch
from peft import PeftModel
from torch import Tensor

from adapters.base import Base
from adapters.canary import MAX_NOISE, Canary, Probe, Step
from training.encoding import Example
from training.products import products_in

log = logging.getLogger(__name__)

ANSWER_TOKENS: Final = 12
MAX_PROMPT_TOKENS: Final = 128
ALTERNATIVES: Final = 8
_DIGITS: Final = 4  # of a log-probability; far finer than any difference that counts

BFLOAT16_NOISE: Final = 0.4
"""At least this is taken where activations are bfloat16 already and hide their noise; measured elsewhere."""


def probe_prompts(
    examples: Sequence[Example], count: int, *, max_context_tokens: int
) -> list[tuple[int, ...]]:
    """Beginnings of examples from all over the data: what precedes the answer, or half if all is learned."""
    limit = min(MAX_PROMPT_TOKENS, max_context_tokens - ANSWER_TOKENS - 1)
    if limit < 1:
        return []
    count = min(count, len(examples))
    chosen = [examples[index * len(examples) // count] for index in range(count)]
    return [example.token_ids[: min(_beginning(example), limit)] for example in chosen]


def _beginning(example: Example) -> int:
    return example.learned_from if example.learned_from > 1 else max(1, len(example.token_ids) // 2)


def record_canary(model: PeftModel, base: Base, prompts: Sequence[tuple[int, ...]]) -> Canary | None:
    """What the adapter on the model answers to the prompts; None if there are none, or it is all noise.

    Args:
        model: the base with the trained adapter; left in evaluation mode.
        prompts: token ids, each with room for ANSWER_TOKENS more in the context.
    """
    if not prompts:
        return None
    model.eval()
    with torch.no_grad(), products_in(base, torch.float32):
        answers = [_greedy(model, base, prompt) for prompt in prompts]
        reference = [_logprobs(model, base, *pair) for pair in zip(prompts, answers, strict=True)]
        noise = _noise(model, base, prompts, answers, reference)
        with model.disable_adapter():
            bare = [_logprobs(model, base, *pair) for pair in zip(prompts, answers, strict=True)]
    distance = _distance(reference, bare)
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


def _noise(
    model: PeftModel,
    base: Base,
    prompts: Sequence[tuple[int, ...]],
    answers: Sequence[tuple[int, ...]],
    reference: Sequence[Tensor],
) -> float:
    with torch.autocast(base.device.type, dtype=torch.bfloat16):
        rounded = [_logprobs(model, base, *pair) for pair in zip(prompts, answers, strict=True)]
    noise = _distance(reference, rounded)
    return noise if base.dtype == torch.float32 else max(noise, BFLOAT16_NOISE)


def _greedy(model: Any, base: Base, prompt: tuple[int, ...]) -> tuple[int, ...]:
    """The likeliest continuation, past whatever would end an answer."""
    answer: list[int] = []
    input_ids, cache = torch.tensor([prompt], device=base.device), None
    for _ in range(ANSWER_TOKENS):
        out = model(input_ids=input_ids, past_key_values=cache, use_cache=True)
        answer.append(int(out.logits[0, -1].argmax()))
        input_ids, cache = torch.tensor([answer[-1:]], device=base.device), out.past_key_values
    return tuple(answer)


def _logprobs(model: Any, base: Base, prompt: tuple[int, ...], answer: tuple[int, ...]) -> Tensor:
    """[N, V] of the answer's positions, in one pass over prompt and answer."""
    input_ids = torch.tensor([prompt + answer[:-1]], device=base.device)
    logits_TV = model(input_ids=input_ids, use_cache=False).logits[0]
    return torch.log_softmax(logits_TV[len(prompt) - 1 :].double().cpu(), dim=-1)


def _distance(reference: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """Largest difference of the log-probability of a token that is kept; NaN if any is."""
    differences = []
    for ours_NV, theirs_NV in zip(reference, other, strict=True):
        values_NK, ids_NK = ours_NV.topk(ALTERNATIVES)
        differences.append((theirs_NV.gather(1, ids_NK) - values_NK).abs().max())
    return float(torch.stack(differences).max())


def _probe(prompt: tuple[int, ...], answer: tuple[int, ...], logprobs_NV: Tensor) -> Probe:
    values_NK, ids_NK = logprobs_NV.topk(ALTERNATIVES)
    steps = (
        Step(token, tuple((i, round(value, _DIGITS)) for i, value in zip(ids, values, strict=True)))
        for token, ids, values in zip(answer, ids_NK.tolist(), values_NK.tolist(), strict=True)
    )
    return Probe(prompt, tuple(steps))
