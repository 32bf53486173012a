"""What the recall benchmark measures: its cells, each a kind of trip, a memory, and perhaps a control.

A cell is written as words with slashes between them, the kind first: `return/blank`, `own/window:21`,
`return/away:20/steps:8`, `three/detours:8`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, cast, get_args

from vidaccel.errors import UserError
from vidaccel.memory import MemoryConfig, MemoryPolicy, parse_memory
from vidaccel.rollout.chunk import Student
from vidaccel.rollout.skipping import StepSkipping
from vidaccel.world.trips import TripKind

Kind = Literal["return", "three", "shift", "own"]
Control = Literal["blank", "swap"]
AWAY_CHUNKS = 6
DETOURS = 1
UNIFORM = "uniform"
UNIFORM_INTERVAL = 6  # frames between keyframes: every second chunk of three

_NUMBERS = {"away": "away_chunks", "detours": "detours", "steps": "num_inference_steps"}

CELLS = (
    "return",
    "return/blank",
    "return/swap",
    "return/uniform",
    "return/window:21",
    "return/sink+window:3+6",
    "return/full:45",
    "return/steps:8",
    "return/away:20",
    "return/away:80",
    "three",
    "three/blank",
    "shift",
    "shift/blank",
    "own",
    "own/window:21",
)


@dataclass(frozen=True, kw_only=True)
class RecallCell:
    """One cell.

    kind: of the trips whose prefix is real, or "own": trips as of "return" that the student makes from the beginning.
    memory: as the command line takes it; "uniform" is the student's own with a keyframe in every second chunk; None is
        the student's own.
    control: "blank" leaves out of the memory every frame that shows the place, "swap" shows another landmark there.
    away_chunks: between the two visits. detours: of "three", how often the camera goes to the third place between
        them. num_inference_steps: None for the student's own. skipping: steps left out.
    Raises UserError for values outside these.
    """

    kind: Kind
    memory: str | None = None
    control: Control | None = None
    away_chunks: int = AWAY_CHUNKS
    detours: int = DETOURS
    num_inference_steps: int | None = None
    skipping: StepSkipping | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise UserError(f"A cell begins with {', '.join(get_args(Kind))}; got {self.kind!r}.")
        if self.away_chunks < 1 or (self.num_inference_steps is not None and self.num_inference_steps < 1):
            raise UserError(f"A cell has at least 1 chunk away and 1 step; got {self.name}.")
        if self.detours < 1 or (self.detours != DETOURS and self.kind != "three"):
            raise UserError(f"Only trips to three places have detours, and at least 1; got {self.name}.")
        if self.control and self.kind == "own":
            raise UserError(f"An own video has no prefix that could be a {self.control}; got {self.name}.")
        if self.memory not in (None, UNIFORM):
            _parsed(self.memory, 3)

    @classmethod
    def parse(cls, text: str) -> RecallCell:
        """The cell that is written so. Raises UserError."""
        kind, *words = text.split("/")
        values: dict[str, Any] = {}
        for word in words:
            name, value = _read_word(word, text)
            if name in values:
                raise UserError(f"The cell {text!r} says twice what its {name} is.")
            values[name] = value
        return cls(kind=cast(Kind, kind), **values)

    @property
    def trip_kind(self) -> TripKind:
        """Of the trips."""
        return "return" if self.kind == "own" else self.kind

    @property
    def trips_name(self) -> str:
        """The name of its trips: those of one name are the same."""
        return _joined(self.trip_kind, *self._way)

    @property
    def truth_name(self) -> str:
        """The name of the record of what the world shows on its trips."""
        return _joined(self.trips_name, "swap" if self.control == "swap" else None, "truth")

    @property
    def plain_name(self) -> str:
        """The name of the cell that it is compared with: its kind with nothing else."""
        return self.kind

    @property
    def name(self) -> str:
        """As it is written, in one order."""
        steps = None if self.num_inference_steps is None else f"steps:{self.num_inference_steps}"
        skip = None if self.skipping is None else f"skip:{self.skipping}"
        return _joined(self.kind, self.memory, self.control, *self._way, steps, skip)

    @property
    def _way(self) -> tuple[str | None, str | None]:
        """What is not as usual on the way from visit to visit."""
        away = None if self.away_chunks == AWAY_CHUNKS else f"away:{self.away_chunks}"
        return away, None if self.detours == DETOURS else f"detours:{self.detours}"

    def student(self, pipe: Any) -> Student:
        """The student of a pipeline, sampled as the cell says. Raises UserError for steps that it does not have."""
        return replace(pipe.student(self.num_inference_steps), skipping=self.skipping)

    def memory_of(self, pipe: Any) -> MemoryPolicy:
        """The memory, without what a control takes away. Raises UserError for "uniform" without slow memory."""
        if self.memory != UNIFORM:
            own: MemoryPolicy = pipe.memory_config()
            return own if self.memory is None else _parsed(self.memory, own.chunk_frames)
        own = pipe.memory_config()
        if not isinstance(own, MemoryConfig) or not own.slow_frames:
            raise UserError(f"This student's memory has no keyframes that could be uniform; leave out {self.name}.")
        return replace(own, keyframe_rule="uniform", keyframe_interval=UNIFORM_INTERVAL)


def _joined(*words: str | None) -> str:
    return "/".join(word for word in words if word)


def _read_word(word: str, cell: str) -> tuple[str, Any]:
    """The field of a cell that a word means, and its value."""
    name, _, value = word.partition(":")
    if word in get_args(Control):
        return "control", word
    if name == "skip":
        return "skipping", StepSkipping.parse(value)
    field = _NUMBERS.get(name)
    if field is None:
        return "memory", word
    if not (value.isascii() and value.isdigit()):
        raise UserError(f"{name} must be a whole number, as {name}:8; got {cell!r}.")
    return field, int(value)


def _parsed(memory: str, chunk_frames: int) -> MemoryPolicy:
    try:
        return parse_memory(memory, chunk_frames)
    except ValueError as error:
        raise UserError(
            f"A cell's words are blank, swap, away:20, detours:8, steps:8, skip:3 or a memory. {error}"
        ) from error
