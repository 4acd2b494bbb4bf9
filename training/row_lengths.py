"""Owns what a plan knows of the rows: the batch that takes most, and how much there is in all."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Rows:
    """What is known of the data.

    Attributes:
        longest: tokens of each row in the batch that takes the most, padding included.
        kept: of its columns, those whose logits are computed.
        shares_prefixes: whether that batch is one sequence; the two above are then per row, rounded up.
        tokens: of one pass over all rows, padding not counted; None without data.
        count: sequences; None without data.
    """

    longest: int
    kept: int
    shares_prefixes: bool
    tokens: int | None
    count: int | None
