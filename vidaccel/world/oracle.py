"""Reads subject, motion, background and camera back from the pixels of a storybook clip.

Matched filters against what the world can draw: no training, no access to the scene. Works on any clip of 128 x 128
whose subject stays in view; it is tested on rendered truth and then judges generated videos.
"""

import functools
import itertools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vidaccel.world import palette
from vidaccel.world.scene import BACKGROUNDS, COLOURS, FRAME_SIZE, GROUND_Y, SHAPES
from vidaccel.world.sprites import SUBJECT_RADIUS, SUBJECT_SIZE, body_mask

_COLOUR_WIDTH = 0.16
_BLOB = 21
_MIN_BLOB = 0.25
_MAX_SHIFT = 8
_CAMERA_STRIDE = 4


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What a clip shows; None where nothing of the world could be made out.

    path: middle of the subject on the canvas relative to the first frame's left edge, (F, 2) in pixels.
    camera_path: left edge of the screen relative to the first frame, (F,) in pixels.
    """

    colour: str | None
    shape: str | None
    motion: str | None
    background: str
    camera: str
    path: Tensor
    camera_path: Tensor


def read_clip(video: Tensor) -> Reading:
    """Read a clip back from its pixels.

    video: (F, 3, 128, 128) in [0, 1]. Raises ValueError for another shape.
    """
    if video.ndim != 4 or tuple(video.shape[1:]) != (3, FRAME_SIZE, FRAME_SIZE):
        raise ValueError(f"`video` must be (frames, 3, {FRAME_SIZE}, {FRAME_SIZE}), got {tuple(video.shape)}.")
    video = video.float()
    camera_path = _camera_path(video)
    likeness = _likeness(video)
    colour, strength = _strongest_colour(likeness)
    path = _track(likeness[:, colour])
    shape = _shape(likeness[:, colour], path)
    path = path + torch.stack([camera_path, torch.zeros_like(camera_path)], dim=1)
    found = strength > _MIN_BLOB
    return Reading(
        colour=COLOURS[colour] if found else None,
        shape=shape if found else None,
        motion=_motion(path) if found else None,
        background=_background(video),
        camera=_camera(camera_path),
        path=path,
        camera_path=camera_path,
    )


def _likeness(video: Tensor) -> Tensor:
    """How much each pixel looks like each subject colour; (F, colours, H, W) in [0, 1]."""
    colors = torch.tensor([palette.SUBJECT_COLOURS[name] for name in COLOURS], device=video.device) / 255
    overlap = torch.einsum("f c h w, n c -> f n h w", video, colors)
    squared = video.square().sum(1, keepdim=True) - 2 * overlap + colors.square().sum(1)[None, :, None, None]
    return torch.exp(-squared / (2 * _COLOUR_WIDTH**2))


def _patches(likeness: Tensor) -> Tensor:
    """Mean over every subject-sized patch, along the rows first and then along the columns."""
    return F.avg_pool2d(F.avg_pool2d(likeness, (1, _BLOB), stride=1), (_BLOB, 1), stride=1)


def _strongest_colour(likeness: Tensor) -> tuple[int, float]:
    """The colour with the fullest subject-sized patch, averaged over the frames."""
    peaks = _patches(likeness).amax((2, 3)).mean(0)
    best = int(peaks.argmax())
    return best, float(peaks[best])


def _track(likeness: Tensor) -> Tensor:
    """Middle of the subject on the screen in every frame; (F, 2) as x, y in pixels."""
    num_frames = likeness.shape[0]
    blobs = _patches(likeness[:, None])[:, 0]
    peak = blobs.flatten(1).argmax(1)
    columns = blobs.shape[2]
    middle = torch.stack([peak % columns, peak // columns], dim=1).float() + _BLOB / 2
    axis = torch.arange(FRAME_SIZE, device=likeness.device) + 0.5
    for _ in range(3):
        near_x = ((axis[None] - middle[:, :1]).abs() <= SUBJECT_RADIUS + 2).float()
        near_y = ((axis[None] - middle[:, 1:]).abs() <= SUBJECT_RADIUS + 2).float()
        weight = likeness * near_x[:, None, :] * near_y[:, :, None]
        total = weight.sum((1, 2)).clamp(min=1e-6)
        middle = torch.stack(
            [(weight.sum(1) * axis).sum(1) / total, (weight.sum(2) * axis).sum(1) / total], dim=1
        ).reshape(num_frames, 2)
    return middle


@functools.cache
def _templates() -> Tensor:
    """Mean-free body masks of all shapes, each around its own centroid; (shapes, S, S), unit length."""
    masks = torch.stack([body_mask(shape) for shape in SHAPES])
    windows = torch.stack([_window(mask[None], _centroid(mask)[None])[0] for mask in masks])
    return _unit(windows)


def _shape(likeness: Tensor, path: Tensor) -> str:
    """The shape whose mask looks most like the average of the subject over the frames."""
    mean = _window(likeness, path).mean(0)
    shifted = [mean.roll((dy, dx), (0, 1)) for dy in range(-3, 4) for dx in range(-3, 4)]
    scores = torch.einsum("s h w, n h w -> n s", _templates().to(mean.device), _unit(torch.stack(shifted)))
    return SHAPES[int(scores.amax(0).argmax())]


def _window(images: Tensor, middle: Tensor) -> Tensor:
    """Cut a subject-sized window around `middle` out of (F, H, W); (F, S, S)."""
    offsets = torch.arange(SUBJECT_SIZE, device=images.device) + 0.5 - SUBJECT_SIZE / 2
    x = (middle[:, :1] + offsets) / (images.shape[2] / 2) - 1
    y = (middle[:, 1:] + offsets) / (images.shape[1] / 2) - 1
    grid = torch.stack(torch.broadcast_tensors(x[:, None, :], y[:, :, None]), dim=-1)
    return F.grid_sample(images[:, None], grid, padding_mode="zeros", align_corners=False)[:, 0]


def _centroid(mask: Tensor) -> Tensor:
    axis = torch.arange(mask.shape[0]) + 0.5
    return torch.stack([(mask.sum(0) * axis).sum(), (mask.sum(1) * axis).sum()]) / mask.sum()


def _unit(images: Tensor) -> Tensor:
    centered = images - images.mean((-2, -1), keepdim=True)
    return centered / centered.flatten(-2).norm(dim=-1).clamp(min=1e-6)[..., None, None]


def _camera_path(video: Tensor) -> Tensor:
    """Where the camera stands in every frame, from the ground's specks; (F,) in pixels, 0 in the first frame."""
    ground = video[:, :, GROUND_Y + 5 :]
    ground = ground - F.avg_pool2d(ground, (1, 31), stride=1, padding=(0, 15), count_include_pad=False)
    keys = list(range(0, video.shape[0], _CAMERA_STRIDE))
    if keys[-1] != video.shape[0] - 1:
        keys.append(video.shape[0] - 1)
    position, positions = 0.0, [0.0]
    for before, after in itertools.pairwise(keys):
        position += _shift(ground[before], ground[after])
        positions.append(position)
    known = torch.tensor(positions, device=video.device)
    frames = torch.arange(video.shape[0], device=video.device)
    key_frames = torch.tensor(keys, device=video.device)
    right = torch.searchsorted(key_frames, frames).clamp(max=len(keys) - 1)
    left = (right - 1).clamp(min=0)
    span = (key_frames[right] - key_frames[left]).clamp(min=1)
    share = (frames - key_frames[left]) / span
    return known[left] * (1 - share) + known[right] * share


