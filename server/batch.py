"""One step's work: which tokens of which sequences. Knows neither torch nor grpc."""

from dataclasses import dataclass
from typing import Literal

from server.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Row:
    """Tokens [start, start + count) of a sequence, by position.

    Attributes:
        samples: after so many of its last ones a token of the answer is chosen, or judged if it is given.
    """

    sequence: Sequence
    start: int
    count: int

    @property
    def samples(self) -> int:
        return max(0, self.start + self.count - max(self.start, self.sequence.reported - 1))

    @property
    def route(self) -> tuple[int, float]:
        """Slot of its adapter, and how much of the adapter's update it gets."""
        return self.sequence.slot, self.sequence.request.adapter_scale

    @property
    def is_decode(self) -> bool:
        return self.count == 1

    @property
    def positions(self) -> range:
        return range(self.start, self.start + self.count)

    def blocks(self, block_tokens: int) -> list[int]:
        """Cache blocks of every position up to the row's last, so many tokens to a block."""
        return self.sequence.blocks[: -(-(self.start + self.count) // block_tokens)]

    def slots(self, block_tokens: int) -> list[int]:
        """Cache slots of the row's own positions."""
        blocks = self.sequence.blocks
        return [blocks[at // block_tokens] * block_tokens + at % block_tokens for at in self.positions]


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of one forward pass: decode rows first, rows of one adapter beside each other."""

    rows: tuple[Row, ...]

    @property
    def token_count(self) -> int:
        return sum(row.count for row in self.rows)

    @property
    def adapter_count(self) -> int:
        """Distinct adapters, the base not counted."""
        return len({row.sequence.slot for row in self.rows} - {0})

    @property
    def is_mixed(self) -> bool:
        """Whether two or more different adapters (the base counted as one) share the pass."""
        return len({row.sequence.slot for row in self.rows}) > 1

    @property
    def phase(self) -> Literal["prefill", "decode", "mixed"]:
        """ "prefill", "decode" or "mixed"."""
        decodes = sum(row.sequence.output_length > 0 for row in self.rows)
        if decodes == len(self.rows):
            return "decode"
        return "mixed" if decodes else "prefill"


def arranged(rows: list[Row]) -> Batch:
    """The rows in the order the runner wants: decode before prefill, then by slot, then by scale."""
    return Batch(tuple(sorted(rows, key=lambda row: (not row.is_decode, *row.route))))
