"""Reads the landmark of a still picture: kind, accent colour and place, by maximum likelihood over all of them.

No training and no access to the trip. A picture is explained by its background alone, or by its background with one
landmark before it; the reading is the landmark that explains most, and its likelihood says how much. The landmark may
be cut off by the border, and a pixel that neither explains (of the subject, of a neighbour) counts for nothing.
"""

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from vidaccel.world import palette
from vidaccel.world.oracle import nearest_backgrounds
from vidaccel.world.scene import ACCENTS, BACKGROUNDS, FRAME_SIZE, GROUND_Y
from vidaccel.world.sprites import LANDMARK_KINDS, LANDMARK_SIZE, landmark_parts, landmark_sprites

VALID_LIKELIHOOD = 0.03
"""A reading of less shows no landmark: first percentile of 80 decoded trips (mean 0.149; bare ground is under 0)."""

SAME_PLACE = 8.0
"""Pixels on the canvas between two readings of a landmark that has not moved, at most."""

_TOP = GROUND_Y + 2 - LANDMARK_SIZE[0]
_ROWS = GROUND_Y - 1 - _TOP  # the last row above the ground is half ground
_LIGHT_ROWS = 60 - _TOP
_UNKNOWN, _SUBJECT = 0.09, 0.03  # squared distances of colours
_FACE = 9  # pixels: wide enough to cover outline and eyes from the colour around them
_HAZE = 0.18
_ALL_ACCENT = 0.95  # of a pixel


@dataclass(frozen=True, kw_only=True)
class LandmarkReadings:
    """What N pictures show.

    kinds, colours: of `LANDMARK_KINDS` and `ACCENTS`.
    x: middle of the landmark on the screen in pixels, (N,).
    likelihoods: log-likelihood ratio against the background alone, a pixel of the landmark, in units of twice the
        variance of a pixel (squared distance of colours in [0, 1]); (N,). Under `VALID_LIKELIHOOD` there is none.
    purities: how much the landmark is of its colour and no mixture, (N,): 1 the colour itself, 0 halfway to another.
    """

    kinds: tuple[str, ...]
    colours: tuple[str, ...]
    x: Tensor
    likelihoods: Tensor
    purities: Tensor


def read_landmarks(pictures: Tensor) -> LandmarkReadings:
    """Read the landmark of every picture; best is the median over the last frames of a hold of the camera.

    pictures: (N, 3, 128, 128) in [0, 1], on any device. Raises ValueError for another shape.
    """
    if pictures.ndim != 4 or tuple(pictures.shape[1:]) != (3, FRAME_SIZE, FRAME_SIZE):
        raise ValueError(f"`pictures` must be (N, 3, {FRAME_SIZE}, {FRAME_SIZE}), got {tuple(pictures.shape)}.")
    ratios, areas = _ratios(pictures.float())
    best = ratios.flatten(1).argmax(1)
    kind, colour, x = torch.unravel_index(best, ratios.shape[1:])
    rows = torch.arange(len(best), device=best.device)
    return LandmarkReadings(
        kinds=tuple(LANDMARK_KINDS[index] for index in kind.tolist()),
        colours=tuple(ACCENTS[index] for index in colour.tolist()),
        x=x + _peak(ratios[rows, kind, colour], x),
        likelihoods=ratios[rows, kind, colour, x] / areas[kind, x],
        purities=_purities(pictures.float(), kind, colour, x),
    )


def _purities(pictures: Tensor, kind: Tensor, colour: Tensor, x: Tensor) -> Tensor:
    """Of landmarks that were found, by the mean colour of what is all accent: (N,)."""
    band = pictures[:, :, _TOP : _TOP + _ROWS]
    inside = (~_subject(band)).float()
    masks = _masks()[0].to(band.device)[kind] > _ALL_ACCENT
    columns = x[:, None] + torch.arange(masks.shape[-1], device=band.device)
    found, known = (
        _padded(part).gather(3, columns[:, None, None].expand(-1, *part.shape[1:3], -1)) for part in (band, inside)
    )
    weights = known * masks[:, None]
    means = (found * weights).sum((2, 3)) / weights.sum((2, 3)).clamp(min=1)
    colors = _colors([palette.ACCENT_COLOURS[name] for name in ACCENTS], band)
    errors = (means[:, None] - colors).square().sum(2)
    apart = (colors[colour][:, None] - colors).square().sum(2)
    purities = (errors - errors.gather(1, colour[:, None])) / apart.clamp(min=1e-9)
    purities = purities.scatter(1, colour[:, None], float("inf")).amin(1)
    return torch.where(weights.sum((1, 2, 3)) > 0, purities, 0.0)


