"""The way of the camera through a rollout, for students that are told of it: moves over time, in screens.

A screen is one width of the picture; positive is to the right, and the camera starts at 0. A move begins with the first
chunk that starts at or after its time, as a prompt does, and takes whole chunks. Within them it follows the ease of the
storybook world: after a share p of its pixel frames it has made p - sin(2 pi p) / (4 pi) of its way, so that it sets
off and arrives at half its mean speed.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from vidaccel.errors import UserError
from vidaccel.rollout.grid import MOST_SECONDS, ChunkGrid, span_seconds

ChunkCamera = Callable[[int, int, int], tuple[list[float], list[float]]]
"""Where the camera is in the latent frames of a chunk, and how far it moved since the frame before each.

Called with the number of the chunk, its first latent frame in the whole rollout, and how many it has; gives two lists
with a number for each frame, in screens (widths of the picture), to the right. All videos of a rollout share it.
"""

_MOVE = re.compile(r"(left|right)\s+(\S+)")
_TIMED = re.compile(r"([\d.:]+\s*-\s*[\d.:]+)\s+(.+)")
_MOST_SCREENS = 10_000  # of one move; where the camera is stays exact in the float32 that a student is told it in
_STEPS = 2**20  # of a screen: what is done of a move is a multiple, so that sums are exact, however they came about
_FORM = "`2-2.75 right 1, 6-6.75 left 0.5`: from and to in seconds, where to, how many screens"


@dataclass(frozen=True)
class CameraMove:
    """The camera moves by `screens` picture widths between two times; to the right where that is above 0.

    Raises UserError for times that are no numbers of at least 0 or do not follow each other, for no way, and for times
    above 1e9 s and ways above 10000 screens.
    """

    start_seconds: float
    end_seconds: float
    screens: float

    def __post_init__(self) -> None:
        for name in ("start_seconds", "end_seconds", "screens"):
            value = getattr(self, name)
            most = _MOST_SCREENS if name == "screens" else MOST_SECONDS
            if isinstance(value, bool) or not isinstance(value, int | float) or not -most <= value <= most:
                raise UserError(
                    f"`{name}` of a camera move must be a finite number of at most {most:g}, got {_short(value)}."
                )
        if self.start_seconds < 0 or self.end_seconds <= self.start_seconds:
            raise UserError(
                "a camera move starts at 0 s or later and ends after its start, got "
                f"{self.start_seconds:g} to {self.end_seconds:g} s."
            )
        if self.screens == 0:
            raise UserError("a camera move of 0 screens moves nothing; where there is no move the camera holds.")

    @classmethod
    def of_words(cls, start_seconds: float, end_seconds: float, words: str) -> "CameraMove":
        """A move by words such as `right 1` or `left 0.5`. Raises UserError for others."""
        return cls(start_seconds, end_seconds, _screens_of(words))

    @property
    def words(self) -> str:
        """Where to, and how many screens, as in `right 1`."""
        return f"{'right' if self.screens > 0 else 'left'} {_plain(abs(self.screens))}"

    def __str__(self) -> str:
        return f"{_plain(self.start_seconds)}-{_plain(self.end_seconds)} {self.words}"


@dataclass(frozen=True)
class PlacedMove:
    """A move and the chunks of a rollout that it takes, from `chunk` to before `end`.

    is_late: it has to wait for the one before it, which takes the chunk that it would start with.
    """

    move: CameraMove
    chunk: int
    end: int
    is_late: bool = False

    def after(self, chunk: int) -> "PlacedMove":
        """The same number of chunks, but not before `chunk`."""
        late = max(0, chunk - self.chunk)
        return replace(self, chunk=self.chunk + late, end=self.end + late, is_late=self.is_late or late > 0)


@dataclass(frozen=True)
class PlacedPath:
    """The way of a camera in the chunks of a rollout: a `ChunkCamera`."""

    grid: ChunkGrid
    moves: tuple[PlacedMove, ...]

    def begun_with(self, chunk: int) -> PlacedMove | None:
        """The move that begins with a chunk."""
        return next((placed for placed in self.moves if placed.chunk == chunk), None)

    def __call__(self, chunk: int, first_frame: int, num_frames: int) -> tuple[list[float], list[float]]:
        """Where the camera is in the latent frames of a chunk, and how far it moved since the one before each.

        Both in screens. Where it is in a latent frame is the mean of its pixel frames. It has not moved in the first
        latent frame of all; at a hard cut the path goes on.
        """
        positions = [self._position(frame) for frame in range(first_frame, first_frame + num_frames)]
        before = [self._position(first_frame - 1) if first_frame else positions[0], *positions]
        return positions, [here - there for there, here in zip(before, positions, strict=False)]

    def _position(self, frame: int) -> float:
        pixels = range(self.grid.pixels_before(frame), self.grid.pixels_before(frame + 1))
        reached = 0.0
        for placed in self.moves:
            first, end = self.grid.first_pixel_frame(placed.chunk), self.grid.first_pixel_frame(placed.end)
            shares = [_eased(min(max((pixel - first) / (end - first), 0.0), 1.0)) for pixel in pixels]
            reached += round(_STEPS * placed.move.screens * sum(shares) / len(shares)) / _STEPS
        return reached


@dataclass(frozen=True)
class CameraPath:
    """The moves of a camera in order of time; before, between and after them it holds.

    Raises UserError for moves that overlap or are out of order.
    """

    moves: tuple[CameraMove, ...] = ()

    def __post_init__(self) -> None:
        before: CameraMove | None = None
        for move in self.moves:
            check_follows(move, before)
            before = move

    @classmethod
    def parse(cls, text: str) -> "CameraPath":
        """The path of `2-2.75 right 1, 6-6.75 left 0.5`; times as `seconds_of` takes them. Raises UserError."""
        moves: list[CameraMove] = []
        for part in text.split(",") if text.strip() else ():
            found = _TIMED.fullmatch(part.strip())
            if found is None:
                raise UserError(f"{_short(part.strip())} is no camera move; write {_FORM}.")
            moves.append(CameraMove.of_words(*span_seconds(found[1]), found[2]))
        return cls(tuple(moves))

    @classmethod
    def of(cls, camera: "CameraPath | str | None") -> "CameraPath":
        """A path, its text, or None for a camera that holds. Raises UserError for anything else."""
        if camera is None or isinstance(camera, str):
            return cls.parse(camera or "")
        if not isinstance(camera, cls):
            raise UserError(f"`camera` must be a text such as {_FORM}; or a `CameraPath`. Got {camera!r}.")
        return camera

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "CameraPath":
        """What `to_dict` gave. Raises UserError for anything else."""
        entries = values.get("moves")
        fields = {"start_seconds", "end_seconds", "screens"}
        if not isinstance(entries, list) or any(not isinstance(one, dict) or set(one) != fields for one in entries):
            raise UserError(f"A camera path is an object with a list `moves`, got {str(values)[:80]}.")
        return cls(tuple(CameraMove(**entry) for entry in entries))

    def to_dict(self) -> dict[str, Any]:
        """The moves as plain values for JSON."""
        return {"moves": [dict(vars(move)) for move in self.moves]}

    def __str__(self) -> str:
        return ", ".join(map(str, self.moves))

    def on(self, grid: ChunkGrid) -> PlacedPath:
        """The path in the chunks of a rollout, for `rollout`.

        A move takes at least one chunk, and as many as come nearest to its length. One that would start before the one
        before it has ended starts there.
        """
        found: list[PlacedMove] = []
        for move in self.moves:
            wanted, free = grid.chunk_from(move.start_seconds), found[-1].end if found else 0
            chunk = max(wanted, free)
            length = (move.end_seconds - move.start_seconds) * grid.fps
            found.append(PlacedMove(move, chunk, _nearest_end(grid, chunk, length), is_late=wanted < free))
        return PlacedPath(grid, tuple(found))

    def positions(self, chunk: int, grid: ChunkGrid) -> list[float]:
        """Where the camera is in each latent frame of a chunk, in screens: the mean of its pixel frames."""
        return self.on(grid)(*_frames_of(chunk, grid))[0]

    def motions(self, chunk: int, grid: ChunkGrid) -> list[float]:
        """How far it moved since the latent frame before, in screens; 0 in the first latent frame of all.

        At a hard cut the path goes on.
        """
        return self.on(grid)(*_frames_of(chunk, grid))[1]

    def problems(self, grid: ChunkGrid, *, num_chunks: int) -> tuple[str, ...]:
        """One line for every move that a rollout of `num_chunks` chunks does not make as it is asked for."""
        end, last = grid.start_seconds(num_chunks), grid.start_seconds(num_chunks - 1)
        apart = grid.chunk_frames * grid.temporal_stride / grid.fps
        found = []
        for placed in self.on(grid).moves:
            name = f"The camera move {placed.move.words!r} at {placed.move.start_seconds:g} s"
            begins, ends = grid.start_seconds(placed.chunk), grid.start_seconds(placed.end)
            if placed.chunk >= num_chunks:
                found.append(
                    f"{name} is not made: the video of {end:g} s has its last chunk at {last:g} s; make the video "
                    "longer or move the camera earlier."
                )
            elif placed.end > num_chunks:
                found.append(
                    f"{name} is not made to its end: it takes until {ends:g} s and the video has {end:g} s; make the "
                    "video longer or move the camera earlier."
                )
            elif placed.is_late:
                found.append(
                    f"{name} begins at {begins:g} s, where the move before it ends: moves take whole chunks of "
                    f"{apart:g} s; leave more time between the two."
                )
        return tuple(found)


def check_follows(move: CameraMove, before: CameraMove | None) -> None:
    """Raise UserError for a move that starts before the one before it has ended."""
    if before is not None and move.start_seconds < before.end_seconds:
        raise UserError(
            f"a camera move must start when the one before it has ended, got {move.start_seconds:g} s and "
            f"{before.end_seconds:g} s."
        )


def check_takes_camera(path: CameraPath, *, takes_camera: bool, student: str) -> None:
    """Raise UserError for moves where the student is not told of a camera."""
    if path.moves and not takes_camera:
        raise UserError(
            "Moves of the camera (--camera, in Python `camera`, camera lines of a timeline) are for students that are "
            f"told of them, and {student} is not: leave it out and say the move in the prompt, such as `the camera "
            "pans left`, or take a student whose transformer has a `camera_dim`."
        )


def _frames_of(chunk: int, grid: ChunkGrid) -> tuple[int, int, int]:
    first = grid.first_frame(chunk)
    return chunk, first, grid.first_frame(chunk + 1) - first


def _nearest_end(grid: ChunkGrid, chunk: int, length: float) -> int:
    """The chunk after `chunk` whose start comes nearest to so many pixel frames later; of two the earlier."""
    wanted = grid.first_pixel_frame(chunk) + length
    after = grid.chunk_from_pixel(math.ceil(wanted))
    ends = [end for end in (after - 1, after) if end > chunk] or [chunk + 1]
    return min(ends, key=lambda end: abs(grid.first_pixel_frame(end) - wanted))


def _eased(progress: float) -> float:
    return progress - math.sin(2 * math.pi * progress) / (4 * math.pi)


def _screens_of(words: str) -> float:
    found = _MOVE.fullmatch(words.strip()) if isinstance(words, str) else None
    try:
        screens = float(found[2]) if found is not None else math.nan
    except ValueError:
        screens = math.nan
    if found is None or not math.isfinite(screens) or screens <= 0:
        raise UserError(
            f"{_short(words)} is no way of a camera; write `right` or `left` and a number of screens: `right 1`."
        )
    return screens if found[1] == "right" else -screens


def _short(value: object) -> str:
    """What was given, as a line of an error can show it."""
    return repr(value)[:80]


def _plain(number: float) -> str:
    """A number as people write it, exact for those that they write."""
    return f"{number:.12g}"
