"""Canaries as values: what is read, what is refused, and what counts as the same answer."""

import json
from typing import Any

import pytest

from adapters.bundle import Bundle, parse_bundle
from adapters.canary import Canary, Probe, Step
from adapters.errors import InvalidAdapterError
from tests.adapters.builders import FINGERPRINT

CANARY = Canary(
    base_fingerprint=FINGERPRINT,
    quantization="nf4",
    precision="float32",
    noise=0.1,
    base_distance=5.0,
    probes=(
        Probe((1, 2, 3), (Step(4, ((4, -0.5), (9, -1.25))), Step(5, ((5, 0.0),)))),
        Probe((7,), (Step(8, ((8, -0.125), (1, -3.0))),)),
    ),
)


def test_a_canary_comes_back_as_it_was_written() -> None:
    bundle = Bundle(FINGERPRINT, canary=CANARY)
    assert parse_bundle(bundle.to_json().encode()) == bundle
    assert CANARY.steps == 3


def test_the_same_answer_is_no_difference_and_another_is_its_largest() -> None:
    step = Step(4, ((4, -0.5), (9, -1.25)))
    assert step.difference({4: -0.5, 9: -1.25, 2: -4.0}) == 0
    assert step.difference({4: -0.75, 9: -1.25}) == 0.25
    assert step.difference({4: -0.5, 9: -4.25}) == 3.0


def test_a_token_that_is_no_longer_likely_is_at_most_as_likely_as_the_least() -> None:
    step = Step(4, ((4, -0.5),))
    assert step.difference({1: -0.1, 2: -6.5}) == 6.0
    assert step.difference({1: -0.1, 2: -0.25}) == 0  # it may be as likely as that: nothing is known


def test_the_tolerance_grows_with_the_noise() -> None:
    exact = Canary(FINGERPRINT, "none", "float32", 0.0, 0.015, CANARY.probes)
    assert 0 < exact.tolerance < CANARY.tolerance < 1
    assert CANARY.tells_from_base
    assert not exact.tells_from_base


def spoiled(path: str, value: Any) -> bytes:
    """A manifest with one thing in its canary replaced; the path's parts are keys and indices."""
    members = json.loads(Bundle(FINGERPRINT, canary=CANARY).to_json())
    *parents, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    place = members
    for part in parents:
        place = place[part]
    place[last] = value
    return json.dumps(members).encode()


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("canary", []),
        ("canary.extra", 1),
        ("canary.base_fingerprint", 3),
        ("canary.base_fingerprint", "x" * 1000),
        ("canary.quantization", "int3"),
        ("canary.quantization", ["nf4"]),
        ("canary.precision", "float8"),
        ("canary.noise", -0.1),
        ("canary.noise", 1e9),
        ("canary.noise", True),
        ("canary.noise", "0.1"),
        ("canary.base_distance", None),
        ("canary.probes", []),
        ("canary.probes", [CANARY.canonical()["probes"][0]] * 17),  # type: ignore[index]  # a list
        ("canary.probes.0", 5),
        ("canary.probes.0.prompt_token_ids", []),
        ("canary.probes.0.prompt_token_ids", [1] * 1025),
        ("canary.probes.0.prompt_token_ids", [-1]),
        ("canary.probes.0.prompt_token_ids", [2**31]),
        ("canary.probes.0.prompt_token_ids", [1.0]),
        ("canary.probes.0.prompt_token_ids", [True]),
        ("canary.probes.0.token_ids", [4]),
        ("canary.probes.0.token_ids", [4, 5, 6]),
        ("canary.probes.0.token_ids", list(range(65))),
        ("canary.probes.0.top_logprobs.0", []),
        ("canary.probes.0.top_logprobs.0", [[4, -0.5]] * 21),
        ("canary.probes.0.top_logprobs.0", [[4]]),
        ("canary.probes.0.top_logprobs.0", [[4, 0.5]]),
        ("canary.probes.0.top_logprobs.0", [["4", -0.5]]),
        ("canary.probes.0.top_logprobs.0", [[4, "low"]]),
        ("canary.probes.0.top_logprobs.0", [[4, -1e9]]),
    ],
)
def test_a_bad_canary_is_refused_by_field(path: str, value: Any) -> None:
    with pytest.raises(InvalidAdapterError, match="canary") as refusal:
        parse_bundle(spoiled(path, value))
    assert refusal.value.reason == "BAD_BUNDLE"
    assert len(str(refusal.value)) < 600
