"""Which prompt holds when and how the camera moves: prompts per span of time, and the chunk each of them starts with.

A rollout changes its prompt between chunks. A span starts with the first chunk whose first pixel frame is at or after
the start of the span: never early, exact where the start is a chunk's, and less than one chunk late elsewhere.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast, get_args

from vidaccel.errors import UserError
from vidaccel.files.text import read_text
from vidaccel.rollout.camera import CameraMove, CameraPath, PlacedPath, check_follows
from vidaccel.rollout.grid import MOST_SECONDS, ChunkGrid, seconds_of, span_seconds

Cut = Literal["soft", "hard"]
CUTS: tuple[Cut, ...] = get_args(Cut)
ENDLESS = 2**62  # chunks; about 10^11 years of video
_TIMES = re.compile(r"[^\s-]*\s*-\s*[^\s-]*")  # from and to


@dataclass(frozen=True)
class PromptSpan:
    """A prompt and the time it starts at.

    cut: what becomes of the memory there. "soft" keeps the remembered frames, computed again under the new prompt;
        "hard" forgets them, as a new shot does.

    Raises UserError for a start that is no number of at least 0, an empty prompt and an unknown cut.
    """

    start_seconds: float
    prompt: str
    cut: Cut = "soft"

    def __post_init__(self) -> None:
        start = self.start_seconds
        if isinstance(start, bool) or not isinstance(start, int | float) or not 0 <= start <= MOST_SECONDS:
            raise UserError(
                f"`start_seconds` must be a number of at least 0 and at most {MOST_SECONDS:g}, got {str(start)[:40]}."
            )
        if not isinstance(self.prompt, str) or not self.prompt.strip():
            raise UserError("a span needs a prompt; say in a few words what the video shows.")
        if self.cut not in CUTS:
            raise UserError(f"`cut` must be one of {', '.join(CUTS)}; got {self.cut!r}.")


@dataclass(frozen=True)
class PromptChange:
    """A span and the chunk it starts with in a rollout."""

    chunk: int
    span: PromptSpan


@dataclass(frozen=True)
class PromptTimeline:
    """The prompts of a video, in order of time; the first starts at 0.

    camera: how the camera moves, for students that are told of it; by default it holds.

    Raises UserError for no spans, a first one that starts later, and starts that do not increase.
    """

    spans: tuple[PromptSpan, ...]
    camera: CameraPath = field(default_factory=CameraPath)

    def __post_init__(self) -> None:
        if not self.spans:
            raise UserError("A timeline needs at least one prompt.")
        before = None
        for span in self.spans:
            _check_order(span, before)
            before = span

    @classmethod
    def single(cls, prompt: str) -> "PromptTimeline":
        """One prompt for the whole video."""
        return cls((PromptSpan(0, prompt),))

    @classmethod
    def from_file(cls, path: str | Path) -> "PromptTimeline":
        """A timeline from a text file, or from a JSON list of objects with the fields of `PromptSpan`.

        A line of text is a time, optionally the cut between bars, and the prompt; or from when until when the camera
        moves, and where to by how many screens. `#` starts a comment line:

            0:00 a red ball on a table
            12.5 the ball rolls to the left
            0:14-0:15 | camera | right 1
            1:05 | hard | a street at night

        In JSON a move is `{"start_seconds": 14, "end_seconds": 15, "camera": "right 1"}`.

        Raises UserError with the file and the line (of JSON: the entry) for what is not of this form.
        """
        path = Path(path)
        text = read_text(path, "The timeline")
        is_json = path.suffix.lower() == ".json" or text.lstrip().startswith("[")
        return _timeline_of(_entries_of_json(path, text) if is_json else _entries_of_text(path, text), path)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "PromptTimeline":
        """What `to_dict` gave. Raises UserError for anything else."""
        entries = values.get("spans")
        if not isinstance(entries, list):
            raise UserError(f"A timeline is an object with a list `spans`, got {str(values)[:80]}.")
        camera = CameraPath.from_dict(values["camera"]) if "camera" in values else CameraPath()
        return cls(tuple(_span_of_entry(entry) for entry in entries), camera)

    def to_dict(self) -> dict[str, Any]:
        """The spans as plain values for JSON, and the camera's moves where there are some."""
        spans = [{"start_seconds": span.start_seconds, "prompt": span.prompt, "cut": span.cut} for span in self.spans]
        return {"spans": spans} | ({"camera": self.camera.to_dict()} if self.camera.moves else {})

    def with_camera(self, camera: CameraPath | str | None) -> "PromptTimeline":
        """The same prompts with a camera; None leaves them as they are. Raises UserError for a second one."""
        path = CameraPath.of(camera)
        if path.moves and self.camera.moves:
            raise UserError(
                "The timeline has camera lines and --camera (in Python `camera`) gives other moves; keep one of them."
            )
        return replace(self, camera=path) if path.moves else self

    def camera_on(self, grid: ChunkGrid) -> PlacedPath:
        """Where the camera is in every chunk, for `rollout`."""
        return self.camera.on(self.grid_with_cuts(grid))

    def changes(self, grid: ChunkGrid, *, num_chunks: int) -> tuple[PromptChange, ...]:
        """The spans that a rollout of `num_chunks` chunks shows, each with its first chunk; the first with chunk 0."""
        return tuple(change for change in self._changes(grid) if change.chunk < num_chunks)

    def grid_with_cuts(self, grid: ChunkGrid) -> ChunkGrid:
        """The grid with this timeline's hard cuts in it."""
        return replace(grid, cuts=tuple(change.chunk for change in self._changes(grid) if _is_new_video(change)))

    def num_chunks(self, grid: ChunkGrid, seconds: float) -> int:
        """How many chunks a video of at least `seconds` takes; at least one."""
        return self.grid_with_cuts(grid).num_chunks(seconds)

    def num_chunks_of(self, grid: ChunkGrid, num_pixel_frames: int) -> int:
        """How many chunks a video of at least `num_pixel_frames` takes; at least one."""
        return max(1, self.grid_with_cuts(grid).chunk_from_pixel(num_pixel_frames))

    def first_pixel_frame(self, chunk: int, grid: ChunkGrid) -> int:
        """Index of a chunk's first pixel frame, which is the number of pixel frames of all chunks before it."""
        return self.grid_with_cuts(grid).first_pixel_frame(chunk)

    def start_seconds(self, chunk: int, grid: ChunkGrid) -> float:
        """Time of a chunk's first pixel frame, which is the length of the video of the chunks before it."""
        return self.grid_with_cuts(grid).start_seconds(chunk)

    def problems(self, grid: ChunkGrid, *, num_chunks: int) -> tuple[str, ...]:
        """One line for every span that a rollout of `num_chunks` chunks does not show, with what to do about it.

        So too for every move of the camera that it does not make as it is asked for.
        """
        changes = self._changes(grid)
        shown = {change.span: change.chunk for change in changes}
        end, last = self.start_seconds(num_chunks, grid), self.start_seconds(num_chunks - 1, grid)
        found = []
        for span in self.spans:
            name = f"The prompt {_short(span.prompt)!r} at {span.start_seconds:g} s is not shown"
            if span not in shown:
                apart = grid.chunk_frames * grid.temporal_stride / grid.fps
                found.append(
                    f"{name}: the next prompt starts with the same chunk; leave at least {apart:g} s between two."
                )
            elif shown[span] >= num_chunks:
                found.append(
                    f"{name}: the video of {end:g} s has its last chunk at {last:g} s; make the video longer or start "
                    "the prompt earlier."
                )
        return (*found, *self.camera.problems(self.grid_with_cuts(grid), num_chunks=num_chunks))

    def _changes(self, grid: ChunkGrid) -> list[PromptChange]:
        """Every span with its first chunk; of several with the same chunk the last. A hard cut moves later chunks.

        Frames that the video begins with are remembered under its first prompt: a span that would start within them
        starts with the first chunk that is made.
        """
        found: list[PromptChange] = []
        pixels_lost = 0
        for span in self.spans:
            chunk = grid.chunk_from(span.start_seconds + pixels_lost / grid.fps)
            if chunk > 0:
                chunk = max(chunk, grid.num_given_chunks)
            if found and found[-1].chunk == chunk:
                pixels_lost -= _is_new_video(found.pop()) * grid.lost_at_cut
            found.append(PromptChange(chunk, span))
            pixels_lost += _is_new_video(found[-1]) * grid.lost_at_cut
        return found


