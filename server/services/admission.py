"""The gate between a staged adapter and the catalogue: every check, the canary last. Knows no messages."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final, TypeVar

from adapters.bundle import Bundle, check_text
from adapters.canary import Canary
from adapters.errors import AdapterError, AdapterNotFoundError, InvalidAdapterError
from adapters.facts import AdapterFacts
from adapters.layout import BaseLayout
from adapters.report import Check, Outcome, ValidationReport
from adapters.store import AdapterStore
from adapters.validate import examine_adapter, failed
from server.engine import Engine
from server.errors import InvalidRequestError, ServerError
from server.services.replay import CanaryReplay
from server.services.workers import Workers

log = logging.getLogger(__name__)

T = TypeVar("T")

_TEXT: Final = "text"
_CANARY: Final = "canary"


class Admission:
    """Decides on staged adapters; nobody else can name one before it is published."""

    def __init__(
        self,
        store: AdapterStore,
        engine: Engine,
        layout: BaseLayout,
        workers: Workers,
        *,
        max_rank: int,
        eos_token_ids: frozenset[int],
        chat_template: str | None,
        canary_timeout_s: float,
        max_waiting_requests: int,
    ) -> None:
        self._store, self._engine, self._layout, self._workers = store, engine, layout, workers
        self._max_rank = max_rank
        self._eos_token_ids, self._chat_template = eos_token_ids, chat_template
        self._replay = CanaryReplay(engine, canary_timeout_s, max_waiting_requests)
        self._replaying = asyncio.Lock()  # one canary at a time: they go beside real work, not instead of it

    async def admit(self, folder: Path, publish: Callable[[AdapterFacts, ValidationReport], T]) -> T:
        """Checks a staged folder, and publishes it if every check passes.

        Args:
            folder: from the store's `new_staging`.
            publish: what then becomes of it; called in a worker.

        Raises:
            AdapterError: refused; its report says what each check found.
            ServerError: the canary could not be replayed.
        """
        examined = await self._workers.run(examine_adapter, folder, self._layout, max_rank=self._max_rank)
        facts = examined.facts
        if facts is None:
            assert examined.error is not None, "no facts without an error"
            raise examined.error
        report = self._with_text(examined.bundle, examined.report)
        canary = examined.bundle.canary if examined.bundle else None
        reason = self._why_not_replayed(canary)
        if canary is None or reason:
            report = report.with_check(Check(_CANARY, Outcome.SKIPPED, reason))
            return await self._workers.run(publish, facts, report)
        async with self._replaying, self._unlisted(folder, facts):
            report = await self._replayed(facts.digest, canary, report)
            return await self._workers.run(publish, facts, report)

    def _with_text(self, bundle: Bundle | None, report: ValidationReport) -> ValidationReport:
        if bundle is None:
            return report.with_check(Check(_TEXT, Outcome.SKIPPED, "the adapter says nothing of it"))
        try:
            detail = check_text(bundle, self._eos_token_ids, self._chat_template)
        except AdapterError as error:
            raise _reported(_TEXT, error, report) from None
        return report.with_check(Check(_TEXT, Outcome.PASSED, detail))

    def _why_not_replayed(self, canary: Canary | None) -> str:
        """Empty if there is a canary that says something here."""
        if canary is None:
            return "the adapter has none"
        if canary.base_fingerprint != self._layout.fingerprint:
            return f"it was recorded on another base, {canary.base_fingerprint}"
        if not canary.tells_from_base:
            return (
                "it cannot tell the adapter from the bare base: they differ by "
                f"{canary.base_distance:g}, and rounding explains {canary.tolerance:g}"
            )
        longest = max(len(probe.prompt_token_ids) + len(probe.steps) for probe in canary.probes)
        context = self._engine.bounds.max_context_tokens
        if longest > context:
            return f"it needs a context of {longest} tokens, this server has {context}"
        return ""

    async def _replayed(self, digest: str, canary: Canary, report: ValidationReport) -> ValidationReport:
        try:
            detail = await self._replay.replay(digest, canary)
        except InvalidRequestError as error:  # a token that the base does not have
            refusal: AdapterError = InvalidAdapterError(
                f"canary in quickchange.json: {error}; record it on this base", reason="BAD_BUNDLE"
            )
            raise _reported(_CANARY, refusal, report) from None
        except AdapterError as error:
            raise _reported(_CANARY, error, report) from None
        return report.with_check(Check(_CANARY, Outcome.PASSED, detail))

    @asynccontextmanager
    async def _unlisted(self, folder: Path, facts: AdapterFacts) -> AsyncIterator[None]:
        """While the block runs the engine can load the content; afterwards only if it was published."""
        is_ours = await self._workers.run(self._store.keep_unlisted, folder, facts)
        # Or another server that starts meanwhile would take what has no version.
        lease = await self._workers.run(self._store.keep, facts.digest)
        try:
            yield
        finally:
            if lease is not None:
                lease.release()
            if is_ours:
                await self._forget_unless_published(facts.digest)

    async def _forget_unless_published(self, digest: str) -> None:
        try:
            await self._workers.run(self._store.get, digest)
        except AdapterNotFoundError:
            try:
                await self._engine.forget(digest)
                await self._workers.run(self._store.remove_blob, digest)
            except (ServerError, AdapterError):
                log.exception("adapter not removed digest=%s; the next start does it", digest)


def _reported(check: str, error: AdapterError, report: ValidationReport) -> AdapterError:
    error.report = report.with_check(failed(check, error))
    return error
