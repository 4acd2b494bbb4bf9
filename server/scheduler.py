"""Decides what the next step computes: waiting → running → Batch. Knows neither torch nor grpc.

Decoding sequences go first, one token each; the rest of the token budget goes to chunks of prompts. A
sequence is admitted when its adapter is on the device and there are blocks for the tokens it has; it gets
more as it grows. When none are left, the running sequence that is least urgent and youngest goes back to the
queue, and computes again later what is not in the prefix cache by then.
"""

from collections.abc import Sequence as Items
from collections.abc import Set
from dataclasses import dataclass, field
from typing import Final, Protocol

from server.batch import Batch, Row, arranged
from server.blocks import BlockPool
from server.fairness import FairShare
from server.prefix import BlockKey, PrefixChain
from server.queue import WaitingQueue
from server.sequence import Phase, Sequence

_JUDGED_TOKENS: Final = 16
"""Of a given answer in one step: each is a look at the whole vocabulary, for which everybody else waits."""


class AdapterGate(Protocol):
    """What admission needs of adapter residency."""

    def acquire(self, digest: str) -> int | None:
        """A slot holding the adapter, referenced until `release`; None while it is not there (load begun)."""

    def is_resident(self, digest: str) -> bool:
        """Whether `acquire` would give a slot."""

    def is_loading(self, digest: str) -> bool:
        """Whether its load is under way, so that waiting for it is bounded."""

    def release(self, digest: str) -> None:
        """Gives one reference back."""

    def prepare(self, order: Items[str]) -> None:
        """Begins loads of adapters that are needed soon, the first soonest, as far as there is room."""

    def in_the_way(self, digest: str, order: Items[str]) -> Set[str]:
        """Adapters in use that have to go before this one fits, chosen in this order."""


@dataclass(slots=True)
class _Admission:
    """What was found out while looking for whom to admit.

    Attributes:
        passed: adapters that cannot start a sequence now.
        is_room_awaited: some adapter does not fit before others have gone.
    """

    passed: set[str] = field(default_factory=set)
    is_room_awaited: bool = False


