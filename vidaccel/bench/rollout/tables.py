"""Figures, table and picture of the rollout benchmark, made from its records."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vidaccel.bench.shared.figure import saved_figure
from vidaccel.bench.shared.markdown import captions, markdown_table
from vidaccel.bench.shared.statistics import percentile

Record = Mapping[str, Any]

EARLY_CHUNK, LATE_CHUNK = 30, 300
_WINDOW = 10  # chunks whose median stands for one, because keyframes come every second chunk
_COLOURS = {"eager": "#8c8c8c", "compiled": "#56a3d9", "captured": "#d1410c"}  # of a bar or curve, by its passes
_LINES = (
    ("transformer", ("denoising_ms",)),
    ("with the clean pass", ("denoising_ms", "commit_ms")),
    ("with the decoder", ("total_ms",)),
)


def summarise_cells(records: Sequence[Record]) -> dict[str, Any]:
    """For every cell its lines (milliseconds per chunk, frames per second), memory, and whether it stays as it was."""
    cells = [record for record in records if record["kind"] == "cell"]
    return {
        "cells": [_summary(cell) for cell in cells],
        "attention": {
            record["memory"]: record["candidates"][0]["attention"]
            for record in records
            if record["kind"] == "attention"
        },
    }


def _summary(cell: Record) -> dict[str, Any]:
    steady = steady_chunks(cell)
    summary = {name: cell[name] for name in ("memory", "mode", "decoder", "attended_frames", "finite", "memory_bytes")}
    summary |= {"chunks": len(cell["chunks"]["total_ms"]), "steady_chunks": len(steady)}
    if not steady:
        return summary | {"lines": {}, "flatness": None}
    lines = {}
    for name, phases in _LINES:
        if name == "with the decoder" and cell["decoder"] == "none":
            continue
        values = [sum(cell["chunks"][phase][row] for phase in phases) for row in steady]
        lines[name] = _line(values, cell)
    medians = {
        phase: statistics.median(cell["chunks"][phase][row] for row in steady)
        for phase in cell["chunks"]
        if phase.endswith("_ms") and phase != "passes_ms"
    }
    passes = zip(*(cell["chunks"]["passes_ms"][row] for row in steady), strict=True)
    medians["passes_ms"] = [statistics.median(values) for values in passes]
    peaks = [peak for peak in cell["chunks"]["peak_bytes"] if peak is not None]
    return summary | {
        "lines": lines,
        "median_ms": medians,
        "peak_bytes": max(peaks, default=None),
        "allocated_bytes": cell["chunks"]["allocated_bytes"][-1],
        "flatness": _flatness(cell),
    }


def steady_chunks(cell: Record) -> list[int]:
    """Rows of a cell that count: the memory is full, and a video from its start is past its first chunks."""
    first = EARLY_CHUNK if cell["from_start"] else 0
    return [
        row
        for row, attended in enumerate(cell["chunks"]["attended_frames"])
        if attended == cell["attended_frames"] and cell["first_chunk"] + row >= first
    ]


def _line(values: Sequence[float], cell: Record) -> dict[str, float]:
    frames = cell["pixel_frames_per_chunk"]
    return {
        "mean_ms": statistics.fmean(values),
        "p50_ms": percentile(values, 50),
        "p95_ms": percentile(values, 95),
        "p99_ms": percentile(values, 99),
        "frames_per_second": 1000 * frames / statistics.fmean(values),
    }


def _flatness(cell: Record) -> dict[str, Any] | None:
    """Time and memory around chunk 300 against chunk 30, for a cell that is long enough."""
    chunks = cell["chunks"]
    if not cell["from_start"] or len(chunks["total_ms"]) < LATE_CHUNK + _WINDOW:
        return None
    early, late = (
        statistics.median(chunks["total_ms"][start : start + _WINDOW]) for start in (EARLY_CHUNK, LATE_CHUNK)
    )
    result: dict[str, Any] = {
        f"chunk_{EARLY_CHUNK}_ms": chunks["total_ms"][EARLY_CHUNK],
        f"chunk_{LATE_CHUNK}_ms": chunks["total_ms"][LATE_CHUNK],
        f"chunk_{EARLY_CHUNK}_median_of_{_WINDOW}_ms": early,
        f"chunk_{LATE_CHUNK}_median_of_{_WINDOW}_ms": late,
        "time_ratio": late / early,
    }
    allocated = [chunks["allocated_bytes"][row] for row in (EARLY_CHUNK, LATE_CHUNK)]
    result["memory_ratio"] = None if None in allocated else allocated[1] / allocated[0]
    result["allocated_bytes"] = allocated
    return result


def rollout_markdown(content: Mapping[str, Any]) -> str:
    """The lines of every cell, attention's candidates, and how flat the long run is."""
    protocol, summary = content["protocol"], content["summary"]
    lines = [
        f"# Rollout at the shape of {protocol['shape']}, random weights",
        "",
        captions(content),
        "",
        f"{protocol['width']}x{protocol['height']}, {protocol['num_inference_steps']} steps, chunks of "
        f"{protocol['chunk_frames']} latent frames. Keyframes are uniform, so that slow memory fills. "
        "Attended frames contain the chunk itself. Chunks that count have a full memory; frames per second are of the "
        "mean. The transformer's line contains arranging the memory and the sampler; the decoder's ends when the "
        "pixels are on the host. Random weights: nothing here is about quality.",
        "",
        *markdown_table(
            ["attended", "mode", "line", "p50 (ms)", "p95 (ms)", "p99 (ms)", "frames/s", "chunks"],
            [row for cell in summary["cells"] for row in _rows(cell)],
        ),
        "",
        "## Phases of a chunk (ms, medians) and memory",
        "",
        *markdown_table(
            [
                "attended",
                "mode",
                "decoder",
                "before the passes",
                "passes",
                "decoding",
                "transfer",
                "peak (GB)",
                "KV (GB)",
            ],
            [_phases(cell) for cell in summary["cells"] if cell["lines"]],
        ),
    ]
    for cell in summary["cells"]:
        if cell["flatness"]:
            lines += ["", *_flatness_lines(cell)]
    for record in content["records"]:
        if record["kind"] == "attention":
            lines += ["", f"## Attention of one layer, memory {record['memory']}", "", *_attention_table(record)]
    if summary["not_run"]:
        lines += ["", "Not run, because it needs CUDA: " + ", ".join(summary["not_run"]) + "."]
    return "\n".join(lines) + "\n"


