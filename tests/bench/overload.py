"""`python -m tests.bench.overload`: many times more requests than the server can answer. Table and JSON.

First its capacity, with as many clients as may run at once; then requests that come at a multiple of that
rate whether or not earlier ones were answered, each tried once; then capacity again. Goodput is what accepted
requests got, beside the capacity of the same run.
"""

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from quickchange import AsyncClient, ResourceExhaustedError
from quickchange.types import Delta, Finished
from tests.bench.answers import percentile
from tests.bench.arrivals import Prompts, poisson_moments
from tests.bench.machine import machine
from tests.bench.ours import OurServer, our_server
from tests.bench.subject import Subject

GOODPUT_SHARE: Final = 0.9
RECOVERY_S: Final = 2.0
_POLL_S: Final = 0.02


@dataclass(frozen=True, slots=True)
class Outcome:
    """One request: when it was sent, its first token and its end, and what became of it.

    Attributes:
        tokens: 0 if it was refused.
        retry_after_s: None unless it was refused with RetryInfo.
        problem: empty unless it ended in any other way.
    """

    sent_s: float
    first_s: float
    ended_s: float
    tokens: int = 0
    retry_after_s: float | None = None
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Overload:
    """What a run found; seconds, tokens a second.

    Attributes:
        factor: requests that came, relative to what capacity answers.
        wait_bound_s: what all that may run and wait at once takes at capacity.
        accepting_s: from the last request of the overload until one is accepted again.
        idle_s: until nobody waits or runs.
    """

    capacity: float
    capacity_after: float
    factor: float
    offered: int
    accepted: int
    refused: int
    refused_without_retry_info: int
    problems: dict[str, int]
    goodput: float
    first_token_p50_s: float
    first_token_p99_s: float
    total_p50_s: float
    total_p99_s: float
    refusal_p99_s: float
    wait_bound_s: float
    retry_after_p50_s: float
    retry_after_max_s: float
    accepting_s: float
    idle_s: float

    @property
    def goodput_share(self) -> float:
        return self.goodput / self.capacity

    def verdicts(self) -> dict[str, bool]:
        return {
            f"goodput at least {GOODPUT_SHARE:.0%} of capacity": self.goodput_share >= GOODPUT_SHARE,
            "p99 of accepted requests within twice what runs and waits takes": (
                self.total_p99_s <= 2 * self.wait_bound_s
            ),
            f"accepting again within {RECOVERY_S:g} s": self.accepting_s <= RECOVERY_S,
            f"{GOODPUT_SHARE:.0%} of capacity afterwards": self.capacity_after
            >= GOODPUT_SHARE * self.capacity,
            "every refusal with RetryInfo": not self.refused_without_retry_info,
            "every request accepted or refused, nothing else": not self.problems,
        }


