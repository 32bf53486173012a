"""From the readings of the recall benchmark to shares with intervals, chance, ceiling, and differences trip by trip."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vidaccel.bench.shared.statistics import entropy_of, share_of, summarise
from vidaccel.world.landmark_oracle import SAME_PLACE

Record = Mapping[str, Any]
Reading = Mapping[str, Any]


def summarise_recall(records: Sequence[Record], *, valid_likelihood: float) -> dict[str, Any]:
    """`cells`: a row for each cell. `truths`: what the oracle makes of the decoded world itself.

    valid_likelihood: least log-likelihood ratio a pixel of what counts as a landmark.
    """
    named = {record["cell"]: record for record in records}
    truths = [record for record in records if record["kind"] == "truth"]
    cells = [record for record in records if record["kind"] != "truth"]
    return {
        "truths": [_truth_row(record, valid_likelihood) for record in truths],
        "cells": [_row(record, named, valid_likelihood) for record in cells],
    }


def is_as_seen(wanted: Reading, got: Reading) -> bool:
    """Whether two readings are of one landmark at one place."""
    return _same_kind(wanted, got) and _same_colour(wanted, got) and _same_place(wanted, got)


def chance_of(wanted: Sequence[Reading], got: Sequence[Reading]) -> float:
    """Share of as seen over all pairs of a return with the first visit of another trip."""
    pairs = [(w, g) for place, w in enumerate(wanted) for other, g in enumerate(got) if other != place]
    return sum(is_as_seen(w, g) for w, g in pairs) / len(pairs)


def _same_kind(wanted: Reading, got: Reading) -> bool:
    return bool(wanted["kind"] == got["kind"])


def _same_colour(wanted: Reading, got: Reading) -> bool:
    return bool(wanted["colour"] == got["colour"])


def _same_place(wanted: Reading, got: Reading) -> bool:
    return abs(wanted["x"] - got["x"]) <= SAME_PLACE


def _readings(record: Record, visit: str) -> list[Reading]:
    return [trip[visit] for trip in record["trips"]]


def _wanted(record: Record, named: Mapping[str, Record]) -> list[Reading]:
    """The first visits that a cell's returns are compared with: its own, or those of the world."""
    source = record if record["kind"] in ("own", "truth") else named[record["truth"]]
    return _readings(source, "first")


def _shares(wanted: Sequence[Reading], got: Sequence[Reading]) -> dict[str, Any]:
    tests: Mapping[str, Callable[[Reading, Reading], bool]] = {
        "as_seen": is_as_seen,
        "same_kind": _same_kind,
        "same_colour": _same_colour,
        "same_place": _same_place,
    }
    return {name: share_of(test(w, g) for w, g in zip(wanted, got, strict=True)) for name, test in tests.items()}


def _sharpness(readings: Sequence[Reading], valid_likelihood: float) -> dict[str, Any]:
    """How many are a landmark at all, how clear they are, and how many kinds there are."""
    kinds = Counter(reading["kind"] for reading in readings)
    commonest, count = kinds.most_common(1)[0]
    return {
        "valid": share_of(reading["likelihood"] >= valid_likelihood for reading in readings),
        "likelihood": summarise([[reading["likelihood"]] for reading in readings]).to_dict(),
        "kinds_entropy": entropy_of([reading["kind"] for reading in readings]),
        "commonest": {"kind": commonest, "share": count / len(readings)},
    }


def _truth_row(record: Record, valid_likelihood: float) -> dict[str, Any]:
    first, second = _readings(record, "first"), _readings(record, "second")
    return {
        "cell": record["cell"],
        **_shares(first, second),
        "chance": chance_of(first, second),
        "first": _sharpness(first, valid_likelihood),
        "second": _sharpness(second, valid_likelihood),
    }


def _row(record: Record, named: Mapping[str, Record], valid_likelihood: float) -> dict[str, Any]:
    got, wanted, truth = _readings(record, "second"), _wanted(record, named), named[record["truth"]]
    names = ("cell", "kind", "control", "memory", "away_chunks", "num_inference_steps", "seconds")
    row = {name: record[name] for name in names}
    row |= _shares(wanted, got) | {"chance": chance_of(wanted, got)}
    row["ceiling"] = _shares(_readings(truth, "first"), _readings(truth, "second"))["as_seen"]
    row["second"] = _against_truth(got, _readings(truth, "second"), valid_likelihood)
    for name in ("frames_in_reach", "keyframes"):
        row[name] = sum(trip[name] for trip in record["trips"]) / len(got)
    row["first"] = row["original"] = None
    if record["kind"] == "own":
        row["first"] = _against_truth(wanted, _readings(truth, "first"), valid_likelihood)
    if record["control"] == "swap":
        original = _readings(named[record["original"]], "first")
        row["original"] = share_of(is_as_seen(w, g) for w, g in zip(original, got, strict=True))
    plain = named.get(record["plain"])
    is_paired = plain is not None and plain is not record and plain["original"] == record["original"]
    row["difference"] = _difference(record, plain, named) if plain is not None and is_paired else None
    return row


def _against_truth(readings: Sequence[Reading], truth: Sequence[Reading], valid_likelihood: float) -> dict[str, Any]:
    """How clear landmarks are, and in shares of those that the world shows on the same trips."""
    found, whole = _sharpness(readings, valid_likelihood), _sharpness(truth, valid_likelihood)
    ratio = found["likelihood"]["mean"] / whole["likelihood"]["mean"]
    return found | {"likelihood_share": ratio, "truth_entropy": whole["kinds_entropy"]}


def _difference(record: Record, plain: Record, named: Mapping[str, Record]) -> dict[str, Any]:
    """As seen less that of the plain cell, on the same trips."""
    here, there = (
        {
            trip["seed"]: is_as_seen(wanted, trip["second"])
            for trip, wanted in zip(one["trips"], _wanted(one, named), strict=True)
        }
        for one in (record, plain)
    )
    return summarise([[float(here[seed]) - float(there[seed])] for seed in here]).to_dict()
