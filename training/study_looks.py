"""Owns how each method of a study looks in every plot: colour, marker and line. Draws nothing."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from training.study_groups import Group
from training.study_result import CellResult

_COLOURS: Final = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#8c6d31")
"""Okabe and Ito's, which people of any colour vision tell apart, but for their yellow, too pale on white."""
_LINES: Final = ("-", "--", "-.", ":")
_MARKERS: Final = ("o", "s", "^", "D", "v", "P", "X")


@dataclass(frozen=True, slots=True)
class Look:
    """In matplotlib's terms."""

    colour: str
    line: str
    marker: str


def method_looks(cells: Sequence[CellResult]) -> dict[str, Look]:
    """By method: no two of 56 are the same."""
    methods = dict.fromkeys(cell.method for cell in cells)
    return {method: _look(index, index // len(_COLOURS)) for index, method in enumerate(methods)}


def group_looks(groups: Sequence[Group]) -> dict[str, Look]:
    """By label: as its method, with a line of its own; where there is one method, a colour of its own too."""
    methods = list(dict.fromkeys(group.method for group in groups))
    looks = {}
    for index, group in enumerate(groups):
        if len(methods) == 1:
            looks[group.label] = _look(index, index // len(_COLOURS))
        else:
            method = methods.index(group.method)
            among_its_own = [other.label for other in groups if other.method == group.method].index(
                group.label
            )
            looks[group.label] = _look(method, method // len(_COLOURS) + among_its_own)
    return looks


def _look(index: int, line: int) -> Look:
    return Look(_COLOURS[index % len(_COLOURS)], _LINES[line % len(_LINES)], _MARKERS[index % len(_MARKERS)])
