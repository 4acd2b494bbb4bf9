"""The adapter store as the services use it: off the event loop, and in step with what the engine holds.

Knows neither messages of the wire nor files' contents.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from adapters.bundle import Bundle, read_bundle
from adapters.errors import AdapterError
from adapters.facts import AdapterRecord, AdapterState
from adapters.leases import Lease
from adapters.names import is_visible, owner_of
from adapters.retention import Collection, RetentionPolicy
from adapters.rows import Change, Entry
from adapters.store import AdapterStore
from adapters.tier import TierName, Whereabouts
from server.engine import Engine
from server.errors import PermissionDeniedError
from server.lora_info import LoraInfo
from server.merged import MergedAdapter
from server.metrics import OTHER_LABEL, ResidentAdapter
from server.services.replica import Replica
from server.services.resolutions import Resolutions
from server.services.workers import Workers

log = logging.getLogger(__name__)

_REMOVAL_RETRY_S = 1.0
_FETCH_ATTEMPTS = 3


def check_own(name: str, tenant: str | None) -> None:
    """
    Raises:
        PermissionDeniedError: the name is not the tenant's, to be changed; None may change all.
    """
    if tenant is not None and owner_of(name) != tenant:
        raise PermissionDeniedError(
            f"a token of tenant {tenant!r} changes only adapters named '{tenant}.…', and not {name!r}",
            "TENANT_NOT_ALLOWED",
        )


@dataclass(frozen=True, slots=True)
class Changes:
    """What is to change about a version; None leaves a thing as it is."""

    etag: str | None
    set_aliases: tuple[str, ...]
    remove_aliases: tuple[str, ...]
    pinned: bool | None
    labels: Mapping[str, str] | None
    aliases_from: int | None


class Catalogue:
    """Resolves references, and lets an adapter go only when nobody needs it any more; in one event loop."""

    def __init__(
        self,
        store: AdapterStore,
        engine: Engine,
        workers: Workers,
        replica: Replica | None = None,
        merged: MergedAdapter | None = None,
    ) -> None:
        """
        Args:
            replica: brings files that the store lists and does not have; None if it has them all.
            merged: what is folded into the base; None if it is bare.
        """
        self.store = store
        self.merged = merged
        self._replica = replica
        self._engine = engine
        self._workers = workers
        self._preparing: set[asyncio.Future[None]] = set()
        self._removals: dict[str, asyncio.Task[None]] = {}
        self._to_remove: set[str] = set()
        self._putting_away: dict[str, asyncio.Task[None]] = {}
        self._names: dict[str, str] = {}
        self._resolutions = Resolutions()
        self._pinned: set[str] = set()
        self._pinning = asyncio.Lock()
        if merged is not None:
            self._resolutions.remember(merged.label, merged.identity.digest)

    async def get(self, reference: str, *, tenant: str | None) -> AdapterRecord:
        """The version that a reference names for a tenant, in any state; None is no tenant, and sees all."""
        return await self._workers.run(self.store.get, reference, tenant)

    async def chat_template_of(self, record: AdapterRecord) -> str | None:
        """The template that the adapter brought; None if it brought none."""
        bundle = await self._workers.run(self._bundle_of, record.facts.digest)
        return bundle.chat_template if bundle else None

    async def ready(self, *, tenant: str | None) -> list[Entry]:
        """Every version that requests of a tenant may name."""
        return await self._workers.run(
            lambda: [entry for entry in self.store.ready() if is_visible(entry.name, tenant)]
        )

    @asynccontextmanager
    async def preparing(self, reference: str, *, tenant: str | None) -> AsyncIterator[AdapterRecord | None]:
        """The adapter of a request that is not submitted yet; None for an empty reference, which is the base.

        While the block runs, no deletion in this or another server takes away what was resolved, and its
        files are here.
        """
        over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._preparing.add(over)
        leases: list[Lease] = []
        try:
            record = None
            if reference:
                record = await self._held(reference, tenant, leases)
                self._names[record.facts.digest] = record.name
                self._resolutions.remember(reference, record.facts.digest)
            yield record
        finally:
            for lease in leases:
                lease.release()
            self._preparing.discard(over)
            over.set_result(None)

    @asynccontextmanager
    async def answering(self, reference: str, *, tenant: str | None) -> AsyncIterator[AdapterRecord | None]:
        """As `preparing`, and what is merged into the base may be named by digest, in the store or not: it is
        the base."""
        wanted = "" if self.is_merged(reference) else reference
        async with self.preparing(wanted, tenant=tenant) as record:
            yield record

    def is_merged(self, digest: str) -> bool:
        """Whether the content is in the base's weights, where nothing has to be loaded and nothing leaves."""
        return self.merged is not None and digest == self.merged.identity.digest

    def tiers(self) -> Mapping[str, TierName]:
        """Where every content is that is in memory."""
        tiers = self._engine.tiers()
        return tiers if self.merged is None else {**tiers, self.merged.identity.digest: "device"}

    def tier_of(self, digest: str) -> Whereabouts:
        """Where the content is now."""
        return "device" if self.is_merged(digest) else self._engine.residency_of(digest)

    async def _held(self, reference: str, tenant: str | None, leases: list[Lease]) -> AdapterRecord:
        for _ in range(_FETCH_ATTEMPTS):
            record = await self._workers.run(self._hold, reference, tenant, leases)
            if leases or self._replica is None:
                return record
            await self._replica.fetch(record.facts.digest)  # meanwhile the reference may get another meaning
        return await self._workers.run(self._hold, reference, tenant, leases)

    def keep(self, record: AdapterRecord) -> Lease | None:
        """Makes the files outlast `preparing`, inside which this is called; None if they are not there."""
        return self.store.keep(record.facts.digest)

    async def update(self, reference: str, changes: Changes, *, tenant: str | None) -> AdapterRecord:
        """The version after the changes, which come all or none."""
        record = await self._workers.run(self._update, reference, changes, tenant)
        if changes.pinned is not None:
            await self._sync_pin(record.facts.digest)
        return record

    async def delete(
        self, reference: str, *, all_versions: bool, etag: str | None, tenant: str | None
    ) -> list[AdapterRecord]:
        """Takes versions away from new requests, and their bytes away once no request uses them; which."""
        doomed, orphans = await self._workers.run(self._delete, reference, all_versions, etag, tenant)
        for digest in {record.facts.digest for record in doomed if record.pinned}:
            await self._sync_pin(digest)
        for digest in orphans:
            self._begin_removal(digest)
        return doomed

    async def collect(self, policy: RetentionPolicy, *, dry_run: bool) -> Collection:
        """Deletes what the policy lets go and removes what is left over; or only tells what that would be."""
        collection = await self._workers.run(self.store.collect, policy, dry_run=dry_run)
        if not dry_run:
            await self._workers.run(self.store.recover)
            for digest in {version.digest for version in collection.versions}:
                self._begin_removal(digest)
        return collection

    async def follow(self, changes: Sequence[Change]) -> None:
        """Does here what changes ask for, whichever server made them; harmless to repeat."""
        for change in changes:
            if change.is_orphan:
                self._begin_removal(change.digest)
            elif change.is_pinned != (change.digest in self._pinned):
                await self._sync_pin(change.digest)
            if change.record is not None and change.record.state is AdapterState.FAILED:
                self._begin_putting_away(change.digest)
            if change.is_pinned:
                self._names[change.digest] = change.name

    async def catch_up(self) -> None:
        """The same without knowing the changes: pins as they are, and nothing in memory that was deleted."""
        pinned = await self._workers.run(self.store.changes.pinned)
        self._names |= pinned
        for digest in pinned.keys() ^ self._pinned:
            await self._sync_pin(digest)
        residents = [resident.digest for resident in self._engine.residents()]
        for digest in await self._workers.run(self.store.changes.unreferenced, residents):
            self._begin_removal(digest)

    def _begin_removal(self, digest: str) -> None:
        self._to_remove.add(digest)
        if digest not in self._removals:
            self._removals[digest] = asyncio.create_task(self._remove(digest))

    async def _remove(self, digest: str) -> None:
        try:
            while digest in self._to_remove:  # again, if it was published and deleted meanwhile
                self._to_remove.discard(digest)
                await self._remove_unless_published(digest)
        except Exception:
            log.exception("adapter not removed digest=%s; the next start does it", digest)
        finally:
            del self._removals[digest]

    async def _remove_unless_published(self, digest: str) -> None:
        while await self._workers.run(self.store.changes.unreferenced, [digest]):
            await self._sync_pin(digest)
            # Whoever resolved it before the deletion has submitted by then, and the engine knows of it.
            if self._preparing:
                await asyncio.wait(self._preparing)
            await self._engine.forget(digest)
            self._names.pop(digest, None)
            self._resolutions.forget(digest)
            if await self._workers.run(self.store.remove_blob, digest):
                log.info("adapter removed digest=%s", digest)
                return
            await asyncio.sleep(_REMOVAL_RETRY_S)  # another server's requests use it

    def _begin_putting_away(self, digest: str) -> None:
        if digest not in self._putting_away:
            self._putting_away[digest] = asyncio.create_task(self._put_away(digest))

    async def _put_away(self, digest: str) -> None:
        """Damaged files leave their place once no request of any server uses them."""
        try:
            while True:
                if await self._workers.run(self.store.put_away, digest):
                    return
                await asyncio.sleep(_REMOVAL_RETRY_S)  # until the requests that use it have ended
        except Exception:
            log.exception("damaged files stay where they are digest=%s; the next start moves them", digest)
        finally:
            del self._putting_away[digest]

    async def load_pinned(self) -> None:
        """Has every pinned adapter loaded, after a start; what does not fit is named in the log."""
        for digest in sorted(self._pinned, key=self._names.__getitem__):
            if self.is_merged(digest):
                continue
            name = self._names[digest]
            try:
                if self._replica is not None:
                    await self._replica.fetch(digest)
                newest = await self._workers.run(self.store.get, name)
                self._resolutions.remember(name, newest.facts.digest)
                await self._engine.load(digest)
            except AdapterError as error:
                log.warning("pinned adapter not loaded adapter=%s digest=%s: %s", name, digest, error)
            else:
                log.info("pinned adapter loaded adapter=%s digest=%s", name, digest)

    async def _sync_pin(self, digest: str) -> None:
        """A content is pinned while any version that has it is."""
        async with self._pinning:  # what is asked first is applied first
            pinned = await self._workers.run(self.store.changes.is_pinned, digest)
            await self._engine.pin(digest, pinned)
            (self._pinned.add if pinned else self._pinned.discard)(digest)

    def residents(self) -> list[ResidentAdapter]:
        """What is in memory, by name; any thread."""
        return [
            ResidentAdapter(
                self._names.get(resident.digest, OTHER_LABEL),
                resident.tier,
                resident.pinned,
                resident.size_bytes,
            )
            for resident in self._engine.residents()
        ]

    def lora_info(self) -> LoraInfo:
        """What a router needs to know, by the references that requests use; any thread."""
        on_device = {digest for digest, tier in self.tiers().items() if tier == "device"}
        return LoraInfo(
            self._engine.adapters_that_fit(),
            self._resolutions.references_to(on_device),
            self._resolutions.references_to(self._engine.awaited_adapters()),
        )

    # In a worker

    def _hold(self, reference: str, tenant: str | None, leases: list[Lease]) -> AdapterRecord:
        """Puts the lease into the caller's list, where it finds it even if it was cancelled meanwhile."""
        record, lease = self.store.hold(reference, tenant)
        if lease is not None:
            leases.append(lease)
        return record

    def _bundle_of(self, digest: str) -> Bundle | None:
        return read_bundle(self.store.path_of(digest))

    def _update(self, reference: str, changes: Changes, tenant: str | None) -> AdapterRecord:
        record = self.store.get(reference, tenant)
        check_own(record.name, tenant)
        return self.store.update(
            record.name,
            record.version,
            etag=changes.etag,
            set_aliases=changes.set_aliases,
            remove_aliases=changes.remove_aliases,
            pinned=changes.pinned,
            labels=changes.labels,
            aliases_from=changes.aliases_from,
        )

    def _delete(
        self, reference: str, all_versions: bool, etag: str | None, tenant: str | None
    ) -> tuple[list[AdapterRecord], list[str]]:
        if tenant is not None:
            check_own(self.store.get(reference, tenant).name, tenant)
        doomed = self.store.versions(reference) if all_versions else [self.store.get(reference)]
        return doomed, self.store.delete(reference, all_versions, etag)
