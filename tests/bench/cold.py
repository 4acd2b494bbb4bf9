"""What it costs that an adapter is on disk and not on the device: the wait for its first token."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice

from tests.bench.answers import Ask, Spread
from tests.bench.arrivals import Prompts
from tests.bench.load import Asker
from tests.bench.ours import OurServer

NEW_TOKENS = 2


@dataclass(frozen=True, slots=True)
class ColdStart:
    """Time to first token of one request at a time.

    Attributes:
        extra_p50_s: median of cold minus warm, adapter by adapter.
    """

    requests: int
    cold_s: Spread
    warm_s: Spread
    extra_p50_s: float


def measure_cold_start(
    server: OurServer, names: Sequence[str], prompts: Prompts, *, prompt_tokens: int, count: int
) -> ColdStart:
    """Each adapter twice in a row: the first time it was evicted long ago, the second time it is there.

    Args:
        names: many more than the device holds.
    """

    async def play(asker: Asker) -> list[tuple[float, float]]:
        pairs = []
        for name in islice(cycle(names), count):
            cold = await asker(Ask(prompts.take(prompt_tokens), name))
            warm = await asker(Ask(prompts.take(prompt_tokens), name))
            pairs.append((cold.first_token_s, warm.first_token_s))
        return pairs

    pairs = server.drive(play, NEW_TOKENS)
    cold, warm = zip(*pairs, strict=True)
    extra = statistics.median(first - second for first, second in pairs)
    return ColdStart(len(pairs), Spread.of(cold), Spread.of(warm), extra)
