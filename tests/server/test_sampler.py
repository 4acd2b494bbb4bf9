"""Choosing tokens: every parameter against its definition; a row never depends on its neighbours."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from server.request import SamplingParams
from server.sampler import SampleRow, Scores, sample, uniform_of


def choose(logits: list[float], uniform: float = 0.0, history: tuple[int, ...] = (), **params: object) -> int:
    row = SampleRow(SamplingParams(**params), (), history, uniform)  # type: ignore[arg-type]
    token = sample(Scores.of(torch.tensor([logits])), [row])[0].token_id
    assert token is not None
    return token


def support(logits: list[float], **params: object) -> set[int]:
    """Tokens that can be drawn."""
    return {choose(logits, uniform=i / 500, temperature=1.0, **params) for i in range(500)}


LOGITS = [math.log(p) for p in (0.5, 0.25, 0.15, 0.1)]


def test_greedy_takes_the_largest() -> None:
    assert choose([0.1, 3.0, -1.0]) == 1


def test_draws_follow_the_probabilities() -> None:
    draws = [choose(LOGITS, uniform=i / 1000, temperature=1.0) for i in range(1000)]
    for token, probability in enumerate((0.5, 0.25, 0.15, 0.1)):
        assert abs(draws.count(token) / 1000 - probability) < 0.01


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({"top_k": 2}, {0, 1}),
        ({"top_p": 0.5}, {0}),
        ({"top_p": 0.6}, {0, 1}),
        ({"top_p": 1.0}, {0, 1, 2, 3}),
        ({"min_p": 0.4}, {0, 1}),
        ({"min_p": 1.0}, {0}),
        ({"top_k": 3, "min_p": 0.25}, {0, 1, 2}),
        ({"top_k": 100}, {0, 1, 2, 3}),
    ],
)
def test_truncation(params: dict[str, object], expected: set[int]) -> None:
    assert support(LOGITS, **params) == expected


def test_temperature_sharpens() -> None:
    cold = [choose(LOGITS, uniform=i / 100, temperature=0.1) for i in range(100)]
    assert cold.count(0) >= 99


@pytest.mark.parametrize(
    "params", [{"repetition_penalty": 5.0}, {"presence_penalty": 2.0}, {"frequency_penalty": 1.0}]
)
def test_penalties_make_a_seen_token_less_likely(params: dict[str, object]) -> None:
    assert choose([3.0, 2.0], history=(0, 0)) == 0
    assert choose([3.0, 2.0], history=(0, 0), **params) == 1


def test_repetition_penalty_multiplies_negative_logits() -> None:
    assert choose([-1.0, -1.5], history=(0,), repetition_penalty=2.0) == 1


def test_logprobs_are_the_models_own() -> None:
    row = SampleRow(SamplingParams(temperature=0.5, logprobs=2), (), (), 0.9)
    choice = sample(Scores.of(torch.tensor([LOGITS])), [row])[0]
    assert choice.logprob is not None
    assert choice.token_id == choice.logprob.token_id
    assert choice.logprob.logprob == pytest.approx(LOGITS[choice.logprob.token_id], abs=1e-6)
    assert [token for token, _ in choice.logprob.alternatives] == [0, 1]


def test_a_row_that_is_not_finite_fails_alone() -> None:
    logits = torch.tensor([[1.0, 2.0], [float("nan"), 0.0], [2.0, 1.0]])
    choices = sample(Scores.of(logits), [SampleRow(SamplingParams(), (), (), 0.0)] * 3)
    assert [choice.token_id for choice in choices] == [1, None, 0]


@settings(deadline=None, max_examples=50)
@given(
    seed=st.integers(0, 2**64 - 1),
    position=st.integers(0, 5),
    temperature=st.sampled_from([0.0, 0.7, 1.0, 2.0]),
    top_p=st.sampled_from([0.3, 0.9, 1.0]),
)
def test_a_row_is_the_same_alone_and_among_others(
    seed: int, position: int, temperature: float, top_p: float
) -> None:
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(seed % 2**32))
    params = SamplingParams(temperature=temperature, top_p=top_p, seed=seed)
    mine = SampleRow(params, (1, 2), (3,), uniform_of(seed, 0, 7))
    others = [SampleRow(SamplingParams(temperature=1.3), (), (), 0.1 * i) for i in range(6)]
    others[position] = mine
    among = sample(Scores.of(logits), others)[position]
    alone = sample(Scores.of(logits[position : position + 1]), [mine])[0]
    assert among == alone


def test_random_numbers_depend_on_seed_and_step_only() -> None:
    assert uniform_of(1, 0, 2) == uniform_of(1, 0, 2)
    seen = {uniform_of(seed, answer, step) for seed in range(9) for answer in range(9) for step in range(9)}
    assert len(seen) == 729


def test_a_row_that_is_not_finite_spoils_no_other() -> None:
    params = SamplingParams(temperature=1.0, top_p=0.9, logprobs=2, repetition_penalty=1.2)
    rows = [SampleRow(params, (1,), (2,), 0.5)] * 3
    logits_SV = torch.randn(3, 1000, generator=torch.Generator().manual_seed(0))
    expected = [sample(Scores.of(row_V[None]), rows[:1])[0] for row_V in logits_SV]
    for bad in (math.nan, math.inf, -math.inf):
        spoiled_SV = logits_SV.clone()
        spoiled_SV[1, 7] = bad
        first, second, third = sample(Scores.of(spoiled_SV), rows)
        assert (first, third) == (expected[0], expected[2])
        assert (second.token_id, second.logprob) == (None, None)
