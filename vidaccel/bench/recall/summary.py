"""From the records of the recall benchmark to figures over prompts, and memories compared prompt by prompt."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from vidaccel.bench.recall.settings import ATTRIBUTES
from vidaccel.bench.recall.trip import NUM_SEGMENTS, RETURNS
from vidaccel.bench.shared.statistics import percentile, share_interval, summarise
from vidaccel.files.text import json_number

Record = Mapping[str, Any]
MEASURES = (
    "psnr",
    "ssim",
    "resemblance",
    "resemblance_of_others",
    "recognised",
    "colour_difference",
    "remembered_frames",
)
COMPARED = ("psnr", "ssim", "resemblance", "colour_difference")
THRESHOLDS = (0.95, 0.98, 0.99, 0.995, 0.997, 0.999)
_SEEN = ("colour", "shape", "background")


def summarise_recall(records: Sequence[Record], *, reference: str) -> dict[str, Any]:
    """`returns`: a row for each begin, place and memory. `visits`: what the oracle reads along own videos.

    `similarities`: of neighbouring chunks by part of the way. `settings`: shares for steps and guidance.
    reference: the memory that the others are compared with.
    """
    cells = [record for record in records if record["kind"] == "trips"]
    return {
        "reference": reference,
        "returns": [
            _return_row(cell, place, cells, reference) for place in RETURNS for cell in cells if _has(cell, place)
        ],
        "visits": [row for cell in cells if cell["begin"] == "own" for row in _visit_rows(cell)],
        "similarities": similarity_rows(cells),
        "settings": [_settings_row(record) for record in records if record["kind"] == "settings"],
    }


def share(successes: Iterable[bool]) -> dict[str, float]:
    """A share with Wilson's interval."""
    found = list(successes)
    low, high = share_interval(sum(found), len(found))
    return {"correct": sum(found), "count": len(found), "share": sum(found) / len(found), "low": low, "high": high}


def _has(cell: Record, place: str) -> bool:
    return place in cell["prompts"][0]["returns"]


def _return_row(cell: Record, place: str, cells: Sequence[Record], reference: str) -> dict[str, Any]:
    row: dict[str, Any] = {name: cell[name] for name in ("begin", "memory", "attended_frames")} | {"place": place}
    for name in MEASURES:
        values = [[value] for value in _values(cell, place, name).values()]
        row[name] = summarise(values).to_dict() if values else None
    row["differences"] = {}
    other = next((c for c in cells if c["begin"] == cell["begin"] and c["memory"] == reference), None)
    if other is not None and other is not cell:
        row["differences"] = {name: _difference(cell, other, place, name) for name in COMPARED}
    second = str(RETURNS[place][1])
    shown = [prompt["visits"][second] for prompt in cell["prompts"]]
    if place == "away":
        row["subject"] = share(one["colour"] is None for one in shown)
    elif str(RETURNS[place][0]) in cell["prompts"][0]["visits"]:
        before = [prompt["visits"][str(RETURNS[place][0])] for prompt in cell["prompts"]]
        row["subject"] = share(
            one["colour"] is not None and all(one[name] == first[name] for name in ("colour", "shape"))
            for one, first in zip(shown, before, strict=True)
        )
    return row


def _values(cell: Record, place: str, name: str) -> dict[str, float]:
    """By prompt; prompts without the value are left out."""
    found = {prompt["prompt"]: prompt["returns"][place][name] for prompt in cell["prompts"]}
    return {prompt: float(value) for prompt, value in found.items() if value is not None}


def _difference(cell: Record, reference: Record, place: str, name: str) -> dict[str, Any] | None:
    """This memory less the reference, over the prompts that both have a value for."""
    here, there = (_values(one, place, name) for one in (cell, reference))
    values = [[here[prompt] - there[prompt]] for prompt in here if prompt in there]
    return summarise(values).to_dict() if values else None


def _visit_rows(cell: Record) -> list[dict[str, Any]]:
    """Along the video: what is still right, and how sharp the pictures are."""
    rows = []
    for segment in cell["prompts"][0]["visits"]:
        place = next(name for name, visits in RETURNS.items() if int(segment) in visits)
        pairs = [(prompt["visits"][segment], prompt["asked"]) for prompt in cell["prompts"]]
        row: dict[str, Any] = {"memory": cell["memory"], "segment": int(segment), "place": place}
        for name in _SEEN if place == "home" else ("background",):
            row[name] = share(shown[name] == asked[name] for shown, asked in pairs)
        row["subject"] = share((shown["colour"] is not None) == (place == "home") for shown, _ in pairs)
        row["sharpness"] = summarise([[shown["sharpness"]] for shown, _ in pairs]).to_dict()
        rows.append(row)
    return rows


def similarity_rows(cells: Sequence[Record]) -> list[dict[str, Any]]:
    """Percentiles of the similarity of neighbouring chunks in videos begun with nothing, and the share of keyframes.

    Parts: the first two chunks of a segment, in which the prompt has changed, and the rest of holds and pans.
    """
    by_part: dict[str, list[float]] = {"change of segment": [], "hold at home": [], "hold away": [], "pan": []}
    for cell in cells:
        if cell["begin"] == "own":
            for prompt in cell["prompts"]:
                for part, value in _parts(prompt["similarities"]):
                    by_part[part].append(value)
    return [
        {
            "part": part,
            "count": len(values),
            **{f"percentile_{rank}": percentile(values, rank) for rank in (5, 50, 95)},
            "below": {f"{limit:g}": sum(value < limit for value in values) / len(values) for limit in THRESHOLDS},
        }
        for part, values in by_part.items()
        if values
    ]


def _parts(similarities: Sequence[float | None]) -> list[tuple[str, float]]:
    chunks = len(similarities) // NUM_SEGMENTS
    found = []
    for chunk, value in enumerate(similarities):
        segment, offset = divmod(chunk, chunks)
        part = ("hold at home", "pan", "hold away", "pan")[segment % 4]
        if segment and offset < 2:
            part = "change of segment"
        if value is not None:
            found.append((part, value))
    return found


def _settings_row(record: Record) -> dict[str, Any]:
    prompts = record["prompts"]
    row: dict[str, Any] = {name: share(prompt[name] for prompt in prompts) for name in (*ATTRIBUTES, "kept")}
    return {"settings": record["settings"], "seconds": json_number(prompts[0]["seconds"]), **row}
