"""Sprites of the storybook world, painted from signed distances in pure torch.

A sprite is (5, height, width): premultiplied red, green, blue, coverage, and the share of each pixel that takes the
sprite's accent colour. One pixel of a sprite is one pixel of the screen; edges are one pixel soft.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

Distance = Callable[[Tensor, Tensor], Tensor]
"""Signed distance in pixels at (x, y), negative inside."""

Part = tuple[Distance, tuple[int, int, int] | None]
"""What to paint and in which colour (0 to 255); None paints in the accent colour."""

INK = (44, 38, 58)
WHITE = (252, 252, 250)
SUBJECT_SIZE = 48
LANDMARK_SIZE = (80, 72)
SUBJECT_RADIUS = 16


def circle(center_x: float, center_y: float, radius: float) -> Distance:
    """A disc."""
    return lambda x, y: torch.hypot(x - center_x, y - center_y) - radius


def ellipse(center_x: float, center_y: float, radius_x: float, radius_y: float) -> Distance:
    """An ellipse (distance exact on the axes only, which is enough for a soft edge)."""
    scale = min(radius_x, radius_y)
    return lambda x, y: (torch.hypot((x - center_x) / radius_x, (y - center_y) / radius_y) - 1) * scale


def rectangle(left: float, top: float, right: float, bottom: float, rounding: float = 0.0) -> Distance:
    """An upright rectangle with corners of radius `rounding`."""
    middle_x, middle_y = (left + right) / 2, (top + bottom) / 2
    half_x, half_y = (right - left) / 2 - rounding, (bottom - top) / 2 - rounding

    def distance(x: Tensor, y: Tensor) -> Tensor:
        dx, dy = (x - middle_x).abs() - half_x, (y - middle_y).abs() - half_y
        outside = torch.hypot(dx.clamp(min=0), dy.clamp(min=0))
        return outside + torch.maximum(dx, dy).clamp(max=0) - rounding

    return distance


def polygon(points: Sequence[tuple[float, float]], rounding: float = 0.0) -> Distance:
    """A convex polygon, points clockwise on the screen; grown by `rounding`."""

    def distance(x: Tensor, y: Tensor) -> Tensor:
        sides = []
        for (x0, y0), (x1, y1) in zip(points, [*points[1:], points[0]], strict=True):
            length = math.hypot(x1 - x0, y1 - y0)
            sides.append(((x - x0) * (y1 - y0) - (y - y0) * (x1 - x0)) / length)
        return torch.stack(sides).amax(0) - rounding

    return distance


def star(center_x: float, center_y: float, outer: float, inner: float, tips: int = 5) -> Distance:
    """A star with one tip pointing up."""
    sector = math.pi / tips
    edge_x, edge_y = inner * math.cos(sector) - outer, inner * math.sin(sector)
    length = math.hypot(edge_x, edge_y)

    def distance(x: Tensor, y: Tensor) -> Tensor:
        dx, dy = x - center_x, y - center_y
        angle = torch.remainder(torch.atan2(dx, -dy) + sector, 2 * sector) - sector
        radius = torch.hypot(dx, dy)
        along, across = radius * angle.cos(), radius * angle.sin().abs()
        return ((along - outer) * edge_y - across * edge_x) / length

    return distance


def grow(shape: Distance, pixels: float) -> Distance:
    """The same shape, larger by `pixels` on every side."""
    return lambda x, y: shape(x, y) - pixels


def paint(parts: Sequence[Part], height: int, width: int) -> Tensor:
    """Paint `parts` one over the other; (5, height, width)."""
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    sprite = torch.zeros(5, height, width)
    for shape, color in parts:
        coverage = (0.5 - shape(x, y)).clamp(0, 1)
        layer = torch.zeros(5)
        layer[3] = 1.0
        if color is None:
            layer[4] = 1.0
        else:
            layer[:3] = torch.tensor(color) / 255
        sprite = sprite * (1 - coverage) + layer[:, None, None] * coverage
    return sprite


def _body(shape: str) -> Distance:
    middle, radius = SUBJECT_SIZE / 2, float(SUBJECT_RADIUS)
    if shape == "ball":
        return circle(middle, middle, radius - 1)
    if shape == "box":
        return rectangle(middle - 13, middle - 11, middle + 13, middle + 15, rounding=2)
    if shape == "triangle":
        return polygon([(middle, middle - 14), (middle + 15, middle + 13), (middle - 15, middle + 13)], rounding=1.5)
    return star(middle, middle, 19.5, 9)


@functools.cache
def subject_sprite(shape: str, gaze: tuple[float, float] = (0.0, 0.0)) -> Tensor:
    """A subject with a face; (5, SUBJECT_SIZE, SUBJECT_SIZE). `gaze` moves the pupils, in pixels."""
    body, middle = _body(shape), SUBJECT_SIZE / 2
    eye_y = middle + (4 if shape == "triangle" else 1)
    parts: list[Part] = [(grow(body, 1.5), INK), (body, None)]
    for eye_x in (middle - 4.5, middle + 4.5):
        parts.append((circle(eye_x, eye_y, 3.2), WHITE))
        parts.append((circle(eye_x + gaze[0], eye_y + gaze[1], 1.6), INK))
    return paint(parts, SUBJECT_SIZE, SUBJECT_SIZE)


def body_mask(shape: str) -> Tensor:
    """Share of each pixel in the subject's own colour; (SUBJECT_SIZE, SUBJECT_SIZE)."""
    return subject_sprite(shape)[4]


