"""Pixels of the storybook world: three layers with parallax, landmarks and the subject, on any device.

Shapes: frames are (batch, frames, 3, height, width) in [0, 1]. Scenes are rendered together: every layer is painted
once as a strip as wide as the camera's way and each frame is cut out of it, between two columns where the camera
stands between two.
"""

import functools
import math
from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

from vidaccel.world import palette
from vidaccel.world.scene import CANVAS_WIDTH, FRAME_SIZE, GROUND_Y, Landmark, Scene, Subject
from vidaccel.world.sprites import LANDMARK_KINDS, LANDMARK_SIZE, SUBJECT_SIZE, landmark_sprites, subject_sprite

FAR_PARALLAX = 0.4
_SPECKS = 84


class Look(Protocol):
    """Everything that a picture depends on but the places of camera and subject."""

    @property
    def background(self) -> str: ...
    @property
    def subject(self) -> Subject: ...
    @property
    def landmarks(self) -> tuple[Landmark, ...]: ...
    @property
    def phases(self) -> tuple[float, ...]: ...


class Filmed(Protocol):
    """Something with a camera and a subject in every frame: a scene or a trip."""

    @property
    def num_frames(self) -> int: ...
    def camera_x(self, frame: int) -> float: ...
    def subject_xy(self, frame: int) -> tuple[float, float]: ...