@dataclass(frozen=True, slots=True)
class Load:
    """How requests are sent.

    Attributes:
        running, waiting: the server's own limits.
    """

    address: str
    prompts: Prompts
    prompt_tokens: int
    new_tokens: int
    running: int
    waiting: int
    seconds: float

    async def ask(self, client: AsyncClient) -> Outcome:
        """One request, tried once."""
        sent_s = first_s = time.perf_counter()
        tokens = 0
        try:
            async with client.stream(
                self.prompts.take(self.prompt_tokens), max_new_tokens=self.new_tokens, ignore_eos=True
            ) as stream:
                async for event in stream:
                    if isinstance(event, Delta) and not tokens:
                        first_s, tokens = time.perf_counter(), 1
                    elif isinstance(event, Finished):
                        tokens = event.usage.completion_tokens
        except ResourceExhaustedError as error:
            now_s = time.perf_counter()
            return Outcome(sent_s, now_s, now_s, retry_after_s=error.retry_after_s)
        except Exception as error:  # whatever it is, it is counted
            now_s = time.perf_counter()
            return Outcome(sent_s, now_s, now_s, problem=f"{type(error).__name__}: {error}"[:200])
        return Outcome(sent_s, first_s, time.perf_counter(), tokens)

    async def capacity(self, client: AsyncClient) -> float:
        """Tokens a second with as many clients as may run at once."""
        began_s = time.perf_counter()

        async def work() -> list[Outcome]:
            done = []
            while time.perf_counter() < began_s + self.seconds:
                done.append(await self.ask(client))
            return done

        groups = await asyncio.gather(*(work() for _ in range(self.running)))
        outcomes = [outcome for group in groups for outcome in group]
        return sum(each.tokens for each in outcomes) / (max(each.ended_s for each in outcomes) - began_s)

    async def flood(self, client: AsyncClient, rate: float, seed: int) -> list[Outcome]:
        """So many requests a second, whoever is refused not asking again."""
        moments = poisson_moments(rate, max(1, round(rate * self.seconds)), seed)
        began_s = time.perf_counter()

        async def send(moment_s: float) -> Outcome:
            await asyncio.sleep(max(0.0, began_s + moment_s - time.perf_counter()))
            return await self.ask(client)

        sending = [asyncio.create_task(send(moment)) for moment in moments]
        await asyncio.sleep(max(0.0, began_s + moments[-1] - time.perf_counter()))
        return await asyncio.gather(*sending)


async def measure(load: Load, factor: float, seed: int) -> Overload:
    """Capacity, overload, recovery, capacity."""
    async with AsyncClient(load.address, retry_window_s=0) as client:
        await load.ask(client)
        capacity = await load.capacity(client)
        rate = factor * capacity / load.new_tokens
        recovering = asyncio.create_task(_recovery(load, client, load.seconds))
        outcomes = await load.flood(client, rate, seed)
        accepting_s, idle_s = await recovering
        capacity_after = await load.capacity(client)
    return _summary(load, factor, capacity, capacity_after, outcomes, accepting_s, idle_s)


async def _recovery(load: Load, client: AsyncClient, after_s: float) -> tuple[float, float]:
    """Seconds until a request is accepted, and until nothing is left, once the flood is over."""
    await asyncio.sleep(after_s)
    began_s = time.perf_counter()
    accepting = asyncio.create_task(_accepted(load, client))
    while True:
        with suppress(Exception):
            capacity = (await client.server_info()).capacity
            if accepting.done() and capacity.requests_waiting + capacity.requests_running == 0:
                return accepting.result() - began_s, time.perf_counter() - began_s
        await asyncio.sleep(_POLL_S)


async def _accepted(load: Load, client: AsyncClient) -> float:
    """When a request that is sent again and again was sent and not refused."""
    while True:
        outcome = await load.ask(client)
        if outcome.tokens:
            return outcome.sent_s
        await asyncio.sleep(_POLL_S)


def _summary(
    load: Load,
    factor: float,
    capacity: float,
    capacity_after: float,
    outcomes: list[Outcome],
    accepting_s: float,
    idle_s: float,
) -> Overload:
    accepted = [each for each in outcomes if each.tokens]
    refused = [each for each in outcomes if not each.tokens and not each.problem]
    problems = [each.problem for each in outcomes if each.problem]
    tokens = sum(each.tokens for each in accepted)
    seconds = max(each.ended_s for each in accepted) - min(each.sent_s for each in outcomes)
    totals = [each.ended_s - each.sent_s for each in accepted]
    firsts = [each.first_s - each.sent_s for each in accepted]
    hints = [each.retry_after_s for each in refused if each.retry_after_s is not None]
    return Overload(
        capacity=capacity,
        capacity_after=capacity_after,
        factor=factor,
        offered=len(outcomes),
        accepted=len(accepted),
        refused=len(refused),
        refused_without_retry_info=len(refused) - len(hints),
        problems={problem: problems.count(problem) for problem in set(problems)},
        goodput=tokens / seconds,
        first_token_p50_s=percentile(firsts, 0.5),
        first_token_p99_s=percentile(firsts, 0.99),
        total_p50_s=percentile(totals, 0.5),
        total_p99_s=percentile(totals, 0.99),
        refusal_p99_s=percentile([each.ended_s - each.sent_s for each in refused], 0.99),
        wait_bound_s=(load.running + load.waiting) * load.new_tokens / capacity,
        retry_after_p50_s=statistics.median(hints) if hints else 0.0,
        retry_after_max_s=max(hints, default=0.0),
        accepting_s=max(0.0, accepting_s),
        idle_s=idle_s,
    )