@functools.cache
def landmark_sprites() -> Tensor:
    """All landmarks, in the order of `LANDMARK_KINDS`, standing on the lower edge; (kinds, 5, *LANDMARK_SIZE)."""
    return torch.stack([paint(parts, *LANDMARK_SIZE) for parts in _LANDMARKS.values()])


_BROWN, _DARK, _CREAM, _STONE = (122, 96, 80), (86, 76, 84), (236, 226, 206), (158, 158, 166)
_MIDDLE, _BASE = LANDMARK_SIZE[1] / 2, float(LANDMARK_SIZE[0])


def _blade(angle: float) -> Distance:
    """One sail of the windmill, turned by `angle` degrees."""
    cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    hub_x, hub_y = _MIDDLE, _BASE - 52
    corners = [(-2.5, 2.0), (2.5, 2.0), (2.5, 24.0), (-2.5, 24.0)]
    turned = [(hub_x + x * cos - y * sin, hub_y + x * sin + y * cos) for x, y in corners]
    return polygon(turned)


def _trapezoid(top: float, bottom: float, top_half: float, bottom_half: float, middle: float = _MIDDLE) -> Distance:
    """An upright trapezoid by the halves of its upper and lower edge."""
    upper = [(middle - top_half, top), (middle + top_half, top)]
    return polygon([*upper, (middle + bottom_half, bottom), (middle - bottom_half, bottom)])