def _shift(before: Tensor, after: Tensor) -> float:
    """How far the camera moved between two (3, rows, W) strips: the best match, refined by a parabola."""
    shifts = range(-_MAX_SHIFT, _MAX_SHIFT + 1)
    inner = before[:, :, _MAX_SHIFT : FRAME_SIZE - _MAX_SHIFT]
    errors = []
    for shift in shifts:
        moved = after[:, :, _MAX_SHIFT - shift : FRAME_SIZE - _MAX_SHIFT - shift]
        errors.append(float((moved - inner).square().mean()))
    best = min(range(len(errors)), key=errors.__getitem__)
    offset = 0.0
    if 0 < best < len(errors) - 1:
        low, middle, high = errors[best - 1 : best + 2]
        curvature = low - 2 * middle + high
        offset = 0.5 * (low - high) / curvature if curvature > 0 else 0.0
    return shifts[best] + offset


def _motion(path: Tensor) -> str:
    """Name the motion of an (F, 2) path on the canvas."""
    x, y = path.unbind(1)
    wide, high = float(x.amax() - x.amin()), float(y.amax() - y.amin())
    if high > 14:
        return "loop" if wide > 18 else "hop"
    edge = max(1, path.shape[0] // 8)
    travelled = float(x[-edge:].mean() - x[:edge].mean())
    if abs(travelled) < 10:
        return "still"
    return "right" if travelled > 0 else "left"


def _camera(path: Tensor) -> str:
    furthest = float(path.abs().amax())
    end = float(path[-1])
    if furthest < 8:
        return "hold"
    if abs(end) < 0.5 * furthest:
        return "pan and return"
    return "pan right" if end > 0 else "pan left"


def background_distances(video: Tensor) -> Tensor:
    """How far the sky, horizon and ground of a clip are in colour from those of each of `BACKGROUNDS`.

    video: (F, 3, 128, 128) in [0, 1]. Root of the mean square over the channels, in levels of 0 to 255; (backgrounds,
    3). Hills and landmarks stand before the horizon, so that in a scene of the world only sky and ground are near.
    """
    return _band_distances(video.float().mean(0, keepdim=True))[0]


def nearest_backgrounds(pictures: Tensor) -> Tensor:
    """The background whose sky, horizon and ground are closest in colour, of (N, 3, H, W); its index, (N,)."""
    return _band_distances(pictures).square().sum(2).argmin(1)


def _background(video: Tensor) -> str:
    return BACKGROUNDS[int(nearest_backgrounds(video.mean(0, keepdim=True)))]


def _band_distances(pictures: Tensor) -> Tensor:
    """Sky, horizon and ground of (N, 3, H, W) to those of each background, in levels; (N, backgrounds, 3)."""
    rows = (slice(0, 12), slice(52, 64), slice(GROUND_Y + 4, FRAME_SIZE))
    seen = torch.stack([pictures[:, :, row].flatten(2).median(2).values for row in rows], dim=1)
    known = torch.tensor([_band_colors(name) for name in BACKGROUNDS], device=pictures.device) / 255
    return (known - seen[:, None]).square().mean(3).sqrt() * 255


def _band_colors(background: str) -> list[list[float]]:
    """Sky near the top, sky in the middle, ground."""
    scenery = palette.SCENERIES[background]

    def sky(y: float) -> list[float]:
        mix = y / GROUND_Y
        return [a * (1 - mix) + b * mix for a, b in zip(scenery.sky_top, scenery.sky_bottom, strict=True)]

    return [sky(6), sky(58), [0.94 * value for value in scenery.ground]]
