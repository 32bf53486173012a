"""Test trips: encoded as the world shows them, and made on from there by a student, as any rollout is.

The student is told of the camera, from where it stands at the beginning. Trips of one kind differ in the side to which
the camera leaves; those that go the same way are rolled out together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from vidaccel.bench.recall.blank import MemoryWithout
from vidaccel.bench.recall.cells import RecallCell
from vidaccel.bench.recall.visits import Visits, read_visits
from vidaccel.machine.private_names import execution_device
from vidaccel.memory import MemoryPolicy
from vidaccel.rollout.camera import ChunkCamera
from vidaccel.rollout.chunk import Shot
from vidaccel.rollout.decode import encode_start
from vidaccel.rollout.loop import ingest, rollout
from vidaccel.rollout.state import RolloutState
from vidaccel.world import FRAME_SIZE, ReturnTrip, latent_cameras, render_trips, swapped, test_trip, trip_caption

_DECODED_CHUNKS = 2  # of a visit: its last, and one that a decoder needs as a beginning
CHUNK_FRAMES = 3  # latent frames: the world's trips are counted in chunks of three
_BATCH = 32  # trips that are rolled out, and decoded, together
_ENCODED_FRAMES = 1600  # pixel frames that are encoded together on a CPU
_RENDERED_FRAMES = 177  # pixel frames of a trip that are rendered together
_BYTES_A_FRAME = 16 * 4 * 3 * FRAME_SIZE**2  # that rendering and encoding take on a GPU, with room to spare


@dataclass(frozen=True, kw_only=True)
class Rolled:
    """What a student made of trips.

    first, second: what is seen at the visits; first only where the student made it.
    frames_in_reach: for each trip how many frames of the first visit the memory held when the way back began.
    keyframes: for each trip the frames in slow memory then.
    passes: for each trip how many passes a chunk took in the mean, the clean one included.
    """

    first: Visits | None
    second: Visits
    frames_in_reach: list[int]
    keyframes: list[int]
    passes: list[float]

    @classmethod
    def joined(cls, parts: Sequence[Rolled], places: Sequence[int]) -> Rolled:
        """All parts; the trips in them, one after the other, go to `places`."""
        back = sorted(range(len(places)), key=places.__getitem__)
        first = [part.first for part in parts if part.first is not None]
        in_reach = list(chain.from_iterable(part.frames_in_reach for part in parts))
        keyframes = list(chain.from_iterable(part.keyframes for part in parts))
        passes = list(chain.from_iterable(part.passes for part in parts))
        return cls(
            first=Visits.joined(first).at(back) if first else None,
            second=Visits.joined([part.second for part in parts]).at(back),
            frames_in_reach=[in_reach[place] for place in back],
            keyframes=[keyframes[place] for place in back],
            passes=[passes[place] for place in back],
        )


class RecallTrips:
    """Trips of one kind, unseen in training; what the world shows is encoded when it is asked for first."""

    def __init__(self, pipe: Any, cell: RecallCell, *, count: int, seed: int = 0):
        """Draw `count` trips for the cells that have the trips of `cell`."""
        self.pipe = pipe
        self.trips = [
            test_trip(seed * 1_000_003 + index, kind=cell.trip_kind, away_chunks=cell.away_chunks, detours=cell.detours)
            for index in range(count)
        ]
        self._latents: dict[bool, Tensor] = {}
        self._truths: dict[bool, tuple[Visits, Visits]] = {}

    def world(self, *, is_swapped: bool = False) -> Tensor:
        """Latents (N, C, F, h, w) of the whole trips, as they are or with another landmark at the place."""
        if is_swapped not in self._latents:
            trips = [swapped(trip, trip.seed) for trip in self.trips] if is_swapped else self.trips
            self._latents[is_swapped] = encode_trips(self.pipe, trips)
        return self._latents[is_swapped]

    def truth(self, *, is_swapped: bool = False) -> tuple[Visits, Visits]:
        """What the world shows at both visits, as the autoencoder gives it back."""
        if is_swapped not in self._truths:
            latents = self.world(is_swapped=is_swapped)
            first, second = (self._read(latents, self.trips, visit, 0) for visit in ("first_visit", "second_visit"))
            self._truths[is_swapped] = first, second
        return self._truths[is_swapped]

    def prefix(self, *, is_swapped: bool = False) -> Tensor:
        """Latents of the trips up to the way back; swapped: with those frames that show the place from the others."""
        end = self.trips[0].prefix_chunks * CHUNK_FRAMES
        latents = self.world()[:, :, :end]
        if is_swapped:
            shown = torch.zeros(len(self.trips), 1, end, 1, 1, dtype=torch.bool)
            for row, trip in enumerate(self.trips):
                shown[row, :, list(target_frames(trip))] = True
            latents = torch.where(shown, self.world(is_swapped=True)[:, :, :end], latents)
        return latents

    def roll(self, cell: RecallCell) -> Rolled:
        """Let the student make what is left of every trip, or with "own" all of it."""
        prefix = None if cell.kind == "own" else self.prefix(is_swapped=cell.control == "swap")
        parts, order = [], []
        for rows in batches(self.trips):
            given = None if prefix is None else prefix[rows]
            parts.append(self._roll_batch([self.trips[row] for row in rows], cell, given))
            order += rows
        return Rolled.joined(parts, order)

    @torch.no_grad()
    def _roll_batch(self, trips: Sequence[ReturnTrip], cell: RecallCell, given: Tensor | None) -> Rolled:
        student = cell.student(self.pipe)
        state = self.pipe.new_state(
            student,
            height=FRAME_SIZE,
            width=FRAME_SIZE,
            seeds=[trip.seed for trip in trips],
            memory=self._memory(cell, trips),
        )
        shots, camera = self._shots(trips, guided=student.num_branches > 1), trip_camera(trips[0])
        half, end = trips[0].prefix_chunks, trips[0].second_visit.stop
        if given is None:
            made = list(rollout(student, state, shots, num_chunks=half, camera=camera))
        else:
            made = []
            for _ in ingest(student, state, shots[0], given, camera=camera):
                pass
        indexes = state.memory.indexes
        in_reach, keyframes = frames_in_reach(state, trips[0]), [len(index.slow) for index in indexes]
        made += rollout(student, state, shots, num_chunks=end, camera=camera)
        latents, missing = torch.cat([chunk.latents for chunk in made], dim=2), half if given is not None else 0
        return Rolled(
            first=None if missing else self._read(latents, trips, "first_visit", 0),
            second=self._read(latents, trips, "second_visit", missing),
            frames_in_reach=in_reach,
            keyframes=keyframes,
            passes=[sum(one) / len(made) for one in zip(*(student.passes_of(chunk) for chunk in made), strict=True)],
        )

    def _memory(self, cell: RecallCell, trips: Sequence[ReturnTrip]) -> MemoryPolicy:
        memory = cell.memory_of(self.pipe)
        if cell.control != "blank":
            return memory
        frames = sorted({frame for trip in trips for frame in target_frames(trip)})
        return MemoryWithout(memory=memory, frames=tuple(frames), chunk_frames=memory.chunk_frames)

    def _shots(self, trips: Sequence[ReturnTrip], *, guided: bool) -> list[Shot]:
        shots: list[Shot] = self.pipe.shots(
            [trip_caption(trip, 0) for trip in trips],
            num_videos=len(trips),
            guided=guided,
        )
        return shots

    def _read(self, latents: Tensor, trips: Sequence[ReturnTrip], visit: str, first_chunk: int) -> Visits:
        """What is seen at the end of a visit; `latents` begin with a chunk of the trip."""
        chunks: range = getattr(trips[0], visit)
        start, stop = (CHUNK_FRAMES * (chunk - first_chunk) for chunk in (chunks.stop - _DECODED_CHUNKS, chunks.stop))
        part = latents[:, :, start:stop]
        shifts = [trip.camera_x(_last_frame(chunks)) - trip.camera_x(_last_frame(trip.first_visit)) for trip in trips]
        return read_visits(self.pipe.vae, part, shifts, batch=_BATCH)


def encode_trips(pipe: Any, trips: Sequence[ReturnTrip]) -> Tensor:
    """Latents (N, C, F, h, w) on the CPU of whole trips of one length as the world draws them."""
    device = execution_device(pipe)
    size = max(1, min(_BATCH, _frames_at_once(device) // trips[0].num_frames))
    parts = [trips[first : first + size] for first in range(0, len(trips), size)]
    return torch.cat([encode_start(pipe.vae, _rendered(part, device)).cpu() for part in parts])


def _frames_at_once(device: torch.device) -> int:
    """How many pixel frames fit beside each other: on a GPU small batches would wait for the host."""
    if device.type != "cuda":
        return _ENCODED_FRAMES
    free, _ = torch.cuda.mem_get_info(device)
    return free // _BYTES_A_FRAME


def _rendered(trips: Sequence[ReturnTrip], device: torch.device) -> Tensor:
    """All frames, (B, f, 3, H, W), drawn piece by piece."""
    length = trips[0].num_frames
    starts = range(0, length, _RENDERED_FRAMES)
    pieces = [min(_RENDERED_FRAMES, length - start) for start in starts]
    clips = zip(starts, pieces, strict=True)
    return torch.cat([render_trips(trips, start=s, num_frames=n, device=device) for s, n in clips], dim=1)


def batches(trips: Sequence[ReturnTrip]) -> Iterator[list[int]]:
    """Places of trips whose cameras go the same way, some at a time."""
    ways: dict[tuple[float, ...], list[int]] = {}
    for place, trip in enumerate(trips):
        screens, _ = _screens(trip)
        ways.setdefault(tuple(round(screen, 6) for screen in screens), []).append(place)
    for places in ways.values():
        yield from (places[first : first + _BATCH] for first in range(0, len(places), _BATCH))


def trip_camera(trip: ReturnTrip) -> ChunkCamera:
    """The camera of a trip as a rollout takes it: in screens, from where it stands first."""
    screens, motions = _screens(trip)

    def camera(chunk: int, first: int, count: int) -> tuple[list[float], list[float]]:
        return screens[first : first + count], motions[first : first + count]

    return camera


def target_frames(trip: ReturnTrip) -> Iterator[int]:
    """Latent frames of the prefix whose chunk shows something of the place."""
    for chunk in range(trip.prefix_chunks):
        if trip.shows_target(chunk):
            yield from range(CHUNK_FRAMES * chunk, CHUNK_FRAMES * (chunk + 1))


def frames_in_reach(state: RolloutState, trip: ReturnTrip) -> list[int]:
    """For every sample, how many frames of the first visit are remembered."""
    visit = {CHUNK_FRAMES * chunk + place for chunk in trip.first_visit for place in range(CHUNK_FRAMES)}
    return [len(visit.intersection((*index.sink, *index.slow, *index.fast))) for index in state.memory.indexes]


def _screens(trip: ReturnTrip) -> tuple[list[float], list[float]]:
    positions, motions = latent_cameras(trip)
    return [(x - positions[0]) / FRAME_SIZE for x in positions], [motion / FRAME_SIZE for motion in motions]


def _last_frame(chunks: range) -> int:
    """The last pixel frame of chunks."""
    return 4 * CHUNK_FRAMES * chunks.stop - 4