_LANDMARKS: Mapping[str, Sequence[Part]] = {
    "tree": (
        (rectangle(_MIDDLE - 4, _BASE - 30, _MIDDLE + 4, _BASE), _BROWN),
        (circle(_MIDDLE - 12, _BASE - 36, 13), None),
        (circle(_MIDDLE + 12, _BASE - 36, 13), None),
        (circle(_MIDDLE, _BASE - 50, 16), None),
    ),
    "pine": (
        (rectangle(_MIDDLE - 3, _BASE - 14, _MIDDLE + 3, _BASE), _BROWN),
        (polygon([(_MIDDLE, _BASE - 48), (_MIDDLE + 22, _BASE - 12), (_MIDDLE - 22, _BASE - 12)]), None),
        (polygon([(_MIDDLE, _BASE - 62), (_MIDDLE + 17, _BASE - 32), (_MIDDLE - 17, _BASE - 32)]), None),
        (polygon([(_MIDDLE, _BASE - 74), (_MIDDLE + 12, _BASE - 52), (_MIDDLE - 12, _BASE - 52)]), None),
    ),
    "house": (
        (rectangle(_MIDDLE - 20, _BASE - 32, _MIDDLE + 20, _BASE), _CREAM),
        (polygon([(_MIDDLE, _BASE - 56), (_MIDDLE + 26, _BASE - 31), (_MIDDLE - 26, _BASE - 31)]), None),
        (rectangle(_MIDDLE - 14, _BASE - 20, _MIDDLE - 3, _BASE), _DARK),
        (rectangle(_MIDDLE + 4, _BASE - 22, _MIDDLE + 15, _BASE - 11), (150, 176, 190)),
    ),
    "tower": (
        (rectangle(_MIDDLE - 11, _BASE - 56, _MIDDLE + 11, _BASE), _STONE),
        (polygon([(_MIDDLE, _BASE - 78), (_MIDDLE + 16, _BASE - 55), (_MIDDLE - 16, _BASE - 55)]), None),
        (rectangle(_MIDDLE - 3, _BASE - 44, _MIDDLE + 3, _BASE - 34, rounding=2), _DARK),
        (rectangle(_MIDDLE - 5, _BASE - 14, _MIDDLE + 5, _BASE, rounding=2), _DARK),
    ),
    "windmill": (
        (_trapezoid(_BASE - 52, _BASE, 8, 14), None),
        (circle(_MIDDLE, _BASE - 52, 9), _DARK),
        (_blade(25), _CREAM),
        (_blade(115), _CREAM),
        (_blade(205), _CREAM),
        (_blade(295), _CREAM),
        (rectangle(_MIDDLE - 4, _BASE - 14, _MIDDLE + 4, _BASE, rounding=1), _DARK),
    ),
    "mushroom": (
        (rectangle(_MIDDLE - 7, _BASE - 26, _MIDDLE + 7, _BASE, rounding=3), _CREAM),
        (ellipse(_MIDDLE, _BASE - 28, 24, 15), None),
        (circle(_MIDDLE - 11, _BASE - 31, 3.5), _CREAM),
        (circle(_MIDDLE + 3, _BASE - 36, 4), _CREAM),
        (circle(_MIDDLE + 13, _BASE - 27, 3), _CREAM),
    ),
    "rock": (
        (_trapezoid(_BASE - 33, _BASE, 9, 25), None),
        (_trapezoid(_BASE - 19, _BASE, 5, 15, middle=_MIDDLE + 15), _STONE),
    ),
    "tent": (
        (polygon([(_MIDDLE, _BASE - 40), (_MIDDLE + 27, _BASE), (_MIDDLE - 27, _BASE)]), None),
        (polygon([(_MIDDLE, _BASE - 26), (_MIDDLE + 9, _BASE), (_MIDDLE - 9, _BASE)]), _DARK),
        (rectangle(_MIDDLE - 1, _BASE - 50, _MIDDLE + 1, _BASE - 38), _DARK),
        (polygon([(_MIDDLE + 1, _BASE - 50), (_MIDDLE + 12, _BASE - 46), (_MIDDLE + 1, _BASE - 42)]), _CREAM),
    ),
}  # fmt: skip
LANDMARK_KINDS = tuple(_LANDMARKS)


@functools.cache
def landmark_parts() -> Mapping[tuple[int, int, int], Tensor]:
    """Where landmarks have a colour that is not their accent: by colour, the share of each pixel it takes.

    Each is (kinds, *LANDMARK_SIZE), in the order of `LANDMARK_KINDS`.
    """
    colors = {color: None for parts in _LANDMARKS.values() for _, color in parts if color is not None}
    return {color: torch.stack([_share(parts, color) for parts in _LANDMARKS.values()]) for color in colors}


def _share(parts: Sequence[Part], color: tuple[int, int, int]) -> Tensor:
    """Share of each pixel that one colour takes: it is painted as the accent, and the others as nothing."""
    return paint([(shape, None if part == color else INK) for shape, part in parts], *LANDMARK_SIZE)[4]
