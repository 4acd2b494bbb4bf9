"""What a request is, and what leaves the engine for it. Knows neither torch nor grpc."""

import enum
from dataclasses import dataclass, field
from typing import Final

from server.errors import InvalidRequestError, ServerError

MAX_PRIORITY: Final = 10
MAX_ADAPTER_SCALE: Final = 16.0
_MAX_SALT_CHARACTERS: Final = 256


class FinishReason(enum.Enum):
    """Why a sequence ended."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen. Defaults are greedy decoding with nothing penalised.

    Raises:
        InvalidRequestError: a value is out of its range.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    logprobs: int | None = None
    """Alternatives to report per token; None reports nothing."""

    @property
    def needs_logits(self) -> bool:
        """Whether more of the logits matters than which is the largest."""
        return self.logprobs is not None or not self.takes_likeliest

    @property
    def takes_likeliest(self) -> bool:
        """Whether the token is the likeliest by the model's own logits: nothing is drawn or penalised."""
        return self.temperature == 0 and (
            self.repetition_penalty == 1 and not self.presence_penalty and not self.frequency_penalty
        )

    def __post_init__(self) -> None:
        _require(
            self.max_new_tokens >= 1,
            "sampling.max_new_tokens",
            f"is {self.max_new_tokens}, must be at least 1",
        )
        _require_range("sampling.temperature", self.temperature, 0.0, 100.0)
        _require(0.0 < self.top_p <= 1.0, "sampling.top_p", f"is {self.top_p}, must be in (0, 1]")
        _require(self.top_k >= 0, "sampling.top_k", f"is {self.top_k}, must not be negative")
        _require_range("sampling.min_p", self.min_p, 0.0, 1.0)
        _require(
            0.0 < self.repetition_penalty <= 100.0,
            "sampling.repetition_penalty",
            f"is {self.repetition_penalty}, must be in (0, 100]",
        )
        _require_range("sampling.presence_penalty", self.presence_penalty, -100.0, 100.0)
        _require_range("sampling.frequency_penalty", self.frequency_penalty, -100.0, 100.0)
        _require(
            len(self.stop) <= 16, "stopping.stop", f"has {len(self.stop)} strings, at most 16 are allowed"
        )
        _require(
            all(0 < len(s) <= 256 for s in self.stop),
            "stopping.stop",
            "each string must have 1 to 256 characters",
        )
        _require(
            self.logprobs is None or 0 <= self.logprobs <= 20,
            "output.logprobs",
            f"is {self.logprobs}, must be 0 to 20",
        )


def _require(condition: bool, name: str, message: str) -> None:
    if not condition:
        raise InvalidRequestError(name, message)


def _require_range(name: str, value: float, low: float, high: float) -> None:
    _require(low <= value <= high, name, f"is {value}, must be {low} to {high}")  # NaN fails too


@dataclass(frozen=True, slots=True)
class AdapterIdentity:
    """Which adapter a request resolved to, once and for all.

    The digest is what residency and caches use; name and version only tell the user.
    """

    name: str
    version: int
    digest: str


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt to be continued.

    Attributes:
        adapter: None for the base.
        merged: what is in the base's weights already, and is told and counted like an adapter; None if
            nothing is, or if another adapter is applied.
        adapter_scale: multiplies the adapter's update.
        given: the answer, if it is not to be chosen but judged: each of its tokens is reported with its
            log-probability and the likeliest alternatives, all of them computed as a prompt is.
        n: answers wanted, each with random numbers of its own.
        priority: larger goes first.
        cache_salt: keys and values are shared only with requests of the same salt, and of the same tenant.
        tenant: whose request it is; empty if it is no tenant's.
        deadline_s: absolute time on time.monotonic(), None for none.
        traceparent: the caller's span, as W3C writes it; empty for none.

    Raises:
        InvalidRequestError: a value is out of its range.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    adapter: AdapterIdentity | None = None
    merged: AdapterIdentity | None = None
    adapter_scale: float = 1.0
    given: tuple[int, ...] = ()
    n: int = 1
    priority: int = 0
    cache_salt: str = ""
    tenant: str = ""
    deadline_s: float | None = None
    traceparent: str = ""

    @property
    def answers_as(self) -> AdapterIdentity | None:
        """Whose answer it is, whichever way the adapter is there; None for the base."""
        return self.adapter or self.merged

    def __post_init__(self) -> None:
        _require_range("adapter_scale", self.adapter_scale, -MAX_ADAPTER_SCALE, MAX_ADAPTER_SCALE)
        _require(self.n >= 1, "sampling.n", f"is {self.n}, must be at least 1")
        _require(not self.given or self._is_judging, "given", "is an answer that nothing may end or change")
        _require_range("priority", self.priority, -MAX_PRIORITY, MAX_PRIORITY)
        _require(
            len(self.cache_salt) <= _MAX_SALT_CHARACTERS,
            "cache_salt",
            f"has {len(self.cache_salt)} characters, at most {_MAX_SALT_CHARACTERS} are allowed",
        )

    @property
    def _is_judging(self) -> bool:
        """Whether nothing is asked for that a given answer could not be."""
        sampling = self.sampling
        return (
            sampling.logprobs is not None
            and sampling.takes_likeliest
            and sampling.ignore_eos
            and not sampling.stop
            and not sampling.stop_token_ids
            and sampling.max_new_tokens == len(self.given)
            and self.n == 1
        )


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds, from submission."""

    queue_s: float
    adapter_load_s: float
    time_to_first_token_s: float
    total_s: float


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Natural logarithm of a chosen token's probability, and of the likeliest alternatives."""

    token_id: int
    logprob: float
    alternatives: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Started:
    """The first token of the first answer was computed; always the first event."""

    prompt_tokens: int
    cached_tokens: int
    queue_s: float


@dataclass(frozen=True, slots=True)
class Delta:
    """New text and tokens of one of the request's answers.

    Text may be empty while a character is incomplete or a stop string is possible.
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    index: int = 0


@dataclass(frozen=True, slots=True)
class Finished:
    """One of the request's answers is complete; the last event, once every answer has had it."""

    reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    timings: Timings
    index: int = 0


@dataclass(frozen=True, slots=True)
class Failed:
    """The request ended with an error, every answer of it; always the last event if it comes."""

    error: ServerError


TokenEvent = Started | Delta | Finished | Failed
