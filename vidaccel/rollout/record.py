"""The record of a rollout: which frames were remembered when, how long chunks took, and what it cost.

Collected chunk by chunk. A chunk costs about a hundred bytes, so that an hour of video (4800 chunks of 12 pixel frames
at 16 fps) is half a megabyte: per chunk there are a few numbers in arrays, and per remembered frame only when it came
into a part of the memory and when it left it.
"""

from __future__ import annotations

import itertools
import math
from array import array
from collections.abc import Mapping
from typing import Any, NamedTuple

from vidaccel.memory import MemoryPolicy
from vidaccel.rollout.chunk import Chunk
from vidaccel.rollout.grid import ChunkGrid, pixel_frames

PARTS = ("sink", "slow", "fast")
_RECORDED = ("first_frame", "num_pixel_frames", "prompt", "similarity", "is_keyframe")


class Residence(NamedTuple):
    """A frame was in a part of the memory after chunks `entered`, ..., `left` - 1; `left` None: it still is."""

    frame: int
    entered: int
    left: int | None


class RolloutRecord:
    """What happened in one rollout. Chunks are counted from 0 and must be added in order.

    num_passes: forward passes of the transformer: steps and the pass that writes the memory, for every branch of
        guidance; a chunk that was given and not made takes the latter alone. Passes that write the memory anew under
        another prompt, and those over frames that come back, are not counted.
    prompts: the prompt and the chunk it begins with, for every change.
    camera: where it was in each latent frame, in screens; nothing for students that are not told of it.
    bytes_by_part: of the memory, as it said last.
    decoder: name of the small decoder that made the pixels; None: the autoencoder did.
    """

    def __init__(
        self,
        memory: MemoryPolicy,
        grid: ChunkGrid,
        *,
        passes_per_chunk: int,
        num_branches: int = 1,
        decoder: str | None = None,
    ) -> None:
        self.memory, self.grid, self.decoder = memory, grid, decoder
        self.num_passes = 0
        self.prompts: list[tuple[int, str]] = []
        self.camera = array("d")
        self.bytes_by_part: dict[str, int] = {}
        self._passes = (passes_per_chunk, num_branches)
        self._first_frames = array("i")
        self._pixel_frames = array("i")
        self._similarity = array("d")  # NaN: none
        self._is_keyframe = bytearray()
        self._seconds: dict[str, array[float]] = {}  # by phase; NaN: not measured
        self._stays = {part: (array("i"), array("i"), array("i")) for part in PARTS}
        self._inside: dict[str, dict[int, int]] = {part: {} for part in PARTS}

    def add(self, chunk: Chunk, *, bytes_by_part: Mapping[str, int] | None = None) -> None:
        """Take one finished chunk; what making one that a session had took is not known and not counted."""
        frames = 0 if chunk.frames is None else chunk.frames.shape[1]
        values = {**vars(chunk), "num_pixel_frames": frames}
        self._add(values, chunk.seconds)
        skipped = min(chunk.skipped, default=0) * self._passes[1]  # a pass is saved where all samples do without it
        self.num_passes += {"made": self._passes[0] - skipped, "given": self._passes[1], "saved": 0}[chunk.origin]
        if bytes_by_part is not None:
            self.bytes_by_part = dict(bytes_by_part)

    def add_recorded(self, values: Mapping[str, Any]) -> None:
        """Take a chunk that another process made, as the session has it: what it took is not known and not counted."""
        self._add(values, {})

    def _add(self, values: Mapping[str, Any], seconds: Mapping[str, float]) -> None:
        index = self.num_chunks
        first_frame, frames, prompt, similarity, is_keyframe = (values[name] for name in _RECORDED)
        self._first_frames.append(first_frame)
        self._pixel_frames.append(frames)
        self._similarity.append(math.nan if similarity is None else similarity)
        self._is_keyframe.append(bool(is_keyframe))
        for phase in seconds:
            if phase not in self._seconds:  # what there was none of before took no time
                known = next(iter(self._seconds.values()), [math.nan] * index)
                self._seconds[phase] = array("d", [math.nan if math.isnan(value) else 0.0 for value in known])
        for phase, measured in self._seconds.items():
            measured.append(seconds.get(phase, 0.0) if seconds else math.nan)
        if not self.prompts or self.prompts[-1][1] != prompt:
            self.prompts.append((index, prompt))
        if (camera := values.get("camera")) is not None:
            self.camera.extend([0.0] * (first_frame - len(self.camera)))  # it held, and nobody was told
            self.camera.extend(camera[0])
        for part in PARTS:
            self._move(part, set(values[part]), index)

    def _move(self, part: str, frames: set[int], index: int) -> None:
        inside, stays = self._inside[part], self._stays[part]
        for frame in sorted(inside.keys() - frames):
            for column, value in zip(stays, (frame, inside.pop(frame), index), strict=True):
                column.append(value)
        inside |= dict.fromkeys(sorted(frames - inside.keys()), index)

    @property
    def num_chunks(self) -> int:
        """Chunks so far."""
        return len(self._first_frames)

    @property
    def num_pixel_frames(self) -> int:
        """Pixel frames of the video so far; 0 where nothing is decoded."""
        return sum(self._pixel_frames)

    @property
    def num_keyframes(self) -> int:
        """Chunks that were keyframes."""
        return sum(self._is_keyframe)

    @property
    def first_frames(self) -> tuple[int, ...]:
        """The first latent frame of every chunk."""
        return tuple(self._first_frames)

    def start_seconds(self) -> list[float]:
        """Where in the video each chunk starts, and at last where the video ends so far."""
        if self.num_pixel_frames:
            return [frames / self.grid.fps for frames in itertools.accumulate(self._pixel_frames, initial=0)]
        stride = self.grid.temporal_stride
        firsts = [*self._first_frames, self._first_frames[-1] + self.grid.chunk_frames] if self.num_chunks else [0]
        return [pixel_frames(frame, stride) / self.grid.fps for frame in firsts]

    @property
    def keyframe_chunks(self) -> tuple[int, ...]:
        """The chunks that were keyframes."""
        return tuple(chunk for chunk, is_one in enumerate(self._is_keyframe) if is_one)

    @property
    def pixel_frames_per_second(self) -> float | None:
        """Pixel frames made per second of work, the first chunk of each process left out, which warms up."""
        work = self.chunk_seconds()
        timed = [place for place in range(1, len(work)) if not math.isnan(work[place] + work[place - 1])]
        total = sum(work[place] for place in timed)
        return sum(self._pixel_frames[place] for place in timed) / total if total > 0 else None

    def chunk_seconds(self) -> list[float]:
        """Time of every chunk, all phases together; NaN where it was not measured."""
        rows = self._seconds.values()
        return [sum(row) for row in zip(*rows, strict=True)] if rows else [math.nan] * self.num_chunks

    def similarities(self) -> list[float]:
        """Similarity of every chunk's keys with those of the chunk before; NaN where there is none."""
        return list(self._similarity)

    def phase_seconds(self) -> dict[str, list[float]]:
        """Time of every chunk by phase: denoising, clean_pass, decoding; NaN where it was not measured."""
        return {phase: list(measured) for phase, measured in self._seconds.items()}

    def returns(self) -> list[tuple[int, int]]:
        """Frames that came back into slow memory after they had left, each with the chunk that they came back for."""
        left = {(stay.frame, stay.left) for part in PARTS for stay in self.stays(part)}
        return sorted(
            (stay.frame, stay.entered)
            for stay in self.stays("slow")
            if (stay.frame, stay.entered) not in left and stay.frame < self._first_frames[stay.entered]
        )

    def stays(self, part: str) -> list[Residence]:
        """When each frame was in a part of the memory ("sink", "slow", "fast"), in the order of leaving it."""
        left = [Residence(*row) for row in zip(*self._stays[part], strict=True)]
        return [*left, *(Residence(frame, entered, None) for frame, entered in self._inside[part].items())]
