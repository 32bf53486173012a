"""The picture of a rollout: which frames sat in sink, slow and fast memory over time, and what each chunk took.

Time runs to the right. A frame that is remembered is a bar at its own height, from the chunk that brought it into a
part of the memory to the chunk that took it out; what was made last lies on the diagonal. Of a long video these bars
are drawn for its end, and everything else for all of it.
"""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from textwrap import wrap
from typing import Any

from vidaccel.files.atomic import atomic_write
from vidaccel.memory import MemoryConfig
from vidaccel.memory.entry import Part
from vidaccel.rollout.record import Residence, RolloutRecord

_SLOW = "#e08a2e"
_PARTS: dict[Part, tuple[str, str]] = {
    "sink": ("#3d5a99", "sink ({} frames)"),
    "slow": (_SLOW, "slow (up to {})"),
    "fast": ("#8fbf9a", "fast ({})"),
}
_PHASE_COLOURS = ("#5b7fb0", "#d9b44a", "#9a7fb8", "#8a8a8a", "#5aa39a")
_RED, _GREY, _CAMERA = "#b03030", "#808080", "#2a7f7f"
_MOST_BARS = 320  # chunks whose frames are told apart; of a longer video the first panel shows the last ones
_SHOWN_BARS = 240
_MOST_LABELS = 12  # prompts that are written out; more would cover each other
_LABEL_LENGTH = 40  # characters in a line of a prompt, which is half of the first panel high
_LABEL_POINTS = 13  # from line to line
_BEYOND = 1.6  # times the 95th percentile: where the axis of times ends, so that a warm-up does not flatten the rest


def draw_rollout(record: RolloutRecord, path: Path) -> Path:
    """Write the picture; its ending chooses the format. Raises ValueError where there is no chunk to draw."""
    if not record.num_chunks:
        raise ValueError("The report has no chunks to draw; run the rollout first.")
    from matplotlib.figure import Figure

    panels, heights = [_draw_memory], [4.6]
    if record.stays("slow"):
        panels.append(_draw_ages)
        heights.append(1.8)
    if any(record.camera):
        panels.append(_draw_camera)
        heights.append(1.2)
    panels.append(_draw_times)
    heights.append(1.8)
    if any(not math.isnan(value) for value in record.similarities()):
        panels.append(_draw_similarity)
        heights.append(1.6)
    figure = Figure(figsize=(11.0, sum(heights) + 0.8), layout="constrained")
    axes = figure.subplots(len(panels), 1, height_ratios=heights)
    first = _first_bar(record)
    for draw, one in zip(panels, axes, strict=True):
        draw(record, one)
        _draw_prompts(record, one, range(first if one is axes[0] else 0, record.num_chunks))
        one.spines[["top", "right"]].set_visible(False)
        one.set_xlim(record.start_seconds()[0 if one is not axes[0] else first], record.start_seconds()[-1])
    for one in axes[0 if first == 0 else 1 : -1]:
        one.tick_params(labelbottom=False)
    _write_prompts(record, axes[0], first)
    axes[-1].set_xlabel("time in the video [s]")
    with atomic_write(path) as unfinished:
        figure.savefig(unfinished, dpi=150)
    return path


def _draw_memory(record: RolloutRecord, axes: Any) -> None:
    from matplotlib.collections import PolyCollection

    times = record.start_seconds()
    for part, (colour, words) in _PARTS.items():
        count = record.memory.part_frames.get(part, 0)
        bars = []
        for stay in record.stays(part):
            left, right = _times_of(stay, times)
            bars.append([(left, stay.frame), (left, stay.frame + 1), (right, stay.frame + 1), (right, stay.frame)])
        if count:
            bars_of_part = PolyCollection(bars, color=colour, linewidth=0.6, zorder=2, label=words.format(count))
            axes.add_collection(bars_of_part)
    middles = [(times[chunk] + times[chunk + 1]) / 2 for chunk in record.keyframe_chunks]
    heights = [record.first_frames[chunk] + 0.5 for chunk in record.keyframe_chunks]
    if middles:
        words = f"keyframe ({record.num_keyframes})"
        axes.plot(middles, heights, "v", color=_RED, markersize=4, zorder=3, label=words)
    if back := record.returns():
        places = ([times[chunk] for _, chunk in back], [frame + 0.5 for frame, _ in back])
        axes.plot(*places, ">", color=_SLOW, mec="black", mew=0.5, ms=5, zorder=3, label=f"came back ({len(back)})")
    last = record.first_frames[-1] + record.grid.chunk_frames
    lowest = record.first_frames[_first_bar(record)]
    axes.set_ylim(lowest, last + 0.02 * (last - lowest))
    axes.set_ylabel("latent frame")
    axes.legend(loc="upper left", fontsize="small", framealpha=0.9)
    where = "" if lowest == 0 else ", at the end of the video (the sink lies below)"
    axes.set_title(f"frames in the memory after each chunk{where}", fontsize="medium")


def _draw_ages(record: RolloutRecord, axes: Any) -> None:
    """How far back the remembered keyframes lie, a line for each."""
    from matplotlib.collections import LineCollection

    times, second = record.start_seconds(), record.grid.temporal_stride / record.grid.fps
    lines, most = [], 0.0
    for stay in record.stays("slow"):
        last = record.num_chunks if stay.left is None else stay.left
        ages = [(record.first_frames[chunk] - stay.frame) * second for chunk in (stay.entered, last - 1)]
        right = times[last]
        lines.append([(times[stay.entered], ages[0]), (right, ages[1] + right - times[last - 1])])
        most = max(most, lines[-1][1][1])
    axes.add_collection(LineCollection(lines, colors=_SLOW, linewidths=1.1))
    axes.set_ylim(0, max(most, second) * 1.08)
    axes.set_ylabel("age of slow\nframes [s]")


