"""Tables and picture of the student benchmark, made from its summary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vidaccel.bench.shared.figure import saved_figure
from vidaccel.bench.shared.markdown import captions, markdown_table
from vidaccel.bench.student.changes import KEPT, WAITS
from vidaccel.bench.student.readings import CLEAR_DISTANCE, SUBJECT
from vidaccel.bench.student.summary import LAST_WAIT, ONE_COLOUR
from vidaccel.world.landmark_oracle import VALID_LIKELIHOOD

Row = Mapping[str, Any]
_NO_CAMERA = "First visits were left out: this student is not told how its camera moves."


def student_markdown(content: Mapping[str, Any]) -> str:
    """A table for each part that was measured."""
    protocol, summary = content["protocol"], content["summary"]
    lines = [
        "# What a causal student does with what it is told",
        "",
        captions(content),
        "",
        f"{protocol['num_inference_steps']} steps, guidance {protocol['guidance_scale']:g}, memory "
        f"{protocol['memory']}; prompts that training never sees, read by the oracles of the storybook world. Shares "
        "with Wilson's intervals, means with bootstrap intervals over prompts (95 %). A landmark counts where its "
        f"log-likelihood ratio is at least {VALID_LIKELIHOOD:g} a pixel.",
    ]
    for title, rows, table in (
        ("Soft changes of the prompt", summary["changes"], _change_tables),
        ("Soft changes in the world's own video", summary.get("given", ()), _given_tables),
        ("Places seen for the first time", summary["visits"], _visit_table),
        ("One prompt, the camera holds", summary["subjects"], _subject_table),
        ("Unusual prompts and beginnings", summary["scenes"], _scene_table),
        ("Ghosts", summary["ghosts"], _ghost_table),
        ("Are landmarks of one colour?", summary.get("colours", ()), _colour_table),
    ):
        if rows:
            lines += ["", f"## {title}", "", *table(rows)]
    if not protocol["has_camera"]:
        lines += ["", _NO_CAMERA]
    return "\n".join(lines) + "\n"


def _given_tables(rows: Sequence[Row]) -> list[str]:
    return [
        "Everything up to the change is the world's: what is lost here is not lost because the student drew something "
        "that cannot be kept.",
        "",
        *_change_tables(rows),
    ]


def _change_tables(rows: Sequence[Row]) -> list[str]:
    obeyed = [
        [
            row["attribute"],
            _share(row["before"]),
            *(_share(row["obeyed"][str(wait)]) for wait in WAITS),
            _share(row["within"]),
            _share(row["kept"]["all"]),
            _share(row["world"]["obeyed"]),
            _share(row["world"]["all"]),
        ]
        for row in rows
    ]
    header = ["change of", "first prompt shown before", *(f"obeyed, {wait} s after" for wait in WAITS)]
    header += [
        f"obeyed within {LAST_WAIT} s",
        "everything else kept",
        "the world itself: obeyed",
        "the world itself: kept",
    ]
    kept = [[row["attribute"], *(_share(row["kept"][name]) for name in KEPT)] for row in rows]
    return [
        "The prompt changes by a soft cut after 2.8 s, while the camera holds. What is read lasts 2.75 s: up to the "
        "change, and from so many seconds after it on. Kept is what was read before the change, asked for or not; what "
        f"could not be read before does not count. Within {LAST_WAIT} s: in at least one of the parts, because a walk "
        "that begins near the edge of the picture soon has no room left.",
        "",
        *markdown_table(header, obeyed),
        "",
        f"Kept of each, {LAST_WAIT} s after the change:",
        "",
        *markdown_table(["change of", *KEPT], kept),
    ]


def _visit_table(rows: Sequence[Row]) -> list[str]:
    body = [
        [
            "the world after the autoencoder" if row["of"] == "truth" else f"begun with {row['of']}",
            "-" if row["of"] == "truth" else row["sampler"],
            _interval(row["likelihood"], ".3f"),
            "-" if row["of_truth"] is None else f"{row['of_truth']:.0%}",
            _share(row["valid"]),
            "-" if row["entropy"] is None else f"{row['entropy']:.2f}",
        ]
        for row in rows
    ]
    header = ["videos", "sampler", "log-likelihood ratio a pixel", "of the world's", "valid", "bits of kinds"]
    return [
        "The camera pans to a place that it has not shown. Given: the world's own video up to where it sets off. Bits: "
        "entropy of the kinds of valid landmarks, 3 where all eight are as frequent.",
        "",
        *markdown_table(header, body),
    ]


def _subject_table(rows: Sequence[Row]) -> list[str]:
    names = (*SUBJECT, "background")
    body = [
        [
            f"{row['until']} s",
            *(_share(row[name]) for name in names),
            _share(row["all"]),
            _interval(row["sharpness"], ".2f"),
        ]
        for row in rows
    ]
    header = ["until", *names, "colour, shape and background", "sharpness against the first window"]
    return [
        "Every window of five seconds is read in its last two. Sharpness is the variance of the Laplacian.",
        "",
        *markdown_table(header, body),
    ]


def _scene_table(rows: Sequence[Row]) -> list[str]:
    names = ("subject", "motion", "clear", "background", "valid", "named")
    header = ["prompt", "colour and shape", "motion", "a clear background", "the background asked for"]
    header += ["a valid landmark", "of the kind that is named"]
    body = [[row["setting"], *(_share(row[name]) for name in names)] for row in rows]
    return [
        "Read after four seconds. A background is clear where the colours of its sky and ground are within "
        f"{CLEAR_DISTANCE:g} levels of one of the world's, as 99 % of the world's own are after the autoencoder. Where "
        "the landmark stands behind the subject, the world gives the first 1.3 s.",
        "",
        *markdown_table(header, body),
    ]


def _ghost_table(rows: Sequence[Row]) -> list[str]:
    body = [[row["part"], _share(row["share"])] for row in rows]
    return markdown_table(["holds of", "no valid landmark where the world has one"], body)


def _colour_table(rows: Sequence[Row]) -> list[str]:
    body = [[row["of"], _interval(row["purity"], ".2f"), _share(row["one"])] for row in rows]
    return [
        "Of valid landmarks. The purity of a colour is 1 where it is one of the world's eight and 0 halfway between "
        f"two; from {ONE_COLOUR:g} on it counts as one.",
        "",
        *markdown_table(["landmarks", "purity", "of one colour"], body),
    ]


def _interval(summary: Row | None, form: str) -> str:
    if summary is None:
        return "-"
    mean, low, high = (format(float(summary[name]), form) for name in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def _share(found: Row | None) -> str:
    return "-" if found is None else f"{found['correct']} of {found['count']} [{found['low']:.0%}, {found['high']:.0%}]"


def save_student_plot(path: Path, content: Mapping[str, Any]) -> Path:
    """Left: changes obeyed and the rest kept; right: the subject along the video."""
    summary = content["summary"]
    with saved_figure(path, (10, 4.2), content["environments"]) as figure:
        changes, subjects = figure.subplots(1, 2)
        _draw_changes(changes, summary["changes"])
        _draw_subjects(subjects, summary["subjects"])
        for axes in (changes, subjects):
            axes.set_ylim(-0.03, 1.03)
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(alpha=0.3, axis="y")
            axes.tick_params(labelsize=8)
    return path


def _draw_changes(axes: Any, rows: Sequence[Row]) -> None:
    axes.set_title("soft changes", fontsize=9, loc="left")
    obeyed, kept = [row["within"] for row in rows], [row["kept"]["all"] for row in rows]
    for shift, label, colour, found in (
        (-0.12, f"obeyed within {LAST_WAIT} s", "#d1410c", obeyed),
        (0.12, "everything else kept", "#0072b2", kept),
    ):
        shown = [(place, one) for place, one in enumerate(found) if one is not None]
        if shown:
            _bars(axes, [place + shift for place, _ in shown], [one for _, one in shown], label, colour)
    axes.set_xticks(range(len(rows)), [row["attribute"] for row in rows])
    if rows:
        axes.legend(fontsize=8, frameon=False, loc="lower left")


def _draw_subjects(axes: Any, rows: Sequence[Row]) -> None:
    axes.set_title("right in windows of five seconds", fontsize=9, loc="left")
    axes.set_xlabel("seconds of one prompt", fontsize=8)
    for number, (name, colour) in enumerate((("colour", "#d1410c"), ("shape", "#0072b2"), ("background", "#1a8a5a"))):
        if rows:
            _bars(axes, [row["until"] + 0.4 * number for row in rows], [row[name] for row in rows], name, colour)
    if rows:
        axes.legend(fontsize=8, frameon=False, loc="lower left")


def _bars(axes: Any, places: Sequence[float], shares: Sequence[Row], label: str, colour: str) -> None:
    values = [share["share"] for share in shares]
    reach = [[share["share"] - share["low"] for share in shares], [share["high"] - share["share"] for share in shares]]
    axes.errorbar(places, values, yerr=reach, fmt="o", markersize=4, linewidth=1.4, color=colour, label=label)
