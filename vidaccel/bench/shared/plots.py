"""The Pareto picture: fidelity to the plain run against the computed forwards, one colour a method, labelled lines."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vidaccel.bench.shared.labels import Label, place_labels
from vidaccel.files.atomic import atomic_write

# A method is the part of a family's name before the first comma; its variants share the colour.
_COLOURS = {
    "EasyCache": "#d1410c",
    "fewer steps": "#8c8c8c",
    "every k-th step": "#4d4d4d",
    "random steps": "#b8a990",
    "FirstBlockCache": "#0072b2",
    "MagCache": "#56a3d9",
    "TaylorSeer": "#7a4fa3",
    "PyramidAttentionBroadcast": "#a8327a",
    "SeaCache": "#1a8a5a",
}
_OTHER_COLOURS = ("#b58900", "#2f6f6f", "#994455", "#556677")
_STYLES = ("-", "--", ":", "-.")
_MOST_NUMBERED = 5  # families whose points carry their parameter; more numbers would cover each other


def save_pareto(path: Path, methods: Sequence[Mapping[str, Any]], *, caption: str) -> Path:
    """Draw `methods` (rows of the summary) as PNG or SVG; points at infinity (identical videos) are left out."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.set_xlabel("computed transformer forwards, mean per video (fewer is faster)")
    axes.set_ylabel("mean PSNR against the plain run (dB)")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    lines = [line for line in map(_shown, _families(methods).values()) if line]
    labels = [_draw_family(axes, line, style) for line, style in zip(lines, _styles(lines), strict=True)]
    if len(lines) <= _MOST_NUMBERED:
        labels += [label for line, style in zip(lines, _styles(lines), strict=True) for label in _numbers(line, style)]
    figure.suptitle(caption, fontsize=8, color="#6e6e73")
    if lines:
        left, right = axes.get_xlim()
        axes.set_xlim(left, right + 0.2 * (right - left))  # room for the names of the lines
        place_labels(axes, labels)
    with atomic_write(path) as unfinished:
        figure.savefig(unfinished, dpi=150)
    return path


def _families(methods: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """The rows of every family, in the order of their appearance."""
    names = dict.fromkeys(method["family"] for method in methods)
    return {name: [method for method in methods if method["family"] == name] for name in names}


def _shown(members: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The rows that have a place in the picture, from few forwards to many."""
    shown = [
        member for member in members if member["psnr"] is not None and math.isfinite(float(member["psnr"]["high"]))
    ]
    return sorted(shown, key=lambda member: float(member["num_forwards"]["mean"]))


def _styles(lines: Sequence[Sequence[Mapping[str, Any]]]) -> list[tuple[str, str]]:
    """Colour and kind of line of every family: the method's colour, and a kind of line for each of its variants."""
    names = [_method(line) for line in lines]
    unknown = [name for name in dict.fromkeys(names) if name not in _COLOURS]
    colours = _COLOURS | {name: _OTHER_COLOURS[place % len(_OTHER_COLOURS)] for place, name in enumerate(unknown)}
    return [(colours[name], _STYLES[names[:place].count(name) % len(_STYLES)]) for place, name in enumerate(names)]


def _method(line: Sequence[Mapping[str, Any]]) -> str:
    return str(line[0]["family"]).partition(",")[0]


def _point(member: Mapping[str, Any]) -> tuple[float, float]:
    return float(member["num_forwards"]["mean"]), float(member["psnr"]["mean"])


def _draw_family(axes: Any, line: Sequence[Mapping[str, Any]], style: tuple[str, str]) -> Label:
    """Draw one line with its intervals; the label that belongs to its end."""
    colour, kind = style
    x, y = zip(*map(_point, line), strict=True)
    low, high = ([float(member["psnr"][name]) for member in line] for name in ("low", "high"))
    axes.vlines(x, low, high, color=colour, alpha=0.3, linewidth=2.5)
    axes.plot(x, y, kind, marker="o", markersize=4, linewidth=1.6, color=colour)
    return Label(x=x[-1], y=y[-1], text=str(line[0]["family"]), colour=colour, size=8.5)


def _numbers(line: Sequence[Mapping[str, Any]], style: tuple[str, str]) -> list[Label]:
    """The parameter of every point, in a small font."""
    points = [(*_point(member), f"{member['parameter']:g}") for member in line]
    return [Label(x=x, y=y, text=text, colour=style[0], size=7, may_stand_left=True) for x, y, text in points]
