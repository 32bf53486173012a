"""Summary, table and picture of rollouts of any length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import Any

from vidaccel.bench.recall.pictures import pixels_of
from vidaccel.bench.recall.summary import is_as_seen
from vidaccel.bench.shared.figure import saved_figure
from vidaccel.bench.shared.markdown import captions, markdown_table, share_text

Row = Mapping[str, Any]
CHUNK_SECONDS = 12 / 16  # pixel frames of a chunk, and of a second
MINUTE_CHUNKS = round(60 / CHUNK_SECONDS)
_COLOURS = ("#8c8c8c", "#0072b2", "#d1410c", "#1a8a5a", "#7a4fa3", "#b58900")


def summarise_endless(records: Sequence[Row]) -> dict[str, Any]:
    """`memories`: a row for each, with the first minute beside the last."""
    return {"memories": [_row(record) for record in records]}


def _row(record: Row) -> dict[str, Any]:
    taken, times = record["process_bytes"], record["chunk_seconds"]
    minute = min(MINUTE_CHUNKS, len(taken) // 2)
    return {
        "memory": record["memory"],
        "attended_frames": record["attended_frames"],
        "as_seen": [is_as_seen(video["first"], video["second"]) for video in record["videos"]],
        "kind_and_place": [_kind_and_place(video["first"], video["second"]) for video in record["videos"]],
        "in_reach": record["in_reach"],
        "num_returns": record["num_returns"],
        "process_bytes": {"minute": taken[minute - 1], "end": taken[-1]},
        "chunk_seconds": {"first": median(times[1:minute]), "last": median(times[-minute:])},
        "disk_bytes": record["disk_bytes"],
    }


def _kind_and_place(first: Row, second: Row) -> bool:
    return is_as_seen(first, {**second, "colour": first["colour"]})


def endless_markdown(content: Row) -> str:
    """How it was measured, and a line for every memory."""
    protocol = content["protocol"]
    minutes = protocol["num_chunks"] / MINUTE_CHUNKS
    lines = [
        "# Minutes of video, and a place of its first seconds",
        "",
        captions(content),
        "",
        f"{protocol['num_videos']} own videos of {minutes:.1f} minutes ({protocol['num_chunks']} chunks, made "
        "together, seeds from 0): the camera sees a place, comes home, goes to the other side and back "
        f"{protocol['num_detours']} times, and to the first place again. Prompt: {protocol['prompt']}; "
        f"{protocol['num_inference_steps']} steps a chunk, thresholds of keyframes as the student's. The rollout is "
        "kept in a session; nothing is decoded but the visits.",
        "",
        "As seen: the oracle reads the kind and colour of the landmark of the first visit, within 8 pixels of its "
        "place, at the very end; kind and place: whatever its colour. In reach: frames of the first visit in slow "
        "memory then, of the first video. Came back: frames that had left the memory and were read again, of the "
        "first video. Process: resident bytes of all of it, weights included, after the first minute and at the "
        "end; memories are measured one after another. On disk: the whole session. A chunk: median of the first and "
        "of the last minute.",
        "",
        *_table(content["summary"]["memories"]),
    ]
    return "\n".join(lines) + "\n"


def _table(rows: Sequence[Row]) -> list[str]:
    header = ["memory", "attended frames", "as seen", "kind and place", "in reach", "came back"]
    header += ["process, 1 min; end", "on disk", "a chunk"]
    body = []
    for row in rows:
        process, chunk = row["process_bytes"], row["chunk_seconds"]
        body.append(
            [
                f"`{row['memory']}`",
                str(row["attended_frames"]),
                f"{share_text(row['as_seen'])} of {len(row['as_seen'])}",
                f"{sum(row['kind_and_place'])} of {len(row['kind_and_place'])}",
                str(row["in_reach"]),
                str(row["num_returns"]),
                f"{_mib(process['minute'])}; {_mib(process['end'])} MiB",
                f"{_mib(row['disk_bytes'])} MiB",
                f"{1000 * chunk['first']:.0f}; {1000 * chunk['last']:.0f} ms",
            ]
        )
    return markdown_table(header, body)


def _mib(count: int) -> str:
    return f"{count / 2**20:.0f}"


def save_endless_plot(path: Path, content: Row) -> Path:
    """Both visits of the first videos, a row a memory; below what the process takes and how long chunks take."""
    records = content["records"]
    heights = [*[1.0] * (len(records) + 1), 2.2, 2.2]
    with saved_figure(path, (9, 1.1 * sum(heights)), content["environments"]) as figure:
        axes = figure.subplots(len(heights), 1, height_ratios=heights)
        rows = [
            (records[0]["strips"]["first"], "first visit"),
            *((r["strips"]["second"], r["memory"]) for r in records),
        ]
        for one, (strip, words) in zip(axes, rows, strict=False):
            one.imshow(pixels_of(strip))
            one.set_ylabel(words, rotation=0, ha="right", va="center", fontsize=8)
            one.set(xticks=[], yticks=[])
            one.spines[:].set_visible(False)
        for colour, record in zip(cycle(_COLOURS), records, strict=False):
            minutes = [chunk / MINUTE_CHUNKS for chunk in range(len(record["process_bytes"]))]
            taken = [count / 2**20 for count in record["process_bytes"]]
            axes[-2].plot(minutes, taken, color=colour, linewidth=1.2, label=record["memory"])
            axes[-1].plot(minutes, _smoothed(record["chunk_seconds"]), color=colour, linewidth=1.2)
        axes[-2].set(ylabel="process (MiB)", ylim=(0, None))
        axes[-2].legend(fontsize=7, ncols=2, frameon=False, loc="lower right")
        axes[-1].set(ylabel="a chunk (ms)", xlabel="minutes of video", ylim=(0, None))
        for one in axes[-2:]:
            one.spines[["top", "right"]].set_visible(False)
            one.grid(alpha=0.3, axis="y")
    return path


def _smoothed(seconds: Sequence[float]) -> list[float]:
    """Milliseconds, the median of each and its twenty neighbours."""
    return [1000 * median(seconds[max(place - 10, 0) : place + 11]) for place in range(len(seconds))]
