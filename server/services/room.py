"""Whether store and disk have room for what is being uploaded. Knows no calls."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from adapters.errors import CapacityError
from adapters.names import owner_of
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

    def admit(self, draft: Draft, adapter_bytes: int | None) -> None:
        """Lets an upload begin, or go on.

        Args:
            adapter_bytes: what its tenant may have in all; None is no limit.

        Raises:
            CapacityError: a quota or the disk has no room for all of it.
        """
        self._store.check_quota(draft.plan.name, draft.plan.files, draft.shelved_bytes)
        with self._lock:
            if adapter_bytes is not None:
                self._check_tenant(draft, adapter_bytes)
            free_bytes = self._store.free_bytes() - sum(other.remaining_bytes for other in self._drafts)
            if free_bytes - draft.remaining_bytes < self._reserve_bytes:
                raise self._full(
                    f"{draft.remaining_bytes} bytes are to come, and {max(0, free_bytes)} are free"
                )
            self._drafts.add(draft)

    def _check_tenant(self, draft: Draft, adapter_bytes: int) -> None:
        """What is under way counts as if it were there: both of two uploads at once may come to their end."""
        tenant = owner_of(draft.plan.name)
        assert tenant is not None, "only tenants have this limit, and their names are checked before"
        under_way = sum(
            other.plan.size_bytes for other in self._drafts if owner_of(other.plan.name) == tenant
        )
        there = self._store.bytes_of_tenant(tenant) + under_way
        is_too_much = there + draft.plan.size_bytes > adapter_bytes
        if is_too_much and not self._store.has_version_of(draft.plan.name, draft.plan.files):
            raise CapacityError(
                f"tenant {tenant!r} has {there} bytes, this upload {draft.plan.size_bytes}, and the "
                f"token allows {adapter_bytes}; delete some with `quickchange adapters rm`",
                reason="TENANT_QUOTA",
            )

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
