"""Whether store and disk have room for what is being uploaded. Knows no calls."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from adapters.errors import CapacityError
from adapters.store import AdapterStore
from server.services.drafts import Draft


class Room:
    """What the uploads under way may still need; any thread.

    Args:
        reserve_bytes: of the disk, left free for everything else.
    """

    def __init__(self, store: AdapterStore, reserve_bytes: int) -> None:
        self._store = store
        self._reserve_bytes = reserve_bytes
        self._drafts: set[Draft] = set()
        self._lock = threading.Lock()

    @contextmanager
    def counting(self, draft: Draft) -> Iterator[None]:
        """What the draft still needs is spoken for during the block, once it was admitted."""
        try:
            yield
        finally:
            with self._lock:
                self._drafts.discard(draft)

    def admit(self, draft: Draft) -> None:
        """Lets an upload begin, or go on.

        Raises:
            CapacityError: a quota or the disk has no room for all of it.
        """
        self._store.check_quota(draft.plan.name, draft.plan.files, draft.shelved_bytes)
        with self._lock:
            free_bytes = self._store.free_bytes() - sum(other.remaining_bytes for other in self._drafts)
            if free_bytes - draft.remaining_bytes < self._reserve_bytes:
                raise self._full(
                    f"{draft.remaining_bytes} bytes are to come, and {max(0, free_bytes)} are free"
                )
            self._drafts.add(draft)

    def check(self) -> None:
        """Whether the disk still takes what comes: others write to it too.

        Raises:
            CapacityError: it has come down to the reserve.
        """
        free_bytes = self._store.free_bytes()
        if free_bytes < self._reserve_bytes:
            raise self._full(f"{free_bytes} bytes are free")

    def _full(self, what: str) -> CapacityError:
        return CapacityError(
            f"{what} on the disk of the adapter store, which keeps {self._reserve_bytes} in reserve; "
            "make room, and upload again",
            reason="DISK_RESERVE",
        )
