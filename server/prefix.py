"""Keys of cache blocks: equal keys mean equal keys and values. Knows no pool and no tensors.

What a block holds depends on every token up to its end, on the adapter and its scale. Salt and tenant
are no part of that: they keep others from finding out, by how fast an answer begins, what somebody has asked.
The server knows the tenant; the salt is the client's word, and separates within a tenant only.
"""

import hashlib
from array import array
from collections.abc import Sequence
from typing import NamedTuple

_DOMAIN = b"quickchange keys and values 1"


class BlockKey(NamedTuple):
    """What a full block holds.

    Attributes:
        adapter: content digest; empty for the base.
        content: SHA-256 over adapter, scale, salt, tenant and all tokens up to the block's end.
    """

    adapter: str
    content: bytes


class PrefixChain:
    """The keys of one sequence's full blocks, computed as they are asked for; its tokens only grow."""

    def __init__(self, adapter: str, scale: float, salt: str, block_tokens: int, tenant: str = "") -> None:
        self._adapter = adapter
        self._block_tokens = block_tokens
        self._keys: list[BlockKey] = []
        # Lengths first: no choice of salt can look like another adapter, or like another tenant.
        fields = [_DOMAIN, adapter.encode(), scale.hex().encode(), salt.encode(), tenant.encode()]
        framed = b"".join(len(field).to_bytes(4, "big") + field for field in fields)
        self._tip = hashlib.sha256(framed).digest()

    def keys(self, token_ids: Sequence[int], count: int) -> list[BlockKey]:
        """Keys of the first `count` blocks; token_ids must reach that far."""
        size = self._block_tokens
        for index in range(len(self._keys), count):
            tokens = array("I", token_ids[index * size : (index + 1) * size])
            assert len(tokens) == size, "only full blocks have keys"
            self._tip = hashlib.sha256(self._tip + tokens.tobytes()).digest()
            self._keys.append(BlockKey(self._adapter, self._tip))
        return self._keys[:count]
