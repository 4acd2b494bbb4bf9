"""Replaces an adapter while it is in use, and keeps account of who answered. Knows no process."""

import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from quickchange import Client, ResolvedAdapter
from training.tasks import Question

_STREAMS: Final = 4
_CALLERS: Final = 4
_STREAM_TOKENS: Final = 64
_UNDER_WAY_EVENTS: Final = 3
_MAX_NEW_TOKENS: Final = 8
_PATIENCE_S: Final = 120.0
_AFTERWARDS_S: Final = 2.0


@dataclass(frozen=True, slots=True)
class LongAnswer:
    """A stream from its first to its last token; seconds on time.monotonic().

    Attributes:
        arrived_s: of each token.
    """

    question: Question
    adapter: ResolvedAdapter
    token_ids: tuple[int, ...]
    arrived_s: tuple[float, ...]

    def tokens_by(self, time_s: float) -> int:
        """How many tokens had arrived by then."""
        return sum(arrived_s <= time_s for arrived_s in self.arrived_s)


@dataclass(frozen=True, slots=True)
class ShortAnswer:
    """One request of the load; seconds on time.monotonic()."""

    question: Question
    adapter: ResolvedAdapter
    text: str
    asked_s: float


@dataclass(frozen=True, slots=True)
class Swap:
    """What happened.

    Attributes:
        published_s: when the upload of the new version was answered, on time.monotonic().
        publish_seconds: from the start of the upload until then.
        old_again, new_again: tokens of the streams' questions, asked again of each version afterwards.
    """

    old: ResolvedAdapter
    new: ResolvedAdapter
    published_s: float
    publish_seconds: float
    streams: tuple[LongAnswer, ...]
    old_again: tuple[tuple[int, ...], ...]
    new_again: tuple[tuple[int, ...], ...]
    load: tuple[ShortAnswer, ...]

    @property
    def streams_on_the_old(self) -> int:
        return sum(stream.adapter.digest == self.old.digest for stream in self.streams)

    @property
    def agreement_with_old(self) -> list[int]:
        """Per stream: tokens until the first that the old version, asked again, chooses otherwise.

        Products are rounded otherwise in another batch, which decides between tokens that are nearly tied.
        """
        return _agreements(self.streams, self.old_again)

    @property
    def agreement_with_new(self) -> list[int]:
        return _agreements(self.streams, self.new_again)

    def answered_by(self, adapter: ResolvedAdapter) -> list[ShortAnswer]:
        return [answer for answer in self.load if answer.adapter.digest == adapter.digest]

    @property
    def asked_afterwards(self) -> list[ShortAnswer]:
        return [answer for answer in self.load if answer.asked_s > self.published_s]


def swap_under_load(
    client: Client,
    name: str,
    successor: Path,
    questions: Sequence[Question],
    stream_tokens: int = _STREAM_TOKENS,
) -> Swap:
    """Publishes the next version of `name` while long streams run on it and callers keep asking.

    Args:
        stream_tokens: of each stream; enough to outlast the upload.
    """
    load = _Load(client, name, questions)
    under_way = threading.Barrier(_STREAMS + 1)
    with ThreadPoolExecutor(_STREAMS + _CALLERS) as pool:
        callers = [pool.submit(load.run) for _ in range(_CALLERS)]
        streams = [
            pool.submit(_stream, client, name, question, stream_tokens, under_way)
            for question in questions[:_STREAMS]
        ]
        try:
            _wait_for_all(under_way, streams)
            began_s = time.monotonic()
            pushed = client.adapters.push(successor, name).adapter
            published_s = time.monotonic()
            long_answers = [stream.result() for stream in streams]
            time.sleep(_AFTERWARDS_S)
        finally:
            load.stop()
            under_way.abort()
        for caller in callers:
            caller.result()
    old = long_answers[0].adapter
    return Swap(
        old=old,
        new=ResolvedAdapter(pushed.name, pushed.version, pushed.digest),
        published_s=published_s,
        publish_seconds=published_s - began_s,
        streams=tuple(long_answers),
        old_again=_again(client, str(old), long_answers),
        new_again=_again(client, pushed.reference, long_answers),
        load=tuple(load.answers),
    )


@dataclass(slots=True)
class _Load:
    """Callers that ask one short question after another until they are told to stop."""

    client: Client
    name: str
    questions: Sequence[Question]
    answers: list[ShortAnswer] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        while not self._stop.is_set():
            question = self.questions[len(self.answers) % len(self.questions)]
            asked_s = time.monotonic()
            answer = self.client.generate(
                question.messages, adapter=self.name, max_new_tokens=_MAX_NEW_TOKENS
            )
            self.answers.append(ShortAnswer(question, answer.adapter, answer.text, asked_s))

    def stop(self) -> None:
        self._stop.set()


def _stream(
    client: Client, name: str, question: Question, tokens: int, under_way: threading.Barrier
) -> LongAnswer:
    """A long answer: it goes on past its end so that it is still running when the new version comes."""
    arrived_s: list[float] = []
    try:
        with client.stream(question.messages, adapter=name, max_new_tokens=tokens, ignore_eos=True) as stream:
            for received, event in enumerate(stream, start=1):
                arrived_s += [time.monotonic()] * len(getattr(event, "token_ids", ()))
                if received == _UNDER_WAY_EVENTS:
                    under_way.wait(_PATIENCE_S)
            result = stream.result()
    except BaseException:
        under_way.abort()
        raise
    return LongAnswer(question, result.adapter, result.token_ids, tuple(arrived_s))


def _wait_for_all(under_way: threading.Barrier, streams: Sequence[Future[LongAnswer]]) -> None:
    """Until every stream has begun; a stream that failed says why."""
    try:
        under_way.wait(_PATIENCE_S)
    except threading.BrokenBarrierError:
        for stream in streams:
            stream.result()
        raise


def _again(client: Client, reference: str, answers: Sequence[LongAnswer]) -> tuple[tuple[int, ...], ...]:
    """What the version that `reference` names gives with nothing else running."""

    def tokens(answer: LongAnswer) -> tuple[int, ...]:
        return client.generate(
            answer.question.messages,
            adapter=reference,
            max_new_tokens=len(answer.token_ids),
            ignore_eos=True,
        ).token_ids

    with ThreadPoolExecutor(_STREAMS) as pool:
        return tuple(pool.map(tokens, answers))


def _agreements(streams: Sequence[LongAnswer], again: Sequence[tuple[int, ...]]) -> list[int]:
    return [_common_prefix(stream.token_ids, other) for stream, other in zip(streams, again, strict=True)]


def _common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    pairs = list(zip(one, other, strict=False))
    return next((place for place, (a, b) in enumerate(pairs) if a != b), len(pairs))