def table(found: Overload) -> Iterator[str]:
    """What a reader wants to know, a line each."""
    yield f"{'capacity, tokens/s':<44}{found.capacity:>10.1f}  afterwards {found.capacity_after:.1f}"
    yield f"{'requests at ' + format(found.factor, 'g') + ' × capacity':<44}{found.offered:>10}"
    yield f"{'  accepted, refused':<44}{found.accepted:>10}  {found.refused}"
    yield f"{'goodput, tokens/s':<44}{found.goodput:>10.1f}  {found.goodput_share:.0%} of capacity"
    yield f"{'first token, s p50/p99':<44}{found.first_token_p50_s:>10.2f}  {found.first_token_p99_s:.2f}"
    yield f"{'whole answer, s p50/p99':<44}{found.total_p50_s:>10.2f}  {found.total_p99_s:.2f}"
    yield f"{'  what runs and waits takes at capacity, s':<44}{found.wait_bound_s:>10.2f}"
    yield f"{'refusal, s p99':<44}{found.refusal_p99_s:>10.3f}"
    yield f"{'RetryInfo, s p50/max':<44}{found.retry_after_p50_s:>10.2f}  {found.retry_after_max_s:.2f}"
    yield f"{'accepting again, idle, s after the last one':<44}{found.accepting_s:>10.2f}  {found.idle_s:.2f}"
    for what, holds in found.verdicts().items():
        yield f"{'ok' if holds else 'NOT MET':<8}{what}"
    for problem, count in found.problems.items():
        yield f"{count} × {problem}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.overload", description=__doc__)
    parser.add_argument("--base", default="smollm2")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--factor", type=float, default=10.0, help="times capacity (default: 10)")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each stretch (default: 20)")
    parser.add_argument("--running", type=int, default=8, help="requests in one step (default: 8)")
    parser.add_argument("--waiting", type=int, default=16, help="length of the queue (default: 16)")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--out", type=Path, default=Path("bench-out"), help="for the JSON (default: bench-out)"
    )
    options = parser.parse_args()
    subject = Subject.load(options.base, options.device)
    flags = ["--max-running-requests", str(options.running), "--max-waiting-requests", str(options.waiting)]
    with (
        tempfile.TemporaryDirectory(prefix="quickchange-overload.") as folder,
        our_server(subject, Path(folder), *flags) as server,
    ):
        found = _measured(server, subject, options)
    options.out.mkdir(parents=True, exist_ok=True)
    document = {"machine": machine(), "options": {name: str(value) for name, value in vars(options).items()}}
    document |= {"overload": asdict(found), "verdicts": found.verdicts()}
    (options.out / "overload.json").write_text(json.dumps(document, indent=2))
    print(*table(found), sep="\n")
    print("\nwrote", options.out / "overload.json")
    return 0 if all(found.verdicts().values()) else 1


def _measured(server: OurServer, subject: Subject, options: argparse.Namespace) -> Overload:
    load = Load(
        server.address,
        Prompts(subject.prompt_ids, options.seed),
        options.prompt_tokens,
        options.new_tokens,
        options.running,
        options.waiting,
        options.seconds,
    )
    return asyncio.run(measure(load, options.factor, options.seed))


if __name__ == "__main__":
    sys.exit(main())
