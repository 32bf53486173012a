"""Scenes of the storybook world: what is where, in which colour, in which frame. Plain numbers, no pixels.

Lengths are pixels of a 128 x 128 screen, times are frames at 16 a second; x grows to the right and y downwards.
The canvas is five screens wide. A short scene has one motion and one camera move; a long one (more than
`SEGMENT_FRAMES` + 1 frames) is a chain of segments in which the camera leaves the subject and comes back.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from vidaccel.world.sprites import LANDMARK_KINDS, LANDMARK_SIZE, SUBJECT_RADIUS

FPS = 16
FRAME_SIZE = 128
CANVAS_WIDTH = 5 * FRAME_SIZE
GROUND_Y = 100
REST_Y = GROUND_Y - SUBJECT_RADIUS
SEGMENT_FRAMES = 96

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple")
SHAPES = ("ball", "box", "triangle", "star")
MOTIONS = ("still", "left", "right", "hop", "loop")
BACKGROUNDS = ("meadow", "desert", "night", "snow", "beach")
CAMERAS = ("hold", "pan left", "pan right", "pan and return")
ACCENTS = ("rose", "sage", "slate", "sand", "plum", "teal", "clay", "olive")

HOP_FRAMES = 16
HOP_HEIGHT = 32.0
LOOP_FRAMES = 32
LOOP_RADIUS = 19.0
_MARGIN = 22.0
_LANDMARK_SPACING = 88.0

Split = Literal["train", "test"]


@dataclass(frozen=True, kw_only=True)
class Subject:
    """The moving subject; `motion` is that of its first segment."""

    colour: str
    shape: str
    motion: str


@dataclass(frozen=True, kw_only=True)
class Landmark:
    """Something that stands on the ground for good; `x` is its middle on the canvas."""

    kind: str
    colour: str
    x: float


@dataclass(frozen=True, kw_only=True)
class Move:
    """A part of a path: from `start` on, for `num_frames` frames, over `distance` pixels from `x`."""

    start: int
    num_frames: int
    kind: str
    x: float
    distance: float


@dataclass(frozen=True, kw_only=True)
class ObjectState:
    """One object in one frame; `visible` is the share of its box that is on the screen, from 0 to 1."""

    name: str
    colour: str
    x: float
    y: float
    screen_x: float
    screen_y: float
    visible: float


@dataclass(frozen=True, kw_only=True)
class FrameState:
    """Everything in one frame: the camera's left edge on the canvas and all objects, the subject first."""

    frame: int
    camera_x: float
    objects: tuple[ObjectState, ...]


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A whole scene; the same seed, length and split give the same scene on every machine."""

    seed: int
    num_frames: int
    background: str
    camera: str
    subject: Subject
    landmarks: tuple[Landmark, ...]
    subject_moves: tuple[Move, ...]
    camera_moves: tuple[Move, ...]
    phases: tuple[float, ...]

    def camera_x(self, frame: int) -> float:
        """Left edge of the screen on the canvas."""
        move, progress = _locate(self.camera_moves, frame)
        if move.kind == "pan and return":
            return move.x + move.distance * math.sin(math.pi * progress) ** 2
        return move.x + move.distance * ease(progress)

    def subject_xy(self, frame: int) -> tuple[float, float]:
        """Middle of the subject on the canvas."""
        return place_in(_locate(self.subject_moves, frame)[0], frame)

    def motion(self, frame: int) -> str:
        """What the subject does in this frame."""
        return _locate(self.subject_moves, frame)[0].kind

    def camera_move(self, frame: int) -> str:
        """What the camera does in this frame; in a long scene that of the segment, not of the whole."""
        return _locate(self.camera_moves, frame)[0].kind

    def segment_start(self, frame: int) -> int:
        """First frame of the segment that this frame lies in; a short scene is one segment."""
        return _locate(self.camera_moves, frame)[0].start

    def state(self, frame: int) -> FrameState:
        """The exact state of one frame. Raises IndexError outside the scene."""
        if not 0 <= frame < self.num_frames:
            raise IndexError(f"`frame` must be from 0 to {self.num_frames - 1}, got {frame}.")
        camera_x = self.camera_x(frame)
        x, y = self.subject_xy(frame)
        height, width = LANDMARK_SIZE
        objects = [_object(self.subject.shape, self.subject.colour, (x, y), camera_x, SUBJECT_RADIUS)]
        for landmark in self.landmarks:
            middle = (landmark.x, GROUND_Y - height / 2)
            objects.append(_object(landmark.kind, landmark.colour, middle, camera_x, width / 2))
        return FrameState(frame=frame, camera_x=camera_x, objects=tuple(objects))


def random_scene(seed: int, *, num_frames: int = 49, split: Split = "train") -> Scene:
    """A scene from a seed.

    split: "test" takes the combinations of colour, shape, motion and background that "train" never has.
    Raises ValueError for `num_frames` under 1 or an unknown split.
    """
    if num_frames < 1:
        raise ValueError(f"`num_frames` must be at least 1, got {num_frames}.")
    if split not in ("train", "test"):
        raise ValueError(f'`split` must be "train" or "test", got {split!r}.')
    draw = random.Random(f"vidaccel world {split} {seed}")
    colour, shape, motion, background = draw.choice(COMBINATIONS[split])
    camera = draw.choices(CAMERAS, weights=(5, 1, 1, 1))[0]
    camera_moves, subject_moves = _paths(draw, num_frames, camera, motion)
    return Scene(
        seed=seed,
        num_frames=num_frames,
        background=background,
        camera=camera if num_frames <= SEGMENT_FRAMES + 1 else "pan and return",
        subject=Subject(colour=colour, shape=shape, motion=motion),
        landmarks=_landmarks(draw),
        subject_moves=subject_moves,
        camera_moves=camera_moves,
        phases=tuple(draw.uniform(0, 2 * math.pi) for _ in range(6)),
    )


def _combinations() -> dict[str, list[tuple[str, str, str, str]]]:
    """All combinations of attributes; one in ten is kept for testing."""
    every = [(c, s, m, b) for c in COLOURS for s in SHAPES for m in MOTIONS for b in BACKGROUNDS]
    test = set(random.Random("vidaccel world split").sample(every, len(every) // 10))
    return {"train": [x for x in every if x not in test], "test": [x for x in every if x in test]}


COMBINATIONS = _combinations()


def _landmarks(draw: random.Random) -> tuple[Landmark, ...]:
    """One of each kind at most, well apart, over the whole canvas, no colour twice."""
    count = min(len(LANDMARK_KINDS), int(CANVAS_WIDTH // _LANDMARK_SPACING))
    kinds, colours = draw.sample(LANDMARK_KINDS, count), draw.sample(ACCENTS, count)
    step = CANVAS_WIDTH / count
    return tuple(
        Landmark(kind=kind, colour=colour, x=round(step * (slot + 0.5) + draw.uniform(-8, 8), 2))
        for slot, (kind, colour) in enumerate(zip(kinds, colours, strict=True))
    )


def _paths(draw: random.Random, num_frames: int, camera: str, motion: str) -> tuple[tuple[Move, ...], tuple[Move, ...]]:
    if num_frames > SEGMENT_FRAMES + 1:
        return _long_paths(draw, num_frames, motion)
    span = max(num_frames - 1, 1)
    direction = {"hold": 0, "pan left": -1, "pan right": 1, "pan and return": draw.choice((-1, 1))}[camera]
    pan = direction * draw.uniform(0.5, 0.75) * min(span, 48)
    left_room, right_room = max(0.0, -pan), max(0.0, pan)
    camera_x = draw.uniform(left_room + 8, CANVAS_WIDTH - FRAME_SIZE - right_room - 8)
    camera_moves = (Move(start=0, num_frames=span, kind=camera, x=camera_x, distance=pan),)
    distance = {"left": -1, "right": 1}.get(motion, 0) * draw.uniform(0.7, 1.0) * min(span, 48)
    reach = LOOP_RADIUS if motion == "loop" else 0.0
    low = _MARGIN + reach - min(0.0, distance, distance - pan, -pan)
    high = FRAME_SIZE - _MARGIN - reach - max(0.0, distance, distance - pan, -pan)
    screen_x = draw.uniform(low, high) if low < high else (low + high) / 2
    return camera_moves, (Move(start=0, num_frames=span, kind=motion, x=camera_x + screen_x, distance=distance),)


def _long_paths(draw: random.Random, num_frames: int, motion: str) -> tuple[tuple[Move, ...], tuple[Move, ...]]:
    """The camera holds, pans away, holds there and comes back; the subject stays around its home."""
    home = draw.uniform(2 * FRAME_SIZE, CANVAS_WIDTH - 3 * FRAME_SIZE)
    subject_x, offset = home + FRAME_SIZE / 2, 0.0
    camera_moves, subject_moves = [], []
    away = 0.0
    for index, start in enumerate(range(0, num_frames, SEGMENT_FRAMES)):
        common = {"start": start, "num_frames": SEGMENT_FRAMES}
        if index % 4 == 1:
            away = draw.choice((-1, 1)) * draw.uniform(1.2, 1.8) * FRAME_SIZE
            away = min(max(away, 4 - home), CANVAS_WIDTH - FRAME_SIZE - 4 - home)
        at_start = away if index % 4 in (2, 3) else 0.0
        distance = {1: away, 3: -away}.get(index % 4, 0.0)
        kind = "hold" if distance == 0 else ("pan right" if distance > 0 else "pan left")
        camera_moves.append(Move(**common, kind=kind, x=home + at_start, distance=distance))
        step = {"left": -1, "right": 1}.get(motion, 0) * 36.0
        step = -step if abs(offset + step) > 40 else step
        motion = {-36.0: "left", 36.0: "right"}.get(step, motion)
        subject_moves.append(Move(**common, kind=motion, x=subject_x + offset, distance=step))
        offset += step
        motion = draw.choice(MOTIONS)
    return tuple(camera_moves), tuple(subject_moves)


def ease(progress: float) -> float:
    """How much of a move of the camera is done: slow at both ends, never standing."""
    progress = min(max(progress, 0.0), 1.0)
    return progress - math.sin(2 * math.pi * progress) / (4 * math.pi)


def place_in(move: Move, frame: int) -> tuple[float, float]:
    """Middle of the subject, if it did nothing but this move."""
    elapsed = frame - move.start
    if move.kind == "hop":
        return move.x, REST_Y - HOP_HEIGHT * abs(math.sin(math.pi * elapsed / HOP_FRAMES))
    if move.kind == "loop":
        angle = 2 * math.pi * elapsed / LOOP_FRAMES
        return move.x + LOOP_RADIUS * math.sin(angle), REST_Y - LOOP_RADIUS * (1 - math.cos(angle))
    return move.x + move.distance * min(elapsed / move.num_frames, 1.0), float(REST_Y)


def _locate(moves: Sequence[Move], frame: int) -> tuple[Move, float]:
    """The move that covers `frame`, and how much of it is done, from 0 to 1."""
    move = moves[min(frame // moves[0].num_frames, len(moves) - 1)] if len(moves) > 1 else moves[0]
    return move, min(max((frame - move.start) / move.num_frames, 0.0), 1.0)


def _object(name: str, colour: str, middle: tuple[float, float], camera_x: float, half_width: float) -> ObjectState:
    screen_x = middle[0] - camera_x
    shown = min(screen_x + half_width, FRAME_SIZE) - max(screen_x - half_width, 0.0)
    return ObjectState(
        name=name,
        colour=colour,
        x=middle[0],
        y=middle[1],
        screen_x=screen_x,
        screen_y=middle[1],
        visible=min(max(shown / (2 * half_width), 0.0), 1.0),
    )
