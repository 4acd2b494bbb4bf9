"""The scheduler against a model of what it may do: budgets, order, no starvation, no leak, no wrong reuse."""

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from server.batch import Batch
from server.blocks import BlockPool
from server.request import AdapterIdentity, Request, SamplingParams
from server.scheduler import Scheduler
from server.sequence import Phase, Sequence
from tests.server.gates import OneLoadAtATime

MAX_RUNNING, MAX_TOKENS, CHUNK = 4, 9, 5
BLOCKS, BLOCK_TOKENS = 10, 4
LONGEST = BLOCKS * BLOCK_TOKENS


def sequence_of(
    prompt: tuple[int, ...], new: int, adapter: int | None = None, *, priority: int = 0, salt: str = ""
) -> Sequence:
    identity = None if adapter is None else AdapterIdentity(f"a{adapter}", 1, str(adapter))
    params = SamplingParams(max_new_tokens=new)
    request = Request("r", prompt, params, identity, priority=priority, cache_salt=salt)
    return Sequence(request, min(len(prompt) + new, LONGEST), 0.0)


def scheduler_of(gate: OneLoadAtATime, blocks: int = BLOCKS, running: int = MAX_RUNNING) -> Scheduler:
    return Scheduler(
        BlockPool(blocks, BLOCK_TOKENS),
        gate,
        max_running=running,
        max_batch_tokens=MAX_TOKENS,
        prefill_chunk_tokens=CHUNK,
        priority_aging_s=10.0,
    )


