"""Trips through the storybook world: a camera that leaves places and comes back, and prompts that change on the way.

A trip is a second kind of scene. Five stops of one screen stand on the canvas, each with one landmark; the camera rests
at a stop, or a little beside it, and pans to a neighbouring one. Times are chunks of three latent frames, which is
twelve pixel frames: chunk c is frames 12c - 3 to 12c + 8, and the first one frames 0 to 8. Lengths are pixels.
"""

import bisect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from vidaccel.world.scene import FRAME_SIZE, Landmark, Move, Subject, ease, place_in

CHUNK_FRAMES = 12
NUM_STOPS = 5
_FRAMES_PER_LATENT = 4
_LANDMARK_REACH = 28.0  # no landmark is wider than 54 pixels; one more on each side for soft edges
_HIGHEST = 36.0  # of the middle of a subject that glides: from the top of a loop into a hop it would rise above


@dataclass(frozen=True, kw_only=True)
class TripSpan:
    """A part of a trip with one prompt: from the chunk `start_chunk` on, this is what the world shows.

    landmarks: one a stop, from the left.
    names_landmark: the caption names the landmark of the subject's stop.
    names_place: the caption names the background.
    """

    start_chunk: int
    subject: Subject
    background: str
    landmarks: tuple[Landmark, ...]
    names_landmark: bool
    names_place: bool


@dataclass(frozen=True, kw_only=True)
class Trip:
    """A whole trip; the same seed, length and split give the same trip on every machine.

    subject_stop: the stop whose screen the subject never leaves.
    camera_moves, subject_moves: they follow one another without gaps and begin on chunk boundaries; a move of the
        camera without distance is a hold.
    """

    seed: int
    num_chunks: int
    spans: tuple[TripSpan, ...]
    subject_stop: int
    camera_moves: tuple[Move, ...]
    subject_moves: tuple[Move, ...]
    phases: tuple[float, ...]

    @property
    def num_frames(self) -> int:
        """Pixel frames: a chunk has twelve, but the first latent frame of a video is a single one."""
        return frame_of(self.num_chunks)

    def camera_x(self, frame: int) -> float:
        """Left edge of the screen on the canvas."""
        move = self.camera_moves[_last_begun(self.camera_moves, frame)]
        return move.x + move.distance * ease((frame - move.start) / move.num_frames)

    def subject_xy(self, frame: int) -> tuple[float, float]:
        """Middle of the subject on the canvas; where its motion changes it glides into the new one for a chunk."""
        index = _last_begun(self.subject_moves, frame)
        move = self.subject_moves[index]
        x, y = place_in(move, frame)
        elapsed = frame - move.start
        if index == 0 or elapsed >= CHUNK_FRAMES:
            return x, y
        old, new = place_in(self.subject_moves[index - 1], move.start), place_in(move, move.start)
        rest = 1 - ease(elapsed / CHUNK_FRAMES)
        return x + rest * (old[0] - new[0]), max(y + rest * (old[1] - new[1]), _HIGHEST)

    def span_at(self, chunk: int) -> TripSpan:
        """What the world shows in a chunk. Raises IndexError outside the trip."""
        if not 0 <= chunk < self.num_chunks:
            raise IndexError(f"`chunk` must be from 0 to {self.num_chunks - 1}, got {chunk}.")
        return self.spans[bisect.bisect(self.spans, chunk, key=lambda span: span.start_chunk) - 1]

    def span_at_frame(self, frame: int) -> TripSpan:
        """What the world shows in a pixel frame; in the first chunk of a span, what it turns into."""
        return self.span_at(chunk_of(frame))

    def holds(self, chunk: int) -> float | None:
        """Where the camera rests during a whole chunk (left edge on the canvas); None while it moves."""
        return rest_of(self.camera_moves, chunk)


@dataclass(frozen=True, kw_only=True)
class ReturnTrip(Trip):
    """A trip for measuring recall: a place is seen, left, and seen again at the very end.

    target_stop: the stop that is returned to.
    first_visit, second_visit: the chunks in which the camera rests there.
    prefix_chunks: chunks until the way back begins; a model is given these and makes the others.
    """

    target_stop: int
    first_visit: range
    second_visit: range
    prefix_chunks: int

    @property
    def target(self) -> Landmark:
        """The landmark that is returned to."""
        return self.spans[0].landmarks[self.target_stop]

    @property
    def target_x(self) -> float:
        """Middle of the landmark that is returned to, on the canvas."""
        return self.target.x

    def shows_target(self, chunk: int) -> bool:
        """Whether any frame of the chunk shows any of the landmark that is returned to."""
        frames = range(max(frame_of(chunk), 0), frame_of(chunk + 1))
        middles = (self.target_x - self.camera_x(frame) for frame in frames)
        return any(-_LANDMARK_REACH < middle < FRAME_SIZE + _LANDMARK_REACH for middle in middles)


def frame_of(chunk: int) -> int:
    """The pixel frame that a chunk begins with; that of chunk 0 would be -3."""
    return CHUNK_FRAMES * chunk - (_FRAMES_PER_LATENT - 1)


def chunk_of(frame: int) -> int:
    """The chunk that a pixel frame lies in."""
    return (frame + _FRAMES_PER_LATENT - 1) // CHUNK_FRAMES


def rest_of(camera_moves: Sequence[Move], chunk: int) -> float | None:
    """Where the camera rests during a whole chunk (left edge on the canvas); None while it moves."""
    move = camera_moves[_last_begun(camera_moves, frame_of(chunk))]
    return move.x if move.distance == 0 else None


def latent_cameras(trip: Trip) -> tuple[list[float], list[float]]:
    """Where the camera stands in every latent frame, and how far it came since the one before; both in pixels.

    The place of a latent frame is the mean over its pixel frames: one for the first, four for the others.
    """
    x = [trip.camera_x(frame) for frame in range(trip.num_frames)]
    columns = [x[0]]
    for start in range(1, trip.num_frames, _FRAMES_PER_LATENT):
        columns.append(sum(x[start : start + _FRAMES_PER_LATENT]) / _FRAMES_PER_LATENT)
    motions = [0.0, *(after - before for before, after in itertools.pairwise(columns))]
    return columns, motions


def _last_begun(moves: Sequence[Move], frame: int) -> int:
    return max(bisect.bisect(moves, frame, key=lambda move: move.start) - 1, 0)
