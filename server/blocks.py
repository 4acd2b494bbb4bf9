"""Paged accounting of the key/value cache: which block belongs to whom. Knows no tensors and no requests."""


class BlockPool:
    """Hands out fixed-size blocks of cache positions. A block has one owner or is free."""

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
        self._free = list(range(block_count - 1, -1, -1))
        self._taken: set[int] = set()

    @property
    def free_blocks(self) -> int:
        return len(self._free)

    @property
    def used_ratio(self) -> float:
        """Share of blocks that have an owner, 0 to 1."""
        return len(self._taken) / self.block_count

    @property
    def total_tokens(self) -> int:
        return self.block_count * self.block_tokens

    @property
    def free_tokens(self) -> int:
        return len(self._free) * self.block_tokens

    def blocks_for(self, tokens: int) -> int:
        """How many blocks hold so many positions."""
        return -(-tokens // self.block_tokens)

    def allocate(self, tokens: int) -> list[int] | None:
        """Blocks for so many positions, or None (and nothing taken) if they are not there."""
        count = self.blocks_for(tokens)
        if count > len(self._free):
            return None
        blocks = [self._free.pop() for _ in range(count)]
        self._taken.update(blocks)
        return blocks

    def free(self, blocks: list[int]) -> None:
        """Gives blocks back.

        Raises:
            ValueError: a block is not taken; nothing is given back then.
        """
        strangers = [block for block in blocks if block not in self._taken]
        if strangers or len(set(blocks)) != len(blocks):
            raise ValueError(f"blocks {strangers or blocks} are not taken, or are given back twice")
        self._taken.difference_update(blocks)
        self._free.extend(reversed(blocks))
