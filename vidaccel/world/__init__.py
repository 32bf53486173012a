"""The storybook world: procedural scenes with captions and exact states, and an oracle that reads them from pixels."""

from vidaccel.world.captions import Prompt, caption, unseen_prompts, vocabulary
from vidaccel.world.clip import Clip, make_clip
from vidaccel.world.oracle import Reading, read_clip
from vidaccel.world.render import render, subject_mask
from vidaccel.world.scene import (
    BACKGROUNDS,
    CAMERAS,
    COLOURS,
    FPS,
    FRAME_SIZE,
    MOTIONS,
    SHAPES,
    FrameState,
    ObjectState,
    Scene,
    random_scene,
)

__all__ = [
    "BACKGROUNDS",
    "CAMERAS",
    "COLOURS",
    "FPS",
    "FRAME_SIZE",
    "MOTIONS",
    "SHAPES",
    "Clip",
    "FrameState",
    "ObjectState",
    "Prompt",
    "Reading",
    "Scene",
    "caption",
    "make_clip",
    "random_scene",
    "read_clip",
    "render",
    "subject_mask",
    "unseen_prompts",
    "vocabulary",
]