_Entry = PromptSpan | CameraMove
_Read = Iterator[tuple[str, Callable[[], _Entry]]]  # where it stands, and what reads it


def _timeline_of(entries: _Read, path: Path) -> PromptTimeline:
    """The timeline of a file's entries, each of which is read, and compared with the one before, where it stands."""
    spans: list[PromptSpan] = []
    moves: list[CameraMove] = []
    for place, read in entries:
        try:
            entry = read()
            if isinstance(entry, PromptSpan):
                _check_order(entry, spans[-1] if spans else None)
                spans.append(entry)
            else:
                check_follows(entry, moves[-1] if moves else None)
                moves.append(entry)
        except UserError as error:
            raise UserError(f"{path}, {place}: {error}") from error
    if not spans:
        raise UserError(f"The timeline {path} has no prompts; write lines such as `0:00 a red ball on a table`.")
    return PromptTimeline(tuple(spans), CameraPath(tuple(moves)))


def _entries_of_text(path: Path, text: str) -> _Read:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip() and not line.lstrip().startswith("#"):
            yield f"line {number}", partial(_entry_of_line, line)


def _entry_of_line(line: str) -> _Entry:
    fields = [field.strip() for field in line.split("|", 2)]
    is_barred = len(fields) == 3 and " " not in fields[0] and "\t" not in fields[0]
    if len(fields) == 3 and fields[1] == "camera" and (is_barred or _TIMES.fullmatch(fields[0])):
        return CameraMove.of_words(*span_seconds(fields[0]), fields[2])
    if is_barred:
        time, cut, prompt = fields
    else:
        time, _, prompt = line.strip().replace("\t", " ").partition(" ")
        cut = "soft"
        if prompt.lstrip().startswith("|"):
            raise UserError(
                "between a time and its prompt stands nothing or the cut: `1:05 | hard | a street`; moves of the "
                "camera are written `0:02-0:02.75 | camera | right 1`."
            )
    return PromptSpan(seconds_of(time), prompt.strip(), cast(Cut, cut))  # which the class checks


