"""What the servers that speak HTTP have in common: a free port, being ready, load through their streams."""

import asyncio
import os
import socket
import time
import urllib.error
import urllib.request
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from tests.bench.answers import Answer, Ask, Load
from tests.bench.cells import Cell
from tests.bench.load import ShortAnswerError, closed_loop, open_loop
from tests.bench.peers.http import events
from tests.bench.processes import Process, wait_until

HOST = "127.0.0.1"
START_S = 600.0


class HttpServer:
    """A peer that runs.

    Args:
        adapters: names that it has, in order.
    """

    path: str

    def __init__(self, name: str, process: Process, port: int, adapters: Sequence[str]) -> None:
        self.name = name
        self.process = process
        self.port = port
        self._adapters = tuple(adapters)

    @abstractmethod
    def body(self, ask: Ask, new_tokens: int) -> dict[str, Any]:
        """The request as it understands it."""

    @abstractmethod
    def tokens_so_far(self, event: Mapping[str, Any], before: int) -> int:
        """How many tokens it has answered with after this event."""

    def takes(self, cell: Cell) -> bool:
        return cell.peers and cell.adapters <= len(self._adapters)

    def measure(self, cell: Cell, asks: Sequence[Ask]) -> Load:
        async def ask_one(ask: Ask) -> Answer:
            return await self._answer(ask, cell.new_tokens)

        if cell.moments_s:
            return asyncio.run(open_loop(ask_one, asks, cell.moments_s))
        return asyncio.run(closed_loop(ask_one, asks, cell.concurrency))

    async def _answer(self, ask: Ask, new_tokens: int) -> Answer:
        asked_s, pieces_s, tokens = time.perf_counter(), [], 0
        async for event in events(HOST, self.port, self.path, self.body(ask, new_tokens)):
            now = self.tokens_so_far(event, tokens)
            if now > tokens:
                pieces_s.append(time.perf_counter())
                tokens = now
        if tokens != new_tokens:
            raise ShortAnswerError(f"{tokens} instead of {new_tokens} tokens")
        return Answer(asked_s, tuple(pieces_s), tokens)


def wait_until_healthy(process: Process, port: int) -> None:
    wait_until(process, lambda: _is_healthy(port), START_S)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def own_environment(**settings: str) -> dict[str, str]:
    """The environment as it was before we chose anything for our own threads."""
    return {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"} | settings


def _is_healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://{HOST}:{port}/health", timeout=5) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False
