"""Owns how texts, tables and documents read as Markdown. Knows not what they say."""

import re
from collections.abc import Sequence
from typing import Final

from training.document import Block, Code, Document, Heading, Items, Paragraph, Picture, Table

_SHORTEST_FENCE: Final = 3


def cell(text: str) -> str:
    """Text that shows as it is, on one line of a table."""
    return "<br>".join(_escaped(text).splitlines()) or "(nothing)"


def table_lines(
    header: Sequence[str], rows: Sequence[Sequence[str]], *, text_columns: int | None = None
) -> list[str]:
    """A table of cells that are Markdown already.

    Args:
        text_columns: so many columns are set to the left and those after them to the right; None for all.
    """
    count = len(header) if text_columns is None else text_columns
    rule = ["---" if column < count else "---:" for column in range(len(header))]
    return [f"| {' | '.join(row)} |" for row in (header, rule, *rows)]


def markdown(document: Document) -> str:
    """The document; pictures are links into its own folder."""
    parts = [f"# {_line(document.title)}", *("\n".join(_lines(block)) for block in document.blocks)]
    return "\n\n".join(parts) + "\n"


def _lines(block: Block) -> list[str]:
    match block:
        case Heading(text):
            return [f"## {_line(text)}"]
        case Paragraph(text):
            return [_line(text)]
        case Items(items):
            return [f"- **{_line(name)}**: {_line(value)}" for name, value in items]
        case Table(header, rows, text_columns):
            cells = [[cell(text) for text in row] for row in rows]
            return table_lines([cell(text) for text in header], cells, text_columns=text_columns)
        case Picture(file, caption):
            return [f"![{_line(caption)}]({file})"]
        case Code(text, language):
            fence = "`" * max(_SHORTEST_FENCE, 1 + max(map(len, re.findall("`+", text)), default=0))
            return [f"{fence}{language}", text.rstrip("\n"), fence]


def _line(text: str) -> str:
    return " ".join(_escaped(text).split())


def _escaped(text: str) -> str:
    shown = text.replace("&", "&amp;").replace("<", "&lt;").replace("\\", "\\\\")
    for mark in "|*_`[]":
        shown = shown.replace(mark, f"\\{mark}")
    return shown
