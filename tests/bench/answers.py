"""What a client saw of its answers, and the figures made of it. Knows no server and no clock."""

import itertools
import math
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Ask:
    """One request: token ids and the name of an adapter, empty for the base."""

    prompt: tuple[int, ...]
    adapter: str


@dataclass(frozen=True, slots=True)
class Answer:
    """One answered request as its client saw it; moments are seconds of one clock.

    Attributes:
        asked_s: when it was sent; under open-loop load when it was due, so that a late sender hides nothing.
        pieces_s: when each piece that held tokens arrived.
        cached_tokens: of the prompt, as the server says.
    """

    asked_s: float
    pieces_s: tuple[float, ...]
    tokens: int
    cached_tokens: int = 0

    @property
    def first_token_s(self) -> float:
        return self.pieces_s[0] - self.asked_s

    @property
    def total_s(self) -> float:
        return self.pieces_s[-1] - self.asked_s

    @property
    def gaps_s(self) -> list[float]:
        """Waits between pieces: inter-token latency as a reader feels it, however many tokens a piece has."""
        return [later - earlier for earlier, later in itertools.pairwise(self.pieces_s)]


@dataclass(frozen=True, slots=True)
class Steps:
    """What the server's steps held while it was measured.

    Attributes:
        mean_adapters: different adapters in a step, the base not counted.
        mixed_share: part of the steps that served two or more different ones, the base counted as one.
        most_adapters: in one step, since the server's start.
    """

    mean_adapters: float
    mixed_share: float
    most_adapters: int


@dataclass(frozen=True, slots=True)
class Load:
    """Everything that one run of requests brought.

    Attributes:
        foreign_share: part of the processors that programs had which were not measured.
    """

    answers: tuple[Answer, ...]
    failures: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    steps: Steps | None = None
    foreign_share: float = 0.0

    @property
    def tokens(self) -> int:
        return sum(answer.tokens for answer in self.answers)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else math.nan


@dataclass(frozen=True, slots=True)
class Spread:
    """Percentiles of some seconds."""

    p50: float
    p95: float
    p99: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        return cls(*(percentile(values, q) for q in (0.50, 0.95, 0.99)))


@dataclass(frozen=True, slots=True)
class Figures:
    """One contender in one cell, over all passes; latencies are of all passes together.

    Attributes:
        tokens_per_second: median of the passes; lowest and highest beside it.
        rates: of each pass, to be compared with another contender's of the same pass.
        cached_tokens: of all prompts, as the server says.
        foreign_share: part of the processors that other programs had, mean of the passes.
    """

    requests: int
    failures: dict[str, int]
    tokens_per_second: float
    lowest: float
    highest: float
    rates: tuple[float, ...]
    first_token_s: Spread
    inter_token_s: Spread
    total_s: Spread
    cached_tokens: int
    steps: Steps | None
    foreign_share: float = 0.0

    @classmethod
    def of(cls, loads: Sequence[Load]) -> "Figures":
        answers = [answer for load in loads for answer in load.answers]
        rates = tuple(load.tokens_per_second for load in loads)
        return cls(
            requests=len(answers),
            failures=dict(sum((load.failures for load in loads), Counter())),
            tokens_per_second=statistics.median(rates),
            lowest=min(rates),
            highest=max(rates),
            rates=rates,
            first_token_s=Spread.of([answer.first_token_s for answer in answers]),
            inter_token_s=Spread.of(gaps_of(answers)),
            total_s=Spread.of([answer.total_s for answer in answers]),
            cached_tokens=sum(answer.cached_tokens for answer in answers),
            steps=loads[-1].steps,
            foreign_share=statistics.mean(load.foreign_share for load in loads),
        )


def gaps_of(answers: Iterable[Answer]) -> list[float]:
    return [gap for answer in answers for gap in answer.gaps_s]


def percentile(values: Sequence[float], q: float) -> float:
    """The value below which a part `q` of them lies; between two by linear interpolation; NaN of none."""
    if not values:
        return math.nan
    ordered = sorted(values)
    place = q * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)
