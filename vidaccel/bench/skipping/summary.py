"""From the records of the skipping benchmark to what is saved, what is lost, and the verdict of a rule given first."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vidaccel.bench.recall.summary import is_as_seen
from vidaccel.bench.shared.statistics import share_of, summarise
from vidaccel.world.landmark_oracle import VALID_LIKELIHOOD

Record = Mapping[str, Any]
PLAIN = "student"
OTHER_NOISE = "other-noise"
LEAST_SAVED = 0.20  # of all passes, clean ones included
MOST_LOSS = 1.05
LEAST_SHARPNESS = 0.95
SHARES = ("as_seen", "valid", "own_as_seen", "first_valid", "subject")
_ROUNDING = 1e-6  # a fifth, in passes that are added up


def summarise_skipping(records: Sequence[Record]) -> list[dict[str, Any]]:
    """A row for every sampler; differences and ratios are to the plain student, prompt by prompt and trip by trip."""
    plain = next(record for record in records if record["sampler"] == PLAIN)
    return [_row(record, plain) for record in records]


def verdict(row: Mapping[str, Any]) -> str:
    """`passes`, `fails`, or `open` where an interval reaches over the bound of the loss; by the rule of this file.

    Saved: at least 20 % of all passes. Loss and sharpness: within 5 % of the plain student's, with their whole
    intervals; fails where the whole interval is beyond. Shares that the oracles read: no interval lies below 0.
    """
    if row["saved"]["mean"] < LEAST_SAVED - _ROUNDING:
        return "fails: saves too little"
    worse = [name for name in SHARES if (found := row[name]) and found["difference"]["high"] < 0]
    if worse:
        return f"fails: {', '.join(worse).replace('_', ' ')}"
    if row["loss"]["low"] > MOST_LOSS:
        return "fails: loss"
    if row["sharpness"]["high"] < LEAST_SHARPNESS:
        return "fails: sharpness"
    is_sure = row["loss"]["high"] <= MOST_LOSS and row["sharpness"]["low"] >= LEAST_SHARPNESS
    return "passes" if is_sure else "open"


def _row(record: Record, plain: Record) -> dict[str, Any]:
    held = list(zip(record["held"], plain["held"], strict=True))
    row: dict[str, Any] = {
        "sampler": record["sampler"],
        "saved": _saved(record, plain, ("held", "return", "own")),
        "saved_by_part": {part: _saved(record, plain, (part,)) for part in ("held", "return", "own") if record[part]},
        "loss": _mean(one["loss"] / other["loss"] for one, other in held),
        "difference": _mean(one["difference"] for one, _ in held),
        "sharpness": _mean(one["shown"]["sharpness"] / other["shown"]["sharpness"] for one, other in held),
        "clearness": _clearness(record["own"], plain["own"]),
        "subject": _share(record["held"], plain["held"], _is_subject_right),
        "as_seen": _share(record["return"], plain["return"], _is_seen),
        "valid": _share(record["return"], plain["return"], _is_valid("second")),
        "own_as_seen": _share(record["own"], plain["own"], _is_seen),
        "first_valid": _share(record["own"], plain["own"], _is_valid("first")),
        "seconds": record["seconds"],
    }
    row["verdict"] = "-" if record["sampler"] in (PLAIN, OTHER_NOISE) else verdict(row)
    return row


def _saved(record: Record, plain: Record, parts: Sequence[str]) -> dict[str, Any]:
    """Share of the passes that is saved, over videos; those of every part count alike."""
    pairs = [pair for part in parts if record[part] for pair in zip(record[part], plain[part], strict=True)]
    return _mean(1 - one["passes"] / other["passes"] for one, other in pairs)


def _clearness(rows: Sequence[Record], plain: Sequence[Record]) -> dict[str, Any] | None:
    """Log-likelihood ratios of landmarks that the student invents, over the mean of the plain student's."""
    if not rows:
        return None
    whole = sum(row["first"]["likelihood"] for row in plain) / len(plain)
    pairs = zip(rows, plain, strict=True)
    return _mean(1 + (one["first"]["likelihood"] - other["first"]["likelihood"]) / whole for one, other in pairs)


def _mean(values: Any) -> dict[str, Any]:
    return summarise([[value] for value in values]).to_dict()


def _share(rows: Sequence[Record], plain: Sequence[Record], test: Callable[[Record], bool]) -> dict[str, Any] | None:
    """How many pass a test, and how many more than of the plain student's; None where nothing was measured."""
    if not rows:
        return None
    pairs = zip(rows, plain, strict=True)
    difference = _mean(float(test(one)) - float(test(other)) for one, other in pairs)
    return {"share": share_of(map(test, rows)), "difference": difference}


def _is_seen(row: Record) -> bool:
    return is_as_seen(row["first"], row["second"])


def _is_valid(visit: str) -> Callable[[Record], bool]:
    return lambda row: bool(row[visit]["likelihood"] >= VALID_LIKELIHOOD)


def _is_subject_right(row: Record) -> bool:
    return all(row["shown"][name] == wanted for name, wanted in row["asked"].items())
