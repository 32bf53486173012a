"""From the records of the EasyCache benchmark to one row per method, and the methods compared at equal compute."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from vidaccel.bench.shared.statistics import summarise, value_at
from vidaccel.files.text import json_number

Record = Mapping[str, Any]
METRIC_FIELDS = ("psnr", "psnr_mean", "ssim", "ms_ssim", "temporal_difference_error", "vmaf")
SPEEDS = (1.5, 2.0, 2.5, 3.0)  # times fewer forwards at which families are compared


def summarise_methods(records: Sequence[Record]) -> dict[str, Any]:
    """`methods`: figures of each method over all videos; `equal_compute`: PSNR and SSIM of each family at `SPEEDS`.

    `unavailable`: metrics that could not be taken, with the reason.
    """
    names = list(dict.fromkeys(record["method"] for record in records if record["family"] != "plain"))
    methods = [_summarise_method([record for record in records if record["method"] == name]) for name in names]
    unavailable = {name: reason for record in records for name, reason in record.get("unavailable", {}).items()}
    return {"methods": methods, "equal_compute": equal_compute(methods), "unavailable": unavailable}


def equal_compute(
    methods: Sequence[Mapping[str, Any]], *, fields: Sequence[str] = ("psnr", "ssim")
) -> list[dict[str, Any]]:
    """Means of `fields` of each family, read off its curve (linear in forwards) where it computes as much."""
    rows = []
    for family in dict.fromkeys(method["family"] for method in methods):
        members = [method for method in methods if method["family"] == family]
        if len(members) < 2:
            continue
        row: dict[str, Any] = {"family": family}
        for field in fields:
            curve = [
                (float(m["forwards_share"]["mean"]), float(m[field]["mean"])) for m in members if m[field] is not None
            ]
            row[field] = {f"{speed:g}x": value_at(curve, 1 / speed) for speed in SPEEDS}
        rows.append(row)
    return rows


def groups(records: Iterable[Record], field: str) -> list[list[float]]:
    """Values of `field` as numbers, one list per prompt; videos without the value are left out."""
    by_prompt: dict[str, list[float]] = {}
    for record in records:
        if record.get(field) is not None:
            by_prompt.setdefault(record["prompt"], []).append(float(record[field]))
    return list(by_prompt.values())


def _summarise_method(records: Sequence[Record]) -> dict[str, Any]:
    first = records[0]
    row: dict[str, Any] = {name: first[name] for name in ("method", "family", "parameter")}
    for field in ("num_forwards", "forwards_share", "fewer_forwards", "time_ratio", *METRIC_FIELDS):
        values = groups(records, field)
        row[field] = summarise(values).to_dict() if values else None
    return row


def ratios(record: Mapping[str, Any], plain: Mapping[str, Any]) -> dict[str, float | str]:
    """What a video saved against the plain run beside it, in forwards and in denoising time."""
    return {
        "forwards_share": record["num_forwards"] / plain["num_forwards"],
        "fewer_forwards": json_number(plain["num_forwards"] / record["num_forwards"]),
        "time_ratio": json_number(plain["denoising_seconds"] / record["denoising_seconds"]),
    }
