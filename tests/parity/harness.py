"""Drives the engine's core step by step, with real adapters from a real store. No threads, no sockets."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapters.base import Base
from adapters.store import AdapterStore
from adapters.validate import validate_adapter
from server.config import EngineSettings
from server.core import EngineCore
from server.generation import Generation
from server.metrics import Metrics
from server.request import (
    AdapterIdentity,
    Delta,
    Failed,
    Finished,
    Request,
    SamplingParams,
    TokenLogprob,
)
from server.stream import RequestStream

DEADLINE_S = 120.0


@dataclass(frozen=True)
class Ask:
    """One request of a test; `arrival` is the step before which it comes."""

    prompt: tuple[int, ...]
    adapter: str = ""
    max_new_tokens: int = 12
    arrival: int = 0
    sampling: SamplingParams | None = None


@dataclass(frozen=True)
class Answer:
    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprob, ...]
    finished: Finished


class Harness:
    """An engine core with published adapters."""

    def __init__(self, base: Base, folder: Path, adapters: dict[str, Path], **settings: Any) -> None:
        self.store = AdapterStore(folder)
        self.identities: dict[str, AdapterIdentity] = {}
        for name, path in adapters.items():
            self.publish(name, path, base)
        self.core = EngineCore(base, self.store, EngineSettings(**settings), Metrics(), lambda: None)
        self._loop = asyncio.new_event_loop()

    def publish(self, name: str, path: Path, base: Base) -> None:
        facts = validate_adapter(path, base.layout, max_rank=256)
        staged = self.store.new_staging()
        for file in path.iterdir():
            (staged / file.name).write_bytes(file.read_bytes())
        record, _ = self.store.publish(name, staged, facts)
        self.identities[name] = AdapterIdentity(name, record.version, record.facts.digest)

    def run(self, asks: Sequence[Ask]) -> list[Answer]:
        """Runs all requests to their ends and returns their answers in the order asked."""
        generations = [self.generation_of(ask) for ask in asks]
        parts: dict[int, list[Delta]] = {id(g.stream): [] for g in generations}
        ends: dict[int, Finished] = {}
        step, deadline_s = 0, time.monotonic() + DEADLINE_S
        while len(ends) < len(asks):
            assert time.monotonic() < deadline_s, f"{len(asks) - len(ends)} requests never ended"
            for ask, generation in zip(asks, generations, strict=True):
                if ask.arrival == step:
                    self.core.add(generation)
            self.core.step()
            step += 1
            for stream, event in self.core.take_events():
                assert not isinstance(event, Failed), event.error
                if isinstance(event, Delta):
                    parts[id(stream)].append(event)
                elif isinstance(event, Finished):
                    ends[id(stream)] = event
        return [
            Answer(
                tuple(t for delta in parts[id(g.stream)] for t in delta.token_ids),
                "".join(delta.text for delta in parts[id(g.stream)]),
                tuple(logprob for delta in parts[id(g.stream)] for logprob in delta.logprobs),
                ends[id(g.stream)],
            )
            for g in generations
        ]

    def close(self) -> None:
        self.core.residency.close()
        self.store.close()
        self._loop.close()

    def generation_of(self, ask: Ask) -> Generation:
        sampling = ask.sampling or SamplingParams(max_new_tokens=ask.max_new_tokens)
        adapter = self.identities[ask.adapter] if ask.adapter else None
        return self.generation(Request("test", ask.prompt, sampling, adapter))

    def generation(self, request: Request) -> Generation:
        stream = RequestStream(self._loop, lambda: None)
        total = len(request.prompt_token_ids) + request.sampling.max_new_tokens
        return Generation(request, stream, self.core.decoder, min(total, self.core.max_context_tokens))
