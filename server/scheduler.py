"""Decides what the next step computes: waiting → running → Batch. Knows neither torch nor grpc.

Decoding sequences go first, one token each; the rest of the token budget goes to chunks of prompts, oldest
first. A sequence is admitted when cache blocks for its whole length and a slot for its adapter are there, so
that nothing admitted ever has to be thrown out again.
"""

from collections import deque
from typing import Protocol

from server.batch import Batch, Row, arranged
from server.blocks import BlockPool
from server.sequence import Phase, Sequence


class AdapterGate(Protocol):
    """What admission needs of adapter residency."""

    def acquire(self, digest: str) -> int | None:
        """A slot holding the adapter, referenced until `release`; None while it is not there (load begun)."""

    def is_loading(self, digest: str) -> bool:
        """Whether its load is under way, so that waiting for it is bounded."""

    def release(self, digest: str) -> None:
        """Gives one reference back."""


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
    ) -> None:
        """
        Args:
            max_running: sequences with cache blocks at one time.
            max_batch_tokens: tokens of one step; at least max_running, so that every decode fits.
            prefill_chunk_tokens: tokens of one prompt in one step.
        """
        if max_batch_tokens < max_running:
            raise ValueError(f"max_batch_tokens {max_batch_tokens} is below max_running {max_running}")
        self.blocks = blocks
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self._adapters = adapters
        self._max_running = max_running
        self._max_batch_tokens = max_batch_tokens
        self._prefill_chunk_tokens = prefill_chunk_tokens

    def add(self, sequence: Sequence) -> None:
        """Queues a sequence; it will leave through `finish`."""
        self.waiting.append(sequence)

    def next_batch(self, now_s: float) -> Batch | None:
        """The next step's rows, or None if nothing can run now."""
        self._admit(now_s)
        rows = [Row(s, s.computed, 1) for s in self.running if s.pending == 1]
        budget = self._max_batch_tokens - len(rows)
        for sequence in self.running:
            if sequence.pending > 1 and budget > 0:
                count = min(sequence.pending, budget, self._prefill_chunk_tokens)
                rows.append(Row(sequence, sequence.computed, count))
                budget -= count
        return arranged(rows) if rows else None

    def commit(self, batch: Batch) -> None:
        """Records that a batch's keys and values are in the cache."""
        for row in batch.rows:
            row.sequence.computed = row.start + row.count

    def finish(self, sequence: Sequence) -> None:
        """Takes a sequence out, wherever it is, and gives back its blocks and its adapter."""
        if sequence.phase is Phase.WAITING:
            self.waiting.remove(sequence)
        elif sequence.phase is Phase.RUNNING:
            self.running.remove(sequence)
            self.blocks.free(sequence.blocks)
            sequence.blocks = []
            if sequence.digest is not None:
                self._adapters.release(sequence.digest)
        sequence.phase = Phase.FINISHED

    def unfinished(self) -> list[Sequence]:
        """Every sequence that is running or waiting."""
        return [*self.running, *self.waiting]

    def waiting_for(self, digest: str) -> list[Sequence]:
        """Sequences that cannot start before this adapter is on the device."""
        return [sequence for sequence in self.waiting if sequence.digest == digest]

    def _admit(self, now_s: float) -> None:
        for sequence in list(self.waiting):
            if len(self.running) >= self._max_running:
                return
            if self.blocks.blocks_for(sequence.max_total_tokens) > self.blocks.free_blocks:
                return  # in order: a long request must not starve behind short ones
            slot = self._slot_for(sequence, now_s)
            if slot is not None:
                self._start(sequence, slot, now_s)
            elif not self._adapters.is_loading(sequence.digest or ""):
                return  # no room for its adapter until others finish: later ones must not keep it out

    def _slot_for(self, sequence: Sequence, now_s: float) -> int | None:
        if sequence.digest is None:
            return 0
        slot = self._adapters.acquire(sequence.digest)
        if slot is None and sequence.adapter_wait_began_s is None:
            sequence.adapter_wait_began_s = now_s
        if slot is not None and sequence.adapter_wait_began_s is not None:
            sequence.adapter_wait_s = now_s - sequence.adapter_wait_began_s
        return slot

    def _start(self, sequence: Sequence, slot: int, now_s: float) -> None:
        blocks = self.blocks.allocate(sequence.max_total_tokens)
        assert blocks is not None, "admission checked that they are free"
        sequence.slot, sequence.blocks = slot, blocks
        sequence.phase, sequence.admitted_s = Phase.RUNNING, now_s
        self.waiting.remove(sequence)
        self.running.append(sequence)