class Scheduler:
    """Holds every unfinished sequence. All methods belong to the engine's thread."""

    def __init__(
        self,
        blocks: BlockPool,
        adapters: AdapterGate,
        *,
        max_running: int,
        max_batch_tokens: int,
        prefill_chunk_tokens: int,
        priority_aging_s: float = 10.0,
        prefix_cache: bool = True,
    ) -> None:
        """
        Args:
            max_running: sequences with cache blocks at one time.
            max_batch_tokens: tokens of one step; at least max_running, so that every decode fits.
            prefill_chunk_tokens: tokens of one prompt in one step.
            priority_aging_s: waiting so long is worth one priority.
            prefix_cache: whether full blocks are kept for others that begin alike.
        """
        if max_batch_tokens < max_running:
            raise ValueError(f"max_batch_tokens {max_batch_tokens} is below max_running {max_running}")
        self.blocks = blocks
        self.running: list[Sequence] = []
        self.preemptions = 0
        self._shares = FairShare()
        self.waiting = WaitingQueue(self._shares, priority_aging_s)
        self._adapters = adapters
        self._max_running = max_running
        self._max_batch_tokens = max_batch_tokens
        self._prefill_chunk_tokens = prefill_chunk_tokens
        self._prefix_cache = prefix_cache
        self._next_number = 0

    def add(self, sequence: Sequence) -> None:
        """Queues a sequence; it will leave through `finish`."""
        sequence.number = self._next_number
        self._next_number += 1
        if self._prefix_cache:
            request = sequence.request
            sequence.chain = PrefixChain(
                sequence.client,
                request.adapter_scale,
                request.cache_salt,
                self.blocks.block_tokens,
                request.tenant,
            )
        self._shares.join(sequence.client)
        sequence.phase = Phase.WAITING
        self.waiting.push(sequence)

    def next_batch(self, now_s: float) -> Batch | None:
        """The next step's rows, or None if nothing can run now."""
        self._grow()
        self._admit(now_s)
        rows = [Row(s, s.computed, 1) for s in self.running if s.pending == 1]
        budget = self._max_batch_tokens - len(rows)
        for sequence in self.running:
            if sequence.pending > 1 and budget > 0:
                count = min(sequence.pending, budget, self._prefill_chunk_tokens, _most_of(sequence))
                rows.append(Row(sequence, sequence.computed, count))
                budget -= count
        return arranged(rows) if rows else None

    def commit(self, batch: Batch) -> None:
        """Records that a batch's keys and values are in the cache."""
        for row in batch.rows:
            row.sequence.computed = row.start + row.count

    def accepted(self, sequence: Sequence) -> None:
        """Records that the newest token came from finite logits: what led to it may serve others too."""
        self._shares.charge(sequence.client, answer_tokens=1)
        full = sequence.computed // self.blocks.block_tokens
        if sequence.chain is None or full == sequence.published:
            return
        keys = sequence.chain.keys(sequence.token_ids, full)
        for index in range(sequence.published, full):
            self.blocks.publish(sequence.blocks[index], keys[index])
        sequence.published = full

    def finish(self, sequence: Sequence, *, spoiled: bool = False) -> list[int]:
        """Takes a sequence out, wherever it is, and gives back its blocks and its adapter.

        Args:
            spoiled: its keys and values may be wrong, so that nobody may use them again.

        Returns:
            Blocks that are empty now.
        """
        emptied: list[int] = []
        if sequence.phase is Phase.WAITING:
            self.waiting.remove(sequence)
        elif sequence.phase is Phase.RUNNING:
            if spoiled:
                self.blocks.forget(sequence.blocks)
            emptied = self._stop(sequence)
        if sequence.phase in (Phase.WAITING, Phase.RUNNING):
            self._shares.leave(sequence.client)
        sequence.phase = Phase.FINISHED
        return emptied

    def unfinished(self) -> list[Sequence]:
        """Every sequence that is running or waiting."""
        return [*self.running, *self.waiting]

    def waiting_for(self, digest: str) -> list[Sequence]:
        """Sequences that cannot start before this adapter is on the device."""
        return [sequence for sequence in self.waiting if sequence.digest == digest]

    # Running

    def _grow(self) -> None:
        """Gives every running sequence a block for its newest token; those that get none go back."""
        for sequence in sorted(self.running, key=_urgency):
            while sequence.phase is Phase.RUNNING and self._lacks_block(sequence):
                fresh = self.blocks.allocate(1)
                if fresh is None:
                    self._preempt(max(self.running, key=_urgency))
                else:
                    sequence.blocks += fresh

    def _lacks_block(self, sequence: Sequence) -> bool:
        return len(sequence.blocks) < self.blocks.blocks_for(len(sequence.token_ids))

    def _preempt(self, sequence: Sequence) -> None:
        self._stop(sequence)
        sequence.phase, sequence.computed, sequence.published = Phase.WAITING, 0, 0
        sequence.preemptions += 1
        self.preemptions += 1
        self.waiting.push(sequence)

    def _stop(self, sequence: Sequence) -> list[int]:
        self.running.remove(sequence)
        emptied = self.blocks.release(sequence.blocks)
        sequence.blocks = []
        if sequence.digest is not None:
            self._adapters.release(sequence.digest)
        return emptied

    # Admission

    def _admit(self, now_s: float) -> None:
        admission = _Admission()
        while self._admit_one(admission, now_s):
            pass  # who goes next may be another adapter now

    def _admit_one(self, admission: "_Admission", now_s: float) -> bool:
        """Starts whoever goes first of those that can; False if nobody does."""
        ranked = self.waiting.ranked(now_s, admission.passed)
        for place, sequence in enumerate(ranked):
            if not self._may_take_a_slot(sequence, admission):
                continue
            slot = self._slot_for(sequence, now_s)
            if slot is not None:
                if self._start(sequence, slot, now_s):
                    return True
                # No other may start either: a long one must not starve behind short ones.
                if not admission.is_room_awaited:
                    self._prepare(ranked[place:])
                return False
            admission.passed.add(sequence.client)
            if not self._adapters.is_loading(sequence.client):
                # No room for its adapter: some in use take no more requests until theirs have ended.
                admission.passed |= self._adapters.in_the_way(sequence.client, self._by_service())
                admission.is_room_awaited = True
        return False

    def _may_take_a_slot(self, sequence: Sequence, admission: "_Admission") -> bool:
        """While an adapter waits for room no other is loaded: a small one would take what it waits for."""
        if sequence.client in admission.passed:
            return False
        return (
            sequence.digest is None
            or not admission.is_room_awaited
            or self._adapters.is_resident(sequence.digest)
        )

    def _prepare(self, ranked: Items[Sequence]) -> None:
        """Has adapters loaded while those who need them wait for their turn; no more than may run at once."""
        digests = [sequence.digest for sequence in ranked if sequence.digest is not None]
        self._adapters.prepare(digests[: self._max_running])

    def _by_service(self) -> list[str]:
        """Adapters in use, the one that had most service first."""
        used = {sequence.client for sequence in self.running}
        return sorted(used, key=self._shares.served, reverse=True)

    def _slot_for(self, sequence: Sequence, now_s: float) -> int | None:
        if sequence.digest is None:
            return 0
        slot = self._adapters.acquire(sequence.digest)
        if slot is None and sequence.adapter_wait_began_s is None:
            sequence.adapter_wait_began_s = now_s
        if slot is not None and sequence.adapter_wait_began_s is not None:
            sequence.adapter_wait_s += now_s - sequence.adapter_wait_began_s
            sequence.adapter_waits.append((sequence.adapter_wait_began_s, now_s))
            sequence.adapter_wait_began_s = None
        return slot

    def _start(self, sequence: Sequence, slot: int, now_s: float) -> bool:
        """Moves a waiting sequence to the running ones, or, if no place can be made, gives its slot back."""
        while not self._place(sequence):
            victim = max(self.running, key=_urgency, default=None)
            if victim is None or victim.urgency >= sequence.request.priority:
                if sequence.digest is not None:
                    self._adapters.release(sequence.digest)
                return False
            self._preempt(victim)
        sequence.slot, sequence.phase = slot, Phase.RUNNING
        sequence.urgency = self.waiting.aged_priority(sequence, now_s)
        if sequence.admitted_s is None:
            sequence.admitted_s = now_s
            sequence.cached_tokens = sequence.computed
            uncached = sequence.prompt_length - sequence.computed
            self._shares.charge(sequence.client, prompt_tokens=uncached)
        self.waiting.remove(sequence)
        self.running.append(sequence)
        return True

    def _place(self, sequence: Sequence) -> bool:
        """Takes blocks for the tokens a sequence has; False, and nothing taken, if they are not there.

        One block per running sequence stays free, so that the next steps do not throw out whom this lets in.
        """
        if len(self.running) >= self._max_running:
            return False
        shared = self.blocks.share(self._known_keys(sequence))
        missing = self.blocks.blocks_for(len(sequence.token_ids)) - len(shared)
        if missing + len(self.running) > self.blocks.free_blocks:
            self.blocks.release(shared)
            return False
        fresh = self.blocks.allocate(missing)
        assert fresh is not None, "just seen to be free"
        sequence.blocks = shared + fresh
        sequence.computed = len(shared) * self.blocks.block_tokens
        sequence.published = len(shared)
        return True

    def _known_keys(self, sequence: Sequence) -> list[BlockKey]:
        """Keys of its full blocks up to the last token reported: from that one on it must be computed."""
        if sequence.chain is None:
            return []
        full = (sequence.reported - 1) // self.blocks.block_tokens
        return sequence.chain.keys(sequence.token_ids, full)


def _most_of(sequence: Sequence) -> int:
    """Tokens of it in one step, as far as its own nature bounds them."""
    if not sequence.request.given:
        return sequence.pending
    return max(0, sequence.reported - 1 - sequence.computed) + _JUDGED_TOKENS


def _urgency(sequence: Sequence) -> tuple[int, int]:
    """Small for what must go on, large for what can wait."""
    return -sequence.urgency, sequence.number
