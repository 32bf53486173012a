"""What a command is given besides prompts: pictures, clips, and further arguments of the pipeline's call."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vidaccel.errors import UserError
from vidaccel.generation.request import Input
from vidaccel.video.paths import IMAGE_SUFFIXES, existing_path

if TYPE_CHECKING:
    from torch import Tensor


def check_files(files: Mapping[str, Path | None]) -> None:
    """Raise `UserError` for an input that is not there; loads no PyTorch, as reading it does."""
    for file in files.values():
        if file is not None:
            existing_path(file)


def read_inputs(**files: Path | None) -> Mapping[Input, Tensor]:
    """The inputs of a request by name: images as (3, H, W), clips as (F, 3, H, W); an image is a clip of one frame."""
    from vidaccel.video.files import load_frames
    from vidaccel.video.images import read_image

    found: dict[Any, Tensor] = {}
    for name, file in files.items():
        if file is None:
            continue
        if name.endswith("image"):
            found[name] = read_image(file)
        else:
            is_image = file.suffix.lower() in IMAGE_SUFFIXES and not file.is_dir()
            found[name] = read_image(file)[None] if is_image else load_frames(file)
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
