"""What a trained adapter answered where it was trained, so that a server can see that it answers the same.

A canary is a few prompts, the tokens that followed greedily, and at each of them the log-probabilities of the
likeliest tokens. They are logits up to a constant that no answer depends on. Knows no torch and no files.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from adapters.strict_json import brief

MAX_PROBES = 16
MAX_PROMPT_TOKENS = 1024
MAX_STEPS = 64
MAX_ALTERNATIVES = 20  # as many as an engine reports
MAX_NOISE = 2.0  # what is noisier than that says nothing

_FLOOR = 0.02
_NOISE_FACTOR = 4.0
_MAX_TOKEN_ID = 2**31
_FIELDS = frozenset({"base_fingerprint", "quantization", "precision", "noise", "base_distance", "probes"})
_PROBE_FIELDS = frozenset({"prompt_token_ids", "token_ids", "top_logprobs"})
_QUANTIZATIONS = ("nf4", "none")
_PRECISIONS = ("float32", "bfloat16")

Refuse = Callable[[str, object, str], NoReturn]


@dataclass(frozen=True, slots=True)
class Step:
    """One position: the token that came, and the likeliest ones with their log-probabilities."""

    token_id: int
    top_logprobs: tuple[tuple[int, float], ...]

    def difference(self, seen: Mapping[int, float]) -> float:
        """The largest difference of a log-probability.

        Args:
            seen: those of the likeliest tokens here; one that is not among them is at most as likely as the
                least of them.
        """
        least = min(seen.values())
        return max(
            abs(logprob - seen[token]) if token in seen else max(logprob - least, 0.0)
            for token, logprob in self.top_logprobs
        )


@dataclass(frozen=True, slots=True)
class Probe:
    """One prompt and what followed."""

    prompt_token_ids: tuple[int, ...]
    steps: tuple[Step, ...]


@dataclass(frozen=True, slots=True)
class Canary:
    """
    Attributes:
        base_fingerprint: of the base it was recorded on.
        quantization: of that base, "nf4" or "none".
        precision: of activations where it was recorded, "float32" or "bfloat16".
        noise: how far its log-probabilities move when they are computed in bfloat16.
        base_distance: how far those of the bare base are from them.
    """

    base_fingerprint: str
    quantization: str
    precision: str
    noise: float
    base_distance: float
    probes: tuple[Probe, ...]

    @property
    def tolerance(self) -> float:
        """Largest difference that kernels, storage and precision explain.

        Twice what was measured, in terms of the noise, where a server rounded everything to bfloat16;
        docs/guides/adapters.md has the figures.
        """
        return _FLOOR + _NOISE_FACTOR * self.noise

    @property
    def steps(self) -> int:
        return sum(len(probe.steps) for probe in self.probes)

    @property
    def tells_from_base(self) -> bool:
        """Whether an adapter that is not applied at all would be noticed."""
        return self.base_distance > self.tolerance

    def canonical(self) -> dict[str, object]:
        """JSON-able; what `parse_canary` reads."""
        return {
            "base_fingerprint": self.base_fingerprint,
            "quantization": self.quantization,
            "precision": self.precision,
            "noise": self.noise,
            "base_distance": self.base_distance,
            "probes": [
                {
                    "prompt_token_ids": list(probe.prompt_token_ids),
                    "token_ids": [step.token_id for step in probe.steps],
                    "top_logprobs": [[list(pair) for pair in step.top_logprobs] for step in probe.steps],
                }
                for probe in self.probes
            ],
        }


def parse_canary(value: object, refuse: Refuse) -> Canary:
    """The canary in a parsed manifest; every bound is checked.

    Args:
        refuse: called with a field, its value and what is wrong with it; raises.
    """
    members = _object(value, "canary", _FIELDS, refuse)
    fingerprint = members["base_fingerprint"]
    if not isinstance(fingerprint, str) or len(fingerprint) > 128:
        refuse("canary.base_fingerprint", fingerprint, "it must be the fingerprint of a base")
    return Canary(
        base_fingerprint=fingerprint,
        quantization=_one_of(members, "quantization", _QUANTIZATIONS, refuse),
        precision=_one_of(members, "precision", _PRECISIONS, refuse),
        noise=_number(members["noise"], "canary.noise", 0.0, MAX_NOISE, refuse),
        base_distance=_number(members["base_distance"], "canary.base_distance", 0.0, 1e6, refuse),
        probes=tuple(
            _probe(probe, f"canary.probes[{index}]", refuse)
            for index, probe in enumerate(_list(members["probes"], "canary.probes", MAX_PROBES, refuse))
        ),
    )


def _probe(value: object, where: str, refuse: Refuse) -> Probe:
    members = _object(value, where, _PROBE_FIELDS, refuse)
    prompt = _tokens(members["prompt_token_ids"], f"{where}.prompt_token_ids", MAX_PROMPT_TOKENS, refuse)
    answer = _tokens(members["token_ids"], f"{where}.token_ids", MAX_STEPS, refuse)
    tops = _list(members["top_logprobs"], f"{where}.top_logprobs", MAX_STEPS, refuse)
    if len(tops) != len(answer):
        refuse(f"{where}.top_logprobs", len(tops), f"there must be one for each of the {len(answer)} tokens")
    return Probe(
        prompt,
        tuple(
            Step(token, _top(top, f"{where}.top_logprobs[{index}]", refuse))
            for index, (token, top) in enumerate(zip(answer, tops, strict=True))
        ),
    )


def _top(value: object, where: str, refuse: Refuse) -> tuple[tuple[int, float], ...]:
    pairs = []
    for pair in _list(value, where, MAX_ALTERNATIVES, refuse):
        if not isinstance(pair, list) or len(pair) != 2:
            refuse(where, pair, "it must hold pairs of a token id and a log-probability")
        (token,) = _tokens(pair[:1], where, 1, refuse)
        pairs.append((token, _number(pair[1], where, -1e6, 1e-3, refuse)))
    return tuple(pairs)


def _tokens(value: object, where: str, limit: int, refuse: Refuse) -> tuple[int, ...]:
    tokens = _list(value, where, limit, refuse)
    for token in tokens:
        if type(token) is not int or not 0 <= token < _MAX_TOKEN_ID:
            refuse(where, token, "it must hold token ids")
    return tuple(tokens)


def _list(value: object, where: str, limit: int, refuse: Refuse) -> list[Any]:
    if not isinstance(value, list):
        refuse(where, value, "it must be a list")
    if not 0 < len(value) <= limit:
        refuse(where, f"{len(value)} items", f"there must be 1 to {limit}")
    return value


def _object(value: object, where: str, fields: frozenset[str], refuse: Refuse) -> dict[str, Any]:
    if not isinstance(value, dict) or value.keys() != fields:
        refuse(where, value, f"it must have exactly {', '.join(sorted(fields))}")
    return value


def _one_of(members: Mapping[str, Any], field: str, choices: tuple[str, ...], refuse: Refuse) -> str:
    value = members[field]
    if not isinstance(value, str) or value not in choices:
        refuse(f"canary.{field}", value, f"it must be one of {', '.join(choices)}")
    return value


def _number(value: object, where: str, low: float, high: float, refuse: Refuse) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        refuse(where, value, "it must be a number")
    if not low <= value <= high:
        refuse(where, brief(value), f"it must be from {low:g} to {high:g}")
    return float(value)
