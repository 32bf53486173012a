"""Labels beside the points of a picture that cover neither each other nor a point."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

_STEP = 2.5  # points between two heights that are tried
_MOST_STEPS = 60
_APART = 6.0  # pixels between two places of a line at which it is looked for
_CROSSING = 4.0  # points further away that a label is put rather than over one such place
_MARKER = 5.0  # pixels around a point that stay free
_FAR = 8.0  # points from its point where a label gets a thin line to it
_SIDE = 7  # points between a point and the text beside it


@dataclass(frozen=True, kw_only=True)
class Label:
    """A text that belongs to a point, in data coordinates; size in points."""

    x: float
    y: float
    text: str
    colour: str
    size: float
    may_stand_left: bool = False


def place_labels(axes: Any, labels: Sequence[Label]) -> None:
    """Write each label beside its point, as near as it is free, with a thin line where it had to move.

    The limits of `axes` must be final. No label covers a point or another label; one crosses lines only where that is
    nearer than to go around them.
    """
    from matplotlib.patheffects import withStroke

    figure = axes.figure
    figure.draw_without_rendering()  # the layout is final from here on
    renderer = figure.canvas.get_renderer()
    crossed = np.array([place for line in axes.lines for place in _places_along(axes, line)]).reshape(-1, 2)
    points = [point for line in axes.lines for point in axes.transData.transform(line.get_xydata())]
    taken = [(x - _MARKER, y - _MARKER, x + _MARKER, y + _MARKER) for x, y in points]
    halo = [withStroke(linewidth=2.5, foreground="white")]
    for label in sorted(labels, key=lambda label: -label.y):  # so that neighbours keep their order
        text = axes.annotate(label.text, (label.x, label.y), (0, 0), textcoords="offset points", va="center")
        text.set(color=label.colour, fontsize=label.size, path_effects=halo)
        costs = []
        for dx, dy, side in _offsets(label.may_stand_left):
            text.set(position=(dx, dy), ha=side)
            box = text.get_window_extent(renderer).extents
            if not any(_overlap(box, other) for other in taken):
                inside = ((crossed > box[:2]) & (crossed < box[2:])).all(1).sum()
                costs.append((abs(dy) + _CROSSING * inside, dx, dy, side, box))
        _, dx, dy, side, box = min(costs, key=lambda cost: cost[0]) if costs else (0, _SIDE, 0, "left", box)
        text.set(position=(dx, dy), ha=side)
        taken.append(tuple(box))
        if abs(dy) > _FAR:
            style = {"arrowstyle": "-", "color": label.colour, "linewidth": 0.6, "alpha": 0.6, "shrinkA": 0}
            axes.annotate("", (label.x, label.y), (dx, dy), textcoords="offset points", arrowprops=style)


def _overlap(left: Sequence[float], right: Sequence[float]) -> bool:
    """Whether two boxes (left, bottom, right, top) have more than an edge in common."""
    return left[0] < right[2] and right[0] < left[2] and left[1] < right[3] and right[1] < left[3]


def _places_along(axes: Any, line: Any) -> Iterator[tuple[float, float]]:
    """Places along a line, in pixels and a few pixels apart."""
    points = [tuple(point) for point in axes.transData.transform(line.get_xydata())]
    for (x, y), (next_x, next_y) in pairwise(points):
        count = max(1, math.ceil(math.hypot(next_x - x, next_y - y) / _APART))
        for place in range(1, count + 1):
            yield x + (next_x - x) * place / count, y + (next_y - y) * place / count


def _offsets(may_stand_left: bool) -> Iterator[tuple[float, float, str]]:
    """Places to try, in points: right of the point (or left of it too), from its own height outwards."""
    for step in range(_MOST_STEPS):
        for sign in (1, -1) if step else (1,):
            yield _SIDE, sign * step * _STEP, "left"
            if may_stand_left:
                yield -_SIDE, sign * step * _STEP, "right"
