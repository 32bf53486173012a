"""What trips are drawn from: the camera's way, attributes before and after a change, landmarks, the subject's path."""

import functools
import random
from collections.abc import Sequence
from dataclasses import dataclass

from vidaccel.world.scene import (
    ACCENTS,
    COMBINATIONS,
    FRAME_SIZE,
    LOOP_RADIUS,
    Landmark,
    Move,
    Split,
    Subject,
)
from vidaccel.world.sprites import LANDMARK_KINDS
from vidaccel.world.trip import CHUNK_FRAMES, NUM_STOPS, TripSpan, frame_of

CHANGES = ("colour", "shape", "motion", "background", "landmark")
Combination = tuple[str, str, str, str]

_LANDMARK_RANGE = (36.0, 92.0)
_LANDMARK_APART = (84.0, 94.0)
_SUBJECT_APART = (22.0, 28.0)
_SUBJECT_RANGE = (14.0, 114.0)
_SUBJECT_ROOM = _SUBJECT_RANGE[1] - _SUBJECT_RANGE[0]
_WALK_SPEED = (0.3, 0.5)  # pixels a frame
_NAMED_LANDMARK_SHARE = 0.35
_UNNAMED_PLACE_SHARE = 0.08
_NAMED_ANEW_SHARE = 0.25  # of later spans: otherwise the prompt goes on naming what it named


@dataclass(frozen=True, kw_only=True)
class TripPlan:
    """What is settled before anything is drawn.

    start_chunks: of every span, the first one 0.
    changes: which of `CHANGES` differ from the span before; empty for the first span.
    apart: landmark and subject stand well apart at the subject's stop; otherwise one may cover the other.
    """

    num_chunks: int
    split: Split
    subject_stop: int
    apart: bool
    start_chunks: tuple[int, ...] = (0,)
    changes: tuple[frozenset[str], ...] = (frozenset(),)


def camera_way(*rests: tuple[float, int], pan_chunks: int | Sequence[int]) -> tuple[Move, ...]:
    """Holds at `rests` (left edge, chunks) with pans between them; `pan_chunks`: of all pans, or of each."""
    pans = [pan_chunks] * (len(rests) - 1) if isinstance(pan_chunks, int) else pan_chunks
    moves, chunk = [], 0
    for index, (x, chunks) in enumerate(rests):
        if index:
            before = rests[index - 1][0]
            kind = "pan right" if x > before else "pan left"
            moves.append(_move(chunk, pans[index - 1], kind, before, x - before))
            chunk += pans[index - 1]
        moves.append(_move(chunk, chunks, "hold", x, 0.0))
        chunk += chunks
    return tuple(moves)


def draw_spans(draw: random.Random, plan: TripPlan) -> tuple[TripSpan, ...]:
    """Every span with what its caption names; what has just changed is always named."""
    landmarks = _landmarks(draw, plan)
    names_landmark = names_place = False
    spans: list[TripSpan] = []
    for combination, changed, chunk in zip(_combinations(draw, plan), plan.changes, plan.start_chunks, strict=True):
        if "landmark" in changed:
            landmarks = _with_other_kind(draw, landmarks, plan.subject_stop)
        colour, shape, motion, background = combination
        if not spans or draw.random() < _NAMED_ANEW_SHARE:
            names_landmark = draw.random() < _NAMED_LANDMARK_SHARE
            names_place = draw.random() >= _UNNAMED_PLACE_SHARE
        names_landmark = names_landmark or "landmark" in changed
        names_place = names_place or "background" in changed
        spans.append(
            TripSpan(
                start_chunk=chunk,
                subject=Subject(colour=colour, shape=shape, motion=motion),
                background=background,
                landmarks=landmarks,
                names_landmark=names_landmark,
                names_place=names_place,
            )
        )
    return tuple(spans)


