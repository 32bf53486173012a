"""Clips: the frames of a video, a moving picture, a folder or a tensor file, brought to a wanted rate."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vidaccel.errors import UserError, first_line
from vidaccel.video.ffmpeg import decode
from vidaccel.video.frames import as_float
from vidaccel.video.images import is_picture, read_pictures
from vidaccel.video.paths import IMAGE_SUFFIXES, existing_path, natural_order
from vidaccel.video.rate import FrameTimes

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Clip:
    """Frames in the order they are shown.

    frames: (F, 3, H, W) float32 in [0, 1]. times: when the frames of the file are shown; None where it does not say:
    folders, tensors, stills. chosen: the frames of the file, by index, that `frames` are.
    """

    frames: Tensor
    times: FrameTimes | None
    chosen: tuple[int, ...]

    @property
    def is_resampled(self) -> bool:
        """Whether `frames` are not simply the frames of the file."""
        return self.times is not None and self.chosen != tuple(range(len(self.times.starts)))


def read_clip(path: str | Path, *, fps: float | None = None) -> Clip:
    """The frames of a video, a moving picture, a still, a folder of pictures or a .safetensors file.

    fps: frames a second that are wanted: a clip with times is brought to that rate, so that it takes the same time
    (`FrameTimes.at_rate`); one without stays as it is. None: every frame as it is.

    Raises UserError for a path that is missing or holds no frames, for frames of unequal sizes, and for a rate that no
    video has.
    """
    path = existing_path(path)
    pictures, times = _pictures(path)
    chosen = range(len(pictures)) if fps is None or times is None else times.at_rate(fps)
    if len({picture.shape for picture in pictures}) > 1:
        raise UserError(f"The images in {path.name} differ in size; frames of one video must agree.")
    frames = torch.stack([as_float(pictures[index]) for index in chosen])
    return Clip(frames=frames, times=times, chosen=tuple(chosen))


def _pictures(path: Path) -> tuple[list[Tensor], FrameTimes | None]:
    """The frames, each (3, H, W) uint8 or float32 in [0, 1], and when they are shown."""
    if path.is_dir():
        return _folder(path), None
    if path.suffix == ".safetensors":
        return list(_tensors(path)), None
    if path.suffix.lower() in IMAGE_SUFFIXES or is_picture(path):
        return read_pictures(path)
    decoded = decode(path)
    pictures = [torch.from_numpy(picture).permute(2, 0, 1) for picture in decoded.pictures]
    if decoded.complaint is not None:
        logger.warning("%s is damaged (%s); %d frames were read.", path.name, decoded.complaint, len(pictures))
    return pictures, decoded.times


def _folder(folder: Path) -> list[Tensor]:
    files = [file for file in folder.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES and file.name[0] != "."]
    if not files:
        raise UserError(f"The folder {folder.name} holds no frames; they may be {', '.join(IMAGE_SUFFIXES)}.")
    frames = []
    for file in sorted(files, key=natural_order):
        pictures, _ = read_pictures(file)
        if len(pictures) > 1:
            raise UserError(f"{file.name} in {folder.name} has {len(pictures)} frames itself; give that file alone.")
        frames += pictures
    return frames


def _tensors(path: Path) -> Tensor:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path.name} cannot be read as safetensors: {first_line(error)}.") from error
    frames = tensors.get("frames")
    if frames is None or frames.dtype != torch.uint8 or frames.ndim != 4 or frames.shape[1] != 3 or 0 in frames.shape:
        raise UserError(
            f"{path.name} must hold a uint8 tensor `frames` of shape (F, 3, H, W), as `save_frames` writes."
        )
    return frames
