"""Paged accounting of the key/value cache: which block belongs to whom, and what can be used again.

Knows no tensors and no requests.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence

from server.prefix import BlockKey


class BlockPool:
    """Hands out fixed-size blocks of cache positions, and keeps full ones for whoever needs the same again.

    A block is empty, owned (by one sequence, or shared by several that read it), or kept: nobody's, but its
    content is known under a key. When no empty one is left, kept ones are given out again, least recently
    used first.
    """

    def __init__(self, block_count: int, block_tokens: int) -> None:
        """
        Args:
            block_count: blocks there are.
            block_tokens: positions per block.
        """
        if block_count < 1 or block_tokens < 1:
            raise ValueError(f"a pool needs blocks: got {block_count} of {block_tokens} tokens")
        self.block_count = block_count
        self.block_tokens = block_tokens
        self._empty = list(range(block_count - 1, -1, -1))
        self._owners: dict[int, int] = {}
        self._kept: OrderedDict[int, None] = OrderedDict()
        self._key_of: dict[int, BlockKey] = {}
        self._block_of: dict[BlockKey, int] = {}

    @property
    def free_blocks(self) -> int:
        """Blocks that can be had now, empty or kept."""
        return len(self._empty) + len(self._kept)

    @property
    def used_ratio(self) -> float:
        """Share of blocks that have an owner, 0 to 1."""
        return len(self._owners) / self.block_count

    @property
    def total_tokens(self) -> int:
        return self.block_count * self.block_tokens

    @property
    def free_tokens(self) -> int:
        return self.free_blocks * self.block_tokens

    def blocks_for(self, tokens: int) -> int:
        """How many blocks hold so many positions."""
        return -(-tokens // self.block_tokens)

    def owners_of(self, block: int) -> int:
        """How many sequences use a block."""
        return self._owners.get(block, 0)

    def allocate(self, count: int) -> list[int] | None:
        """So many blocks of unknown content, or None (and nothing taken) if they are not there."""
        if count > self.free_blocks:
            return None
        while len(self._empty) < count:
            block, _ = self._kept.popitem(last=False)
            self._forget_content(block)
            self._empty.append(block)
        blocks = [self._empty.pop() for _ in range(count)]
        self._owners.update(dict.fromkeys(blocks, 1))
        return blocks

    def share(self, keys: Iterable[BlockKey]) -> list[int]:
        """The blocks of the longest known run from the first key on, each with one more owner."""
        blocks = []
        for key in keys:
            block = self._block_of.get(key)
            if block is None:
                break
            self._kept.pop(block, None)
            self._owners[block] = self._owners.get(block, 0) + 1
            blocks.append(block)
        return blocks

    def publish(self, block: int, key: BlockKey) -> None:
        """Makes an owned block, whose content is complete, known. The first block under a key stays it."""
        if block not in self._owners:
            raise ValueError(f"block {block} has no owner")
        if key not in self._block_of and block not in self._key_of:
            self._block_of[key] = block
            self._key_of[block] = key

    def release(self, blocks: Sequence[int]) -> list[int]:
        """Takes one owner from each block; returns those that are empty now: neither owned nor kept.

        Raises:
            ValueError: a block has no owner; nothing is released then.
        """
        strangers = [block for block in blocks if block not in self._owners]
        if strangers or len(set(blocks)) != len(blocks):
            raise ValueError(f"blocks {strangers or blocks} are not taken, or are given back twice")
        emptied = []
        for block in reversed(blocks):  # the end of a prefix is given up before its beginning
            self._owners[block] -= 1
            if self._owners[block]:
                continue
            del self._owners[block]
            if block in self._key_of:
                self._kept[block] = None
            else:
                self._empty.append(block)
                emptied.append(block)
        return emptied

    def forget(self, blocks: Iterable[int]) -> None:
        """Makes the content of blocks unknown: whoever owns them keeps them, nobody gets them from now on."""
        for block in blocks:
            if block in self._key_of:
                self._forget_content(block)
            if block in self._kept:
                del self._kept[block]
                self._empty.append(block)

    def forget_adapter(self, adapter: str) -> list[int]:
        """Makes everything unknown that was computed with an adapter; returns the blocks."""
        blocks = [block for block, key in self._key_of.items() if key.adapter == adapter]
        self.forget(blocks)
        return blocks

    def _forget_content(self, block: int) -> None:
        del self._block_of[self._key_of.pop(block)]
