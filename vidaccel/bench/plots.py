"""The Pareto picture: fidelity to the plain run against the computed forwards, one line per family of methods."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vidaccel.files.atomic import atomic_write

_MARKERS = "osD^v<>Ppx*"
_COLOURS = 10  # of matplotlib's cycle
_PANELS = (("psnr", "mean PSNR against the plain run (dB)"), ("ssim", "mean SSIM against the plain run"))


def save_pareto(path: Path, methods: Sequence[Mapping[str, Any]], *, caption: str) -> Path:
    """Draw `methods` (rows of the summary) as PNG or SVG; points at infinity (identical videos) are left out."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5.4), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (field, label) in zip(figure.subplots(1, 2), _PANELS, strict=True):
        for number, family in enumerate(dict.fromkeys(method["family"] for method in methods)):
            members = [method for method in methods if method["family"] == family]
            _draw_family(axes, members, field, marker=_MARKERS[number // _COLOURS % len(_MARKERS)])
        axes.set_xlabel("computed transformer forwards, mean per video")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=9 if len(axes.lines) < _COLOURS else 6)
    figure.suptitle(caption, fontsize=9)
    with atomic_write(path) as unfinished:
        figure.savefig(unfinished, dpi=150)
    return path


def _draw_family(axes: Any, members: Sequence[Mapping[str, Any]], field: str, *, marker: str) -> None:
    shown = [member for member in members if member[field] is not None and math.isfinite(float(member[field]["high"]))]
    shown.sort(key=lambda member: float(member["num_forwards"]["mean"]))
    if not shown:
        return
    x = [float(member["num_forwards"]["mean"]) for member in shown]
    y, low, high = ([float(member[field][name]) for member in shown] for name in ("mean", "low", "high"))
    bars = [[b - a for a, b in zip(low, y, strict=True)], [b - a for a, b in zip(y, high, strict=True)]]
    axes.errorbar(x, y, yerr=bars, marker=marker, markersize=4, capsize=2, linewidth=1.2, label=members[0]["family"])
    for across, up, member in zip(x, y, shown, strict=True):
        axes.annotate(f"{member['parameter']:g}", (across, up), xytext=(3, 4), textcoords="offset points", fontsize=7)