def _rows(cell: Record) -> list[list[str]]:
    return [
        [
            str(cell["attended_frames"]),
            cell["mode"],
            f"with the {cell['decoder']} decoder" if name == "with the decoder" else name,
            *(f"{line[key]:.1f}" for key in ("p50_ms", "p95_ms", "p99_ms")),
            f"{line['frames_per_second']:.2f}",
            str(cell["steady_chunks"]),
        ]
        for name, line in cell["lines"].items()
    ]


def _phases(cell: Record) -> list[str]:
    medians, reserved = cell["median_ms"], cell["memory_bytes"]["reserved"]
    return [
        str(cell["attended_frames"]),
        cell["mode"],
        cell["decoder"],
        f"{medians['before_passes_ms']:.1f}",
        " + ".join(f"{value:.1f}" for value in medians["passes_ms"]),
        f"{medians['decoding_ms']:.1f}",
        f"{medians['transfer_ms']:.1f}",
        "-" if cell["peak_bytes"] is None else f"{cell['peak_bytes'] / 1e9:.2f}",
        f"{reserved / 1e9:.2f}",
    ]


def _flatness_lines(cell: Record) -> list[str]:
    flat = cell["flatness"]
    early, late = (flat[f"chunk_{chunk}_median_of_{_WINDOW}_ms"] for chunk in (EARLY_CHUNK, LATE_CHUNK))
    memory = "-" if flat["memory_ratio"] is None else f"{100 * (flat['memory_ratio'] - 1):+.2f} %"
    return [
        f"{cell['mode']}, {cell['attended_frames']} attended: chunk {LATE_CHUNK} takes {late:.1f} ms and chunk "
        f"{EARLY_CHUNK} {early:.1f} ms (medians of {_WINDOW} from there on; {100 * (flat['time_ratio'] - 1):+.2f} %); "
        f"memory {memory}."
    ]


