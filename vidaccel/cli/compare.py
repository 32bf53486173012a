"""`vidaccel compare A B`: how close one video is to another; and the tables of every comparison."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from vidaccel.cli.console import console, say
from vidaccel.cli.jobs import check_writable
from vidaccel.errors import UserError
from vidaccel.files.text import write_json
from vidaccel.video.paths import VIDEO_SUFFIXES, existing_path

if TYPE_CHECKING:
    from torch import Tensor

    from vidaccel.generation.generate import Generation
    from vidaccel.video.metrics import VideoComparison

_ROWS = (
    ("psnr", "PSNR, all pixels pooled", "dB"),
    ("psnr_mean", "PSNR, mean of frames", "dB"),
    ("ssim", "SSIM", ""),
    ("ms_ssim", "MS-SSIM", ""),
    ("temporal_difference_error", "temporal-difference error", ""),
    ("vmaf", "VMAF", ""),
    ("lpips", "LPIPS", ""),
)
_USUAL_RATE = 16.0  # Wan's, where nothing says one


def compare(
    reference: Annotated[Path, typer.Argument(metavar="A", help="Reference: video file, .safetensors or PNG folder.")],
    video: Annotated[Path, typer.Argument(metavar="B", help="What is compared with it; same size and length.")],
    json_output: Annotated[Path | None, typer.Option("--json", help="Also write the figures to this file.")] = None,
    output: Annotated[Path | None, typer.Option(help="Also write a side-by-side video to this file.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files that exist.")] = False,
) -> None:
    """Compare two videos, or two sets of saved frames, of the same size and length."""
    _check_outputs([path for path in (json_output, output) if path is not None], (reference, video), overwrite)
    if output is not None and output.suffix.lower() not in VIDEO_SUFFIXES:
        raise UserError(f"`--output` must end in {', '.join(VIDEO_SUFFIXES)}, got {output}.")
    for path in (reference, video):
        existing_path(path)
    from vidaccel.video.files import write_video  # loads PyTorch
    from vidaccel.video.frames import side_by_side
    from vidaccel.video.metrics import compare_videos

    (first, fps), (second, _) = _frames(reference), _frames(video)
    comparison = compare_videos(first, second, fps=fps)
    console.print(comparison_table(comparison))
    for name, reason in comparison.unavailable.items():
        say(f"{name}: not available: {reason}")
    if json_output is not None:
        write_json(json_output, {"reference": str(reference), "video": str(video), **comparison.to_dict()})
    if output is not None:
        write_video(output, side_by_side(first, second, (reference.name, video.name)), fps=fps)


def _check_outputs(paths: list[Path], inputs: tuple[Path, Path], overwrite: bool) -> None:
    taken = {path.resolve() for path in inputs}
    for path in paths:
        if path.resolve() in taken:
            raise UserError(f"{path} is given twice; a result needs a file of its own.")
        taken.add(path.resolve())
        if path.is_dir():
            raise UserError(f"{path} is a folder; give the name of a file.")
        if path.exists() and not overwrite:
            raise UserError(f"{path} exists; give --overwrite or another name.")
        check_writable(path.parent)


def comparison_table(comparison: VideoComparison) -> Table:
    """One row a metric."""
    table = Table("metric", "value")
    values: dict[str, Any] = vars(comparison)
    for name, title, unit in _ROWS:
        value = values[name]
        table.add_row(title, "not available" if value is None else f"{value:.4g} {unit}".rstrip())
    return table


def twin_table(plain: Generation, reused: Generation, comparison: VideoComparison) -> Table:
    """A plain run beside the same one with EasyCache: time, forwards, and how close the videos are."""
    table = Table("", "without reuse", "with EasyCache", "ratio")
    rows = (
        ("denoising time", plain.denoising_seconds, reused.denoising_seconds, ".2f", " s"),
        ("total time", plain.total_seconds, reused.total_seconds, ".2f", " s"),
        ("transformer forwards", plain.num_forwards, reused.num_forwards, "d", ""),
    )
    for title, left, right, form, unit in rows:
        ratio = f"{left / right:.2f}x" if right else "-"
        table.add_row(title, f"{left:{form}}{unit}", f"{right:{form}}{unit}", ratio)
    table.add_row("PSNR", "", f"{comparison.psnr:.2f} dB", "")
    table.add_row("SSIM", "", f"{comparison.ssim:.4f}", "")
    return table


def _frames(path: Path) -> tuple[Tensor, float]:
    from vidaccel.video.clips import read_clip

    clip = read_clip(path)
    return clip.frames, _USUAL_RATE if clip.times is None else clip.times.fps
