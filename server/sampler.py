"""Logits to tokens: a pure function of logits, parameters, history and one random number. Knows no engine.

S rows, V vocabulary.
"""

import random
from collections import Counter
from collections.abc import Sequence as Items
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.library import native
from kernels.rowwise import argmax, argmax_reference
from server.request import SamplingParams, TokenLogprob


@dataclass(frozen=True, slots=True)
class SampleRow:
    """What choosing one token depends on, besides its logits.

    Attributes:
        uniform: in [0, 1), from the request's own generator; greedy rows do not use it.
    """

    params: SamplingParams
    prompt_ids: Items[int]
    output_ids: Items[int]
    uniform: float


@dataclass(frozen=True, slots=True)
class Choice:
    """The chosen token; token_id is None if the row's logits were not finite."""

    token_id: int | None
    logprob: TokenLogprob | None


def uniform_of(seed: int, answer: int, step: int) -> float:
    """The random number of an answer's step: a function of the request's seed alone, whatever else runs."""
    return random.Random(f"{seed}/{answer}/{step}").random()  # noqa: S311  # reproducible sampling, not a secret


def sample(logits_SV: Tensor, rows: Items[SampleRow]) -> list[Choice]:
    """Chooses one token per row. A row's choice depends on its own logits and parameters alone."""
    greedy = _greedy(logits_SV).tolist()
    choices = []
    for index, row in enumerate(rows):
        if greedy[index] < 0:
            choices.append(Choice(None, None))
            continue
        logits_V = _penalised(logits_SV[index], row)
        if row.params.temperature > 0:
            token = _draw(logits_V, row.params, row.uniform)
        else:
            token = greedy[index] if logits_V is logits_SV[index] else int(logits_V.argmax())
        choices.append(Choice(token, _logprob(logits_SV[index], token, row.params.logprobs)))
    return choices


def _greedy(logits_SV: Tensor) -> Tensor:
    """The likeliest token of each row, -1 where a row is not finite."""
    native_form = logits_SV.device.type == "cpu" and native() is not None
    return argmax(logits_SV) if native_form else argmax_reference(logits_SV)


def _penalised(logits_V: Tensor, row: SampleRow) -> Tensor:
    """Repetition penalty (Keskar et al. 2019; prompt and answer), then presence and frequency (answer)."""
    params = row.params
    if params.repetition_penalty != 1.0:
        seen = torch.tensor(sorted({*row.prompt_ids, *row.output_ids}), device=logits_V.device)
        values = logits_V[seen]
        factor = params.repetition_penalty
        logits_V = logits_V.index_copy(0, seen, torch.where(values > 0, values / factor, values * factor))
    if row.output_ids and (params.presence_penalty or params.frequency_penalty):
        counts = Counter(row.output_ids)
        seen = torch.tensor(list(counts), device=logits_V.device)
        count = torch.tensor(list(counts.values()), device=logits_V.device, dtype=logits_V.dtype)
        logits_V = logits_V.index_add(0, seen, -(params.presence_penalty + params.frequency_penalty * count))
    return logits_V


def _draw(logits_V: Tensor, params: SamplingParams, uniform: float) -> int:
    """Inverse of the cumulative distribution after temperature, top-k, top-p and min-p, likeliest first."""
    scaled_V = logits_V.double() / params.temperature
    count = min(params.top_k or scaled_V.shape[0], scaled_V.shape[0])
    ordered, ids = torch.topk(scaled_V, count)
    probabilities = torch.softmax(ordered, dim=0)
    mass_before = torch.cumsum(probabilities, dim=0) - probabilities
    keep = mass_before < params.top_p
    keep &= probabilities >= params.min_p * probabilities[0]
    cumulative = torch.cumsum(probabilities * keep, dim=0)
    index = int(torch.searchsorted(cumulative, uniform * cumulative[-1], right=True))
    return int(ids[min(index, int(keep.nonzero()[-1]))])


def _logprob(logits_V: Tensor, token: int, alternatives: int | None) -> TokenLogprob | None:
    """Of the model's own distribution, before penalties and temperature."""
    if alternatives is None:
        return None
    logprobs_V = torch.log_softmax(logits_V.double(), dim=0)
    values, ids = torch.topk(logprobs_V, alternatives)
    pairs = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    return TokenLogprob(token, float(logprobs_V[token]), pairs)
