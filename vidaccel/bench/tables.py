"""Results as markdown, for people; the JSON beside it holds everything."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from vidaccel.machine.environment import hardware_line

Content = Mapping[str, Any]


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


def quality_markdown(content: Content) -> str:
    """Accuracy of the generated videos by the oracle, beside the oracle's own accuracy, and the VAE's fidelity."""
    summary, protocol = content["summary"], content["protocol"]
    rows = [
        [kind, name, f"{share['correct']} of {share['count']}", _percent(share["share"]), _interval_text(share)]
        for kind, shares in summary["accuracy"].items()
        for name, share in shares.items()
    ]
    vae = summary["vae_psnr"]
    lines = [
        "# Quality of the model on unseen prompts",
        "",
        captions(content),
        "",
        f"{protocol['num_inference_steps']} steps, guidance {protocol['guidance_scale']:g}, {protocol['num_frames']} "
        "frames. An attribute is correct where the oracle reads from the pixels what the prompt asks for. "
        "The rows of rendered and reconstructed clips show what the oracle and the VAE alone lose.",
        "",
        *markdown_table(["videos", "attribute", "correct", "share", "95 % interval"], rows),
    ]
    if vae is not None:
        lines += [
            "",
            f"VAE reconstruction of {vae['count']} unseen clips: PSNR {vae['mean']:.2f} dB mean "
            f"[{vae['low']:.2f}, {vae['high']:.2f}], median {vae['median']:.2f}, 5th percentile "
            f"{vae['percentile_5']:.2f}, worst {vae['minimum']:.2f}.",
        ]
    return "\n".join(lines) + "\n"


def speed_markdown(content: Content) -> str:
    """The two statements of the speed benchmark with their figures."""
    summary, protocol = content["summary"], content["protocol"]
    verdict = "yes" if summary["time_follows_forwards_within_1_percent"] else "no"
    rows = [
        ["denoising time, plain", f"{summary['plain_seconds']:.3f} s, {summary['plain_forwards']} forwards"],
        ["denoising time, with reuse", f"{summary['reuse_seconds']:.3f} s, {summary['reuse_forwards']} forwards"],
        ["computed forwards / all forwards", f"{summary['forwards_ratio']:.4f}"],
        ["time with reuse / time without", f"{summary['time_ratio']:.4f}"],
        ["the two agree within 1 %", f"{verdict} ({100 * (summary['time_ratio_over_forwards_ratio'] - 1):+.2f} %)"],
        ["one forward, median", f"{summary['forward_ms']:.3f} ms"],
    ]
    if summary["reused_step_ms"] is not None:
        rows += [
            ["reused step, transformer calls, median (worst)", _pair(summary, "reused_step_ms")],
            ["reused step, with guidance and scheduler, median (worst)", _pair(summary, "reused_whole_step_ms")],
            ["a reused step costs under 1 ms", "yes" if summary["reused_step_under_1_ms"] else "no"],
        ]
    if summary["extra_peak_bytes"] is not None:
        rows += [
            ["peak memory without reuse", f"{summary['peak_bytes'] / 1e9:.2f} GB"],
            ["peak memory with reuse - without", f"{summary['extra_peak_bytes'] / 1e6:.1f} MB"],
        ]
    rows += [
        ["weights of the transformer", f"{summary['weight_bytes'] / 1e9:.2f} GB"],
        ["reads of the device's memory in a reused step", f"{summary['reads_per_reused_step']:g}"],
        ["all latents finite", "yes" if summary["finite"] else "no"],
    ]
    lines = [
        f"# Speed at the shape of {protocol['shape']}, random weights",
        "",
        captions(content),
        "",
        f"{protocol['num_frames']} frames of {protocol['width']}x{protocol['height']}, "
        f"{protocol['num_inference_steps']} steps, guidance {protocol['guidance_scale']:g}, attention "
        f"{protocol['attention']}, threshold {float(protocol['easycache']['threshold']):g} with at most "
        f"{protocol['easycache']['max_consecutive_reuses']} reuses in a row, repeats: {protocol['repeats']}. "
        "Random weights: which steps are reused is the setting's doing, and nothing here is about quality.",
        "",
        *markdown_table(["figure", "value"], rows),
    ]
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


def captions(content: Content) -> str:
    """One line for each place the records were measured in, with the command."""
    return "  \n".join(
        f"{hardware_line(environment)}; `{environment['command']}`" for environment in content["environments"]
    )


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a markdown table."""
    cells = [list(header), ["---"] * len(header), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in cells]


def _number(summary: Content | None, name: str, form: str) -> str:
    return "-" if summary is None else number_text(float(summary[name]), form)


def _fewer(method: Content) -> str:
    """How many times fewer forwards than the plain runs all videos together took."""
    share = float(method["forwards_share"]["mean"])
    return f"{1 / share:.2f}x" if share else "infx"


def _times(summary: Content | None) -> str:
    return "-" if summary is None else _number(summary, "median", ".2f") + "x"


def number_text(value: float, form: str) -> str:
    """A number for people; infinity is a word."""
    return "inf" if math.isinf(value) else format(value, form)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _interval_text(share: Content) -> str:
    return f"{_percent(share['low'])} to {_percent(share['high'])}"


def _pair(summary: Content, name: str) -> str:
    return f"{summary[name]:.3f} ms ({summary[name + '_worst']:.3f} ms)"
