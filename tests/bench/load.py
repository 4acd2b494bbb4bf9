"""Load: closed-loop clients that ask again once answered, and open-loop ones that ask when it is time."""

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import replace

from tests.bench.answers import Answer, Ask, Load

Asker = Callable[[Ask], Awaitable[Answer]]
"""Sends one request and reads its answer to the end; raises whatever went wrong."""


class ShortAnswerError(Exception):
    """Fewer tokens than were asked for: figures of it would not compare."""


async def closed_loop(asker: Asker, asks: Iterable[Ask], concurrency: int) -> Load:
    """Sends every ask once, `concurrency` at a time."""
    run = _Run(asker)
    queue = iter(asks)
    began_s = time.perf_counter()
    await asyncio.gather(*(run.work_off(queue) for _ in range(concurrency)))
    return run.load(time.perf_counter() - began_s)


async def open_loop(asker: Asker, asks: Sequence[Ask], moments_s: Sequence[float]) -> Load:
    """Sends every ask at its moment, whether or not earlier ones are answered; latencies count from then."""
    run = _Run(asker)
    began_s = time.perf_counter()

    async def send(ask: Ask, moment_s: float) -> None:
        await asyncio.sleep(max(0.0, began_s + moment_s - time.perf_counter()))
        await run.send(ask, due_s=began_s + moment_s)

    await asyncio.gather(*(send(ask, moment) for ask, moment in zip(asks, moments_s, strict=True)))
    return run.load(time.perf_counter() - began_s)


class _Run:
    """Answers and failures of one run."""

    def __init__(self, asker: Asker) -> None:
        self._asker = asker
        self._answers: list[Answer] = []
        self._failures: Counter[str] = Counter()

    async def work_off(self, queue: Iterator[Ask]) -> None:
        for ask in queue:
            await self.send(ask)

    async def send(self, ask: Ask, due_s: float | None = None) -> None:
        try:
            answer = await self._asker(ask)
        except Exception as error:  # whatever it is, it is a failed request and counted
            self._failures[f"{type(error).__name__}: {error}"[:200]] += 1
        else:
            self._answers.append(answer if due_s is None else replace(answer, asked_s=due_s))

    def load(self, seconds: float) -> Load:
        return Load(tuple(self._answers), self._failures, seconds)
