"""The rule by which the claims about teachers are decided; it is written down before the measurement.

An arm is a student distilled from one start, with one seed, by a teacher with the "long" or the "short" view; arms of
a pair differ in nothing else. Of a start the claim holds if, with equal updates of the generator and last weights:

1. in every seed, as_seen of the long arm is at least 20 points above that of the short arm;
2. the lower bound of the pooled difference is above 20 points: mean over all seeds and trips, 95 % bootstrap over
   trips, which are the same in all arms;
3. pooled over seeds, the long arm's as_seen is at most 10 % with the place blanked out of its memory and with a window
   of the last frames, and it shows the swapped landmark in at least 80 %;
4. pooled over seeds, landmarks of the long arm are valid not more than 5 points less often than those of the short arm,
   on returns and on first visits; being better is no offence.

It takes at least 3 seeds and 256 trips; with fewer the claim is not decided.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vidaccel.bench.shared.statistics import share_interval, summarise

LEAST_SEEDS = 3
LEAST_TRIPS = 256
LEAST_GAIN = 0.20
MOST_CONTROL = 0.10
LEAST_SWAPPED = 0.80
MOST_LOSS_OF_VALIDITY = 0.05

Arm = Mapping[str, Any]


def decide(arms: Sequence[Arm], *, start: str) -> dict[str, Any]:
    """Checks and verdict for the arms of one start.

    An arm is a record with `start`, `seed`, `view`, `updates` and `cells`, which by cell hold lists of booleans, one a
    trip: as_seen, swapped, valid. The verdict is "holds", "fails", or "not decided" where arms or trips are missing.
    """
    pairs = pairs_of(arms, start)
    checks = [*_gains(pairs), *_controls(pairs), *_validity(pairs)] if pairs else []
    missing = _missing(pairs)
    verdict = "not decided" if missing else "holds" if all(check["holds"] for check in checks) else "fails"
    return {"start": start, "verdict": verdict, "missing": missing, "seeds": sorted(pairs), "checks": checks}


def pairs_of(arms: Sequence[Arm], start: str) -> dict[int, tuple[Arm, Arm]]:
    """By seed, the long and the short arm, where both are there with equal updates."""
    found = {(arm["seed"], arm["view"]): arm for arm in arms if arm["start"] == start}
    seeds = sorted({seed for seed, _ in found})
    pairs = {seed: (found.get((seed, "long")), found.get((seed, "short"))) for seed in seeds}
    return {
        seed: (long, short)
        for seed, (long, short) in pairs.items()
        if long is not None and short is not None and long["updates"] == short["updates"]
    }


def _missing(pairs: Mapping[int, tuple[Arm, Arm]]) -> str:
    if len(pairs) < LEAST_SEEDS:
        return f"{len(pairs)} of {LEAST_SEEDS} seeds with both arms at equal updates"
    trips = min(len(arm["cells"]["memory"]["as_seen"]) for pair in pairs.values() for arm in pair)
    return f"{trips} of {LEAST_TRIPS} trips" if trips < LEAST_TRIPS else ""


def _gains(pairs: Mapping[int, tuple[Arm, Arm]]) -> list[dict[str, Any]]:
    checks = []
    for seed, (long, short) in pairs.items():
        gain = _share(long, "memory", "as_seen") - _share(short, "memory", "as_seen")
        checks.append(_check(f"gain of as_seen, seed {seed}", gain, least=LEAST_GAIN))
    summary = difference_of(pairs, "memory", "as_seen")
    checks.append(_check("lower bound of the pooled gain", summary["low"], least=LEAST_GAIN, strict=True) | summary)
    return checks


def _controls(pairs: Mapping[int, tuple[Arm, Arm]]) -> list[dict[str, Any]]:
    checks = []
    for cell, name, least, most in (
        ("blank", "as_seen", None, MOST_CONTROL),
        ("window", "as_seen", None, MOST_CONTROL),
        ("swap", "swapped", LEAST_SWAPPED, None),
    ):
        values = [value for long, _ in pairs.values() for value in long["cells"][cell][name]]
        low, high = share_interval(sum(values), len(values))
        found = _check(f"{name} of the long arm, {cell}", sum(values) / len(values), least=least, most=most)
        checks.append(found | {"low": low, "high": high})
    return checks


def _validity(pairs: Mapping[int, tuple[Arm, Arm]]) -> list[dict[str, Any]]:
    checks = []
    for cell, words in (("memory", "returns"), ("first visit", "first visits")):
        summary = difference_of(pairs, cell, "valid")
        least = -MOST_LOSS_OF_VALIDITY
        checks.append(_check(f"validity on {words}, long - short", summary["mean"], least=least) | summary)
    return checks


def difference_of(pairs: Mapping[int, tuple[Arm, Arm]], cell: str, name: str) -> dict[str, float]:
    """Long minus short, mean over seeds and trips, with a bootstrap interval over trips."""
    columns = [
        [float(ours) - float(theirs) for ours, theirs in zip(*(arm["cells"][cell][name] for arm in pair), strict=True)]
        for pair in pairs.values()
    ]
    summary = summarise([list(trip) for trip in zip(*columns, strict=True)])
    return {"mean": summary.mean, "low": summary.low, "high": summary.high}


def _check(
    name: str, value: float, *, least: float | None = None, most: float | None = None, strict: bool = False
) -> dict[str, Any]:
    rounded = round(value, 9)  # shares are sums of thirds and the like
    if least is not None:
        bound, holds = least, rounded > least if strict else rounded >= least
        words = f"{'above' if strict else 'at least'} {least:.0%}"
    else:
        assert most is not None
        bound, holds, words = most, rounded <= most, f"at most {most:.0%}"
    return {"check": name, "value": value, "asked": words, "bound": bound, "holds": holds}


def _share(arm: Arm, cell: str, name: str) -> float:
    values = arm["cells"][cell][name]
    return sum(values) / len(values)
