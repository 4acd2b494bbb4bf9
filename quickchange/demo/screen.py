"""What the demo prints: headings, lines and tables; bold on a terminal only. Knows no story."""

import os
import sys
import time
from collections.abc import Sequence
from typing import Final

_BOLD, _PLAIN = "\x1b[1m", "\x1b[0m"
_LONGEST_CELL: Final = 60


class Screen:
    """Standard output, with a clock that starts at its birth."""

    def __init__(self) -> None:
        self._began_s = time.monotonic()
        self._is_bold = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        self._chapter = 0

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self._began_s

    def heading(self, text: str) -> None:
        """The next chapter, numbered, with the time since the start."""
        self._chapter += 1
        line = f"{self._chapter}. {text}"
        mark = f"[{self.elapsed_s:.0f} s]"
        self.line()
        self.line(f"{_BOLD}{line}{_PLAIN}  {mark}" if self._is_bold else f"{line}  {mark}")

    def line(self, text: str = "") -> None:
        print(text, flush=True)

    def note(self, text: str) -> None:
        """A line of the chapter."""
        self.line(f"   {text}")

    def table(self, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Columns as wide as their widest cell; long cells are cut."""
        cells = [[one_line(cell) for cell in row] for row in rows]
        widths = [max(len(row[column]) for row in (header, *cells)) for column in range(len(header))]
        for row in (list(header), ["-" * width for width in widths], *cells):
            self.note("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def one_line(text: str, longest: int = _LONGEST_CELL) -> str:
    """The text on one line, cut where it gets too long."""
    flat = " ".join(text.split())
    return flat if len(flat) <= longest else flat[: longest - 1] + "…"
