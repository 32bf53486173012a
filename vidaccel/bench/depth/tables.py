"""The depth benchmark for people: one row a student and a memory, and recall over bytes as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vidaccel.bench.shared.figure import saved_figure
from vidaccel.bench.shared.markdown import Content, captions, markdown_table, share_text
from vidaccel.bench.shared.statistics import share_interval

Record = Mapping[str, Any]
_HEADER = ("student", "trained with", "memory", "bytes", "as seen", "clearness", "loss, returns", "loss, arrivals")
_COLOURS = ("#0072b2", "#d1410c", "#1a8a5a", "#7a4fa3", "#b58900")
_MARKS = {"depth": "o", "frames": "s", "bits": "^"}


def summarise_depth(records: Sequence[Record]) -> dict[str, Any]:
    """By student and memory: share of trips as seen with its Wilson interval, and how much of the bytes is left."""
    whole = {record["student"]: record["bytes"] for record in records if record["memory"] == "depth:1"}
    rows: dict[str, dict[str, Any]] = {}
    for record in records:
        seen, student = record["as_seen"], record["student"]
        rows.setdefault(student, {})[record["memory"]] = {
            "as_seen": sum(seen) / len(seen),
            "interval": list(share_interval(sum(seen), len(seen))),
            "share_of_bytes": round(record["bytes"] / whole[student], 4) if student in whole else None,
        }
    return {"students": rows}


def depth_markdown(content: Content) -> str:
    """The results as a page."""
    protocol = content["protocol"]
    lines = [
        "# Layers that share a memory",
        "",
        "The students differ in how their layers were trained to read each other's memory. Each is measured with "
        "memories of fewer layers (a layer reads the nearest kept one at or below it), of fewer frames that reach as "
        "far back, and of fewer bits. As seen: at the return, kind, colour and place of the landmark are those of the "
        f"first visit, on {protocol['num_trips']} held-out trips with {protocol['away_chunks']} chunks between the "
        f"visits and {protocol['num_inference_steps']} passes a chunk; intervals: Wilson, 95 %. Clearness: "
        "log-likelihood ratio a pixel of what stands there. Loss: of the velocity at noise levels above 0.8, on "
        "held-out chunks that come back to a place, or to a new one. Bytes: keys and values of all remembered frames "
        "of one video. One training seed a student.",
        "",
        captions(content),
        "",
        *markdown_table(_HEADER, [_row(record) for record in content["records"]]),
    ]
    return "\n".join(lines) + "\n"


def _row(record: Record) -> tuple[str, ...]:
    losses = record["losses"]
    return (
        record["student"],
        training_words(record),
        record["words"],
        f"{record['bytes'] / 1e6:.2f} MB",
        share_text(record["as_seen"]),
        f"{record['clearness']:.3f}",
        *(f"{losses[kind]:.4f}" if kind in losses else "" for kind in ("returns", "arrivals")),
    )


def training_words(record: Record) -> str:
    """How the layers of a record's student were trained to read."""
    if record["kv_routing"] > 0:
        return f"routing {record['kv_routing']:g}"
    return "own memory" if record["depth_every"] == 1 else f"1 layer in {record['depth_every']}"


def save_depth_plot(path: Path, content: Content) -> Path:
    """As seen over bytes: a colour a student, a line for fewer layers, and marks for fewer frames and fewer bits."""
    with saved_figure(path, (7, 4.4), content["environments"], fontsize=7) as figure:
        axes = figure.subplots()
        students = list(dict.fromkeys(record["student"] for record in content["records"]))
        for place, student in enumerate(students):
            own = [record for record in content["records"] if record["student"] == student]
            for kind, mark in _MARKS.items():
                points = sorted(map(_point, (record for record in own if record["memory"].startswith(kind))))
                if points:
                    _draw(axes, points, mark, "-" if kind == "depth" else "", _COLOURS[place % len(_COLOURS)])
                    axes.lines[-1].set_label(f"{student} ({training_words(own[0])}), {_KIND_WORDS[kind]}")
        axes.set_xlabel("MB of keys and values that are remembered")
        axes.set_ylabel("as seen at the first visit")
        axes.set_ylim(-0.03, 1.03)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        if students:
            axes.legend(fontsize=7)
    return path


_KIND_WORDS = {"depth": "fewer layers", "frames": "fewer frames", "bits": "fewer bits"}


def _point(record: Record) -> tuple[float, float, float, float]:
    seen = record["as_seen"]
    return record["bytes"] / 1e6, sum(seen) / len(seen), *share_interval(sum(seen), len(seen))


def _draw(axes: Any, points: Sequence[tuple[float, float, float, float]], mark: str, line: str, colour: str) -> None:
    x, y, low, high = zip(*points, strict=True)
    axes.vlines(x, low, high, color=colour, alpha=0.3, linewidth=2)
    axes.plot(x, y, linestyle=line or "none", marker=mark, markersize=5, color=colour)
