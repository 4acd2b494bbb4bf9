"""Closed loops keep so many requests going; open loops keep to the clock; failures are counted."""

import asyncio
import time

import pytest

from tests.bench.answers import Answer, Ask, Load
from tests.bench.interference import gaps_within
from tests.bench.load import closed_loop, open_loop

ASKS = [Ask((index,), "") for index in range(20)]


class Answering:
    """Answers after a while; keeps count of what runs at once."""

    def __init__(self, seconds: float = 0.002) -> None:
        self._seconds = seconds
        self.asked: list[Ask] = []
        self.running = self.most = 0

    async def __call__(self, ask: Ask) -> Answer:
        self.asked.append(ask)
        self.running += 1
        self.most = max(self.most, self.running)
        asked_s = time.perf_counter()
        await asyncio.sleep(self._seconds)
        self.running -= 1
        return Answer(asked_s, (time.perf_counter(),), tokens=1)


@pytest.mark.parametrize("concurrency", [1, 3, 64])
async def test_a_closed_loop_keeps_so_many_going(concurrency: int) -> None:
    answering = Answering()
    load = await closed_loop(answering, ASKS, concurrency)
    assert answering.most == min(concurrency, len(ASKS))
    assert sorted(ask.prompt for ask in answering.asked) == [ask.prompt for ask in ASKS]
    assert load.tokens == len(ASKS)
    assert load.tokens_per_second == pytest.approx(len(ASKS) / load.seconds)


async def test_failures_are_counted_and_stop_nobody() -> None:
    async def every_other(ask: Ask) -> Answer:
        if ask.prompt[0] % 2:
            raise ConnectionError("reset")
        return Answer(0.0, (1.0,), tokens=1)

    load = await closed_loop(every_other, ASKS, 4)
    assert load.failures == {"ConnectionError: reset": 10}
    assert len(load.answers) == 10


async def test_an_open_loop_sends_whether_or_not_anything_was_answered() -> None:
    answering = Answering(seconds=0.2)
    await open_loop(answering, ASKS, [0.001 * index for index in range(len(ASKS))])
    assert answering.most == len(ASKS)


async def test_an_open_loop_counts_from_when_a_request_was_due() -> None:
    async def blocking(ask: Ask) -> Answer:
        asked_s = time.perf_counter()
        time.sleep(0.05)  # noqa: ASYNC251 - holds up the loop, so that later requests are sent too late
        return Answer(asked_s, (time.perf_counter(),), tokens=1)

    load: Load = await open_loop(blocking, ASKS[:3], [0.0, 0.001, 0.002])
    waits = sorted(answer.first_token_s for answer in load.answers)
    assert waits[0] >= 0.05
    assert waits[2] >= 0.14, "the third waited for two others before it was sent"


def test_gaps_are_those_that_ended_within_the_window() -> None:
    answer = Answer(0.0, (1.0, 2.0, 4.0, 7.0, 11.0), tokens=5)
    assert gaps_within([answer], 4.0, 7.5) == [2.0, 3.0]
