"""Collecting old versions every so often, by the server's own policy. Knows no messages."""

import asyncio
import logging

from adapters.retention import RetentionPolicy
from server.services.audit import SERVER, audited, subjects_of
from server.services.catalogue import Catalogue

log = logging.getLogger(__name__)


class Housekeeper:
    """
    Args:
        policy: of every round, and the default of whoever asks for one.
        interval_s: from one round to the next, the first included; None for no rounds.
    """

    def __init__(self, catalogue: Catalogue, policy: RetentionPolicy, interval_s: float | None) -> None:
        self.policy = policy
        self._catalogue = catalogue
        self._interval_s = interval_s
        self._rounds: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begins the rounds, if there are to be any."""
        if self._interval_s is not None:
            self._rounds = asyncio.create_task(self._go_round(self._interval_s))

    def close(self) -> None:
        """Ends the rounds."""
        if self._rounds is not None:
            self._rounds.cancel()

    async def _go_round(self, interval_s: float) -> None:
        while True:
            await asyncio.sleep(interval_s)
            try:
                with audited("collect", SERVER) as change:
                    collection = await self._catalogue.collect(self.policy, dry_run=False)
                    change.subjects = subjects_of(collection)
            except Exception:  # the next round may succeed
                log.exception("old versions could not be collected")
            else:
                log.info(
                    "collected versions=%d freed_bytes=%d", len(collection.versions), collection.freed_bytes
                )
