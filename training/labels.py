"""Owns where labels of points in a plot go, so that they can be read. Knows no values."""

from collections.abc import Sequence
from typing import Any, Final

_REACHES: Final = (7, 16, 26, 38, 52)  # points from the middle of the marker
_SIDES: Final = ((1, 0), (1, 1), (1, -1), (-1, 0), (-1, 1), (-1, -1), (0, 1), (0, -1))
_ALIGNMENT: Final = {1: ("left", "bottom"), 0: ("center", "center"), -1: ("right", "top")}
_MARKER_REACH: Final = 9  # pixels
_FONT_SIZE: Final = 8.5


def label_points(axes: Any, points: Sequence[tuple[float, float, str]]) -> None:
    """Writes each text beside its point, where it meets fewest other texts and markers, and stays inside.

    Layout, limits and scales of the axes must be final.
    """
    from matplotlib.transforms import Bbox

    renderer = axes.figure.canvas.get_renderer()
    frame = axes.get_window_extent(renderer)
    middles = [axes.transData.transform((x, y)) for x, y, _ in points]
    taken = [Bbox.from_bounds(*(middle - _MARKER_REACH), *[2 * _MARKER_REACH] * 2) for middle in middles]
    for x, y, text in points:
        options = [_option(axes, x, y, text, reach, *side) for reach in _REACHES for side in _SIDES]
        boxes = [option.get_window_extent(renderer) for option in options]
        costs = [_cost(box, taken, frame) for box in boxes]
        best = costs.index(min(costs))
        taken.append(boxes[best])
        for option in options[:best] + options[best + 1 :]:
            option.remove()
        _connect(axes, x, y, options[best])


def _option(axes: Any, x: float, y: float, text: str, reach: int, right: int, up: int) -> Any:
    across = reach if up == 0 or right == 0 else 0.7 * reach
    return axes.annotate(
        text, (x, y), (right * across, up * across), textcoords="offset points", fontsize=_FONT_SIZE,
        ha=_ALIGNMENT[right][0], va=_ALIGNMENT[up][1],
    )  # fmt: skip


def _cost(box: Any, taken: Sequence[Any], frame: Any) -> int:
    inside = frame.contains(box.x0, box.y0) and frame.contains(box.x1, box.y1)
    return 4 * (not inside) + sum(bool(box.overlaps(other)) for other in taken)


def _connect(axes: Any, x: float, y: float, label: Any) -> None:
    """A thin line from a label that is not beside its point."""
    right, up = label.xyann
    if max(abs(right), abs(up)) > _REACHES[0]:
        axes.annotate(
            "", (x, y), (right, up), textcoords="offset points", zorder=1,
            arrowprops={"arrowstyle": "-", "color": "#999999", "linewidth": 0.6},
        )  # fmt: skip
