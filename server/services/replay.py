"""Has a new adapter judge what its canary says it answered in training. Knows neither files nor messages.

The questions with their answers go through the engine like anybody's prompts, a few at a time, behind
everybody else's, and with a salt of their own, so that nothing they computed can serve another request.
"""

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Final

from adapters.canary import MAX_ALTERNATIVES, Canary, Probe
from adapters.errors import OUT_OF_MEMORY, AdapterError, CanaryMismatchError, CapacityError
from server.engine import Engine
from server.errors import (
    AdapterLoadError,
    DeadlineError,
    QueueFullError,
    RequestFailedError,
    RequestMemoryError,
)
from server.request import (
    MAX_PRIORITY,
    AdapterIdentity,
    Delta,
    Failed,
    Request,
    SamplingParams,
    TokenLogprob,
)

CANARY_NAME: Final = "_canary"
"""What metrics call the adapter meanwhile; no adapter can have this name."""

_TOGETHER: Final = 4
"""Probes in the engine at once: as many as a usual canary has take little longer than one alone."""

_ROOM_POLL_S: Final = 0.1
_RETRY_AFTER_S: Final = 5.0


class CanaryDelayedError(QueueFullError):
    """The server was too busy to replay a canary in time; nothing is known against the adapter."""

    reason = "CANARY_NOT_REPLAYED"


class CanaryReplay:
    """Replays canaries through an engine."""

    def __init__(self, engine: Engine, timeout_s: float, max_waiting_requests: int) -> None:
        """
        Args:
            timeout_s: for a whole canary, the adapter's load included.
            max_waiting_requests: that the engine's queue has room for.
        """
        self._engine = engine
        self._timeout_s = timeout_s
        self._together = min(_TOGETHER, max_waiting_requests)

    async def replay(self, digest: str, canary: Canary) -> str:
        """What was seen, if the adapter answers as it did in training.

        Args:
            digest: of a content in the store; it needs no version.

        Raises:
            CanaryMismatchError: it does not.
            CapacityError: the adapter cannot be on this device at all.
            CanaryDelayedError: there was no time or no room for it.
            DrainingError, EngineDownError, InvalidRequestError
        """
        run = _Run(self._engine, digest, canary, time.monotonic() + self._timeout_s)
        try:
            await run.load()
            await run.ask_all(self._together)
        except (DeadlineError, QueueFullError, RequestMemoryError) as error:
            raise CanaryDelayedError(
                f"the server is too busy to replay the canary, {self._timeout_s:g} s at most: {error}; "
                "go on later with the same upload_id, or upload again",
                _RETRY_AFTER_S,
            ) from None
        return (
            f"{run.compared} tokens of {len(canary.probes)} prompts: log-probabilities differ by at most "
            f"{run.worst:.4f}, of {canary.tolerance:.4f} that rounding explains"
        )


class _Run:
    """One replay.

    Attributes:
        compared: positions seen so far.
        worst: the largest difference at any of them.
    """

    def __init__(self, engine: Engine, digest: str, canary: Canary, deadline_s: float) -> None:
        self._engine, self._canary, self._deadline_s = engine, canary, deadline_s
        self._identity = AdapterIdentity(CANARY_NAME, 0, digest)
        self._salt = f"canary {secrets.token_hex(16)}"
        self.compared = 0
        self.worst = 0.0

    async def load(self) -> None:
        """Waits until the adapter is on the device.

        It does not queue for room, where others would have to make way for it; it looks again.
        """
        while True:
            try:
                await self._engine.load(self._identity.digest)
            except CapacityError as error:
                if error.reason not in (CapacityError.default_reason, OUT_OF_MEMORY):
                    raise
            else:
                return
            if time.monotonic() > self._deadline_s:
                raise DeadlineError("no room on the device")
            await asyncio.sleep(_ROOM_POLL_S)

    async def ask_all(self, together: int) -> None:
        """Asks all probes, so many at once; the first that shows a fault ends the others."""
        room = asyncio.Semaphore(together)

        async def ask_in_turn(probe: Probe) -> None:
            async with room:
                await self._ask(probe)

        tasks = [asyncio.ensure_future(ask_in_turn(probe)) for probe in self._canary.probes]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _ask(self, probe: Probe) -> None:
        """Compares every position of one probe, given the trainer's tokens before it."""
        async with aclosing(self._judged(probe)) as judged:
            steps = iter(probe.steps)
            async for logprob in judged:
                self._note(next(steps).difference(dict(logprob.alternatives)))

    def _note(self, difference: float) -> None:
        self.compared += 1
        self.worst = max(self.worst, difference)
        if difference > self._canary.tolerance:
            raise CanaryMismatchError(
                f"it does not answer as it was trained: log-probabilities of the canary differ by "
                f"{difference:.4f} after {self.compared} of {self._canary.steps} tokens, and rounding "
                f"explains {self._canary.tolerance:.4f}; were its files mixed up with another adapter's? "
                "record a new canary by training again, or remove it from quickchange.json"
            )

    async def _judged(self, probe: Probe) -> AsyncGenerator[TokenLogprob]:
        """What the server has at each position of the answer."""
        stream = self._engine.submit(self._request(probe))
        try:
            async for event in stream:
                if isinstance(event, Failed):
                    raise _meaning_of(event.error)
                if isinstance(event, Delta):
                    for logprob in event.logprobs:
                        yield logprob
        finally:
            stream.cancel()

    def _request(self, probe: Probe) -> Request:
        return Request(
            request_id=f"canary-{self._identity.digest[-12:]}",
            prompt_token_ids=probe.prompt_token_ids,
            given=tuple(step.token_id for step in probe.steps),
            sampling=SamplingParams(
                max_new_tokens=len(probe.steps), ignore_eos=True, logprobs=MAX_ALTERNATIVES
            ),
            adapter=self._identity,
            priority=-MAX_PRIORITY,
            cache_salt=self._salt,
            deadline_s=self._deadline_s,
        )


def _meaning_of(error: Exception) -> Exception:
    if isinstance(error, RequestFailedError) and not isinstance(error, RequestMemoryError):
        return CanaryMismatchError(f"it cannot answer its canary: {error}; train it again")
    if isinstance(error, AdapterLoadError) and isinstance(error.cause, AdapterError):
        return error.cause
    return error
