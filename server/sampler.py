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

from kernels.draw import Draw, draw_tokens
from kernels.library import native
from kernels.rowwise import argmax, argmax_reference
from server.request import SamplingParams, TokenLogprob


@dataclass(frozen=True, slots=True)
class Scores:
    """What a forward pass says of the next tokens.

    Attributes:
        likeliest_S: the likeliest token of each row, -1 where a row is not finite.
        logits_SV: None where no row needs more than that.
    """

    likeliest_S: Tensor
    logits_SV: Tensor | None = None

    @classmethod
    def of(cls, logits_SV: Tensor) -> "Scores":
        """With the likeliest tokens of all logits."""
        native_form = logits_SV.device.type == "cpu" and native() is not None
        return cls(argmax(logits_SV) if native_form else argmax_reference(logits_SV), logits_SV)

    def of_row(self, index: int) -> "Scores":
        """Of one row alone."""
        rows = slice(index, index + 1)
        return Scores(self.likeliest_S[rows], None if self.logits_SV is None else self.logits_SV[rows])


@dataclass(frozen=True, slots=True)
class SampleRow:
    """What choosing one token depends on, besides its logits.

    Attributes:
        uniform: in [0, 1), from the request's own generator; greedy rows do not use it.
        given: the token to judge, which is not chosen; None for one that is.
    """

    params: SamplingParams
    prompt_ids: Items[int]
    output_ids: Items[int]
    uniform: float
    given: int | None = None


@dataclass(frozen=True, slots=True)
class Choice:
    """The chosen token; token_id is None if the row's logits were not finite."""

    token_id: int | None
    logprob: TokenLogprob | None


def uniform_of(seed: int, answer: int, step: int) -> float:
    """The random number of an answer's step: a function of the request's seed alone, whatever else runs."""
    return random.Random(f"{seed}/{answer}/{step}").random()  # noqa: S311  # reproducible sampling, not a secret


def sample(scores: Scores, rows: Items[SampleRow]) -> list[Choice]:
    """Chooses one token per row. A row's choice depends on its own logits and parameters alone.

    All numbers come to the host at once, at the end: on a GPU nothing waits before that.
    """
    found = [scores.likeliest_S.double()]
    if scores.logits_SV is not None:
        found += _beyond_likeliest(scores.likeliest_S, scores.logits_SV, rows)
    numbers = torch.cat(found).tolist()
    rest = iter(numbers[len(rows) :])
    return [_choice(int(token), row, rest) for token, row in zip(numbers, rows, strict=False)]


def _beyond_likeliest(greedy_S: Tensor, logits_SV: Tensor, rows: Items[SampleRow]) -> Iterator[Tensor]:
    """What else is to be known of each row, in the order in which `_choice` takes it."""
    others = _other_than_greedy(logits_SV, rows) | _given(logits_SV, rows)
    for index, row in enumerate(rows):
        token = others.get(index)
        if token is not None:
            yield token.double()[None]
        if row.params.logprobs is not None:
            own = greedy_S[index] if token is None else token
            yield from _logprobs(logits_SV[index], own, row.params.logprobs)


def _other_than_greedy(logits_SV: Tensor, rows: Items[SampleRow]) -> dict[int, Tensor]:
    """Tokens of the rows that do not simply take the likeliest, by row."""
    penalised = {
        index: _penalised(logits_SV[index], row)
        for index, row in enumerate(rows)
        if not row.params.takes_likeliest
    }
    drawn = [index for index in penalised if rows[index].params.temperature > 0]
    tokens = draw_tokens([penalised[index] for index in drawn], [_draw_of(rows[index]) for index in drawn])
    by_row = dict(zip(drawn, tokens, strict=True))
    likeliest = {index: logits_V.argmax() for index, logits_V in penalised.items() if index not in by_row}
    return by_row | likeliest


def _given(logits_SV: Tensor, rows: Items[SampleRow]) -> dict[int, Tensor]:
    return {
        index: torch.tensor(row.given, device=logits_SV.device)
        for index, row in enumerate(rows)
        if row.given is not None
    }


def _draw_of(row: SampleRow) -> Draw:
    params = row.params
    return Draw(params.temperature, params.top_k, params.top_p, params.min_p, row.uniform)


def _choice(greedy: int, row: SampleRow, rest: Iterator[float]) -> Choice:
    is_greedy = row.params.takes_likeliest and row.given is None
    token = greedy if is_greedy else int(next(rest))
    logprob = None
    if (count := row.params.logprobs) is not None:
        own, ids, values = next(rest), [*islice(rest, count)], [*islice(rest, count)]
        logprob = TokenLogprob(token, own, tuple(zip(map(int, ids), values, strict=True)))
    return Choice(token, logprob) if greedy >= 0 else Choice(None, None)


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


def _logprobs(logits_V: Tensor, token: Tensor, alternatives: int) -> list[Tensor]:
    """Of the model's own distribution, before penalties and temperature: the token's, then ids and values."""
    log_mass = torch.logsumexp(logits_V.double(), dim=0)
    values, ids = torch.topk(logits_V, alternatives)
    own = logits_V.gather(0, token.clamp_min(0)[None])
    return [own.double() - log_mass, ids.double(), values.double() - log_mass]
