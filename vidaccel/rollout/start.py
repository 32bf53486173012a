"""What a rollout begins with: an image or a clip, remembered as if it had been made, and shown as it was given."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from vidaccel.errors import UserError
from vidaccel.rollout.chunk import Chunk
from vidaccel.rollout.decode import encode_start, whole_start
from vidaccel.rollout.grid import ChunkGrid, pixel_frames
from vidaccel.video.frames import as_float, rounded_to_uint8

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Start:
    """The frames that a rollout begins with.

    vae: a diffusers `AutoencoderKLWan`, which encodes them.
    frames: (B, f, 3, H, W), floating in [0, 1] or uint8; f is one more than a multiple of the autoencoder's stride in
        time. B is 1 for all videos, or one for each.
    num_videos: of the rollout.
    is_decoded: show them as the autoencoder gives them back, about 30 dB from what was given, and not as they are. The
        memory and everything that is made is the same either way.
    """

    vae: Any
    frames: Tensor
    num_videos: int = 1
    is_decoded: bool = False

    @classmethod
    def of(cls, vae: Any, frames: Tensor, *, num_videos: int = 1, is_decoded: bool = False) -> Start:
        """The start of (f, 3, H, W) or (B, f, 3, H, W) frames; the first of a clip that does not divide are left out.

        Raises UserError for frames of another shape or outside [0, 1], and for another number of clips than of videos.
        """
        if frames.is_floating_point() and not bool(((frames >= 0) & (frames <= 1)).all()):
            raise UserError(
                "The frames to begin with must be floating in [0, 1], or uint8; got values from "
                f"{frames.min().item():g} to {frames.max().item():g}."
            )
        whole = whole_start(vae, frames)
        if len(whole) not in (1, num_videos):
            raise UserError(f"There are {len(whole)} clips to begin with and {num_videos} videos; give one.")
        return cls(vae=vae, frames=whole, num_videos=num_videos, is_decoded=is_decoded)

    @property
    def num_latent_frames(self) -> int:
        """Latent frames that the frames become."""
        stride: int = self.vae.config.scale_factor_temporal
        return (self.frames.shape[1] - 1) // stride + 1

    def latents(self) -> Tensor:
        """(B, C, F, h, w) float32, normalised as the transformer's, for every video."""
        return encode_start(self.vae, self.frames).expand(self.num_videos, -1, -1, -1, -1)

    def shown(self, chunk: Chunk) -> Chunk:
        """A chunk of these frames, with the pixels that were given unless they are to be decoded ones."""
        if chunk.frames is None or self.is_decoded:
            return chunk
        stride = self.vae.config.scale_factor_temporal
        first, end = (
            pixel_frames(frame, stride) for frame in (chunk.first_frame, chunk.first_frame + chunk.latents.shape[2])
        )
        own = rounded_to_uint8(as_float(self.frames[:, first:end].cpu()))
        return replace(chunk, frames=own.expand(self.num_videos, -1, -1, -1, -1).contiguous())

    def say(self) -> None:
        """Log in one line what becomes of the frames."""
        count = self.frames.shape[1]
        what = "the image" if count == 1 else f"the {count} frames of the clip"
        how = "as the autoencoder decodes them" if self.is_decoded else "with the pixels that were given"
        logger.info(f"The video begins with {what}, {how}.")


def start_settings(frames: Tensor | None, *, stride: int, is_decoded: bool) -> dict[str, Any]:
    """What must agree of a start, as JSON values, for a session to go on.

    frames: (f, 3, H, W) or (B, f, 3, H, W), before or after those are left out that `stride` does not divide.
    """
    if frames is None:
        return {"start": None}
    frames = frames[..., (frames.shape[-4] - 1) % stride :, :, :, :]
    numbers = as_float(frames.cpu()).float().contiguous()
    numbers = numbers[0] if numbers.ndim == 5 and len(numbers) == 1 else numbers
    digest = hashlib.sha256(f"{tuple(numbers.shape)}".encode() + numbers.numpy().tobytes()).hexdigest()
    return {"start": digest} | ({} if is_decoded else {"start_pixels": "as given"})


def check_length(grid: ChunkGrid, num_chunks: int | None) -> None:
    """Raise UserError for no number of chunks, and for a start that is as long already as the video is to be."""
    if num_chunks is not None:
        check_number("num_chunks", num_chunks)
    if grid.given_frames and num_chunks is not None and num_chunks <= grid.num_given_chunks:
        given = pixel_frames(grid.given_frames, grid.temporal_stride)
        what = "The image" if given == 1 else "The clip"
        raise UserError(
            f"{what} that the video begins with has {given} frames, {given / grid.fps:g} s at {grid.fps:g} frames a "
            "second, and the whole video is to be no longer, so that there is nothing to make; ask for a longer video."
        )


def check_number(name: str, value: object) -> None:
    """Raise UserError for what is no whole number of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"`{name}` must be a whole number of at least 1, got {value!r}.")
