"""The files that pictures and videos come in, told by their suffixes. Loads nothing, so that errors come at once."""

from __future__ import annotations

import re
from pathlib import Path

from vidaccel.errors import UserError

PLAYER = "-"  # in place of a file: standard output, for a player
VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv")  # that are written; ffmpeg reads many more
IMAGE_SUFFIXES = (
    *(".apng", ".avif", ".bmp", ".gif", ".jp2", ".jpeg", ".jpg"),
    *(".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"),
)
_NUMBER = re.compile(r"(\d+)")


def video_path(path: str | Path) -> Path:
    """`path`, if its suffix is one of a video file that can be written; else raises UserError."""
    path = Path(path)
    if path.suffix.lower() not in VIDEO_SUFFIXES:
        raise UserError(f"A video file must end in {', '.join(VIDEO_SUFFIXES)}; got {path.name!r}.")
    return path


def existing_path(path: str | Path) -> Path:
    """`path`, if something is there; else raises UserError."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"There is no file or folder {path}.")
    return path


def natural_order(path: Path) -> tuple[list[str | int], str]:
    """What sorts files as people count: f2.png before f10.png, whatever the zeros in front."""
    parts = _NUMBER.split(path.name)  # text and digits take turns
    return [int(part) if index % 2 else part for index, part in enumerate(parts)], path.name