class Cache:
    """What the tensors would hold: for each position of each block, who may read it."""

    def __init__(self) -> None:
        self.written: dict[tuple[int, int], tuple[str, str, tuple[int, ...]]] = {}

    def run(self, batch: Batch) -> None:
        """Writes what each row computes, and checks everything it reads."""
        for row in batch.rows:
            sequence = row.sequence
            for position in range(row.start + row.count):
                place = sequence.blocks[position // BLOCK_TOKENS], position % BLOCK_TOKENS
                meant = (
                    sequence.client,
                    sequence.request.cache_salt,
                    tuple(sequence.token_ids[: position + 1]),
                )
                if position >= row.start:
                    self.written[place] = meant
                assert self.written[place] == meant


class SchedulerMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0
        self.gate = OneLoadAtATime()
        self.scheduler = scheduler_of(self.gate)
        self.pool = self.scheduler.blocks
        self.cache = Cache()
        self.alive: list[Sequence] = []

    @rule(
        prompt=st.lists(st.integers(0, 1), min_size=1, max_size=20),
        new=st.integers(1, 25),
        adapter=st.sampled_from([None, 0, 1, 2, 3]),
        priority=st.sampled_from([0, 0, 0, 1, -2]),
        salt=st.sampled_from(["", "s"]),
    )
    def submit(self, prompt: list[int], new: int, adapter: int | None, priority: int, salt: str) -> None:
        sequence = sequence_of(tuple(prompt), new, adapter, priority=priority, salt=salt)
        sequence.submitted_s = self.now_s
        self.alive.append(sequence)
        self.scheduler.add(sequence)

    @rule()
    def load(self) -> None:
        self.gate.finish_load()

    @rule(seconds=st.floats(0.0, 30.0))
    def wait(self, seconds: float) -> None:
        self.now_s += seconds

    @rule(steps=st.integers(1, 5))
    def step(self, steps: int) -> None:
        for _ in range(steps):
            self.run_step()

    def run_step(self) -> None:
        batch = self.scheduler.next_batch(self.now_s)
        if batch is None:
            return
        self.check(batch)
        self.cache.run(batch)
        self.scheduler.commit(batch)
        for row in batch.rows:
            sequence = row.sequence
            if sequence.pending == 0:
                self.scheduler.accepted(sequence)
                sequence.take(len(sequence.token_ids) % 2)
                if len(sequence.token_ids) >= sequence.max_total_tokens:
                    self.end(sequence)

    def check(self, batch: Batch) -> None:
        assert batch.token_count <= MAX_TOKENS
        assert len({id(row.sequence) for row in batch.rows}) == len(batch.rows)
        decodes = [row.is_decode for row in batch.rows]
        assert decodes == sorted(decodes, reverse=True)
        for row in batch.rows:
            assert row.sequence.phase is Phase.RUNNING
            assert row.start == row.sequence.computed
            assert 1 <= row.count <= CHUNK
            assert len(row.sequence.blocks) * BLOCK_TOKENS >= row.start + row.count
        decoding = {id(s) for s in self.scheduler.running if s.pending == 1}
        assert decoding <= {id(row.sequence) for row in batch.rows}, "a decoding sequence must never wait"

    @precondition(lambda self: self.alive)
    @rule(data=st.data(), spoiled=st.booleans())
    def cancel(self, data: st.DataObject, spoiled: bool) -> None:
        self.end(data.draw(st.sampled_from(self.alive)), spoiled=spoiled)

    def end(self, sequence: Sequence, *, spoiled: bool = False) -> None:
        held = list(sequence.blocks)
        emptied = self.scheduler.finish(sequence, spoiled=spoiled)
        assert all(self.pool.owners_of(block) == 0 for block in emptied)
        if spoiled:
            assert set(emptied) == {block for block in held if self.pool.owners_of(block) == 0}
        self.alive.remove(sequence)

    @invariant()
    def accounts_balance(self) -> None:
        running = self.scheduler.running
        owned = Counter(block for sequence in running for block in sequence.blocks)
        assert all(self.pool.owners_of(block) == owned[block] for block in range(BLOCKS))
        assert self.pool.free_blocks == BLOCKS - len(owned)
        references = sum(self.gate.resident.values())
        assert references == sum(s.digest is not None for s in running)
        assert len(running) <= MAX_RUNNING
        assert sorted(map(id, self.scheduler.unfinished())) == sorted(map(id, self.alive))
        assert len(self.scheduler.waiting) == len(self.alive) - len(running)
        for sequence in self.scheduler.waiting:
            assert sequence.phase is Phase.WAITING
            assert not sequence.blocks

    def teardown(self) -> None:
        """Whatever happened, everything that is left finishes in bounded time."""
        for _ in range(80 * (len(self.alive) + 1)):
            self.gate.finish_load()
            self.now_s += 0.1
            self.run_step()
        assert not self.alive
        assert self.pool.free_blocks == BLOCKS
        assert sum(self.gate.resident.values()) == 0


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(max_examples=150, stateful_step_count=50, deadline=None)


def run_step(scheduler: Scheduler, now_s: float = 0.0) -> list[Sequence]:
    """One step, whose tokens are all 1; returns the sequences that it ended."""
    ended = []
    batch = scheduler.next_batch(now_s)
    for row in batch.rows if batch else ():
        scheduler.commit(Batch((row,)))
        if row.sequence.pending == 0:
            scheduler.accepted(row.sequence)
            row.sequence.take(1)
            if len(row.sequence.token_ids) >= row.sequence.max_total_tokens:
                scheduler.finish(row.sequence)
                ended.append(row.sequence)
    return ended


def finish_all(scheduler: Scheduler, sequences: list[Sequence], now_s: float = 0.0) -> list[Sequence]:
    """Runs until nothing is left; returns the sequences in the order of their ends."""
    ended: list[Sequence] = []
    for _ in range(1000):
        ended += run_step(scheduler, now_s)
        if len(ended) == len(sequences):
            return ended
    raise AssertionError(f"{len(sequences) - len(ended)} never ended")


def test_a_loading_adapter_keeps_nobody_else_waiting() -> None:
    gate = OneLoadAtATime()
    scheduler = scheduler_of(gate)
    cold, warm = sequence_of((1, 2), 2, 0), sequence_of((1, 2), 2)
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


def test_equal_beginnings_are_computed_once() -> None:
    scheduler = scheduler_of(OneLoadAtATime())
    first, second = sequence_of(tuple(range(11)), 2), sequence_of((*range(9), 99, 98), 2)
    for sequence in (first, second):
        scheduler.add(sequence)
        finish_all(scheduler, [sequence])
    assert (first.cached_tokens, second.cached_tokens) == (0, 8)


def test_a_prompt_that_is_known_as_a_whole_still_computes_its_last_token() -> None:
    scheduler = scheduler_of(OneLoadAtATime())
    again = [sequence_of(tuple(range(8)), 2) for _ in range(2)]
    for sequence in again:
        scheduler.add(sequence)
        finish_all(scheduler, [sequence])
    assert again[1].cached_tokens == 4


@pytest.mark.parametrize(
    "other",
    [
        sequence_of(tuple(range(11)), 2, 0),
        sequence_of(tuple(range(11)), 2, salt="another tenant"),
        sequence_of((99, *range(1, 11)), 2),
    ],
)
def test_another_adapter_salt_or_beginning_shares_nothing(other: Sequence) -> None:
    gate = OneLoadAtATime()
    gate.resident["0"] = 0
    scheduler = scheduler_of(gate)
    mine = sequence_of(tuple(range(11)), 2)
    for sequence in (mine, other):
        scheduler.add(sequence)
        finish_all(scheduler, [sequence])
    assert other.cached_tokens == 0


def test_when_blocks_run_out_the_youngest_gives_way_and_all_end() -> None:
    scheduler = scheduler_of(OneLoadAtATime(), blocks=6)
    sequences = [sequence_of((number, 1, 1), 17) for number in range(3)]
    for sequence in sequences:
        scheduler.add(sequence)
    assert finish_all(scheduler, sequences)[0] is sequences[0]
    assert scheduler.preemptions > 0
    assert scheduler.blocks.free_blocks == 6


def test_the_urgent_takes_the_place_of_the_less_urgent() -> None:
    scheduler = scheduler_of(OneLoadAtATime(), running=1)
    low, high = sequence_of((1, 2), 9), sequence_of((3, 4), 2, priority=1)
    scheduler.add(low)
    scheduler.next_batch(0.0)
    scheduler.add(high)
    assert finish_all(scheduler, [low, high]) == [high, low]


def test_waiting_long_enough_makes_urgent() -> None:
    scheduler = scheduler_of(OneLoadAtATime(), running=1)
    old, urgent = sequence_of((1, 2), 2), sequence_of((3, 4), 2, priority=1)
    urgent.submitted_s = 25.0
    scheduler.add(urgent)
    scheduler.add(old)
    assert finish_all(scheduler, [old, urgent], now_s=25.0) == [old, urgent]


def test_a_busy_adapter_cannot_starve_another() -> None:
    gate = OneLoadAtATime()
    gate.resident |= {"0": 0, "1": 0}
    scheduler = scheduler_of(gate, running=2)
    busy = [sequence_of((number, 5), 4, 0) for number in range(20)]
    rare = sequence_of((1, 2), 4, 1)
    for sequence in (*busy, rare):
        scheduler.add(sequence)
    ended = finish_all(scheduler, [*busy, rare])
    assert ended.index(rare) <= 3


def test_adapters_in_use_make_room_for_one_that_has_none() -> None:
    """Two adapters always have requests, a third needs the place of one of them."""
    gate = OneLoadAtATime(room=2)
    gate.resident |= {"0": 0, "1": 0}
    scheduler = scheduler_of(gate, running=4)
    busy = [sequence_of((number, 5), 4, number % 2) for number in range(40)]
    third = sequence_of((1, 2), 4, 2)
    for sequence in (*busy[:4], third, *busy[4:]):
        scheduler.add(sequence)
    ended: list[Sequence] = []
    while third not in ended:
        assert len(ended) < 20, "the third adapter waited for the other two to run dry"
        ended += run_step(scheduler)
        gate.finish_load()


def test_small_adapters_do_not_take_the_room_that_a_large_one_waits_for() -> None:
    """There is always a request for some small adapter that is not there, and room for one of them."""
    gate = OneLoadAtATime(room=3, sizes={"9": 2})
    scheduler = scheduler_of(gate, running=4)
    small = [sequence_of((number, 5), 4, number % 5) for number in range(60)]
    large = sequence_of((1, 2), 4, 9)
    for sequence in (*small[:5], large, *small[5:]):
        scheduler.add(sequence)
    ended: list[Sequence] = []
    while large not in ended:
        assert len(ended) < 40, "the large adapter waited for the small ones to run dry"
        ended += run_step(scheduler)
        gate.finish_load()


def test_while_one_adapter_waits_for_room_no_other_is_loaded() -> None:
    gate = OneLoadAtATime(room=2, sizes={"9": 2})
    gate.resident["0"] = 0
    scheduler = scheduler_of(gate)
    for adapter in (0, 9, 1):
        scheduler.add(sequence_of((1, 2), 9, adapter))
    scheduler.next_batch(0.0)
    assert gate.loading is None


def test_who_waits_for_a_place_has_its_adapter_loaded_meanwhile() -> None:
    gate = OneLoadAtATime(room=2)
    gate.resident["0"] = 0
    scheduler = scheduler_of(gate, running=1)
    first, same, cold = sequence_of((1, 2), 5, 0), sequence_of((3, 4), 2, 0), sequence_of((5, 6), 2, 1)
    base = sequence_of((7, 8), 2)
    for sequence in (first, base, same, cold):
        scheduler.add(sequence)
    run_step(scheduler)
    assert scheduler.running == [first]
    assert gate.loading == "1"
    gate.finish_load()
    ended = finish_all(scheduler, [first, base, same, cold])
    assert ended[0] is first
    assert cold.adapter_wait_s == 0.0
    assert cold.adapter_wait_began_s is None, "its turn came before its adapter"


def test_no_look_ahead_drives_out_what_is_needed_sooner() -> None:
    gate = OneLoadAtATime(room=2)
    gate.resident |= {"0": 0, "1": 0}
    scheduler = scheduler_of(gate, running=1)
    for adapter in (0, 1, 2):
        scheduler.add(sequence_of((adapter, 9), 20, adapter))
    for _ in range(5):
        run_step(scheduler)
        assert (set(gate.resident), gate.loading) == ({"0", "1"}, None)


def test_no_look_ahead_takes_the_room_that_another_waits_for() -> None:
    """The large one waits until the running ones have made room; a small one behind it would fit at once."""
    gate = OneLoadAtATime(room=3, sizes={"9": 2})
    gate.resident |= {"0": 0, "1": 0}
    scheduler = scheduler_of(gate, running=2)
    for adapter in (0, 1):
        scheduler.add(sequence_of((adapter, 9), 20, adapter))
    run_step(scheduler)
    for adapter in (9, 2):
        scheduler.add(sequence_of((adapter, 9), 2, adapter))
    scheduler.add(sequence_of((1, 9), 2))
    for _ in range(3):
        run_step(scheduler)
        assert gate.loading is None


def test_a_given_answer_is_judged_a_few_tokens_at_a_time() -> None:
    """However large a step may be: every judged token costs a look at the whole vocabulary."""
    scheduler = Scheduler(
        BlockPool(40, BLOCK_TOKENS),
        OneLoadAtATime(),
        max_running=MAX_RUNNING,
        max_batch_tokens=200,
        prefill_chunk_tokens=200,
    )
    judging = SamplingParams(max_new_tokens=50, logprobs=0, ignore_eos=True)
    sequence = Sequence(Request("r", tuple(range(60)), judging, given=tuple(range(50))), 110, 0.0)
    scheduler.add(sequence)
    steps = []
    while sequence.output_length < 50:
        batch = scheduler.next_batch(0.0)
        assert batch is not None
        (row,) = batch.rows
        steps.append((row.count, row.samples))
        scheduler.commit(batch)
        for _ in range(row.samples):
            scheduler.accepted(sequence)
            sequence.take(0)
    assert steps == [(75, 16), (16, 16), (16, 16), (2, 2)]
