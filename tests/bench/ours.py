"""`quickchange serve` as a process of its own, and its streams as a client sees them."""

import asyncio
import re
import statistics
import sys
import time
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from quickchange import AsyncClient, Client
from quickchange.server_facts import ServerInfo
from quickchange.types import Delta, Finished
from tests.bench.answers import Answer, Ask, Load, Steps
from tests.bench.cells import Cell
from tests.bench.load import Asker, ShortAnswerError, closed_loop, open_loop
from tests.bench.processes import Process, StartError, running
from tests.bench.subject import Pool, Subject

READY = re.compile(r"ready grpc=(\S+) metrics=(\S+)")
_SERIES = re.compile(r"^(quickchange_\w+)(?:\{[^}]*\})? (\S+)$", re.MULTILINE)

T = TypeVar("T")


class OurServer:
    """A server that runs, holding a pool of adapters."""

    def __init__(self, name: str, process: Process, address: str, metrics_address: str) -> None:
        self.name = name
        self.process = process
        self.address = address
        self.upload_to_first_token_s: float | None = None
        self._metrics_url = f"http://{metrics_address}/metrics"

    def takes(self, cell: Cell) -> bool:
        return True

    def measure(self, cell: Cell, asks: Sequence[Ask]) -> Load:
        async def play(asker: Asker) -> Load:
            if cell.moments_s:
                return await open_loop(asker, asks, cell.moments_s)
            return await closed_loop(asker, asks, cell.concurrency)

        before, info_before = self.series(), self.info()
        load = self.drive(play, cell.new_tokens)
        return replace(load, steps=_steps_between(before, self.series(), info_before, self.info()))

    def drive(self, work: Callable[[Asker], Awaitable[T]], new_tokens: int) -> T:
        """Runs something that asks, over one connection."""

        async def run() -> T:
            async with asking(self.address, new_tokens) as asker:
                return await work(asker)

        return asyncio.run(run())

    def publish(self, pool: Pool) -> float:
        """Uploads the pool and asks each of its adapters once.

        Returns:
            Median seconds from an upload's first byte to the new adapter's first token.
        """
        seconds = []
        with Client(self.address) as client:
            client.generate([*range(70, 74)], max_new_tokens=1)
            for name, folder in pool.folders.items():
                began_s = time.perf_counter()
                client.adapters.push(folder, name)
                client.generate([*range(70, 74)], adapter=name, max_new_tokens=1)
                seconds.append(time.perf_counter() - began_s)
        return statistics.median(seconds)

    def info(self) -> ServerInfo:
        with Client(self.address) as client:
            return client.server_info()

    def series(self) -> Mapping[str, float]:
        """Every Prometheus series of ours, summed over labels."""
        with urllib.request.urlopen(self._metrics_url) as response:
            text = response.read().decode()
        sums: dict[str, float] = {}
        for name, value in _SERIES.findall(text):
            sums[name] = sums.get(name, 0.0) + float(value)
        return sums


@contextmanager
def our_server(
    subject: Subject, scratch: Path, *flags: str, pool: Pool | None = None, name: str = "quickchange"
) -> Iterator[OurServer]:
    """A server with a store of its own under `scratch`, the pool's adapters published and asked once."""
    command = [sys.executable, "-m", "quickchange", "serve", "--base", subject.source]
    command += ["--device", subject.device, "--store", str(scratch / f"store-{name}")]
    command += ["--port", "0", "--metrics-port", "0", *flags]
    with running(command, scratch / f"{name}.log") as process:
        match = READY.match(process.line())
        if match is None:
            raise StartError(f"the server did not say that it is ready; see {process.log}")
        server = OurServer(name, process, match[1], match[2])
        if pool is not None:
            server.upload_to_first_token_s = server.publish(pool)
        yield server


@asynccontextmanager
async def asking(address: str, new_tokens: int) -> AsyncIterator[Asker]:
    """Sends requests over one connection, for answers of exactly so many tokens."""
    async with AsyncClient(address) as client:

        async def ask(request: Ask) -> Answer:
            return await _stream(client, request, new_tokens)

        yield ask


async def _stream(client: AsyncClient, request: Ask, new_tokens: int) -> Answer:
    asked_s, pieces_s, usage = time.perf_counter(), [], None
    options = {"adapter": request.adapter, "max_new_tokens": new_tokens, "ignore_eos": True}
    async with client.stream(request.prompt, **options) as stream:  # type: ignore[arg-type]  # checked there
        async for event in stream:
            if isinstance(event, Delta) and event.token_ids:
                pieces_s.append(time.perf_counter())
            elif isinstance(event, Finished):
                usage = event.usage
    if usage is None or usage.completion_tokens != new_tokens:
        raise ShortAnswerError(f"{usage} instead of {new_tokens} tokens")
    return Answer(asked_s, tuple(pieces_s), usage.completion_tokens, usage.cached_tokens)


def _steps_between(
    before: Mapping[str, float], after: Mapping[str, float], info_before: ServerInfo, info_after: ServerInfo
) -> Steps:
    def grown(name: str) -> float:
        return after.get(name, 0.0) - before.get(name, 0.0)

    steps = max(1.0, grown("quickchange_batch_adapters_count"))
    passes = max(1, info_after.steps.steps - info_before.steps.steps)
    mixed = info_after.steps.mixed_steps - info_before.steps.mixed_steps
    return Steps(
        mean_adapters=grown("quickchange_batch_adapters_sum") / steps,
        mixed_share=mixed / passes,
        most_adapters=info_after.steps.max_adapters_in_step,
    )