def render(
    scenes: Sequence[Scene],
    *,
    start: int = 0,
    num_frames: int | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Frames `start` to `start + num_frames` of every scene; (B, F, 3, H, W) float32 in [0, 1].

    num_frames: None renders up to the end of the shortest scene.
    Raises ValueError if a scene is shorter than that.
    """
    num_frames = checked_length(scenes, start, num_frames)
    return draw_looks(scenes, *positions(scenes, start, num_frames), device=device)


def subject_mask(
    scenes: Sequence[Scene],
    *,
    start: int = 0,
    num_frames: int | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Share of every pixel that the moving subject covers; (B, F, H, W) float32 in [0, 1]."""
    num_frames = checked_length(scenes, start, num_frames)
    return draw_subjects(scenes, positions(scenes, start, num_frames)[1], device=device)[:, :, 3]


def draw_looks(looks: Sequence[Look], camera: Tensor, subject_xy: Tensor, *, device: torch.device | str) -> Tensor:
    """Pictures of looks from given places; (B, F, 3, H, W) float32 in [0, 1].

    camera: left edge of the screen on the canvas, (B, F). subject_xy: middle of the subject on the screen, (B, F, 2).
    """
    near = _near_strip(looks, camera, device)
    far = _far_strip(looks, camera, device)
    frames = repeat(_sky(looks, device), "b c h w -> b f c h w", f=camera.shape[1])
    for strip, parallax in ((far, FAR_PARALLAX), (near, 1.0)):
        origin = (parallax * camera.amin(1, keepdim=True)).floor()
        layer = _cut(strip, (parallax * camera - origin).to(device))
        frames = frames * (1 - layer[:, :, 3:]) + layer[:, :, :3]
    subject = draw_subjects(looks, subject_xy, device=device)
    return (frames * (1 - subject[:, :, 3:4]) + subject[:, :, :3]).clamp(0, 1)


def checked_length(scenes: Sequence[Filmed], start: int, num_frames: int | None) -> int:
    """How many frames were asked for. Raises ValueError if a scene does not have them."""
    shortest = min(scene.num_frames for scene in scenes)
    if num_frames is None:
        num_frames = shortest - start
    if start < 0 or num_frames < 1 or start + num_frames > shortest:
        raise ValueError(
            f"frames {start} to {start + num_frames} do not lie in a scene of {shortest} frames; make the scene longer."
        )
    return num_frames


def positions(scenes: Sequence[Filmed], start: int, num_frames: int) -> tuple[Tensor, Tensor]:
    """Left edge of every frame, (B, F), and the middle of the subject on the screen, (B, F, 2); float64 on the CPU."""
    frames = range(start, start + num_frames)
    camera = torch.tensor([[scene.camera_x(frame) for frame in frames] for scene in scenes], dtype=torch.float64)
    middle = [[scene.subject_xy(frame) for frame in frames] for scene in scenes]
    subject_xy = torch.tensor(middle, dtype=torch.float64)
    subject_xy[..., 0] -= camera
    return camera, subject_xy


def _color(colors: Sequence[palette.Color], device: torch.device | str) -> Tensor:
    """(B, 3) in [0, 1]."""
    return torch.tensor(colors, dtype=torch.float32, device=device) / 255


def _sceneries(looks: Sequence[Look], field: str, device: torch.device | str) -> Tensor:
    return _color([getattr(palette.SCENERIES[look.background], field) for look in looks], device)


def _sky(looks: Sequence[Look], device: torch.device | str) -> Tensor:
    """Sky with a sun or moon and, at night, stars; it does not move. (B, 3, H, W)."""
    y = (torch.arange(FRAME_SIZE, device=device) + 0.5) / GROUND_Y
    x = torch.arange(FRAME_SIZE, device=device) + 0.5
    top, bottom = _sceneries(looks, "sky_top", device), _sceneries(looks, "sky_bottom", device)
    mix = y.clamp(0, 1)[None, None, :, None]
    sky = top[:, :, None, None] * (1 - mix) + bottom[:, :, None, None] * mix
    sky = repeat(sky, "b c h 1 -> b c h w", w=FRAME_SIZE)
    phases = torch.tensor([look.phases for look in looks], dtype=torch.float32, device=device)
    light_x = 64 + 44 * torch.sin(phases[:, 0])
    light_y = 24 + 8 * torch.sin(phases[:, 1])
    distance = torch.hypot(
        x[None, None, :] - light_x[:, None, None], (y * GROUND_Y)[None, :, None] - light_y[:, None, None]
    )
    disc = (0.5 + 10 - distance).clamp(0, 1)[:, None]
    glow = 0.35 * torch.exp(-((distance - 10).clamp(min=0) / 9))[:, None]
    is_night = torch.tensor([look.background == "night" for look in looks], device=device)[:, None, None, None]
    stars = repeat(_stars(device), "h w -> b 1 h w", b=len(looks)) * is_night
    light = _sceneries(looks, "light", device)[:, :, None, None]
    coverage = torch.maximum(torch.maximum(disc, glow), stars)
    return sky * (1 - coverage) + light * coverage


@functools.cache
def _stars(device: torch.device | str) -> Tensor:
    """A fixed sprinkle of stars; (H, W)."""
    index = torch.arange(22, dtype=torch.float32)
    star_x, star_y = (index * 61.8 + 9) % FRAME_SIZE, (index * 23.7 + 5) % 60
    y, x = torch.meshgrid(torch.arange(FRAME_SIZE) + 0.5, torch.arange(FRAME_SIZE) + 0.5, indexing="ij")
    distance = torch.hypot(x[..., None] - star_x, y[..., None] - star_y).amin(-1)
    return (1.6 - distance).clamp(0, 1).to(device)


def _columns(camera: Tensor, parallax: float, device: torch.device | str) -> Tensor:
    """Canvas position of every column of a strip that covers the camera's way; (B, W_strip).

    Strips begin on a whole pixel, so that a part of a scene is drawn exactly as in the whole.
    """
    low = (parallax * camera.amin(1)).floor()
    width = math.ceil(float((parallax * (camera.amax(1) - camera.amin(1))).max())) + FRAME_SIZE + 3
    return (low[:, None] + torch.arange(width) + 0.5).to(device=device, dtype=torch.float32)


def _far_strip(looks: Sequence[Look], camera: Tensor, device: torch.device | str) -> Tensor:
    """Hills, dunes, mountains or the sea; (B, 4, H, W_strip), premultiplied."""
    x = _columns(camera, FAR_PARALLAX, device)
    phases = torch.tensor([look.phases for look in looks], dtype=torch.float32, device=device)[:, 2:5, None]
    waves = torch.sin(x[:, None] * torch.tensor([0.031, 0.067, 0.113], device=device)[:, None] + phases)
    roll = (waves * torch.tensor([0.6, 0.3, 0.1], device=device)[:, None]).sum(1)
    heights = [palette.SCENERIES[look.background].far_height for look in looks]
    level, swing = torch.tensor(heights, dtype=torch.float32, device=device).unbind(1)
    edge = GROUND_Y - level[:, None] - swing[:, None] * roll
    y = torch.arange(FRAME_SIZE, device=device) + 0.5
    coverage = (y[None, :, None] - edge[:, None, :] + 0.5).clamp(0, 1)[:, None]
    depth = ((y[None, :, None] - edge[:, None, :]) / 40).clamp(0, 1)[:, None] * 0.18
    far = _sceneries(looks, "far", device)[:, :, None, None]
    haze = _sceneries(looks, "sky_bottom", device)[:, :, None, None]
    return torch.cat([(far * (1 - depth) + haze * depth) * coverage, coverage], dim=1)


def _near_strip(looks: Sequence[Look], camera: Tensor, device: torch.device | str) -> Tensor:
    """Ground with specks, and the landmarks that stand on it; (B, 4, H, W_strip), premultiplied."""
    x = _columns(camera, 1.0, device)
    strip = torch.zeros(len(looks), 4, FRAME_SIZE, x.shape[1], device=device)
    for slot in range(len(looks[0].landmarks)):
        strip = _add_landmark(strip, [look.landmarks[slot] for look in looks], x)
    y = torch.arange(FRAME_SIZE, device=device) + 0.5
    coverage = (y - GROUND_Y + 0.5).clamp(0, 1)[None, None, :, None]
    shade = 1 - 0.12 * ((y - GROUND_Y) / (FRAME_SIZE - GROUND_Y)).clamp(0, 1)[None, None, :, None]
    color = _sceneries(looks, "ground", device)[:, :, None, None] * shade
    tile = _speck_tile(device)
    column = torch.remainder(x, CANVAS_WIDTH).long() % CANVAS_WIDTH
    for channel, field in ((0, "speck_dark"), (1, "speck_light")):
        speck = rearrange(tile[channel][:, column], "h b w -> b 1 h w")
        color = color * (1 - speck) + _sceneries(looks, field, device)[:, :, None, None] * speck
    return torch.cat(
        [strip[:, :3] * (1 - coverage) + color * coverage, strip[:, 3:] * (1 - coverage) + coverage], dim=1
    )


@functools.cache
def _speck_tile(device: torch.device | str) -> Tensor:
    """Where the ground has dark and light specks, the same in every scene; (2, H, CANVAS_WIDTH)."""
    index = torch.arange(_SPECKS, dtype=torch.float32, device=device)
    speck_x = (index * CANVAS_WIDTH / _SPECKS + 5 * torch.sin(index * 2.4)) % CANVAS_WIDTH
    speck_y = GROUND_Y + 7 + (FRAME_SIZE - GROUND_Y - 12) * torch.remainder(index * 0.6180339887, 1)
    y, x = torch.arange(FRAME_SIZE, device=device) + 0.5, torch.arange(CANVAS_WIDTH, device=device) + 0.5
    tiles = []
    for offset, radius in ((0, 2.8), (1, 2.2)):
        dx = (x[:, None] - speck_x[offset::2]).abs() / 1.5
        dx = torch.minimum(dx, CANVAS_WIDTH / 1.5 - dx)
        distance = torch.hypot(dx[None], y[:, None, None] - speck_y[offset::2]).amin(-1)
        tiles.append((radius + 0.5 - distance).clamp(0, 1))
    return torch.stack(tiles)


def _add_landmark(strip: Tensor, landmarks: Sequence, x: Tensor) -> Tensor:
    """Paint one landmark of every scene over `strip`, if its columns can show any of them."""
    height, width = LANDMARK_SIZE
    middle = torch.tensor([landmark.x for landmark in landmarks], dtype=torch.float32)
    left = x[:, 0].cpu()
    if not bool(((middle + width / 2 > left) & (middle - width / 2 < left + x.shape[1])).any()):
        return strip
    sprites = landmark_sprites()[[LANDMARK_KINDS.index(landmark.kind) for landmark in landmarks]].to(x.device)
    sprites = _tinted(sprites, _color([palette.ACCENT_COLOURS[landmark.colour] for landmark in landmarks], x.device))
    u = (x - middle.to(x.device)[:, None]) / (width / 2)
    y = torch.arange(FRAME_SIZE, device=x.device) + 0.5
    v = (y - (GROUND_Y + 2 - height / 2)) / (height / 2)
    grid = torch.stack(torch.broadcast_tensors(u[:, None, :], v[None, :, None]), dim=-1)
    layer = F.grid_sample(sprites, grid, padding_mode="zeros", align_corners=False)
    return strip * (1 - layer[:, 3:]) + layer


def _tinted(sprites: Tensor, accent: Tensor) -> Tensor:
    """(B, 5, H, W) sprites and (B, 3) accents to (B, 4, H, W) premultiplied colours."""
    return torch.cat([sprites[:, :3] + sprites[:, 4:] * accent[:, :, None, None], sprites[:, 3:4]], dim=1)


def _cut(strip: Tensor, position: Tensor) -> Tensor:
    """Cut a screen out of a (B, 4, H, W_strip) strip at every (B, F) position; (B, F, 4, H, W)."""
    base = position.floor()
    fraction = (position - base).float()[:, :, None, None, None]
    column = base.long()[:, :, None] + torch.arange(FRAME_SIZE, device=strip.device)
    batch = torch.arange(strip.shape[0], device=strip.device)[:, None, None]
    columns = rearrange(strip, "b c h w -> b w c h")
    left, right = columns[batch, column], columns[batch, column + 1]
    shifted = rearrange(left, "b f w c h -> b f c h w") * (1 - fraction)
    return shifted + rearrange(right, "b f w c h -> b f c h w") * fraction


def draw_subjects(looks: Sequence[Look], subject_xy: Tensor, *, device: torch.device | str) -> Tensor:
    """The subject of every look on an empty screen; (B, F, 4, H, W), premultiplied."""
    num_frames = subject_xy.shape[1]
    sprites = torch.stack([subject_sprite(look.subject.shape, _gaze(look)) for look in looks]).to(device)
    sprites = _tinted(sprites, _color([palette.SUBJECT_COLOURS[look.subject.colour] for look in looks], device))
    position = rearrange(subject_xy, "b f two -> (b f) two").to(device=device, dtype=torch.float32)
    axis = torch.arange(FRAME_SIZE, device=device) + 0.5
    u = (axis[None, :] - position[:, :1]) / (SUBJECT_SIZE / 2)
    v = (axis[None, :] - position[:, 1:]) / (SUBJECT_SIZE / 2)
    grid = torch.stack(torch.broadcast_tensors(u[:, None, :], v[:, :, None]), dim=-1)
    sprites = repeat(sprites, "b c h w -> (b f) c h w", f=num_frames)
    layer = F.grid_sample(sprites, grid, padding_mode="zeros", align_corners=False)
    return rearrange(layer, "(b f) c h w -> b f c h w", b=len(looks))


def _gaze(look: Look) -> tuple[float, float]:
    """The subject looks where it goes."""
    return {"left": (-1.2, 0.4), "right": (1.2, 0.4), "hop": (0.0, -1.2), "loop": (0.9, -0.9)}.get(
        look.subject.motion, (0.0, 0.4)
    )
