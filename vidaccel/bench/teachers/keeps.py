"""Does a student that remembers go on doing so under a teacher of short memory? Reported; no rule decides it.

The student begins as the teacher-forced one (start *as-is*), which recalls, and is distilled with either view. What a
short teacher takes away shows late: the question is asked with at least `LEAST_UPDATES` equal updates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vidaccel.bench.shared.statistics import share_interval, summarise

AS_IS = "as-is"
LEAST_UPDATES = 1000
_VIEWS = ("long", "short")

Arm = Mapping[str, Any]


def keeping(arms: Sequence[Arm]) -> dict[str, Any] | None:
    """What the arms that began as the teacher still recall, pooled over the seeds of which both views are there.

    arms: as `decide` takes them. Returns seeds, updates, as_seen of both views with Wilson's intervals, and their
    difference with a 95 % bootstrap over trips; None without a pair of equal updates.
    """
    found = {(arm["seed"], arm["view"]): arm for arm in arms if arm["start"] == AS_IS}
    pairs = [
        (found[seed, "long"], found[seed, "short"])
        for seed in sorted({seed for seed, _ in found})
        if (seed, "long") in found and (seed, "short") in found
    ]
    pairs = [(long, short) for long, short in pairs if long["updates"] == short["updates"]]
    if not pairs:
        return None
    seen = [[arm["cells"]["memory"]["as_seen"] for arm in pair] for pair in pairs]
    views = {view: [value for pair in seen for value in pair[place]] for place, view in enumerate(_VIEWS)}
    by_trip = zip(*([float(a) - float(b) for a, b in zip(*pair, strict=True)] for pair in seen), strict=True)
    difference = summarise([list(trip) for trip in by_trip])
    return {
        "seeds": [long["seed"] for long, _ in pairs],
        "updates": sorted({long["updates"] for long, _ in pairs}),
        "as_seen": {view: _share(values) for view, values in views.items()},
        "difference": {"mean": difference.mean, "low": difference.low, "high": difference.high},
    }


def _share(values: Sequence[bool]) -> dict[str, float]:
    low, high = share_interval(sum(values), len(values))
    return {"share": sum(values) / len(values), "low": low, "high": high}
