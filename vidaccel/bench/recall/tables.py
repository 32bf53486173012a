"""Tables and plot of the recall benchmark, made from its summary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vidaccel.bench.shared.figure import saved_figure
from vidaccel.bench.shared.markdown import captions, markdown_table

Row = Mapping[str, Any]
_TITLES = {
    "return": "Back to a place",
    "three": "With a third place in between",
    "shift": "To rest beside where the camera stood before",
    "own": "In videos of the student alone",
}
_COLOURS = {None: "#d1410c", "blank": "#8c8c8c", "swap": "#0072b2"}


def recall_markdown(content: Mapping[str, Any]) -> str:
    """How it was measured, a table for each kind of trip, and what the oracle makes of the world itself."""
    protocol, summary = content["protocol"], content["summary"]
    lines = [
        "# Is a place the same when the camera comes back?",
        "",
        captions(content),
        "",
        f"{protocol['num_trips']} unseen trips of every kind: the camera leaves a place, sees another, comes home and "
        "returns. Everything up to the way back is the world's, encoded; the student makes the rest with its own "
        f"memory ({protocol['memory']}), {protocol['num_inference_steps']} steps and guidance "
        f"{protocol['guidance_scale']:g} where nothing else is said. As seen: the oracle reads the kind and the colour "
        f"of the first visit (decoded), within {protocol['most_shift']:g} pixels of its place, in the median of the "
        f"return's last {protocol['still_frames']} frames. Blank: no frame that shows the place is in memory. Swap: "
        "those frames show another landmark, which is what must come back. Ceiling: the return as the world shows it, "
        "decoded. Chance: a return against the first visits of other trips. Valid: a log-likelihood ratio of at least "
        f"{protocol['valid_likelihood']:g} a pixel, which 99 % of the decoded world reach. Shares have Wilson's 95 % "
        "intervals, differences (in points, trip by trip) the bootstrap's.",
    ]
    for kind, title in _TITLES.items():
        rows = [row for row in summary["cells"] if row["kind"] == kind]
        if rows:
            lines += ["", f"## {title}", "", *_return_table(rows)]
        if kind == "own" and rows:
            lines += ["", "What the student itself invents at the first visit:", "", *_first_table(rows)]
    for row in summary["cells"]:
        if row["original"] is not None:
            lines += ["", f"`{row['cell']}` shows the landmark that was there before in {_share(row['original'])}."]
    lines += ["", "## What the world itself is read as", "", *_truth_table(summary["truths"])]
    return "\n".join(lines) + "\n"


def _return_table(rows: Sequence[Row]) -> list[str]:
    header = ["cell", "frames of the visit in reach", "in slow memory", "as seen", "less the plain cell", "ceiling"]
    header += ["chance", "kind", "colour", "place", "valid", "clearness, of the world's"]
    body = []
    for row in rows:
        cells = [f"`{row['cell']}`", f"{row['frames_in_reach']:.1f}", f"{row['keyframes']:.1f}"]
        cells += [_share(row["as_seen"]), _points(row["difference"]), f"{row['ceiling']['share']:.0%}"]
        cells += [f"{row['chance']:.1%}", *(f"{row[name]['share']:.0%}" for name in _PARTS)]
        cells += [_share(row["second"]["valid"]), f"{row['second']['likelihood_share']:.0%}"]
        body.append(cells)
    return markdown_table(header, body)


_PARTS = ("same_kind", "same_colour", "same_place")


def _first_table(rows: Sequence[Row]) -> list[str]:
    header = ["cell", "valid", "clearness, of the world's", "kinds (bits)", "of the world's (bits)", "commonest kind"]
    body = []
    for row in rows:
        first = row["first"]
        kinds = [f"{first[name]:.2f}" for name in ("kinds_entropy", "truth_entropy")]
        commonest = f"{first['commonest']['kind']}, {first['commonest']['share']:.0%}"
        cells = [f"`{row['cell']}`", _share(first["valid"]), f"{first['likelihood_share']:.0%}", *kinds, commonest]
        body.append(cells)
    return markdown_table(header, body)


def _truth_table(rows: Sequence[Row]) -> list[str]:
    header = ["trips", "return as seen", "chance", "valid at the first visit", "log-likelihood ratio a pixel"]
    body = [
        [
            f"`{row['cell']}`",
            _share(row["as_seen"]),
            f"{row['chance']:.1%}",
            _share(row["first"]["valid"]),
            f"{row['first']['likelihood']['mean']:.3f}",
        ]
        for row in rows
    ]
    return markdown_table(header, body)


def _share(found: Row) -> str:
    return f"{found['share']:.1%} of {found['count']} [{found['low']:.0%}, {found['high']:.0%}]"


def _points(found: Row | None) -> str:
    if found is None:
        return "-"
    mean, low, high = (f"{100 * float(found[name]):+.1f}" for name in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def save_recall_plot(path: Path, content: Mapping[str, Any]) -> Path:
    """How often a place is as seen, a line for each cell, with its interval, its chance and its ceiling."""
    rows = content["summary"]["cells"]
    with saved_figure(path, (9, 1.6 + 0.32 * len(rows)), content["environments"]) as figure:
        axes = figure.subplots()
        for place, row in enumerate(rows):
            _draw_row(axes, place, row)
        axes.set_yticks(range(len(rows)), [row["cell"] for row in rows])
        axes.set(xlim=(-2, 105), ylim=(len(rows) - 0.4, -0.7))
        axes.set_xlabel("as seen (%); grey tick: chance, dotted: ceiling")
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3, axis="x")
    return path


def _draw_row(axes: Any, place: int, row: Row) -> None:
    seen = {name: 100 * row["as_seen"][name] for name in ("share", "low", "high")}
    interval = [[max(0.0, seen["share"] - seen["low"])], [max(0.0, seen["high"] - seen["share"])]]
    style = {"fmt": "o", "markersize": 5, "linewidth": 1.6, "color": _COLOURS[row["control"]]}
    axes.errorbar([seen["share"]], [place], xerr=interval, **style)
    axes.vlines(100 * row["chance"], place - 0.3, place + 0.3, color="#b0b0b0", linewidth=2)
    axes.vlines(100 * row["ceiling"]["share"], place - 0.35, place + 0.35, color="#4d4d4d", linestyle=":")
