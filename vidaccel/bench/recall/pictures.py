"""Is it the same place? Measures between a picture of a place and one made after the camera had been elsewhere.

A student does not know exactly where its camera stands, so pictures are compared at the horizontal shift that suits
them best. Only rows between the sun, which moves with the screen, and the ground, which is the same everywhere, count:
there stand the landmarks, by which places of the storybook world differ. Pictures are (3, H, W) in [0, 1].
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vidaccel.errors import UserError
from vidaccel.video.metrics import psnr, ssim
from vidaccel.world import Reading
from vidaccel.world.scene import GROUND_Y
from vidaccel.world.sprites import SUBJECT_RADIUS

BAND = slice(46, GROUND_Y)  # below the sun and its glow, above the ground
MOST_SHIFT = 32
_SUBJECT_HALF = SUBJECT_RADIUS + 6  # with its outline, and what a frame in between smears
_STANDS_OUT = 0.08  # distance in RGB from the middle of the row
_LEAST_COLUMNS = 6


@dataclass(frozen=True, kw_only=True)
class PlaceComparison:
    """How much a later picture is one of the same place.

    shift: pixels by which the later picture lies to the right of the earlier one, where their squared error is least.
    psnr, ssim: there. colour_difference: there, of every landmark of the earlier picture the mean colour against what
    is at its place now, mean of absolute differences in levels of 0 to 255; None where nothing stood.
    """

    shift: int
    psnr: float
    ssim: float
    colour_difference: float | None


def still(frames: Tensor) -> Tensor:
    """The picture that frames (F, 3, H, W) of a camera at rest have in common: their median."""
    return frames.float().median(dim=0).values


def subject_area(reading: Reading, height: int, width: int) -> Tensor:
    """Where the subject was in any frame of a clip whose camera holds, (H, W) bool; nowhere if there was none."""
    area = torch.zeros(height, width, dtype=torch.bool)
    if reading.colour is None:
        return area
    for x, y in (reading.path - F.pad(reading.camera_path[:, None], (0, 1))).tolist():
        left, top = max(round(x) - _SUBJECT_HALF, 0), max(round(y) - _SUBJECT_HALF, 0)
        area[top : max(round(y) + _SUBJECT_HALF, 0), left : max(round(x) + _SUBJECT_HALF, 0)] = True
    return area


def compare_places(earlier: Tensor, later: Tensor, *, hidden: tuple[Tensor, Tensor] | None = None) -> PlaceComparison:
    """Compare two pictures of, perhaps, one place.

    hidden: of both, where something moves that does not belong to the place, (H, W) bool; it does not count.
    Raises UserError for pictures of unequal sizes, no wider than twice the largest shift, or all hidden.
    """
    if earlier.shape != later.shape or earlier.shape[2] <= 2 * MOST_SHIFT:
        raise UserError(
            f"Two pictures of one size, wider than {2 * MOST_SHIFT} pixels, can be compared; "
            f"got {tuple(earlier.shape)} and {tuple(later.shape)}."
        )
    first, second, standing = _banded(earlier), _banded(later), landmark_map(earlier)
    nowhere = torch.zeros(earlier.shape[1:], dtype=torch.bool)
    masks = [~area[BAND] for area in hidden or (nowhere, nowhere)]

    def overlap(shift: int) -> tuple[Tensor, Tensor, Tensor]:
        here, there = _columns(earlier.shape[2], shift)
        return first[:, :, here], second[:, :, there], masks[0][:, here] & masks[1][:, there]

    def error(shift: int) -> float:
        one, other, seen = overlap(shift)
        return float(((one - other).square().mean(0) * seen).sum() / seen.sum()) if seen.any() else math.inf

    shift = min(_shifts(), key=error)
    one, other, seen = overlap(shift)
    if not seen.any():
        raise UserError("Two pictures of which everything is hidden cannot be compared.")
    filled = [torch.where(seen, part, 0.5)[None] for part in (one, other)]
    return PlaceComparison(
        shift=shift,
        psnr=psnr(one[:, seen][None, :, None], other[:, seen][None, :, None]),
        ssim=ssim(filled[0], filled[1]),
        colour_difference=_colour_difference(one, other, standing[:, :, _columns(earlier.shape[2], shift)[0]], seen),
    )


def landmark_map(picture: Tensor) -> Tensor:
    """What stands out from the background: the difference to the middle of every row, (3, rows, W).

    Sky and hills change little along a row, landmarks take up less than half of it.
    """
    band = _banded(picture)
    return band - band.median(dim=2, keepdim=True).values


def resemblance(earlier: Tensor, later: Tensor) -> float:
    """Largest cosine of the landmark maps of two pictures over all shifts; 1 for the same landmarks.

    What a shift moves out of the picture counts as 0 and not as nothing: two empty margins would resemble each other.
    Around 0 where nothing fits, and 0 for a picture without landmarks.
    """
    one, other = (landmark_map(picture).double() for picture in (earlier, later))
    lengths = float(one.norm() * other.norm())
    if lengths == 0:
        return 0.0
    pairs = (_columns(one.shape[2], shift) for shift in _shifts())
    return max(float((one[:, :, here] * other[:, :, there]).sum()) for here, there in pairs) / lengths


def sharpness(picture: Tensor) -> float:
    """Variance of the Laplacian of the luma between sun and ground, in squared levels of 0 to 255."""
    luma = torch.einsum("c h w, c -> h w", _banded(picture), torch.tensor([0.299, 0.587, 0.114])) * 255
    kernel = torch.tensor([[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]])
    return float(F.conv2d(luma[None, None], kernel[None, None]).var(correction=0))


def _banded(picture: Tensor) -> Tensor:
    return picture[:, BAND].float()


def _shifts() -> Iterator[int]:
    """Small ones first, so that among equals the smallest is taken."""
    yield 0
    for size in range(1, MOST_SHIFT + 1):
        yield size
        yield -size


def _columns(width: int, shift: int) -> tuple[slice, slice]:
    """Columns of the earlier and of the later picture that show the same if the later one lies `shift` to the right."""
    return slice(max(-shift, 0), width - max(shift, 0)), slice(max(shift, 0), width - max(-shift, 0))


def _colour_difference(earlier: Tensor, later: Tensor, standing: Tensor, seen: Tensor) -> float | None:
    """Mean over the landmarks, which are runs of columns with something standing in them."""
    stands = (standing.norm(dim=0) > _STANDS_OUT) & seen
    columns = (stands.sum(0) >= _LEAST_COLUMNS).tolist()
    differences = []
    start = None
    for column, filled in enumerate([*columns, False]):
        if filled and start is None:
            start = column
        if not filled and start is not None:
            if column - start >= _LEAST_COLUMNS:
                run = slice(start, column)
                area = stands[:, run]
                means = [part[:, :, run][:, area].mean(1) for part in (earlier, later)]
                differences.append(float((means[0] - means[1]).abs().mean()) * 255)
            start = None
    return sum(differences) / len(differences) if differences else None
