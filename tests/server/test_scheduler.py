"""The scheduler against a model of what it may do: budgets, order, no starvation, nothing leaked."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from server.blocks import BlockPool
from server.request import AdapterIdentity, Request, SamplingParams
from server.scheduler import Scheduler
from server.sequence import Phase, Sequence

DEVICE_ADAPTERS = 2
MAX_RUNNING, MAX_TOKENS, CHUNK = 4, 9, 5
BLOCKS, BLOCK_TOKENS = 16, 4


class OneLoadAtATime:
    """Adapter residency in miniature: room for two, a load takes until `finish_load`."""

    def __init__(self) -> None:
        self.resident: dict[str, int] = {}
        self.loading: str | None = None

    def acquire(self, digest: str) -> int | None:
        if digest in self.resident:
            self.resident[digest] += 1
            return int(digest) + 1
        if self.loading is None and len(self.resident) >= DEVICE_ADAPTERS:
            unused = [d for d, references in self.resident.items() if references == 0]
            if unused:
                del self.resident[unused[0]]
        if self.loading is None and len(self.resident) < DEVICE_ADAPTERS:
            self.loading = digest
        return None

    def is_loading(self, digest: str) -> bool:
        return digest == self.loading

    def release(self, digest: str) -> None:
        self.resident[digest] -= 1
        assert self.resident[digest] >= 0

    def finish_load(self) -> None:
        if self.loading is not None:
            self.resident[self.loading] = 0
            self.loading = None


def sequence_of(prompt: int, new: int, adapter: int | None) -> Sequence:
    identity = None if adapter is None else AdapterIdentity(f"a{adapter}", 1, str(adapter))
    request = Request("r", tuple(range(prompt)), SamplingParams(max_new_tokens=new), identity)
    return Sequence(request, prompt + new, 0.0)


class SchedulerMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.gate = OneLoadAtATime()
        self.pool = BlockPool(BLOCKS, BLOCK_TOKENS)
        self.scheduler = Scheduler(
            self.pool,
            self.gate,
            max_running=MAX_RUNNING,
            max_batch_tokens=MAX_TOKENS,
            prefill_chunk_tokens=CHUNK,
        )
        self.alive: list[Sequence] = []

    @rule(prompt=st.integers(1, 20), new=st.integers(1, 6), adapter=st.sampled_from([None, 0, 1, 2, 3]))
    def submit(self, prompt: int, new: int, adapter: int | None) -> None:
        sequence = sequence_of(prompt, new, adapter)
        self.alive.append(sequence)
        self.scheduler.add(sequence)

    @rule()
    def load(self) -> None:
        self.gate.finish_load()

    @rule()
    def step(self) -> None:
        self.run_step()

    def run_step(self) -> None:
        batch = self.scheduler.next_batch(0.0)
        if batch is None:
            return
        assert batch.token_count <= MAX_TOKENS
        assert len({id(row.sequence) for row in batch.rows}) == len(batch.rows)
        decodes = [row.is_decode for row in batch.rows]
        assert decodes == sorted(decodes, reverse=True)
        for row in batch.rows:
            assert row.sequence.phase is Phase.RUNNING
            assert row.start == row.sequence.computed
            assert 1 <= row.count <= CHUNK
        decoding = {id(s) for s in self.scheduler.running if s.pending == 1}
        assert decoding <= {id(row.sequence) for row in batch.rows}, "a decoding sequence must never wait"
        self.scheduler.commit(batch)
        for row in batch.rows:
            if row.sequence.pending == 0:
                row.sequence.token_ids.append(1)
                if len(row.sequence.token_ids) >= row.sequence.max_total_tokens:
                    self.end(row.sequence)

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        self.end(data.draw(st.sampled_from(self.alive)))

    def end(self, sequence: Sequence) -> None:
        self.scheduler.finish(sequence)
        self.alive.remove(sequence)

    @invariant()
    def accounts_balance(self) -> None:
        running = self.scheduler.running
        owned = [block for s in running for block in s.blocks]
        assert len(owned) == len(set(owned)) == BLOCKS - self.pool.free_blocks
        for sequence in running:
            assert len(sequence.blocks) * BLOCK_TOKENS >= sequence.max_total_tokens
        references = sum(self.gate.resident.values())
        assert references == sum(s.digest is not None for s in running)
        assert len(running) <= MAX_RUNNING
        assert sorted(map(id, self.scheduler.unfinished())) == sorted(map(id, self.alive))

    def teardown(self) -> None:
        """Whatever happened, everything that is left finishes in bounded time."""
        for _ in range(60 * (len(self.alive) + 1)):
            self.gate.finish_load()
            self.run_step()
        assert not self.alive
        assert self.pool.free_blocks == BLOCKS
        assert sum(self.gate.resident.values()) == 0


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_a_loading_adapter_keeps_nobody_else_waiting() -> None:
    gate = OneLoadAtATime()
    scheduler = Scheduler(
        BlockPool(BLOCKS, BLOCK_TOKENS), gate, max_running=4, max_batch_tokens=8, prefill_chunk_tokens=8
    )
    cold, warm = sequence_of(2, 2, 0), sequence_of(2, 2, None)
    scheduler.add(cold)
    scheduler.add(warm)
    batch = scheduler.next_batch(0.0)
    assert batch is not None
    assert [row.sequence for row in batch.rows] == [warm]
    gate.finish_load()
    batch = scheduler.next_batch(2.5)
    assert batch is not None
    assert {row.sequence for row in batch.rows} == {cold, warm}
    assert cold.adapter_wait_s == 2.5