def draw_subject_moves(draw: random.Random, plan: TripPlan, *, motions: Sequence[str]) -> tuple[Move, ...]:
    """The subject's path inside its home screen, by the motion of every span; equal motions run on."""
    legs = _legs(plan, motions)
    distances = [_walk(draw, motion) * chunks for motion, _, chunks in legs]
    offsets = [sum(distances[:index]) for index in range(len(distances) + 1)]
    reach = LOOP_RADIUS if "loop" in motions else 0.0
    scale = min(1.0, (_SUBJECT_ROOM - 2 * reach) / max(max(offsets) - min(offsets), 1.0))
    low, high = _SUBJECT_RANGE[0] + reach - scale * min(offsets), _SUBJECT_RANGE[1] - reach - scale * max(offsets)
    start = draw.uniform(low, high)
    if plan.apart and not any(distances):
        start = min(max(draw.uniform(*_SUBJECT_APART), low), high)
    x = FRAME_SIZE * plan.subject_stop + start
    return tuple(
        _move(chunk, chunks, motion, x + scale * offset, scale * distance)
        for (motion, chunk, chunks), offset, distance in zip(legs, offsets, distances, strict=False)
    )


def _combinations(draw: random.Random, plan: TripPlan) -> list[Combination]:
    """Colour, shape, motion and background of every span, all of them of the plan's split.

    Drawn again if no combination of the split may follow, or if the subject would walk further than its home is wide.
    """
    while True:
        spans = [draw.choice(COMBINATIONS[plan.split])]
        for changed in plan.changes[1:]:
            following = _following(plan.split, spans[-1], changed - {"landmark"})
            spans += [draw.choice(following)] if following else []
        if len(spans) == len(plan.changes) and _walks_fit(plan, [motion for _, _, motion, _ in spans]):
            return spans


@functools.cache
def _following(split: Split, before: Combination, changed: frozenset[str]) -> tuple[Combination, ...]:
    """The combinations of a split that differ from one in these attributes and in no other."""
    return tuple(other for other in COMBINATIONS[split] if _differing(before, other) == changed)


def _landmarks(draw: random.Random, plan: TripPlan) -> tuple[Landmark, ...]:
    """One a stop, kind and colour drawn with replacement, so that none can be guessed from another."""
    marks = []
    for stop in range(NUM_STOPS):
        low, high = _LANDMARK_APART if plan.apart and stop == plan.subject_stop else _LANDMARK_RANGE
        x = round(FRAME_SIZE * stop + draw.uniform(low, high), 1)
        marks.append(Landmark(kind=draw.choice(LANDMARK_KINDS), colour=draw.choice(ACCENTS), x=x))
    return tuple(marks)


def _move(chunk: int, chunks: int, kind: str, x: float, distance: float) -> Move:
    return Move(start=frame_of(chunk), num_frames=CHUNK_FRAMES * chunks, kind=kind, x=x, distance=distance)


def _differing(one: Combination, other: Combination) -> set[str]:
    return {name for name, a, b in zip(CHANGES, one, other, strict=False) if a != b}


def _walk(draw: random.Random, motion: str) -> float:
    """Pixels that the subject walks in a chunk."""
    return {"left": -1, "right": 1}.get(motion, 0) * draw.uniform(*_WALK_SPEED) * CHUNK_FRAMES


def _legs(plan: TripPlan, motions: Sequence[str]) -> list[tuple[str, int, int]]:
    """(motion, first chunk, chunks) with equal neighbours merged."""
    kept = [index for index, motion in enumerate(motions) if index == 0 or motion != motions[index - 1]]
    starts = [plan.start_chunks[index] for index in kept] + [plan.num_chunks]
    return [(motions[index], start, end - start) for index, start, end in zip(kept, starts, starts[1:], strict=False)]


def _walks_fit(plan: TripPlan, motions: Sequence[str]) -> bool:
    """Whether every walk can be made at walking speed without leaving the home screen."""
    longest = _SUBJECT_ROOM / (_WALK_SPEED[0] * CHUNK_FRAMES)
    return all(chunks <= longest for motion, _, chunks in _legs(plan, motions) if motion in ("left", "right"))


def _with_other_kind(draw: random.Random, landmarks: tuple[Landmark, ...], stop: int) -> tuple[Landmark, ...]:
    old = landmarks[stop]
    kind = draw.choice([kind for kind in LANDMARK_KINDS if kind != old.kind])
    return (*landmarks[:stop], Landmark(kind=kind, colour=old.colour, x=old.x), *landmarks[stop + 1 :])
