"""Results as markdown, for people; the JSON beside it holds everything."""

from __future__ import annotations

from collections.abc import Sequence

from vidaccel.bench.shared.markdown import Content, captions, markdown_table, number_text


def easycache_markdown(content: Content, *, detailed: Sequence[str]) -> str:
    """All methods, families at equal compute, and one row per video for the methods named in `detailed`."""
    protocol, summary = content["protocol"], content["summary"]
    lines = [
        "# EasyCache against the plain run, in the same process",
        "",
        captions(content),
        "",
        f"{protocol['num_prompts']} prompts x {len(protocol['seeds'])} seeds, {protocol['num_frames']} frames of "
        f"{protocol['width']}x{protocol['height']}, {protocol['num_inference_steps']} steps, guidance "
        f"{protocol['guidance_scale']:g}. PSNR is pooled over a video; the mean has its 95 % bootstrap interval over "
        "prompts; p5 is the 5th percentile over videos. Time is denoising time, plain over method.",
        "",
        *method_table(summary["methods"]),
        *(f"\nNot available: {name}. {reason}" for name, reason in summary["unavailable"].items()),
        "",
        "## Mean PSNR (dB) at equal compute",
        "",
        *equal_compute_table(summary["equal_compute"], "psnr", ".1f"),
        "",
        "## Mean SSIM at equal compute",
        "",
        *equal_compute_table(summary["equal_compute"], "ssim", ".4f"),
    ]
    if headline := [_headline(method) for method in summary["methods"] if method["method"] in detailed]:
        lines += ["", "## At the default threshold", "", *headline]
    for name in detailed:
        lines += ["", f"## Every video: {name}", "", *_video_table(content["records"], name)]
    return "\n".join(lines) + "\n"


def method_table(methods: Sequence[Content]) -> list[str]:
    """One row per method of a summary."""
    header = [
        "method",
        "forwards",
        "fewer",
        "time",
        "PSNR mean (dB)",
        "median",
        "p5",
        "SSIM",
        "MS-SSIM",
        "temporal",
        "VMAF",
    ]
    rows = [
        [
            method["method"],
            _number(method["num_forwards"], "mean", ".1f"),
            _fewer(method),
            _times(method["time_ratio"]),
            f"{_number(method['psnr'], 'mean', '.2f')} [{_number(method['psnr'], 'low', '.2f')}, "
            f"{_number(method['psnr'], 'high', '.2f')}]",
            _number(method["psnr"], "median", ".2f"),
            _number(method["psnr"], "percentile_5", ".2f"),
            _number(method["ssim"], "mean", ".4f"),
            _number(method["ms_ssim"], "mean", ".4f"),
            _number(method["temporal_difference_error"], "mean", ".5f"),
            _number(method["vmaf"], "mean", ".2f"),
        ]
        for method in methods
    ]
    return markdown_table(header, rows)


def _headline(method: Content) -> str:
    psnr = method["psnr"]
    return (
        f"- {method['method']}: {_fewer(method)} fewer forwards, "
        f"{_number(method['time_ratio'], 'median', '.2f')}x less denoising time, PSNR against the plain run "
        f"{_number(psnr, 'mean', '.1f')} dB mean, {_number(psnr, 'percentile_5', '.1f')} dB 5th percentile."
    )


def equal_compute_table(rows: Sequence[Content], field: str, form: str) -> list[str]:
    """Families by speeds: the mean of `field` where they compute as much."""
    if not rows:
        return ["No family has two settings, so there is no curve to read."]
    speeds = list(rows[0][field])
    body = [
        [row["family"], *("-" if row[field][s] is None else format(row[field][s], form) for s in speeds)]
        for row in rows
    ]
    return markdown_table(["family", *(f"{speed} fewer forwards" for speed in speeds)], body)


def _video_table(records: Sequence[Content], name: str) -> list[str]:
    rows = [
        [
            record["prompt"],
            str(record["seed"]),
            str(record["num_forwards"]),
            f"{float(record['time_ratio']):.2f}x",
            number_text(float(record["psnr"]), ".2f"),
            "-" if record["ssim"] is None else f"{record['ssim']:.4f}",
            f"`{record['decisions']}`",
        ]
        for record in records
        if record["method"] == name
    ]
    return markdown_table(["prompt", "seed", "forwards", "time", "PSNR", "SSIM", "steps (C computed, . reused)"], rows)


def _number(summary: Content | None, name: str, form: str) -> str:
    return "-" if summary is None else number_text(float(summary[name]), form)


def _fewer(method: Content) -> str:
    """How many times fewer forwards than the plain runs all videos together took."""
    share = float(method["forwards_share"]["mean"])
    return f"{1 / share:.2f}x" if share else "infx"


def _times(summary: Content | None) -> str:
    return "-" if summary is None else _number(summary, "median", ".2f") + "x"
