"""Plain statistics: means, shares and tails with intervals, entropy, and curves read at equal compute."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from vidaccel.files.text import json_number

NUM_DRAWS = 2000
ROUNDING = 1e-9  # the mean of equal shares is a little off the share


@dataclass(frozen=True, kw_only=True)
class Summary:
    """A figure over all videos; `low` and `high` bound its mean with 95 % (bootstrap over prompts)."""

    count: int
    mean: float
    low: float
    high: float
    median: float
    percentile_5: float
    minimum: float

    def to_dict(self) -> dict[str, float | str]:
        """Plain values; infinities become strings."""
        return {name: json_number(value) for name, value in asdict(self).items()}


def summarise(groups: Sequence[Sequence[float]], *, seed: int = 0) -> Summary:
    """Summary of the values of all `groups`, one group per prompt (its seeds); prompts are drawn with replacement.

    Raises ValueError where there is no value.
    """
    groups = [group for group in groups if len(group)]
    if not groups:
        raise ValueError("There is nothing to summarise: no group has a value.")
    values = [value for group in groups for value in group]
    low, high = _bootstrap(groups, seed=seed)
    return Summary(
        count=len(values),
        mean=float(np.mean(values)),
        low=low,
        high=high,
        median=percentile(values, 50),
        percentile_5=percentile(values, 5),
        minimum=min(values),
    )


def percentile(values: Sequence[float], rank: float) -> float:
    """The value `rank` percent of the way through the sorted values, linear in between; infinities are allowed."""
    ordered = sorted(values)
    position = (len(ordered) - 1) * rank / 100
    below, above = ordered[math.floor(position)], ordered[math.ceil(position)]
    if below == above or math.isinf(above):
        return below
    return below + (position - math.floor(position)) * (above - below)


def share_interval(successes: int, count: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927); honest for small counts and for shares near 0 and 1."""
    if count < 1:
        raise ValueError(f"`count` must be at least 1, got {count}.")
    z = 1.959964
    share = successes / count
    middle = share + z**2 / (2 * count)
    half = z * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return max(0.0, (middle - half) / (1 + z**2 / count)), min(1.0, (middle + half) / (1 + z**2 / count))


def share_of(successes: Iterable[bool]) -> dict[str, Any] | None:
    """A share with its 95 % interval: `correct`, `count`, `share`, `low`, `high`; None of nothing."""
    found = list(successes)
    if not found:
        return None
    low, high = share_interval(sum(found), len(found))
    return {"correct": sum(found), "count": len(found), "share": sum(found) / len(found), "low": low, "high": high}


def entropy_of(names: Sequence[str]) -> float | None:
    """Bits of how often each name comes, 0 where all are one; None of nothing."""
    counts = Counter(names).values()
    if not counts:
        return None
    return sum(count / len(names) * math.log2(len(names) / count) for count in counts)


def value_at(curve: Sequence[tuple[float, float]], position: float) -> float | None:
    """The height of a curve of (x, y) points at `position`, linear in between, infinities left out; None outside it."""
    points = sorted(point for point in curve if math.isfinite(point[1]))
    if not points or not points[0][0] - ROUNDING <= position <= points[-1][0] + ROUNDING:
        return None
    return float(np.interp(position, [x for x, _ in points], [y for _, y in points]))


def _bootstrap(groups: Sequence[Sequence[float]], *, seed: int) -> tuple[float, float]:
    sums = np.array([math.fsum(group) if all(map(math.isfinite, group)) else sum(group) for group in groups])
    counts = np.array([len(group) for group in groups])
    drawn = np.random.default_rng(seed).integers(0, len(groups), (NUM_DRAWS, len(groups)))
    means = (sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)).tolist()
    return percentile(means, 2.5), percentile(means, 97.5)