def _attention_table(record: Record) -> list[str]:
    rows = [
        [
            row["attention"],
            "-" if row["ms"] is None else f"{row['ms']:.3f}",
            row["error"] or f"{row['relative_error']:.4f}",
        ]
        for row in record["candidates"]
    ]
    return markdown_table(["attention", "ms", "relative error, or why it cannot"], rows)


def save_rollout_plot(path: Path, content: Mapping[str, Any]) -> Path:
    """Milliseconds of each chunk of the videos that were made from their start; frames a second of every cell."""
    with saved_figure(path, (10, 4.6), content["environments"], color="#6e6e73") as figure:
        over_time, rates = figure.subplots(1, 2, width_ratios=(3, 2))
        _draw_chunks(over_time, [record for record in content["records"] if record["kind"] == "cell"])
        _draw_rates(rates, [cell for cell in content["summary"]["cells"] if cell["lines"]])
        for axes in (over_time, rates):
            axes.spines[["top", "right"]].set_visible(False)
    return path


def _draw_chunks(axes: Any, cells: Sequence[Record]) -> None:
    """The curves of the cells that begin with the first chunk, or of all where none does."""
    shown = [cell for cell in cells if cell["from_start"]] or cells
    slowest = max((cell["chunks"]["total_ms"][row] for cell in shown for row in steady_chunks(cell)), default=0.0)
    longest = max((len(cell["chunks"]["total_ms"]) for cell in shown), default=0)
    for cell in shown:
        times = cell["chunks"]["total_ms"]
        x = range(cell["first_chunk"], cell["first_chunk"] + len(times))
        axes.plot(x, times, linewidth=1.2, color=_COLOURS.get(cell["mode"], "#4d4d4d"))
        name = f"{cell['attended_frames']} attended, {cell['mode']}, {cell['decoder']} decoder"
        side, shift = ("right", 0) if len(times) == longest else ("left", 6)
        axes.annotate(name, (x[-1], times[-1]), (shift, 9), textcoords="offset points", ha=side, fontsize=8)
    if slowest:
        axes.set_ylim(0, 1.5 * slowest)  # the first chunks, which are compiled and captured, would hide all others
    axes.set_xlabel("chunk")
    axes.set_ylabel("ms per chunk, pixels on the host")
    axes.grid(alpha=0.25)


def _draw_rates(axes: Any, cells: Sequence[Record]) -> None:
    """A bar for every cell, with its number; the fastest at the top."""
    rated = [(list(cell["lines"].values())[-1]["frames_per_second"], cell) for cell in cells]
    rated.sort(key=lambda pair: pair[0])
    names = [f"{cell['attended_frames']}, {cell['mode']}, {cell['decoder']}" for _, cell in rated]
    values = [value for value, _ in rated]
    bars = axes.barh(range(len(rated)), values, color=[_COLOURS.get(cell["mode"], "#4d4d4d") for _, cell in rated])
    axes.bar_label(bars, fmt="%.1f", padding=3, fontsize=8)
    axes.set_yticks(range(len(rated)), names, fontsize=8)
    axes.set_xlim(0, 1.15 * max(values, default=1.0))
    axes.set_xlabel("frames a second")
    axes.set_title("attended frames, passes, decoder", fontsize=8, loc="left")
