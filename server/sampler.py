"""Logits to tokens: a pure function of logits, parameters, history and one random number. Knows no engine.

S rows, V vocabulary.
"""

import random
from collections import Counter
from collections.abc import Iterator
from collections.abc import Sequence as Items
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from kernels.library import native
from kernels.rowwise import argmax, argmax_reference
from server.request import SamplingParams, TokenLogprob

_LIKELIEST = 256
"""Tokens that are ordered before all are."""
_ROUNDING = 1e-9
"""Of a sum of so many probabilities, in double precision, and then some."""


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
    """Chooses one token per row. A row's choice depends on its own logits and parameters alone.

    All numbers come to the host at once, at the end: on a GPU nothing waits before that.
    """
    greedy_S = _greedy(logits_SV)
    found = [greedy_S.double()]
    for index, row in enumerate(rows):
        found += _found(logits_SV[index], greedy_S[index], row)
    numbers = torch.cat(found).tolist()
    rest = iter(numbers[len(rows) :])
    return [_choice(int(token), row, rest) for token, row in zip(numbers, rows, strict=False)]


def _found(logits_V: Tensor, greedy: Tensor, row: SampleRow) -> list[Tensor]:
    """What is to be known of a row beyond its likeliest token, in the order in which `_choice` takes it."""
    token, found = greedy, []
    if not row.params.takes_likeliest:
        penalised_V = _penalised(logits_V, row)
        drawn = row.params.temperature > 0
        token = _draw(penalised_V, row.params, row.uniform) if drawn else penalised_V.argmax()
        found.append(token.double()[None])
    if row.params.logprobs is not None:
        found += _logprobs(logits_V, token, row.params.logprobs)
    return found


def _choice(greedy: int, row: SampleRow, rest: Iterator[float]) -> Choice:
    token = greedy if row.params.takes_likeliest else int(next(rest))
    logprob = None
    if (count := row.params.logprobs) is not None:
        own, ids, values = next(rest), [*islice(rest, count)], [*islice(rest, count)]
        logprob = TokenLogprob(token, own, tuple(zip(map(int, ids), values, strict=True)))
    return Choice(token, logprob) if greedy >= 0 else Choice(None, None)


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


def _draw(logits_V: Tensor, params: SamplingParams, uniform: float) -> Tensor:
    """Inverse of the cumulative distribution after temperature, top-k, top-p and min-p, likeliest first.

    Ordering a vocabulary takes a CPU longer than a small model's step. Nearly always the likeliest tokens
    decide; where they do not, all are ordered. Which of the two makes no difference to the token.
    """
    scaled_V = logits_V.double() / params.temperature
    if 0 < params.top_k < len(scaled_V):
        ordered, ids = torch.topk(scaled_V, params.top_k)
        return _inverse(torch.softmax(ordered, dim=0), ids, params, uniform)
    log_mass = torch.logsumexp(scaled_V, dim=0)
    if scaled_V.device.type == "cpu" and len(scaled_V) > _LIKELIEST:
        ordered, ids = torch.topk(scaled_V, _LIKELIEST)
        probabilities = torch.exp(ordered - log_mass)
        if _decide(probabilities, params, uniform):
            return _inverse(probabilities, ids, params, uniform)
    ordered, ids = torch.sort(scaled_V, descending=True)
    return _inverse(torch.exp(ordered - log_mass), ids, params, uniform)


def _kept(probabilities: Tensor, params: SamplingParams) -> Tensor:
    """Which of the tokens, likeliest first, top-p and min-p leave."""
    mass_before = torch.cumsum(probabilities, dim=0) - probabilities
    return (mass_before < params.top_p) & (probabilities >= params.min_p * probabilities[0])


def _decide(probabilities: Tensor, params: SamplingParams, uniform: float) -> bool:
    """Whether a draw ends among these, the likeliest, whatever the others are."""
    if params.top_p < 1 or params.min_p > 0:
        return not _kept(probabilities, params)[-1]
    return uniform < float(probabilities.sum()) - _ROUNDING


def _inverse(probabilities: Tensor, ids: Tensor, params: SamplingParams, uniform: float) -> Tensor:
    """The token at which the mass of those kept reaches `uniform` of its total."""
    keep = _kept(probabilities, params)
    cumulative = torch.cumsum(probabilities * keep, dim=0)
    whole = params.top_p == 1 and params.min_p == 0 and not params.top_k
    target = torch.full_like(cumulative[-1:], uniform) if whole else uniform * cumulative[-1:]
    last = (keep * torch.arange(len(keep), device=keep.device)).amax(dim=0, keepdim=True)
    index = torch.searchsorted(cumulative, target, right=True).minimum(last)
    return ids.gather(0, index)[0]


def _logprobs(logits_V: Tensor, token: Tensor, alternatives: int) -> list[Tensor]:
    """Of the model's own distribution, before penalties and temperature: the token's, then ids and values."""
    log_mass = torch.logsumexp(logits_V.double(), dim=0)
    values, ids = torch.topk(logits_V, alternatives)
    own = logits_V.gather(0, token.clamp_min(0)[None])
    return [own.double() - log_mass, ids.double(), values.double() - log_mass]
