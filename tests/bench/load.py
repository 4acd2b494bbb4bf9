"""Closed-loop load: so many clients, each asking again as soon as it is answered."""

import asyncio
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

from quickchange import AsyncClient


@dataclass(frozen=True)
class Ask:
    """One request: token ids and the name of an adapter, empty for the base."""

    prompt: tuple[int, ...]
    adapter: str


@dataclass(frozen=True)
class Measurement:
    """Seconds, tokens and ratios of one scenario."""

    scenario: str
    concurrency: int
    requests: int
    tokens: int
    seconds: float
    tokens_per_second: float
    first_token_p50_s: float
    first_token_p99_s: float
    adapters_in_a_step: int


def random_asks(count: int, adapters: Sequence[str], prompt_tokens: int, seed: int) -> list[Ask]:
    """Prompts of random tokens, adapters in turn."""
    generator = random.Random(seed)
    return [
        Ask(tuple(generator.randrange(10, 250) for _ in range(prompt_tokens)), adapters[i % len(adapters)])
        for i in range(count)
    ]


async def closed_loop(
    address: str, scenario: str, asks: Sequence[Ask], concurrency: int, new_tokens: int
) -> Measurement:
    """Sends every ask once, `concurrency` at a time; each answer has exactly `new_tokens` tokens."""
    queue = list(reversed(asks))
    first_tokens_s: list[float] = []
    tokens = 0
    async with AsyncClient(address) as client:

        async def worker() -> None:
            nonlocal tokens
            while queue:
                ask = queue.pop()
                answer = await client.generate(
                    ask.prompt, adapter=ask.adapter, max_new_tokens=new_tokens, ignore_eos=True
                )
                tokens += answer.usage.completion_tokens
                first_tokens_s.append(answer.timings.time_to_first_token_s)

        began_s = time.perf_counter()
        await asyncio.gather(*(worker() for _ in range(concurrency)))
        seconds = time.perf_counter() - began_s
        steps = (await client.server_info()).steps
    return Measurement(
        scenario,
        concurrency,
        len(asks),
        tokens,
        seconds,
        tokens / seconds,
        statistics.median(first_tokens_s),
        max(first_tokens_s) if len(first_tokens_s) < 100 else statistics.quantiles(first_tokens_s, n=100)[98],
        steps.max_adapters_in_step,
    )
