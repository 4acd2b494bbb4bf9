"""One answer's way from chosen tokens to events: text, stops, timings. Knows no batches and no queues."""

import secrets
import time

from server.detokenizer import Decoder, Detokenizer
from server.request import (
    Delta,
    Finished,
    FinishReason,
    Request,
    Started,
    Timings,
    TokenEvent,
)
from server.sampler import Choice, SampleRow, uniform_of
from server.sequence import Sequence
from server.stream import RequestStream
from server.tracing import Interval, RequestTrace


class Generation:
    """A sequence together with its text and its random numbers; owned by the engine's thread.

    Attributes:
        index: which of the request's answers it is.
        siblings: all of the request's answers, this one too, by index.
        trace: the request's, for the first of them; None if there is no tracer.
    """

    def __init__(
        self, request: Request, stream: RequestStream, decoder: Decoder, max_total_tokens: int, index: int
    ) -> None:
        self.sequence = Sequence(request, max_total_tokens, time.monotonic())
        self.stream = stream
        self.index = index
        self.siblings: list[Generation] = [self]
        self.trace: RequestTrace | None = None
        self._text = Detokenizer(decoder, request.sampling.stop)
        seed = request.sampling.seed
        self._first_token_s: float | None = None
        self._last_token_s: float | None = None
        self._seed = secrets.randbits(64) if seed is None else seed

    @property
    def request(self) -> Request:
        return self.sequence.request

    def sample_row(self, ahead: int) -> SampleRow:
        """What the sampler needs for this sequence's next token.

        Args:
            ahead: so many tokens before it, which are given, are judged in the same step.
        """
        sequence = self.sequence
        uniform = uniform_of(self._seed, self.index, sequence.output_length)
        return SampleRow(
            self.request.sampling,
            self.request.prompt_token_ids,
            sequence.output_ids,
            uniform,
            sequence.given_after(ahead),
        )

    def accept(self, choice: Choice, eos_token_ids: frozenset[int]) -> tuple[float | None, list[TokenEvent]]:
        """Takes the chosen token.

        Returns:
            Seconds since the previous token (None for the first, and for one that was given), and the events,
            which end with Finished if this token was the last.
        """
        assert choice.token_id is not None
        now_s, sequence = time.monotonic(), self.sequence
        sequence.take(choice.token_id)
        began_s = None if self.request.given else self._last_token_s
        gap_s = None if began_s is None else now_s - began_s
        self._last_token_s = now_s
        events: list[TokenEvent] = []
        if self._first_token_s is None:
            self._first_token_s = now_s
            if self.index == 0:
                events.append(Started(sequence.prompt_length, sequence.cached_tokens, self.queue_s))
        reason = sequence.finish_reason(eos_token_ids)
        # A stopping token is counted and reported, but is no part of the text.
        text = "" if reason is FinishReason.STOP else self._text.add(choice.token_id)
        if self._text.stopped:
            reason = FinishReason.STOP
        elif reason is not None:
            text += self._text.finish()
        logprobs = (choice.logprob,) if choice.logprob else ()
        events.append(Delta(text, (choice.token_id,), logprobs, self.index))
        if reason is not None:
            events.append(self.finished(reason))
        return gap_s, events

    def finished(self, reason: FinishReason) -> Finished:
        """The closing event."""
        sequence = self.sequence
        return Finished(
            reason,
            prompt_tokens=sequence.prompt_length,
            completion_tokens=sequence.output_length,
            cached_tokens=sequence.cached_tokens,
            timings=self._timings(),
            index=self.index,
        )

    @property
    def queue_s(self) -> float:
        """Seconds from submission to admission, or until now."""
        sequence = self.sequence
        return (sequence.admitted_s or time.monotonic()) - sequence.submitted_s

    @property
    def duration_s(self) -> float:
        """Seconds since submission."""
        return time.monotonic() - self.sequence.submitted_s

    def end_trace(self, reason: str, code: str, generated_tokens: int) -> None:
        """The request ended, and with it its span.

        Args:
            reason, code: as metrics know them.
            generated_tokens: of all answers.
        """
        assert self.trace is not None
        adapter = self.request.answers_as
        attributes: dict[str, str | int] = {
            "quickchange.request_id": self.request.request_id,
            "quickchange.adapter": f"{adapter.name}@{adapter.version}" if adapter else "",
            "quickchange.adapter_digest": adapter.digest if adapter else "",
            "quickchange.reason": reason,
            "gen_ai.usage.input_tokens": self.sequence.prompt_length,
            "gen_ai.usage.output_tokens": generated_tokens,
        }
        self.trace.end(self.parts(), attributes, code if reason == "failed" else None)

    def parts(self) -> list[Interval]:
        """What its life until now consisted of."""
        sequence, now_s = self.sequence, time.monotonic()
        began_s, admitted_s, first_token_s = sequence.submitted_s, sequence.admitted_s, self._first_token_s
        parts = [Interval("queue", began_s, admitted_s or now_s)]
        parts += [Interval("adapter load", *wait) for wait in sequence.adapter_waits]
        if admitted_s is not None:
            parts.append(Interval("prefill", admitted_s, first_token_s or now_s))
        if first_token_s is not None:
            parts.append(Interval("decode", first_token_s, now_s))
        return parts

    def _timings(self) -> Timings:
        sequence = self.sequence
        first_token_s = (self._first_token_s or time.monotonic()) - sequence.submitted_s
        return Timings(self.queue_s, sequence.adapter_wait_s, first_token_s, self.duration_s)


def generations_of(
    request: Request, stream: RequestStream, decoder: Decoder, max_total_tokens: int
) -> list[Generation]:
    """The answers a request asks for, by index.

    Args:
        max_total_tokens: of prompt and answer together, for each.
    """
    answers = [Generation(request, stream, decoder, max_total_tokens, index) for index in range(request.n)]
    for answer in answers:
        answer.siblings = answers
    return answers