def _draw_camera(record: RolloutRecord, axes: Any) -> None:
    """The way of the camera, a point for each latent frame."""
    times, firsts = record.start_seconds(), [*record.first_frames, len(record.camera)]
    middles = [
        left + (right - left) * (frame + 0.5) / (end - first)
        for (left, right), (first, end) in zip(pairwise(times), pairwise(firsts), strict=True)
        for frame in range(end - first)
    ]
    axes.plot(middles, record.camera, color=_CAMERA, linewidth=1)
    axes.set_ylabel("camera\n[screens]")


def _draw_times(record: RolloutRecord, axes: Any) -> None:
    times, phases = record.start_seconds(), record.phase_seconds()
    floor = [0.0] * record.num_chunks
    for colour, (phase, seconds) in zip(_PHASE_COLOURS, phases.items(), strict=False):
        top = [below + 1000 * value for below, value in zip(floor, seconds, strict=True)]
        axes.stairs(top, times, baseline=floor, fill=True, color=colour, label=phase.replace("_", " "))
        floor = top
    measured = sorted(value for value in floor if not math.isnan(value)) if phases else []
    axes.set_ylabel("time per chunk\n[ms]")
    if not measured:
        axes.set_title("time not measured", fontsize="medium")
        return
    limit = _BEYOND * measured[math.ceil(0.95 * len(measured)) - 1]
    beyond = sum(value > limit for value in measured)
    axes.set_ylim(0, min(measured[-1], limit) * 1.25)
    rate = record.pixel_frames_per_second
    words = "" if rate is None else f", {rate:.3g} pixel frames per second"
    words += "" if not beyond else f"; {beyond} longer than shown, up to {measured[-1] / 1000:.3g} s"
    axes.set_title(f"median {measured[len(measured) // 2]:.1f} ms{words}", fontsize="medium")
    axes.legend(loc="upper right", fontsize="small", ncols=len(phases), framealpha=0.9)


def _draw_similarity(record: RolloutRecord, axes: Any) -> None:
    times, values = record.start_seconds(), record.similarities()
    middles = [(left + right) / 2 for left, right in pairwise(times)]
    is_long = _first_bar(record) > 0
    line, size = ("", 2) if is_long else ("-", 4)
    axes.plot(middles, values, linestyle=line, marker=".", color="#5b7fb0", markersize=size, linewidth=0.8)
    chunks = record.keyframe_chunks
    marks = [values[chunk] for chunk in chunks]
    axes.plot([middles[chunk] for chunk in chunks], marks, "." if is_long else "v", color=_RED, markersize=size)
    axes.set_ylabel("similarity to\nchunk before")
    memory = record.memory
    if isinstance(memory, MemoryConfig) and memory.uses_similarity:
        threshold = memory.similarity_threshold
        axes.axhline(threshold, color=_RED, linewidth=0.8)
        axes.set_title(f"{record.num_keyframes} keyframes, below the threshold {threshold:g}", fontsize="medium")


def _draw_prompts(record: RolloutRecord, axes: Any, chunks: range) -> None:
    """A line where a prompt begins."""
    times = record.start_seconds()
    for chunk, _ in record.prompts[1:]:
        if chunk in chunks:
            axes.axvline(times[chunk], color=_GREY, linewidth=1, linestyle="--", zorder=1)


def _write_prompts(record: RolloutRecord, axes: Any, first: int) -> None:
    """The prompts along their lines; the one that holds where the panel begins stands at its edge."""
    times = record.start_seconds()
    before = [prompt for chunk, prompt in record.prompts if chunk <= first][-1:]
    prompts = [*((first, prompt) for prompt in before), *(entry for entry in record.prompts if entry[0] > first)]
    if len(record.prompts) == 1 or len(prompts) > _MOST_LABELS:
        return
    left, right = axes.get_xlim()
    points = 72 * axes.get_window_extent().width / axes.figure.dpi / (right - left)  # of a second
    ends = [*(times[chunk] for chunk, _ in prompts[1:]), right]
    for (chunk, prompt), end in zip(prompts, ends, strict=True):
        lines = max(1, int(points * (end - times[chunk]) / _LABEL_POINTS))  # as many as there is room for
        axes.annotate(
            "\n".join(wrap(prompt, _LABEL_LENGTH, max_lines=lines, placeholder=" ...")),
            (times[chunk], 0.03),
            xycoords=axes.get_xaxis_transform(),
            xytext=(4, 0),
            textcoords="offset points",
            rotation=90,
            fontsize="small",
            color="#303030",
            va="bottom",
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.8},
            zorder=4,
        )


def _first_bar(record: RolloutRecord) -> int:
    """The first chunk of the panel in which frames are told apart."""
    return 0 if record.num_chunks <= _MOST_BARS else record.num_chunks - _SHOWN_BARS


def _times_of(stay: Residence, times: list[float]) -> tuple[float, float]:
    return times[stay.entered], times[-1] if stay.left is None else times[stay.left]
