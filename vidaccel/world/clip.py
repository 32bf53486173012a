"""One call that makes a clip with its caption and its exact state."""

from dataclasses import dataclass

import torch
from torch import Tensor

from vidaccel.world.captions import caption
from vidaccel.world.render import render
from vidaccel.world.scene import FrameState, Scene, Split, random_scene


@dataclass(frozen=True, kw_only=True)
class Clip:
    """A rendered scene.

    video: (F, 3, 128, 128) float32 in [0, 1], 16 frames a second.
    caption: one sentence about it.
    states: the exact state of every frame.
    """

    scene: Scene
    video: Tensor
    caption: str
    states: tuple[FrameState, ...]


def make_clip(seed: int, *, num_frames: int = 49, split: Split = "train", device: torch.device | str = "cpu") -> Clip:
    """A clip, its caption and its exact state from a seed; the same on every call.

    num_frames: 49 by default; hundreds to thousands make a scene whose camera leaves the subject and comes back.
    Raises ValueError for `num_frames` under 1 or an unknown split.
    """
    scene = random_scene(seed, num_frames=num_frames, split=split)
    return Clip(
        scene=scene,
        video=render([scene], device=device)[0],
        caption=caption(scene),
        states=tuple(scene.state(frame) for frame in range(num_frames)),
    )