def _entries_of_json(path: Path, text: str) -> _Read:
    try:
        entries = json.loads(text)
    except (ValueError, RecursionError) as error:  # the second of lists in lists in lists
        line = f", line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise UserError(f"{path}{line}: this is not JSON ({error}).") from error
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{path} must hold a list of objects with `start_seconds` and `prompt`, got {text[:40]!r}.")
    for number, entry in enumerate(entries, start=1):
        is_move = isinstance(entry, dict) and "camera" in entry
        yield f"entry {number}", partial(_move_of_entry if is_move else _span_of_entry, entry)


def _move_of_entry(entry: Mapping[str, Any]) -> CameraMove:
    if set(entry) != {"start_seconds", "end_seconds", "camera"}:
        raise UserError(
            f"a camera move is an object with `start_seconds`, `end_seconds` and `camera`, got {str(entry)[:80]}."
        )
    start, end = (_number_of(entry[name]) for name in ("start_seconds", "end_seconds"))
    return CameraMove.of_words(start, end, entry["camera"])


def _span_of_entry(entry: Any) -> PromptSpan:
    fields = ("start_seconds", "prompt", "cut")
    if not isinstance(entry, dict) or not {"start_seconds", "prompt"} <= set(entry) <= set(fields):
        raise UserError(f"a span is an object with `start_seconds`, `prompt` and perhaps `cut`, got {str(entry)[:80]}.")
    return PromptSpan(**{**entry, "start_seconds": _number_of(entry["start_seconds"])})


def _number_of(time: Any) -> Any:
    """A time as seconds where it is a text; the classes check what is none."""
    return seconds_of(time) if isinstance(time, str) else time


def _check_order(span: PromptSpan, before: PromptSpan | None) -> None:
    if before is None and span.start_seconds != 0:
        raise UserError(f"the first prompt must start at 0, got {span.start_seconds:g} s.")
    if before is not None and span.start_seconds <= before.start_seconds:
        raise UserError(
            f"a prompt must start after the one before it, got {span.start_seconds:g} s after "
            f"{before.start_seconds:g} s."
        )


def _is_new_video(change: PromptChange) -> bool:
    return change.span.cut == "hard" and change.chunk > 0


def _short(text: str) -> str:
    return text if len(text) <= 40 else text[:37] + "..."
