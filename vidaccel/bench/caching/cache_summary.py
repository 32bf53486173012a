"""From the records of the cache benchmark to its tables: curves at equal executed work, and paired differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vidaccel.bench.caching.summary import SPEEDS, Record, equal_compute, summarise_methods
from vidaccel.bench.shared.statistics import NUM_DRAWS, ROUNDING, percentile, summarise, value_at

EQUAL_FIELDS = ("psnr", "ssim", "ms_ssim", "vmaf")
PER_PROMPT_SPEED = 2.0


def summarise_caches(records: Sequence[Record]) -> dict[str, Any]:
    """What the tables show, as plain values.

    num_videos: videos that every method has made; the tables are over these alone, so that all methods are compared on
        the same ones. While there is none they are over all.
    methods: one row per method, its time ratio over the timed ones only (None without).
    equal_compute: each family's curves read at `SPEEDS` times fewer forwards.
    differences: PSNR of each EasyCache minus each other family there, paired by prompt.
    per_prompt: PSNR of each family at 2x for every prompt.
    failures: families that raised or registered no hook; no_effect: those that never saved a block.
    """
    videos, num_videos = common_videos([record for record in records if record["kind"] == "video"])
    summary = summarise_methods(videos)
    for row in summary["methods"]:
        times = [
            [float(record["time_ratio"])]
            for record in records
            if record["kind"] == "time" and record["method"] == row["method"]
        ]
        row["time_ratio"] = summarise(times).to_dict() if times else None
    failures = {one["family"]: one["why"] for one in records if one["kind"] == "failure"}
    families = list(dict.fromkeys(record["family"] for record in videos if record["family"] != "repeat"))
    return {
        **summary,
        "num_videos": num_videos,
        "equal_compute": equal_compute(summary["methods"], fields=EQUAL_FIELDS),
        "differences": paired_differences(videos),
        "per_prompt": per_prompt(videos),
        "failures": [{"family": family, "why": why} for family, why in failures.items()],
        "no_effect": [name for name in families if _saves_nothing(name, videos)],
    }


def common_videos(videos: Sequence[Record]) -> tuple[list[Record], int]:
    """The records of the prompts and seeds that all methods have, and how many those are; all records if there is none.

    The second plain run is made for a few videos only and does not count.
    """
    made: dict[str, set[tuple[str, int]]] = {}
    for record in videos:
        if record["family"] != "repeat":
            made.setdefault(record["method"], set()).add((record["prompt"], record["seed"]))
    common = set.intersection(*made.values()) if made else set()
    kept = [record for record in videos if (record["prompt"], record["seed"]) in common]
    return (kept, len(common)) if common else (list(videos), 0)


def paired_differences(videos: Sequence[Record]) -> list[dict[str, Any]]:
    """Mean PSNR (dB) of each EasyCache family minus each other one at `SPEEDS`, with a 95 % bootstrap interval.

    Prompts are drawn with replacement, the same for both families; both curves are read anew in every draw. None where
    a curve does not reach the speed in every draw.
    """
    families = _families(videos)
    ours = [name for name in families if name.startswith("EasyCache")]
    rows = []
    for name in ours:
        for other in families:
            if other in ours:
                continue
            prompts = sorted(_common_prompts(videos, (name, other)))
            row: dict[str, Any] = {"family": name, "other": other, "num_prompts": len(prompts)}
            for speed in SPEEDS:
                row[f"{speed:g}x"] = _difference(videos, (name, other), prompts, speed)
            rows.append(row)
    return rows


def per_prompt(videos: Sequence[Record]) -> list[dict[str, Any]]:
    """PSNR of each family at `PER_PROMPT_SPEED` times fewer forwards, read off the curve of each prompt."""
    rows = []
    for prompt in dict.fromkeys(record["prompt"] for record in videos):
        mine = [record for record in videos if record["prompt"] == prompt]
        values = {}
        for family in _families(videos):
            shares, psnrs = _curves([one for one in mine if one["family"] == family], [prompt])
            points = list(zip(shares[:, 0].tolist(), psnrs[:, 0].tolist(), strict=True))
            values[family] = value_at(points, 1 / PER_PROMPT_SPEED)
        rows.append({"prompt": prompt, "psnr": values})
    return rows


def _difference(
    videos: Sequence[Record], pair: tuple[str, str], prompts: Sequence[str], speed: float
) -> dict[str, float] | None:
    if not prompts:
        return None
    everyone = np.arange(len(prompts))[None]
    drawn = np.random.default_rng(0).integers(0, len(prompts), (NUM_DRAWS, len(prompts)))
    first, second = (_curves([one for one in videos if one["family"] == family], prompts) for family in pair)
    (mean,) = (_heights(*first, everyone, 1 / speed) - _heights(*second, everyone, 1 / speed)).tolist()
    differences = _heights(*first, drawn, 1 / speed) - _heights(*second, drawn, 1 / speed)
    if np.isnan([mean, *differences]).any():
        return None
    return {"mean": mean, "low": percentile(differences, 2.5), "high": percentile(differences, 97.5)}


def _heights(shares: np.ndarray, psnrs: np.ndarray, drawn: np.ndarray, position: float) -> np.ndarray:
    """(draws,) heights at `position` of the mean curves of the `drawn` (draws, prompts); nan outside a curve."""
    kept = np.isfinite(psnrs).all(axis=1)
    if kept.sum() < 2:
        return np.full(len(drawn), np.nan)
    x, y = shares[kept][:, drawn].mean(axis=2), psnrs[kept][:, drawn].mean(axis=2)
    order = x.argsort(axis=0)
    x, y = np.take_along_axis(x, order, axis=0), np.take_along_axis(y, order, axis=0)
    upper = (x < position).sum(axis=0).clip(1, len(x) - 1)[None]
    x_low, x_high, y_low, y_high = (
        np.take_along_axis(values, index, axis=0)[0] for values in (x, y) for index in (upper - 1, upper)
    )
    width = np.where(x_high > x_low, x_high - x_low, 1.0)
    heights = y_low + (position - x_low) / width * (y_high - y_low)
    return np.where((x[0] - ROUNDING <= position) & (position <= x[-1] + ROUNDING), heights, np.nan)


def _curves(records: Sequence[Record], prompts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """(methods, prompts) arrays of forwards shares and PSNR, means over seeds."""
    place = {prompt: index for index, prompt in enumerate(prompts)}
    methods = list(dict.fromkeys(record["method"] for record in records))
    sums = np.zeros((3, len(methods), len(prompts)))
    for record in records:
        if record["prompt"] in place:
            row = methods.index(record["method"]), place[record["prompt"]]
            sums[(slice(None), *row)] += (1, record["forwards_share"], float(record["psnr"]))
    with np.errstate(invalid="ignore", divide="ignore"):
        shares, psnrs = sums[1] / sums[0], sums[2] / sums[0]
    measured = (sums[0] > 0).all(axis=1) if len(prompts) else np.zeros(0, dtype=bool)
    return shares[measured], psnrs[measured]


def _common_prompts(videos: Sequence[Record], pair: tuple[str, str]) -> set[str]:
    """Prompts that every method of both families was measured on."""
    by_method: dict[str, set[str]] = {}
    for record in videos:
        if record["family"] in pair:
            by_method.setdefault(record["method"], set()).add(record["prompt"])
    return set.intersection(*by_method.values())


def _families(videos: Sequence[Record]) -> list[str]:
    names = dict.fromkeys(record["family"] for record in videos)
    return [name for name in names if name not in ("repeat", "plain")]


def _saves_nothing(family: str, videos: Sequence[Mapping[str, Any]]) -> bool:
    return all(record["forwards_share"] >= 1 for record in videos if record["family"] == family)
