"""Does a student that remembers go on doing so under a teacher of short memory? Reported; no rule decides it.

The student begins as the teacher-forced one (start *as-is*), which recalls, and is distilled with either view. What a
short teacher takes away shows late: the question is asked with at least `LEAST_UPDATES` equal updates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vidaccel.bench.shared.statistics import share_interval
from vidaccel.bench.teachers.rule import Arm, difference_of, pairs_of

AS_IS = "as-is"
LEAST_UPDATES = 1000
_VIEWS = ("long", "short")


def keeping(arms: Sequence[Arm]) -> dict[str, Any] | None:
    """What the arms that began as the teacher still recall, pooled over the seeds of which both views are there.

    arms: as `decide` takes them. Returns seeds, updates, as_seen of both views with Wilson's intervals, and their
    difference with a 95 % bootstrap over trips; None without a pair of equal updates.
    """
    pairs = pairs_of(arms, AS_IS)
    if not pairs:
        return None
    views = {
        view: [value for pair in pairs.values() for value in pair[place]["cells"]["memory"]["as_seen"]]
        for place, view in enumerate(_VIEWS)
    }
    return {
        "seeds": sorted(pairs),
        "updates": sorted({long["updates"] for long, _ in pairs.values()}),
        "as_seen": {view: _share(values) for view, values in views.items()},
        "difference": difference_of(pairs, "memory", "as_seen"),
    }


def _share(values: Sequence[bool]) -> dict[str, float]:
    low, high = share_interval(sum(values), len(values))
    return {"share": sum(values) / len(values), "low": low, "high": high}
