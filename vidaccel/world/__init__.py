"""The storybook world: procedural scenes with captions and exact states, and an oracle that reads them from pixels."""

from vidaccel.world.captions import Asked, Prompt, asked_by, caption, trip_caption, unseen_prompts, vocabulary
from vidaccel.world.clip import Clip, make_clip
from vidaccel.world.landmark_oracle import VALID_LIKELIHOOD, LandmarkReadings, read_landmarks
from vidaccel.world.oracle import Reading, background_distances, read_clip
from vidaccel.world.render import render, subject_mask
from vidaccel.world.scene import (
    ACCENTS,
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
from vidaccel.world.sprites import LANDMARK_KINDS
from vidaccel.world.trip import ReturnTrip, Trip, TripSpan, latent_cameras
from vidaccel.world.trip_plan import CHANGES
from vidaccel.world.trip_render import render_trips, trip_mask
from vidaccel.world.trips import change_trip, random_trip, swapped, test_trip

__all__ = [
    "ACCENTS",
    "BACKGROUNDS",
    "CAMERAS",
    "CHANGES",
    "COLOURS",
    "FPS",
    "FRAME_SIZE",
    "LANDMARK_KINDS",
    "MOTIONS",
    "SHAPES",
    "VALID_LIKELIHOOD",
    "Asked",
    "Clip",
    "FrameState",
    "LandmarkReadings",
    "ObjectState",
    "Prompt",
    "Reading",
    "ReturnTrip",
    "Scene",
    "Trip",
    "TripSpan",
    "asked_by",
    "background_distances",
    "caption",
    "change_trip",
    "latent_cameras",
    "make_clip",
    "random_scene",
    "random_trip",
    "read_clip",
    "read_landmarks",
    "render",
    "render_trips",
    "subject_mask",
    "swapped",
    "test_trip",
    "trip_caption",
    "trip_mask",
    "unseen_prompts",
    "vocabulary",
]
