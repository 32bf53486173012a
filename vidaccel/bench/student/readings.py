"""What the oracles of the storybook world read in a part of a video, as plain values."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vidaccel.video.frames import as_float
from vidaccel.world import background_distances, read_clip
from vidaccel.world.landmark_oracle import VALID_LIKELIHOOD, read_landmarks

SUBJECT = ("colour", "shape", "motion")
STILL_FRAMES = 9  # whose median is read for the landmark
CLEAR_DISTANCE = 6.0  # 99 % of 48 unseen scenes after the autoencoder are nearer than this to their background
_LUMA = (0.299, 0.587, 0.114)
_LAPLACIAN = ((0.0, 1.0, 0.0), (1.0, -4.0, 1.0), (0.0, 1.0, 0.0))


@dataclass(frozen=True, kw_only=True)
class SeenLandmark:
    """The landmark of a picture.

    x: of its middle on the screen, in pixels. likelihood: log ratio a pixel. purity: of its colour, as of
    `LandmarkReadings`; None in results from before it was read.
    """

    kind: str
    colour: str
    x: float
    likelihood: float
    purity: float | None = None

    @property
    def is_valid(self) -> bool:
        """Whether it is as sharp as landmarks of the world are after the autoencoder."""
        return self.likelihood >= VALID_LIKELIHOOD


@dataclass(frozen=True, kw_only=True)
class Shown:
    """What a part of a video shows.

    colour, shape, motion: of the subject, None where there is none. background_distance: of sky and ground from those
        of the nearest background, the larger of both, in levels. sharpness: as of `sharpness_of`. landmark: the most
        likely one, valid or not.
    """

    colour: str | None
    shape: str | None
    motion: str | None
    background: str
    background_distance: float
    sharpness: float
    landmark: SeenLandmark

    @property
    def is_clear(self) -> bool:
        """Whether the background is one of the world's, and no mixture of two."""
        return self.background_distance <= CLEAR_DISTANCE

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Shown:
        """What `to_dict` gave."""
        return cls(**{**values, "landmark": SeenLandmark(**values["landmark"])})


def read_part(frames: Tensor) -> Shown:
    """Read frames (F, 3, 128, 128), floating in [0, 1] or uint8, in which the camera holds.

    A motion needs two seconds to be told; the landmark is read in the median of the last frames.
    """
    clip = as_float(frames)
    reading, (sky, _, ground) = read_clip(clip), background_distances(clip).unbind(1)
    still = clip[-STILL_FRAMES:].median(dim=0).values
    return Shown(
        colour=reading.colour,
        shape=reading.shape,
        motion=reading.motion,
        background=reading.background,
        background_distance=round(float(torch.maximum(sky, ground).min()), 3),
        sharpness=round(sharpness_of(still), 3),
        landmark=seen_landmarks(still[None])[0],
    )


def seen_landmarks(pictures: Tensor) -> list[SeenLandmark]:
    """The landmarks of pictures (N, 3, 128, 128) in [0, 1]."""
    found = read_landmarks(pictures)
    numbers = (found.x.tolist(), found.likelihoods.tolist(), found.purities.tolist())
    return [
        SeenLandmark(kind=kind, colour=colour, x=round(x, 2), likelihood=round(likelihood, 5), purity=round(purity, 3))
        for kind, colour, x, likelihood, purity in zip(found.kinds, found.colours, *numbers, strict=True)
    ]


def sharpness_of(picture: Tensor) -> float:
    """Variance of the Laplacian of the luma of a picture (3, H, W) in [0, 1], in squared levels of 0 to 255."""
    luma = torch.einsum("c h w, c -> h w", picture, picture.new_tensor(_LUMA)) * 255
    return float(F.conv2d(luma[None, None], luma.new_tensor(_LAPLACIAN)[None, None]).var(correction=0))
