"""When requests arrive and whom they ask for: Poisson moments, prompts, popularity. Knows no server."""

import itertools
import random
from collections.abc import Sequence

from tests.bench.answers import Ask


def poisson_moments(rate: float, count: int, seed: int) -> list[float]:
    """Seconds from the start at which `count` requests come, `rate` a second on average and independently."""
    generator = random.Random(seed)
    return list(itertools.accumulate(generator.expovariate(rate) for _ in range(count)))


def zipf_choices(names: Sequence[str], count: int, exponent: float, seed: int) -> list[str]:
    """`count` names; the k-th of them is chosen with weight k^-exponent."""
    weights = [rank**-exponent for rank in range(1, len(names) + 1)]
    return random.Random(seed).choices(names, weights, k=count)


def in_turn(names: Sequence[str], count: int) -> list[str]:
    """`count` names, each as often as any other; the base if there are none."""
    return [names[i % len(names)] if names else "" for i in range(count)]


class Prompts:
    """Random token ids, never the same twice, so that no cache of prefixes can help.

    Args:
        ids: from which tokens are drawn.
    """

    def __init__(self, ids: range, seed: int) -> None:
        self._ids = ids
        self._generator = random.Random(seed)

    def take(self, tokens: int) -> tuple[int, ...]:
        return tuple(self._generator.choices(self._ids, k=tokens))

    def asks(self, adapters: Sequence[str], tokens: int) -> list[Ask]:
        """One request for each name."""
        return [Ask(self.take(tokens), adapter) for adapter in adapters]

    def asks_with_prefix(self, adapters: Sequence[str], tokens: int, prefix_tokens: int) -> list[Ask]:
        """As `asks`, but all prompts for one adapter begin with the same tokens, new ones at every call."""
        prefixes = {name: self.take(prefix_tokens) for name in dict.fromkeys(adapters)}
        return [Ask(prefixes[name] + self.take(tokens - prefix_tokens), name) for name in adapters]