def _ratios(pictures: Tensor) -> tuple[Tensor, Tensor]:
    """Log-likelihood ratio of every kind, colour and place, (N, K, C, W), and how many pixels each shows, (K, W)."""
    band = pictures[:, :, _TOP : _TOP + _ROWS]
    background = _background_error(band, nearest_backgrounds(pictures))
    accents, fixed = _masks()
    accents, fixed = accents.to(band.device), fixed.to(band.device)
    colors = _colors([palette.ACCENT_COLOURS[name] for name in ACCENTS], band)
    own = F.conv2d(_padded(rearrange(_gains(band, background, colors), "n c h w -> (n c) 1 h w")), accents[:, None])
    own = rearrange(own, "(n c) k 1 w -> n k c w", n=len(band))
    others = F.conv2d(_padded(_gains(band, background, _colors(list(landmark_parts()), band))), fixed)
    shown = F.conv2d(_padded(torch.ones_like(band[:1, :1])), (accents + fixed.sum(1))[:, None])
    return (own + rearrange(others, "n k 1 w -> n k 1 w"))[..., :FRAME_SIZE], shown[0, :, 0, :FRAME_SIZE]


@functools.cache
def _masks() -> tuple[Tensor, Tensor]:
    """Share of each pixel of every kind in its accent, (K, H, W), and in every fixed colour, (K, P, H, W)."""
    parts = torch.stack(list(landmark_parts().values()), dim=1)[:, :, :_ROWS]
    return landmark_sprites()[:, 4, :_ROWS], parts


def _padded(maps: Tensor) -> Tensor:
    """Nothing is known, and nothing counts, beyond the border."""
    return F.pad(maps, (LANDMARK_SIZE[1] // 2,) * 2)


def _colors(colors: list[palette.Color], like: Tensor) -> Tensor:
    return torch.tensor(colors, dtype=torch.float32, device=like.device) / 255


def _gains(band: Tensor, background: Tensor, colors: Tensor) -> Tensor:
    """How much better each of (P, 3) colours explains each pixel than the background does; (N, P, H, W).

    0 where neither explains it, and where a subject stands: their colours are far from all others, and the outline and
    the eyes are never far from them.
    """
    errors = _error(band, colors)
    is_known = torch.minimum(errors, background[:, None]) < _UNKNOWN
    return (background[:, None] - errors) * (is_known & ~_subject(band))


def _subject(band: Tensor) -> Tensor:
    """Where a subject stands, with its outline and its eyes; (N, 1, H, W)."""
    subject = _error(band, _colors(list(palette.SUBJECT_COLOURS.values()), band)).amin(1, keepdim=True) < _SUBJECT
    return F.max_pool2d(subject.float(), _FACE, stride=1, padding=_FACE // 2) > 0


def _error(band: Tensor, colors: Tensor) -> Tensor:
    """Squared distance of every pixel of (N, 3, H, W) to (P, 3) colours; (N, P, H, W)."""
    return (band[:, None] - colors[:, :, None, None]).square().sum(2)


def _background_error(band: Tensor, backgrounds: Tensor) -> Tensor:
    """Squared distance of every pixel to what its background may show there; (N, H, W)."""
    sceneries = [palette.SCENERIES[name] for name in BACKGROUNDS]

    def field(name: str) -> Tensor:
        return _colors([getattr(scenery, name) for scenery in sceneries], band)[backgrounds][:, :, None, None]

    y = (torch.arange(_ROWS, device=band.device) + _TOP + 0.5)[:, None] / GROUND_Y
    sky = field("sky_top") * (1 - y) + field("sky_bottom") * y
    far = field("far")
    errors = [
        _distance_to_mix(band, far, far + _HAZE * (field("sky_bottom") - far)),
        (band - sky).square().sum(1),
        F.pad(_distance_to_mix(band, sky, field("light"))[:, :_LIGHT_ROWS], (0, 0, 0, _ROWS - _LIGHT_ROWS), value=1.0),
    ]
    return torch.stack(errors).amin(0)


def _distance_to_mix(band: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """Squared distance to the nearest mixture of two colours; (N, H, W)."""
    line = other - one
    share = ((band - one) * line).sum(1, keepdim=True) / line.square().sum(1, keepdim=True).clamp(min=1e-6)
    return (band - one - share.clamp(0, 1) * line).square().sum(1)


def _peak(ratios: Tensor, x: Tensor) -> Tensor:
    """Where between the neighbours of the best column the likelihood peaks, by a parabola; (N,) in [-0.5, 0.5]."""
    low, middle, high = (ratios.gather(1, (x + step).clamp(0, FRAME_SIZE - 1)[:, None])[:, 0] for step in (-1, 0, 1))
    curvature = (low - 2 * middle + high).clamp(max=-1e-6)
    return (0.5 * (low - high) / curvature).clamp(-0.5, 0.5)
