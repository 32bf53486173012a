"""The search for frames that come back by what the camera saw, counted out column by column."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence


def views_to_come(
    columns: Sequence[float],
    moving: Collection[int],
    *,
    present: Collection[int],
    coming: Sequence[float],
    width: int,
    depth: int,
    most: int,
) -> list[int]:
    """Frame after frame the one that shows most of what fewer than `depth` show; of equals a still one, the latest.

    columns: of all frames so far. moving: frames in which the camera moves. coming: columns of the chunk's frames.
    width: columns of a screen.
    """
    wanted = set(range(round(min(coming)), round(max(coming)) + width))
    views = [set(range(round(column), round(column) + width)) for column in columns]
    shown = Counter(column for frame in present for column in views[frame])
    found: list[int] = []
    while len(found) < most:
        rest = [frame for frame in range(len(columns)) if frame not in present and frame not in found]
        gains = {frame: sum(shown[column] < depth for column in views[frame] & wanted) for frame in rest}
        best = max(rest, key=lambda frame: (gains[frame], frame not in moving, frame), default=None)
        if best is None or not gains[best]:
            break
        shown.update(views[best])
        found.append(best)
    return found
