"""Owns which examples share a sequence. Knows lengths only."""

import random
from bisect import bisect_left, insort
from collections.abc import Sequence

from training.encoding import Example

Pack = tuple[Example, ...]
"""Examples that are computed as one sequence, none of which sees another."""


def packed(examples: Sequence[Example], max_length: int, seed: int) -> tuple[Pack, ...]:
    """Every example in exactly one pack of at most max_length tokens, in few packs.

    Best fit, longest first: each goes where it leaves the least room. The seed decides between equal lengths.
    """
    order = list(examples)
    random.Random(seed).shuffle(order)  # noqa: S311  an order is no secret
    order.sort(key=lambda example: -len(example.token_ids))
    packs: list[list[Example]] = []
    rooms: list[tuple[int, int]] = []  # ascending: tokens that are free, in which pack
    for example in order:
        length = len(example.token_ids)
        found = bisect_left(rooms, (length, -1))
        if found < len(rooms):
            room, index = rooms.pop(found)
        else:
            room, index = max_length, len(packs)
            packs.append([])
        packs[index].append(example)
        if room > length:
            insort(rooms, (room - length, index))
    return tuple(map(tuple, packs))


def alone(examples: Sequence[Example]) -> tuple[Pack, ...]:
    """Every example as a sequence of its own, in their order."""
    return tuple((example,) for example in examples)
