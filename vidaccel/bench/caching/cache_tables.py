"""The cache benchmark as markdown, for people; the JSON beside it holds everything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vidaccel.bench.caching.cache_summary import PER_PROMPT_SPEED, common_videos
from vidaccel.bench.caching.methods import BUILTIN_NOTES
from vidaccel.bench.caching.tables import equal_compute_table, method_table
from vidaccel.bench.shared.markdown import Content, captions, markdown_table, number_text

_TITLES = {
    "psnr": ("PSNR (dB)", ".1f"),
    "ssim": ("SSIM", ".4f"),
    "ms_ssim": ("MS-SSIM", ".4f"),
    "vmaf": ("VMAF", ".1f"),
}
_HOW = (
    "Forwards are executed work: operations of the transformer's blocks that really ran (linear layers and attention, "
    "counted beneath every cache) over those of one plain forward. They and the fidelity depend on nothing but prompt, "
    "seed and method, so several processes may have shared them out; times are from a pass of its own, one video at a "
    "time. PSNR is pooled over a video; the mean has its 95 % bootstrap interval over prompts; p5 is the 5th "
    "percentile over videos. Time is denoising time, plain over method."
)


def caches_markdown(content: Content) -> str:
    """All methods, families at equal work, EasyCache minus each other family, what did not run, and every prompt."""
    protocol, summary = content["protocol"], content["summary"]
    videos, num_videos = common_videos([record for record in content["records"] if record["kind"] == "video"])
    measured = {record["prompt"] for record in videos}
    timed = {(record["prompt"], record["seed"]) for record in content["records"] if record["kind"] == "time"}
    lines = [
        "# EasyCache against the caches of diffusers, at equal executed work",
        "",
        captions(content),
        "",
        f"{len(measured)} of {protocol['num_prompts']} prompts, {num_videos} of "
        f"{protocol['num_prompts'] * len(protocol['seeds'])} videos, the same for every method, at most {len(timed)} "
        f"timed; {protocol['num_frames']} frames of {protocol['width']}x{protocol['height']}, "
        f"{protocol['num_inference_steps']} steps, guidance {protocol['guidance_scale']:g}. {_HOW}",
        "",
        *method_table(summary["methods"]),
        *(_not_available(name, reason, videos) for name, reason in summary["unavailable"].items()),
        "",
        *_findings(summary),
    ]
    for field, (title, form) in _TITLES.items():
        lines += ["", f"## Mean {title} at equal work", "", *equal_compute_table(summary["equal_compute"], field, form)]
    lines += ["", "## EasyCache minus the others, mean PSNR (dB), paired by prompt", "", *_differences(summary)]
    lines += ["", f"## Every prompt: PSNR (dB) at {PER_PROMPT_SPEED:g}x fewer forwards", "", *_prompts(summary)]
    return "\n".join(lines) + "\n"


def _not_available(name: str, reason: str, videos: Sequence[Content]) -> str:
    lacking = sum(name in video.get("unavailable", {}) for video in videos)
    return f"\n{name} could not be taken of {lacking} of {len(videos)} videos ({reason.splitlines()[0]})."


def _findings(summary: Content) -> list[str]:
    """How each cache of diffusers was set, and which of them did nothing or could not run."""
    rows = [[family, note] for family, note in BUILTIN_NOTES.items()]
    for row in rows:
        why = [one["why"] for one in summary["failures"] if one["family"] == row[0]]
        if why:
            row[1] += f" **Not measured: {why[0].splitlines()[0]}.**"
        elif row[0] in summary["no_effect"]:
            row[1] += " **Ran without an error and saved nothing.**"
    return ["## The caches of diffusers: settings and findings", "", *markdown_table(["cache", "setting"], rows)]


def _differences(summary: Content) -> list[str]:
    rows = summary["differences"]
    if not rows:
        return ["No EasyCache family and other family share a prompt yet."]
    speeds = [name for name in rows[0] if name.endswith("x")]
    body = [
        [row["family"], row["other"], *(_interval(row[speed]) for speed in speeds), str(row["num_prompts"])]
        for row in rows
        if any(row[speed] is not None for speed in speeds)
    ]
    return markdown_table(["family", "minus", *(f"{speed} fewer forwards" for speed in speeds), "prompts"], body)


def _interval(difference: Mapping[str, float] | None) -> str:
    if difference is None:
        return "-"
    return f"{difference['mean']:+.1f} [{difference['low']:+.1f}, {difference['high']:+.1f}]"


def _prompts(summary: Content) -> list[str]:
    rows: Sequence[Content] = summary["per_prompt"]
    if not rows:
        return ["No prompt is measured yet."]
    families = [name for name in rows[0]["psnr"] if any(row["psnr"].get(name) is not None for row in rows)]
    body = [[row["prompt"], *(_height(row["psnr"].get(name)) for name in families)] for row in rows]
    return markdown_table(["prompt", *families], body)


def _height(value: float | None) -> str:
    return "-" if value is None else number_text(value, ".1f")
