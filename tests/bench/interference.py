"""What streams notice while adapters that they do not use are loaded beside them."""

import asyncio
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice

from tests.bench.answers import Answer, Ask, Load, Spread
from tests.bench.arrivals import Prompts, poisson_moments
from tests.bench.load import Asker, closed_loop, open_loop
from tests.bench.ours import OurServer, asking

STREAMS = 4
VISITS_PER_SECOND = 4.0
VISITOR_PROMPT_TOKENS = 32
VISITOR_NEW_TOKENS = 4
SETTLING_S = 2.0
ALONE_S = 10.0


@dataclass(frozen=True, slots=True)
class Interference:
    """Inter-token latency of streams on the base while visitors come, at one rate throughout.

    Attributes:
        alone_s: without visitors.
        steady_s: visitors ask for adapters that are on the device.
        cycling_s: visitors ask for all adapters in a cycle much longer than the device holds.
        loads: adapters that were loaded for the visits of the cycle.
        ratios: p99 cycling over p99 steady, of each pass.
    """

    adapters: int
    visits: int
    loads: int
    failures: int
    alone_s: Spread
    steady_s: Spread
    cycling_s: Spread
    ratios: tuple[float, ...]

    @property
    def ratio(self) -> float:
        return statistics.median(self.ratios)


@dataclass(frozen=True, slots=True)
class Phase:
    """One stretch of visits: gaps between the streams' tokens within it, loads and failures."""

    gaps_s: list[float]
    loads: int
    failures: int

    @property
    def spread(self) -> Spread:
        return Spread.of(self.gaps_s)


@dataclass(frozen=True, slots=True)
class Household:
    """Streams that go on, and visitors that come and go.

    Args:
        names: of all adapters, many more than the device holds.
        stream_tokens: of each of the streams' answers; long, so that few prompts of theirs come between.
    """

    server: OurServer
    names: Sequence[str]
    prompts: Prompts
    prompt_tokens: int
    stream_tokens: int
    tell: Callable[[str], None]

    def measure(self, visits: int, passes: int) -> Interference:
        """Alone, steady and cycling, one after the other, so often."""
        few, everyone = cycle(self.names[:2]), cycle(self.names)
        phases = []
        for number in range(passes):
            alone = self._phase([], number)
            self._phase(list(islice(few, 2)), number)  # they are on the device from here on
            steady = self._phase(list(islice(few, visits)), number)
            cycling = self._phase(list(islice(everyone, visits)), number)
            phases.append((alone, steady, cycling))
            p99 = [f"{phase.spread.p99 * 1e3:.1f}" for phase in phases[-1]]
            self.tell(f"inter-token p99, ms: alone {p99[0]}, steady {p99[1]}, cycling {p99[2]}")
        alone, steady, cycling = (_together(each) for each in zip(*phases, strict=True))
        return Interference(
            adapters=len(self.names),
            visits=visits * passes,
            loads=cycling.loads,
            failures=alone.failures + steady.failures + cycling.failures,
            alone_s=alone.spread,
            steady_s=steady.spread,
            cycling_s=cycling.spread,
            ratios=tuple(cycling.spread.p99 / steady.spread.p99 for _, steady, cycling in phases),
        )

    def _phase(self, visitors: Sequence[str], seed: int) -> Phase:
        asks = self.prompts.asks(visitors, VISITOR_PROMPT_TOKENS)
        moments_s = poisson_moments(VISITS_PER_SECOND, len(asks), seed)
        window: list[float] = []
        over = asyncio.Event()

        async def play(streams: Asker) -> tuple[Load, Load]:
            async with asking(self.server.address, VISITOR_NEW_TOKENS) as visits:
                going = asyncio.create_task(closed_loop(streams, self._stream_asks(over), STREAMS))
                await asyncio.sleep(SETTLING_S)
                window.append(time.perf_counter())
                seen = await open_loop(visits, asks, moments_s) if asks else await _nobody()
                window.append(time.perf_counter())
                over.set()
                return await going, seen

        before = self._loads()
        streams, visits = self.server.drive(play, self.stream_tokens)
        failures = sum(streams.failures.values()) + sum(visits.failures.values())
        return Phase(gaps_within(streams.answers, *window), self._loads() - before, failures)

    def _stream_asks(self, over: asyncio.Event) -> Iterator[Ask]:
        while not over.is_set():
            yield Ask(self.prompts.take(self.prompt_tokens), "")

    def _loads(self) -> int:
        return int(self.server.series().get("quickchange_adapter_load_seconds_count", 0.0))


def gaps_within(answers: Sequence[Answer], begin_s: float, end_s: float) -> list[float]:
    """Waits between pieces that ended within a stretch of time."""
    return [
        gap
        for answer in answers
        for gap, moment_s in zip(answer.gaps_s, answer.pieces_s[1:], strict=True)
        if begin_s <= moment_s <= end_s
    ]


def _together(phases: Sequence[Phase]) -> Phase:
    return Phase(
        [gap for phase in phases for gap in phase.gaps_s],
        sum(phase.loads for phase in phases),
        sum(phase.failures for phase in phases),
    )


async def _nobody() -> Load:
    await asyncio.sleep(ALONE_S)
    return Load(())
