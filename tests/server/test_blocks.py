"""The block pool never loses a block and never gives one to two owners."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from server.blocks import BlockPool

BLOCKS, TOKENS = 12, 4


class BlockPoolMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(BLOCKS, TOKENS)
        self.owners: list[list[int]] = []

    @rule(tokens=st.integers(0, BLOCKS * TOKENS + 5))
    def allocate(self, tokens: int) -> None:
        free = self.pool.free_blocks
        blocks = self.pool.allocate(tokens)
        needed = -(-tokens // TOKENS)
        if needed > free:
            assert blocks is None
            assert self.pool.free_blocks == free
        else:
            assert blocks is not None
            assert len(blocks) == needed
            self.owners.append(blocks)

    @precondition(lambda self: self.owners)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        self.pool.free(self.owners.pop(data.draw(st.integers(0, len(self.owners) - 1))))

    @precondition(lambda self: any(self.owners))
    @rule()
    def freeing_twice_is_refused_and_changes_nothing(self) -> None:
        blocks = next(blocks for blocks in self.owners if blocks)
        free = self.pool.free_blocks
        with pytest.raises(ValueError, match=r"not taken|twice"):
            self.pool.free([blocks[0], blocks[0]])
        assert self.pool.free_blocks == free

    @invariant()
    def every_block_has_one_place(self) -> None:
        owned = [block for blocks in self.owners for block in blocks]
        assert len(owned) == len(set(owned))
        assert set(owned) <= set(range(BLOCKS))
        assert self.pool.free_blocks == BLOCKS - len(owned)
        assert self.pool.used_ratio == len(owned) / BLOCKS


TestBlockPool = BlockPoolMachine.TestCase
TestBlockPool.settings = settings(max_examples=50, stateful_step_count=40, deadline=None)


def test_a_pool_without_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="needs blocks"):
        BlockPool(0, 16)
