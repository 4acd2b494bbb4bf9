"""A cell of the comparison: who is asked, by how many at once, for how much. Knows no contender."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from tests.bench.answers import Ask
from tests.bench.arrivals import Prompts, in_turn, poisson_moments, zipf_choices

Kind = Literal["in turn", "zipf", "own prompts", "shared prefix"]


@dataclass(frozen=True, slots=True)
class Cell:
    """
    Attributes:
        adapters: so many different ones; 0 is the base alone.
        concurrency: clients of a closed loop; under open-loop load, none.
        rate: requests a second of an open loop, else None.
        moments_s: when the requests of an open loop come.
        exponent: of a Zipf popularity.
        prefix_tokens: that all prompts for one adapter share.
        peers: whether others are measured in it, too.
    """

    adapters: int
    concurrency: int
    requests: int
    prompt_tokens: int
    new_tokens: int
    kind: Kind = "in turn"
    rate: float | None = None
    moments_s: tuple[float, ...] = ()
    exponent: float = 1.0
    prefix_tokens: int = 0
    peers: bool = True

    @property
    def scenario(self) -> str:
        if self.kind == "zipf":
            return f"{self.adapters} adapters, Zipf {self.exponent:g}"
        if self.kind in ("own prompts", "shared prefix"):
            return f"{self.adapters} adapters, {self.kind}"
        if self.adapters < 2:
            return "one adapter" if self.adapters else "base only"
        return f"{self.adapters} adapters in turn"

    @property
    def load(self) -> str:
        return f"{self.concurrency} at once" if self.rate is None else f"{self.rate:.2f} a second"

    def asks(self, names: Sequence[str], prompts: Prompts, seed: int) -> list[Ask]:
        """The requests, with new prompts at every call."""
        names = names[: self.adapters]
        if self.kind == "zipf":
            return prompts.asks(zipf_choices(names, self.requests, self.exponent, seed), self.prompt_tokens)
        chosen = in_turn(names, self.requests)
        if self.kind == "shared prefix":
            return prompts.asks_with_prefix(chosen, self.prompt_tokens, self.prefix_tokens)
        return prompts.asks(chosen, self.prompt_tokens)

    def at_rate(self, rate: float, seed: int) -> "Cell":
        """The same requests as open-loop load."""
        moments = tuple(poisson_moments(rate, self.requests, seed))
        return replace(self, rate=rate, moments_s=moments)


def shuffled(cells: Sequence[Cell], seed: int) -> list[Cell]:
    """The cells in another order, so that no cell always comes when the machine is warm, or tired."""
    mixed = list(cells)
    random.Random(seed).shuffle(mixed)
    return mixed
