"""A policy that errs is told so in one line that names it and its method, before anything is attended to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from tests.support.sliding_window import SlidingWindow
from tests.support.tiny_causal import chunks_of, shot, state_of, student
from vidaccel.errors import UserError
from vidaccel.memory import Entry, being_made


@dataclass(frozen=True, kw_only=True)
class Window(SlidingWindow):
    window_frames: int = 9


def fast(kept: Any, current: range) -> tuple[Entry, ...]:
    return (*(Entry(frame, "fast") for frame in kept), *being_made(current))


def _shifted(by: float) -> Callable[..., Any]:
    return lambda self, kept, current: fast([frame + by for frame in kept], current)


def _first_again(self: Any, kept: list[int], frames: range) -> list[int]:
    return [0] if frames.start > 12 else kept[-6:]


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "sizes": (
        {"part_frames": property(lambda self: {"fast": -9})},
        r"`part_frames\['fast'\]` is -9; it must be a whole",
    ),
    "parts": ({"part_frames": property(lambda self: {"tier": 9})}, "must give frames for some of sink, slow, fast"),
    "no_room": ({"part_frames": property(lambda self: {"fast": 2})}, "`total_frames` is 2; it must be .* at least 3"),
    "length": ({"max_frames": "9"}, "`max_frames` is '9'"),
    "settings": ({"to_dict": lambda self: None}, "`to_dict` gives None"),
    "too_many": ({"begin": lambda self, kept, frames: kept}, "`begin` leaves 9 frames beside the 3 of the chunk"),
    "no_keyframe": ({"commit": lambda self, kept, done: [*kept, *done.frames]}, r"`commit` gives \[0, 1, 2\]; it must"),
    "not_bool": ({"commit": lambda self, kept, done: (kept, "yes")}, r"`commit` gives \(\[\], 'yes'\)"),
    "nothing": ({"entries": lambda self, kept, current: None}, "`entries` gives None; it must give a tuple of `Entry`"),
    "numbers": ({"entries": lambda self, kept, current: (*kept, *current)}, r"`entries` gives \(0, 1, 2\)"),
    "no_chunk": ({"entries": lambda self, kept, current: fast(kept, range(0))}, "must end with the chunk being made"),
    "order": ({"entries": lambda self, kept, current: fast(kept, current)[::-1]}, "must end with the chunk being made"),
    "later": ({"entries": _shifted(100)}, "`entries` has frame 100, which was forgotten before or does not exist yet"),
    "before": ({"entries": _shifted(-100)}, "`entries` has frame -100"),
    "halves": ({"entries": _shifted(0.5)}, "`entries` has frame 0.5"),
    "retrieval": ({"retrieval": "view"}, "`retrieval` is 'view'; it must be a `Retrieval`, or None"),
    "forgotten": ({"begin": _first_again}, "`entries` has frame 0, which was forgotten before"),
    "twice": ({"entries": lambda self, kept, current: fast([*kept[:1], *kept], current)}, "has a frame twice"),
    "few_places": ({"positions": lambda self, kept, current: (0,)}, r"`positions` gives \(0,\); it must give 3 whole"),
    "far_places": (
        {"positions": lambda self, kept, current: tuple(range(10**6, 10**6 + len(kept) + len(current)))},
        r"`positions` gives \(1000000, 1000001, 1000002\); it must give 3 whole numbers from 0 to 8",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_policy_whose_answers_cannot_be_is_refused_by_name(name: str) -> None:
    members, message = WRONG[name]
    policy = type("Odd", (Window,), members)()
    made = student(num_inference_steps=1)
    with pytest.raises(UserError, match=f"The memory policy Odd cannot be used: its .*{message}"):
        chunks_of(made, state_of(made, policy), 7, [shot("a"), shot("b", start=5)])


@pytest.mark.parametrize("memory", [3, {"sink_frames": 3}, SlidingWindow], ids=str)
def test_what_is_no_policy_is_refused(memory: Any) -> None:
    with pytest.raises(UserError, match=r"must be a text such as slow-fast:3.*, or a MemoryPolicy"):
        state_of(student(), memory)
