"""Ways there and back, twice: scenes of the storybook world, their prompts, and rollouts of a student along them.

The camera holds at home, pans away, holds there, pans back, holds, pans away again and holds: seven segments as long as
those of the world's long scenes. Prompts are the world's own captions of the segments, in a wording that names no
landmark, so that only what is remembered says what stood where. Several prompts are rolled out together as a batch.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vidaccel.catalog.pipelines import WAN_TEXT_TOKENS
from vidaccel.memory.config import MemoryConfig
from vidaccel.rollout.chunk import Shot
from vidaccel.rollout.decode import StreamingDecoder, encode_start
from vidaccel.rollout.loop import replay, rollout
from vidaccel.rollout.state import RolloutState
from vidaccel.world import FRAME_SIZE, Scene, caption, random_scene, render
from vidaccel.world.scene import SEGMENT_FRAMES, Move
from vidaccel.world.sprites import LANDMARK_KINDS

NUM_SEGMENTS = 7
VISITS = (0, 2, 4, 6)  # segments in which the camera holds; the others are pans
RETURNS = {"home": (0, 4), "away": (2, 6)}  # a place, and the segments of its first and its second visit
WINDOW_FRAMES = 5  # last latent frames of a visit, which are decoded and looked at
_MOST_WORDINGS = 1000
_BATCH = 8  # trips that are rolled out together
_ENCODED = 4  # clips that are encoded together


@dataclass(frozen=True, kw_only=True)
class Trip:
    """One scene with the prompts of its segments; `seed` is also that of the noise."""

    seed: int
    scene: Scene
    prompts: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class TripGrid:
    """Where segments lie in chunks.

    chunk_frames: latent frames of a chunk. stride: pixel frames of a latent frame after the first.
    """

    chunk_frames: int
    stride: int

    def start_chunk(self, segment: int) -> int:
        """The first chunk whose middle latent frame shows the segment, as captions are given in training."""
        middle = (segment * SEGMENT_FRAMES + 2) / self.stride - self.chunk_frames // 2
        return max(0, math.ceil(middle / self.chunk_frames))

    def frames(self, segment: int) -> range:
        """Latent frames of a segment."""
        return range(self.start_chunk(segment) * self.chunk_frames, self.start_chunk(segment + 1) * self.chunk_frames)

    def window(self, segment: int) -> range:
        """The last latent frames of a segment."""
        return self.frames(segment)[-WINDOW_FRAMES:]


@dataclass(frozen=True, kw_only=True)
class TripVideos:
    """What came of the trips with one memory; B prompts.

    windows: by segment, the pixels of the ends of visits, (B, f, 3, H, W) in [0, 1].
    similarities: of each prompt and chunk, None where the rule takes none. keyframes: the same, whether it was one.
    remembered: by place, for each prompt how many frames of its first visit were in reach at the beginning of the
    second.
    seconds: of the chunks that were made, decoding left out.
    """

    windows: dict[int, Tensor]
    similarities: list[list[float | None]]
    keyframes: list[list[bool]]
    remembered: dict[str, list[int]]
    seconds: float


def plan_trips(count: int, *, seed: int = 0) -> list[Trip]:
    """Scenes over combinations of attributes that training never sees; the second way away is the first again."""
    trips = []
    for index in range(count):
        scene = random_scene(seed * 1_000_003 + index, num_frames=NUM_SEGMENTS * SEGMENT_FRAMES + 1, split="test")
        home, away = scene.camera_moves[0].x, scene.camera_moves[1].distance
        moves = tuple(_move(segment, home, away) for segment in range(len(scene.camera_moves)))
        scene = replace(scene, camera_moves=moves)
        trips.append(Trip(seed=scene.seed, scene=scene, prompts=_prompts(scene)))
    return trips


def _move(segment: int, home: float, away: float) -> Move:
    distance = {1: away, 3: -away}.get(segment % 4, 0.0)
    kind = "hold" if distance == 0 else ("pan right" if distance > 0 else "pan left")
    x = home + (away if segment % 4 in (2, 3) else 0.0)
    return Move(start=segment * SEGMENT_FRAMES, num_frames=SEGMENT_FRAMES, kind=kind, x=x, distance=distance)


def _prompts(scene: Scene) -> tuple[str, ...]:
    """The captions of all segments in the first wording that names no landmark."""
    for wording in range(_MOST_WORDINGS):
        texts = [caption(scene, frame=part * SEGMENT_FRAMES, paraphrase=wording) for part in range(NUM_SEGMENTS)]
        if not any(kind in text.split() for text in texts for kind in LANDMARK_KINDS):
            return tuple(texts)
    raise AssertionError("A wording names a landmark in two of five cases, so this cannot happen.")


def rendered_windows(trips: Sequence[Trip], grid: TripGrid, segments: Sequence[int]) -> dict[int, Tensor]:
    """The ends of visits as the world draws them, (B, f, 3, H, W): the frames that a decoded window shows."""
    scenes = [trip.scene for trip in trips]
    return {
        segment: render(scenes, start=grid.stride * frames[0], num_frames=grid.stride * (len(frames) - 1) + 1)
        for segment in segments
        for frames in [grid.window(segment)]
    }


def encode_trips(vae: Any, trips: Sequence[Trip], grid: TripGrid, num_segments: int) -> Tensor:
    """Latents (B, C, F, h, w) of the first segments as the world draws them."""
    num_frames = grid.stride * (grid.start_chunk(num_segments) * grid.chunk_frames - 1) + 1
    parts = [trips[first : first + _ENCODED] for first in range(0, len(trips), _ENCODED)]
    clips = (render([trip.scene for trip in part], num_frames=num_frames) for part in parts)
    return torch.cat([encode_start(vae, clip) for clip in clips])


def take_trips(
    pipe: Any,
    trips: Sequence[Trip],
    memory: MemoryConfig,
    *,
    given: Tensor | None = None,
    max_sequence_length: int = WAN_TEXT_TOKENS,
) -> TripVideos:
    """Roll all trips out with `memory`; `given`: latents (B, C, F, h, w) of whole segments that they begin with."""
    parts = []
    for first in range(0, len(trips), _BATCH):
        batch = slice(first, first + _BATCH)
        start = None if given is None else given[batch]
        parts.append(_take_batch(pipe, trips[batch], memory, start, max_sequence_length))
    return TripVideos(
        windows={segment: torch.cat([part.windows[segment] for part in parts]) for segment in parts[0].windows},
        similarities=[row for part in parts for row in part.similarities],
        keyframes=[row for part in parts for row in part.keyframes],
        remembered={place: [n for part in parts for n in part.remembered[place]] for place in RETURNS},
        seconds=sum(part.seconds for part in parts),
    )


@torch.no_grad()
def _take_batch(
    pipe: Any, trips: Sequence[Trip], memory: MemoryConfig, given: Tensor | None, max_sequence_length: int
) -> TripVideos:
    grid = TripGrid(chunk_frames=memory.chunk_frames, stride=pipe.vae_scale_factor_temporal)
    student = pipe.student()
    seeds = [trip.seed for trip in trips]
    state = pipe.new_state(student, height=FRAME_SIZE, width=FRAME_SIZE, seeds=seeds, memory=memory)
    shots = _shots(pipe, trips, grid, max_sequence_length)
    log = _Log(state, grid)
    if given is not None:
        replay(student, state, shots, log.watched(given.split(memory.chunk_frames, dim=2)))
    first = state.num_frames
    pieces = []
    began = time.perf_counter()
    for chunk in rollout(student, state, shots, num_chunks=grid.start_chunk(NUM_SEGMENTS)):
        pieces.append(chunk.latents)
        log.note()
    seconds = time.perf_counter() - began
    latents = torch.cat(pieces, dim=2)
    windows = {}
    for segment in VISITS:
        frames = grid.window(segment)
        if frames[0] >= first:
            part = latents[:, :, frames[0] - first : frames[-1] + 1 - first]
            windows[segment] = StreamingDecoder(pipe.vae).decode(part).cpu().float() / 255
    return TripVideos(
        windows=windows,
        similarities=log.similarities,
        keyframes=log.keyframes,
        remembered=log.remembered,
        seconds=seconds,
    )


def _shots(pipe: Any, trips: Sequence[Trip], grid: TripGrid, max_sequence_length: int) -> list[Shot]:
    return [
        replace(
            pipe.shots(
                [trip.prompts[segment] for trip in trips],
                num_videos=len(trips),
                max_sequence_length=max_sequence_length,
            )[0],
            start_chunk=grid.start_chunk(segment),
        )
        for segment in range(NUM_SEGMENTS)
    ]


class _Log:
    """Notes after every chunk what the memories of all samples did."""

    def __init__(self, state: RolloutState, grid: TripGrid) -> None:
        self.state, self.grid = state, grid
        self.similarities: list[list[float | None]] = [[] for _ in state.seeds]
        self.keyframes: list[list[bool]] = [[] for _ in state.seeds]
        self.remembered: dict[str, list[int]] = {}

    def watched(self, chunks: Sequence[Tensor]) -> Iterator[Tensor]:
        """The chunks; each is noted when the next is asked for."""
        for chunk in chunks:
            yield chunk
            self.note()

    def note(self) -> None:
        similarity = self.state.memory.similarity
        values = [None] * len(self.state.seeds) if similarity is None else similarity.tolist()
        for sample, index in enumerate(self.state.memory.indexes):
            self.similarities[sample].append(values[sample])
            self.keyframes[sample].append(index.is_keyframe)
        for place, (first, second) in RETURNS.items():
            if self.state.num_chunks == self.grid.start_chunk(second):
                visit = set(self.grid.frames(first))
                self.remembered[place] = [
                    len(visit.intersection((*index.sink, *index.slow, *index.fast)))
                    for index in self.state.memory.indexes
                ]
