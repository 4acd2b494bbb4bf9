"""Owns what is asked in an evaluation: a chat up to its last answer, and that answer. Knows no server."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from training.errors import DataError
from training.readers import Place
from training.rows import Message, Row, shortened


@dataclass(frozen=True, slots=True)
class Case:
    """One question.

    Attributes:
        place: where its row stands in its file.
        messages: all that precedes the answer.
        reference: the answer of the row.
    """

    place: Place
    messages: tuple[Message, ...]
    reference: str

    @property
    def question(self) -> str:
        """The last message, which is what a person looks at."""
        return self.messages[-1]["content"]


@dataclass(frozen=True, slots=True)
class Answer:
    """What came.

    Attributes:
        tokens: how many, the one that ended it included.
        ended: whether it ended by itself, not at a limit.
    """

    text: str
    tokens: int
    ended: bool


def cases_of(rows: Sequence[Row], *, source: object) -> list[Case]:
    """The last answer of each row, in the order of the rows.

    Args:
        source: where the rows are from, for error messages.

    Raises:
        DataError: a row is plain text, which asks nothing.
    """
    plain = [str(row.place) for row in rows if row.text]
    if plain:
        raise DataError(
            f"{source} has plain text, which asks nothing ({shortened(plain)}); evaluation needs "
            "prompt + completion, instruction + output, or messages"
        )
    return [Case(row.place, row.messages[:-1], row.messages[-1]["content"]) for row in rows]


def sample(cases: Sequence[Case], count: int | None, seed: int) -> list[Case]:
    """`count` of them at random, in their order; all if there are no more, or for None."""
    if count is None or count >= len(cases):
        return list(cases)
    chosen = sorted(random.Random(seed).sample(range(len(cases)), count))  # noqa: S311  no secret
    return [cases[index] for index in chosen]
