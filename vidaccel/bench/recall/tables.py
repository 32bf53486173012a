"""Tables and picture of the recall benchmark, made from its summary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vidaccel.bench.recall.settings import ATTRIBUTES
from vidaccel.bench.shared.markdown import captions, markdown_table
from vidaccel.files.atomic import atomic_write
from vidaccel.machine.environment import hardware_line

Row = Mapping[str, Any]
_TITLES = {
    ("away", "clip"): "The other place again, first seen in a clip of the world",
    ("home", "own"): "Home again, first seen in the student's own video",
    ("away", "own"): "The other place again, first seen in the student's own video",
}
_FORMS = (("psnr", ".2f"), ("ssim", ".3f"), ("colour_difference", ".1f"), ("resemblance", ".3f"))
_COLOURS = {"slow-fast": "#d1410c", "sink+window": "#1a8a5a", "window": "#0072b2", "full": "#7a4fa3"}
_PANELS = {
    "away": (("resemblance", "resemblance"), ("psnr", "PSNR (dB)")),
    "home": (
        ("psnr", "PSNR of what the subject leaves in view (dB)"),
        ("colour_difference", "colours off by (levels)"),
    ),
}


def recall_markdown(content: Mapping[str, Any]) -> str:
    """A table for each place and begin, the comparison with the first memory, drift, similarities and settings."""
    protocol, summary = content["protocol"], content["summary"]
    seconds = protocol["segments"] * protocol["segment_frames"] / 16
    lines = [
        "# Is a place the same when the camera comes back?",
        "",
        captions(content),
        "",
        f"{protocol['num_prompts']} unseen prompts ({protocol['own_prompts']} for videos of the student alone), "
        f"{seconds:g} s of {protocol['segments']} segments: home, pan, away, pan, home, pan, away. "
        f"{protocol['num_inference_steps']} steps, guidance {protocol['guidance_scale']:g}. "
        f"Videos that begin with a clip get the first {protocol['given_segments']} segments from the world. Pictures "
        "are medians over the last second of a visit, compared between sun and ground at the best horizontal shift. "
        "Resemblance is the cosine of what stands out from the background; recognised: how often the first visit of "
        "another prompt resembles the second less than its own. Other prompts mostly have "
        "other backgrounds, so half is not the level of chance: read all figures against the "
        "windows. Means with 95 % bootstrap intervals "
        "over prompts; shares have Wilson's.",
    ]
    for (place, begin), title in _TITLES.items():
        rows = [row for row in summary["returns"] if (row["place"], row["begin"]) == (place, begin)]
        if rows:
            lines += ["", f"## {title}", "", *_return_table(rows, place)]
            if differences := [row for row in rows if row["differences"]]:
                lines += ["", f"Less {summary['reference']}, prompt by prompt:", "", *_difference_table(differences)]
    if summary["visits"]:
        lines += ["", "## Along the student's own videos", "", *_visit_table(summary["visits"], protocol)]
    if summary["similarities"]:
        lines += ["", "## Similarity of a chunk's keys with the chunk before", "", *_similarity_table(summary)]
    if summary["settings"]:
        lines += ["", "## Steps and guidance, 12 s with one prompt", "", *_settings_table(summary["settings"])]
    return "\n".join(lines) + "\n"


def _return_table(rows: Sequence[Row], place: str) -> list[str]:
    header = [
        "memory",
        "attended",
        "frames of the first visit in reach",
        "PSNR (dB)",
        "SSIM",
        "colours off by (levels)",
    ]
    header += ["no subject, as it should be" if place == "away" else "subject is back"]
    if place == "away":
        header += ["resemblance", "of other prompts", "recognised"]
    body = []
    for row in rows:
        cells = [row["memory"], str(row["attended_frames"]), _mean(row["remembered_frames"], ".1f")]
        cells += [_interval(row[name], form) for name, form in _FORMS[:3]]
        cells += [_share(row.get("subject"))]
        if place == "away":
            cells += [_interval(row["resemblance"], ".3f"), _mean(row["resemblance_of_others"], ".3f")]
            cells += [_interval(row["recognised"], ".0%")]
        body.append(cells)
    return markdown_table(header, body)


def _difference_table(rows: Sequence[Row]) -> list[str]:
    body = [
        [row["memory"], *(_interval(row["differences"][name], f"+{form}") for name, form in _FORMS)] for row in rows
    ]
    return markdown_table(["memory", "PSNR (dB)", "SSIM", "colours off by", "resemblance"], body)


def _visit_table(rows: Sequence[Row], protocol: Mapping[str, Any]) -> list[str]:
    length = protocol["segment_frames"] / 16
    body = [
        [
            row["memory"],
            f"{(row['segment'] + 1) * length:g} s",
            row["place"],
            *(_share(row.get(name)) for name in ("subject", "colour", "shape", "background")),
            _interval(row["sharpness"], ".0f"),
        ]
        for row in rows
    ]
    return markdown_table(
        [
            "memory",
            "until",
            "place",
            "subject in view at home and only there",
            "colour",
            "shape",
            "background",
            "sharpness",
        ],
        body,
    )


def _similarity_table(summary: Mapping[str, Any]) -> list[str]:
    rows = summary["similarities"]
    limits = list(rows[0]["below"])
    body = [
        [
            row["part"],
            str(row["count"]),
            *(f"{row[f'percentile_{rank}']:.4f}" for rank in (5, 50, 95)),
            *(f"{row['below'][limit]:.0%}" for limit in limits),
        ]
        for row in rows
    ]
    return markdown_table(["part", "chunks", "p5", "median", "p95", *(f"below {limit}" for limit in limits)], body)


def _settings_table(rows: Sequence[Row]) -> list[str]:
    names = (*ATTRIBUTES, "kept")
    body = [[row["settings"], *(_share(row[name]) for name in names), f"{row['seconds']:.0f}"] for row in rows]
    return markdown_table(["steps@guidance", *names, "seconds for all"], body)


def _mean(summary: Row | None, form: str) -> str:
    return "-" if summary is None else format(float(summary["mean"]), form)


def _interval(summary: Row | None, form: str) -> str:
    if summary is None:
        return "-"
    mean, low, high = (format(float(summary[name]), form) for name in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def _share(found: Row | None) -> str:
    return "-" if found is None else f"{found['correct']} of {found['count']} [{found['low']:.0%}, {found['high']:.0%}]"


def save_recall_plot(path: Path, content: Mapping[str, Any]) -> Path:
    """How much the second visit is like the first: two panels for each table, a bar for each memory."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    returns = content["summary"]["returns"]
    panels = [key for key in _TITLES if any((row["place"], row["begin"]) == key for row in returns)]
    figure = Figure(figsize=(10, 1.5 + 3 * len(panels)), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, key in zip(figure.subplots(len(panels), 2, squeeze=False), panels, strict=True):
        rows = [row for row in returns if (row["place"], row["begin"]) == key]
        for side, (name, label) in zip(axes, _PANELS[key[0]], strict=True):
            _draw_bars(side, rows, name)
            side.set_xlabel(label)
        if key[0] == "away":
            others = [float(row["resemblance_of_others"]["mean"]) for row in rows]
            level = sum(others) / len(others)
            axes[0].axvline(level, color="#8c8c8c", linestyle=":")
            style = {"textcoords": "offset points", "va": "top", "fontsize": 7, "color": "#6e6e73"}
            axes[0].annotate("another prompt's\nfirst visit", (level, 0.99), (4, 0), ("data", "axes fraction"), **style)
        axes[0].set_title(_TITLES[key], fontsize=9, loc="left")
    figure.suptitle("\n".join(map(hardware_line, content["environments"])), fontsize=8)
    with atomic_write(path) as unfinished:
        figure.savefig(unfinished, dpi=150)
    return path


def _draw_bars(axes: Any, rows: Sequence[Row], name: str) -> None:
    rows = [row for row in rows if row[name] is not None]
    names = [row["memory"] for row in rows]
    values = [[float(row[name][part]) for part in ("mean", "low", "high")] for row in rows]
    means = [mean for mean, _, _ in values]
    bars = [[mean - low for mean, low, _ in values], [high - mean for mean, _, high in values]]
    for place, mean in enumerate(means):
        colour = _COLOURS.get(names[place].partition(":")[0], "#4d4d4d")
        interval = [[side[place]] for side in bars]
        axes.errorbar([mean], [names[place]], xerr=interval, fmt="o", markersize=5, linewidth=1.6, color=colour)
        axes.annotate(
            format(mean, ".2f" if abs(mean) < 1 else ".1f"),
            (mean, place),
            (0, 5),
            textcoords="offset points",
            ha="center",
            fontsize=7,
        )
    axes.set_ylim(len(names) - 0.4, -0.7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=7)
    axes.grid(alpha=0.3, axis="x")
