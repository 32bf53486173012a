"""What the call of a pipeline is given, as a rollout takes it: prompts and seeds of every video, length, start."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vidaccel.errors import UserError
from vidaccel.rollout.camera import CameraPath, PlacedPath, check_takes_camera
from vidaccel.rollout.grid import ChunkGrid
from vidaccel.rollout.start import Start, check_length, check_number
from vidaccel.rollout.state import RolloutState
from vidaccel.rollout.timeline import PromptTimeline


def timeline_of(prompt: object) -> PromptTimeline:
    """The timeline that a length is counted by; prompts that are none have no cuts."""
    return prompt if isinstance(prompt, PromptTimeline) else PromptTimeline.single("a prompt")


def chunks_asked(num_chunks: int | None, num_frames: int | None, prompt: object, grid: ChunkGrid) -> int | None:
    """The length of a rollout in chunks, None for no end. Raises UserError for two lengths and nothing to make."""
    if num_chunks is not None and num_frames is not None:
        raise UserError("The length of a rollout is `num_chunks` or `num_frames`; give one of them.")
    if num_frames is not None:
        check_number("num_frames", num_frames)
    length = num_chunks if num_frames is None else timeline_of(prompt).num_chunks_of(grid, num_frames)
    check_length(grid, length)
    return length


def camera_asked(
    camera: CameraPath | str | None, prompt: object, grid: ChunkGrid, *, takes_camera: bool
) -> PlacedPath | None:
    """Where the camera is in every chunk; None for a student that is not told.

    Raises UserError for moves that such a student cannot make, and for moves beside those of a timeline.
    """
    timeline = timeline_of(prompt).with_camera(camera)
    check_takes_camera(timeline.camera, takes_camera=takes_camera, student="this student")
    return timeline.camera_on(grid) if takes_camera else None


def start_of(pipe: Any, image: Any, video: Any, state: RolloutState, *, is_decoded: bool) -> Start | None:
    """The image or the clip that a rollout begins with, of the size of its videos; None without one.

    pipe: with the autoencoder and diffusers' `video_processor`. image, video: as `pipe.stream` takes them.
    Raises UserError for both, and for frames of another size.
    """
    if image is None and video is None:
        return None
    if image is not None and video is not None:
        raise UserError("A rollout begins with an image or a video, not both.")
    side = pipe.vae_scale_factor_spatial
    size = (state.size[1] * side, state.size[2] * side)
    frames = video if image is None else image
    if not isinstance(frames, Tensor):
        frames = pipe.video_processor.preprocess(frames, *size) / 2 + 0.5
    elif image is not None and frames.ndim == 3:
        frames = frames[None]
    if tuple(frames.shape[-2:]) != size:
        raise UserError(
            f"The frames to begin with are {tuple(frames.shape[-2:])} and the video is {size} (height, width); "
            "scale and cut them first."
        )
    return Start.of(pipe.vae, frames, num_videos=len(state.seeds), is_decoded=is_decoded)


def repeated(given: Any, times: int) -> Any:
    """Prompts, or their embeddings, with each as often in a row as there are videos of it; one text is for all."""
    if isinstance(given, Tensor):
        return given.repeat_interleave(times, dim=0)
    if given is None or isinstance(given, str | PromptTimeline):
        return given
    return [one for one in given for _ in range(times)]


def drawn_seeds(generator: torch.Generator | Sequence[torch.Generator] | None, count: int) -> tuple[int, ...]:
    """A seed for every video, drawn from the generators. Raises UserError for another number of them."""
    sources = list(generator) if isinstance(generator, Sequence) else [generator] * count
    if len(sources) != count:
        raise UserError(f"There must be a generator for each of the {count} videos, got {len(sources)}.")
    return tuple(
        int(torch.randint(2**62, (1,), generator=source, device="cpu" if source is None else source.device))
        for source in sources
    )
