"""Owns what a written report is made of: a few kinds of blocks. Knows neither Markdown nor HTML.

Texts are plain: whoever renders a block escapes them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Heading:
    """Begins a section."""

    text: str


@dataclass(frozen=True, slots=True)
class Paragraph:
    text: str


@dataclass(frozen=True, slots=True)
class Items:
    """Facts with their names, in a list."""

    items: Sequence[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Table:
    """
    Attributes:
        text_columns: so many columns on the left hold words; those after them hold numbers.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    text_columns: int = 1


@dataclass(frozen=True, slots=True)
class Picture:
    """
    Attributes:
        file: name of a PNG in the folder of the report.
        caption: what it shows, for those who do not see it as well.
    """

    file: str
    caption: str


@dataclass(frozen=True, slots=True)
class Code:
    """
    Attributes:
        language: for those who colour it, such as "yaml".
    """

    text: str
    language: str


Block = Heading | Paragraph | Items | Table | Picture | Code


@dataclass(frozen=True, slots=True)
class Document:
    title: str
    blocks: Sequence[Block]


def facts(value: object) -> str:
    """A value, or the names and values of a mapping, on one line."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {facts(member)}" for name, member in value.items())
    return str(value)
