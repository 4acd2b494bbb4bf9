"""The block pool loses no block, gives none to two owners by mistake, and never mixes contents up."""

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from server.blocks import BlockPool
from server.prefix import BlockKey

BLOCKS, TOKENS = 12, 4


def key(number: int) -> BlockKey:
    return BlockKey(f"adapter{number % 2}", bytes([number]))


class BlockPoolMachine(RuleBasedStateMachine):
    """`content` is what a test's cache would hold: the key whose values were written last, or None."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(BLOCKS, TOKENS)
        self.owners: list[list[int]] = []
        self.content: dict[int, BlockKey | None] = {}

    @rule(count=st.integers(0, BLOCKS + 2))
    def allocate(self, count: int) -> None:
        free = self.pool.free_blocks
        blocks = self.pool.allocate(count)
        assert (blocks is None) == (count > free)
        if blocks is None:
            assert self.pool.free_blocks == free
            return
        assert not any(block in owned for owned in self.owners for block in blocks)
        self.content.update(dict.fromkeys(blocks))  # the owner writes over what was there
        self.owners.append(blocks)

    @precondition(lambda self: any(self.owners))
    @rule(data=st.data(), number=st.integers(0, 5))
    def publish(self, data: st.DataObject, number: int) -> None:
        block = data.draw(st.sampled_from([block for owned in self.owners for block in owned]))
        if self.content[block] is None:
            self.content[block] = key(number)
            self.pool.publish(block, key(number))

    @rule(numbers=st.lists(st.integers(0, 5), unique=True, max_size=4))
    def share(self, numbers: list[int]) -> None:
        blocks = self.pool.share([key(number) for number in numbers])
        assert [self.content[block] for block in blocks] == [key(number) for number in numbers[: len(blocks)]]
        self.owners.append(blocks)

    @precondition(lambda self: self.owners)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        blocks = self.owners.pop(data.draw(st.integers(0, len(self.owners) - 1)))
        for block in self.pool.release(blocks):
            assert self.pool.owners_of(block) == 0

    @rule(number=st.integers(0, 5))
    def forget_adapter(self, number: int) -> None:
        adapter = key(number).adapter
        self.pool.forget_adapter(adapter)
        for other in range(6):
            if key(other).adapter == adapter:
                assert self.pool.share([key(other)]) == []

    @precondition(lambda self: self.owners)
    @rule(data=st.data())
    def forget_a_spoiled_sequence(self, data: st.DataObject) -> None:
        blocks = data.draw(st.sampled_from(self.owners))
        self.pool.forget(blocks)
        for number in range(6):
            found = self.pool.share([key(number)])
            assert not set(found) & set(blocks)
            self.pool.release(found)

    @precondition(lambda self: any(self.owners))
    @rule()
    def releasing_twice_is_refused_and_changes_nothing(self) -> None:
        blocks = next(blocks for blocks in self.owners if blocks)
        free = self.pool.free_blocks
        with pytest.raises(ValueError, match=r"not taken|twice"):
            self.pool.release([blocks[0], blocks[0]])
        assert self.pool.free_blocks == free

    @invariant()
    def every_block_has_one_place(self) -> None:
        owned = Counter(block for blocks in self.owners for block in blocks)
        for block in range(BLOCKS):
            assert self.pool.owners_of(block) == owned[block]
        assert self.pool.free_blocks == BLOCKS - len(owned)
        assert self.pool.used_ratio == len(owned) / BLOCKS

    def teardown(self) -> None:
        for blocks in self.owners:
            self.pool.release(blocks)
        everything = self.pool.allocate(BLOCKS)
        assert everything is not None
        assert sorted(everything) == list(range(BLOCKS))
        assert self.pool.share([key(number) for number in range(6)]) == []


TestBlockPool = BlockPoolMachine.TestCase
TestBlockPool.settings = settings(max_examples=100, stateful_step_count=50, deadline=None)


def test_a_pool_without_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="needs blocks"):
        BlockPool(0, 16)


def test_kept_blocks_go_least_recently_used_and_a_prefix_from_its_end() -> None:
    pool = BlockPool(3, TOKENS)
    blocks = pool.allocate(3)
    assert blocks is not None
    for number, block in enumerate(blocks):
        pool.publish(block, key(number))
    pool.release(blocks)
    pool.allocate(1)
    assert pool.share([key(0), key(1), key(2)]) == blocks[:2]
