"""Drives the engine's core step by step, with real adapters from a real store. No threads, no sockets."""

import asyncio
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapters.base import Base
from adapters.store import AdapterStore
from adapters.validate import validate_adapter
from server.config import EngineSettings
from server.core import EngineCore
from server.generation import Generation, generations_of
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
    adapter_scale: float = 1.0
    priority: int = 0
    given: tuple[int, ...] = ()


@dataclass(frozen=True)
class Answer:
    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprob, ...]
    finished: Finished
    preemptions: int


class Harness:
    """An engine core with published adapters."""

    def __init__(self, base: Base, folder: Path, adapters: dict[str, Path], **settings: Any) -> None:
        self.store = AdapterStore(folder)
        self.identities: dict[str, AdapterIdentity] = {}
        for name, path in adapters.items():
            self.publish(name, path, base)
        self._metrics = Metrics()
        self.core = EngineCore(base, self.store, EngineSettings(**settings), self._metrics, lambda: None)
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
        return [answers[0] for answers in self._run([self.answers_to(ask) for ask in asks], asks)]

    def run_many(self, ask: Ask, n: int) -> list[Answer]:
        """Runs one request for n answers."""
        return self._run([self.answers_to(ask, n)], [ask])[0]

    def _run(self, groups: Sequence[list[Generation]], asks: Sequence[Ask]) -> list[list[Answer]]:
        parts: defaultdict[tuple[int, int], list[Delta]] = defaultdict(list)
        ends: dict[tuple[int, int], Finished] = {}
        step, deadline_s = 0, time.monotonic() + DEADLINE_S
        while len(ends) < sum(map(len, groups)):
            assert time.monotonic() < deadline_s, f"{len(ends)} requests ended, the others never did"
            for ask, group in zip(asks, groups, strict=True):
                if ask.arrival == step:
                    self.core.add(group)
            self.core.step()
            step += 1
            for stream, event in self.core.take_events():
                assert not isinstance(event, Failed), event.error
                if isinstance(event, Delta):
                    parts[id(stream), event.index].append(event)
                elif isinstance(event, Finished):
                    ends[id(stream), event.index] = event
        return [
            [_answer(g, parts[id(g.stream), g.index], ends[id(g.stream), g.index]) for g in group]
            for group in groups
        ]

    @property
    def evictions(self) -> float:
        """How many adapters had to leave the device."""
        labels = {"tier": "device"}
        return self._metrics.registry.get_sample_value("quickchange_adapter_evictions_total", labels) or 0.0

    def close(self) -> None:
        self.core.residency.close()
        self.store.close()
        self._loop.close()

    def answers_to(self, ask: Ask, n: int = 1) -> list[Generation]:
        sampling = ask.sampling or SamplingParams(max_new_tokens=ask.max_new_tokens)
        adapter = self.identities[ask.adapter] if ask.adapter else None
        request = Request(
            "test",
            ask.prompt,
            sampling,
            adapter,
            adapter_scale=ask.adapter_scale,
            n=n,
            priority=ask.priority,
            given=ask.given,
        )
        return self.answers_of(request)

    def answers_of(self, request: Request) -> list[Generation]:
        stream = RequestStream(self._loop, lambda: None, request.n)
        total = len(request.prompt_token_ids) + request.sampling.max_new_tokens
        return generations_of(request, stream, self.core.decoder, min(total, self.core.max_context_tokens))


def _answer(generation: Generation, deltas: list[Delta], finished: Finished) -> Answer:
    return Answer(
        tuple(t for delta in deltas for t in delta.token_ids),
        "".join(delta.text for delta in deltas),
        tuple(logprob for delta in deltas for logprob in delta.logprobs),
        finished,
        generation.sequence.preemptions,
    )
