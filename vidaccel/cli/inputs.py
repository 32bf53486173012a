"""What a command is given besides prompts: pictures, clips, and further arguments of the pipeline's call."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vidaccel.errors import UserError
from vidaccel.video.paths import existing_path

if TYPE_CHECKING:
    from torch import Tensor

    from vidaccel.generation.request import Input
    from vidaccel.video.clips import Clip

KeepFrames = Annotated[
    bool,
    typer.Option("--keep-frames", help="Take every frame of a clip, whatever its frame rate, and so change its speed."),
]
logger = logging.getLogger(__name__)


def check_files(files: Mapping[str, Path | None]) -> None:
    """Raise `UserError` for an input that is not there; loads no PyTorch, as reading it does."""
    for file in files.values():
        if file is not None:
            existing_path(file)


def read_inputs(*, fps: float, keep_frames: bool, **files: Path | None) -> Mapping[Input, Tensor]:
    """The inputs of a request by name: images as (3, H, W), clips as (F, 3, H, W); an image is a clip of one frame.

    A clip of another frame rate than `fps` is brought to that, so that it keeps its speed, and that is said; with
    `keep_frames` its frames stay as they are. Raises UserError for files that cannot be read.
    """
    from vidaccel.video.clips import read_clip
    from vidaccel.video.images import read_image

    found: dict[Any, Tensor] = {}
    for name, file in files.items():
        if file is None:
            continue
        if name.endswith("image"):
            found[name] = read_image(file)
        else:
            clip = read_clip(file, fps=None if keep_frames else fps)
            found[name] = clip.frames
            if clip.is_resampled:
                logger.info("--%s %s: %s", name.replace("_", "-"), file.name, _resampling(clip, fps))
    return found


def read_arguments(texts: Sequence[str]) -> dict[str, Any]:
    """`name=value` pairs; a value is read as JSON (a number, true, null, a list) and else taken as text."""
    found: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise UserError(f"`--argument` must be NAME=VALUE, got {text!r}.")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


def _resampling(clip: Clip, fps: float) -> str:
    assert clip.times is not None
    rate = f"{clip.times.fps:.4g} a second" if clip.times.is_constant else "varying rate"
    return (
        f"{len(clip.times.starts)} frames at {rate} became {len(clip.frames)} at {fps:.4g}, so that its "
        f"{float(clip.times.end):.2f} s stay as long; --keep-frames takes them as they are."
    )
