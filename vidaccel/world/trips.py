"""Trips from a seed: for training, for measuring recall, and for measuring changes of the prompt."""

import dataclasses
import math
import random
from collections.abc import Sequence
from typing import Any, Literal

from vidaccel.world.scene import ACCENTS, FRAME_SIZE, Landmark, Move, Split
from vidaccel.world.sprites import LANDMARK_KINDS
from vidaccel.world.trip import NUM_STOPS, ReturnTrip, Trip, rest_of
from vidaccel.world.trip_plan import CHANGES, TripPlan, camera_way, draw_spans, draw_subject_moves

_HOLD_CHUNKS, _HOLD_WEIGHTS = (1, 2, 3, 4, 6, 8), (6, 8, 4, 3, 1, 1)
_LONG_HOLD_CHUNKS = (6, 13)
_BACK_SHARE = 0.6
_SHIFTED_SHARE = 0.4
_MAX_SHIFT = 40
_LONG_PAN = 160.0  # pixels; a longer pan takes two chunks, because one would smear
_IN_VIEW_SHIFT = 9  # beside the stop by this much, the subject is still on the screen
_APART_SHARE = 0.7
_SHIFT = 24.0
_CHANGE_CHUNK, _CHANGE_CHUNKS = 4, 16
_MIN_SPAN_CHUNKS = 3
_CHANGE_WEIGHTS = {"colour": 1, "shape": 1, "motion": 1, "background": 1, "landmark": 5}  # the harder the more often

TripKind = Literal["return", "three", "shift"]


def random_trip(seed: int, *, num_chunks: int = 15, split: Split = "train", change_share: float = 0.4) -> Trip:
    """A trip for training: holds of one to four chunks and now and then more, pans of one or two, most of them back.

    It begins at the subject. In two of five later rests the camera stands up to 40 pixels beside the stop, so that a
    return is at another alignment.
    split: "test" takes combinations that "train" never has, in every span.
    change_share: share of trips in which the prompt changes, mostly once and while the subject is in view.
    Raises ValueError for `num_chunks` under 1, an unknown split or a share outside 0 to 1.
    """
    _check(num_chunks=num_chunks)
    if split not in ("train", "test"):
        raise ValueError(f'`split` must be "train" or "test", got {split!r}.')
    if not 0 <= change_share <= 1:
        raise ValueError(f"`change_share` must be from 0 to 1, got {change_share}.")
    draw = random.Random(f"vidaccel trip {split} {seed}")
    home = draw.randrange(NUM_STOPS)
    has_change = draw.random() < change_share and num_chunks > _MIN_SPAN_CHUNKS
    camera_moves = _wander(draw, num_chunks, home=home, stays=has_change and draw.random() < 0.5)
    change_chunks = _change_chunks(draw, camera_moves, num_chunks=num_chunks, home=home) if has_change else []
    plan = TripPlan(
        num_chunks=num_chunks,
        split=split,
        subject_stop=home,
        apart=draw.random() < _APART_SHARE,
        start_chunks=(0, *change_chunks),
        changes=(frozenset(), *(_changed_attributes(draw) for _ in change_chunks)),
    )
    return Trip(**_contents(draw, plan), seed=seed, camera_moves=camera_moves)


def test_trip(
    seed: int,
    *,
    kind: TripKind = "return",  # noqa: PT028 - it makes trips, it is no test
    pan_chunks: int = 1,  # noqa: PT028
    away_chunks: int = 6,  # noqa: PT028
    detours: int = 1,  # noqa: PT028
) -> ReturnTrip:
    """A trip of held-out attributes that ends where it has been before; the subject is at place A, where it begins.

    kind: "return": place A for 2 chunks, B for 2, A for `away_chunks`, B for 2; "three": A, B, A, C for 2 chunks each,
        then A for `away_chunks` and B for 2, with A between B and C; "shift": as "return", but at last the camera
        rests 24 pixels beside the old place.
    detours: of "three", how often the camera goes to C and back to A; others have none.
    Raises ValueError for an unknown kind or counts under 1.
    """
    if kind not in ("return", "three", "shift"):
        raise ValueError(f'`kind` must be "return", "three" or "shift", got {kind!r}.')
    _check(pan_chunks=pan_chunks, away_chunks=away_chunks, detours=detours)
    if detours != 1 and kind != "three":
        raise ValueError(f'Only trips of the kind "three" have `detours`, got {detours} for {kind!r}.')
    draw = random.Random(f"vidaccel test trip {kind} {seed}")
    a = draw.randrange(1, NUM_STOPS - 1) if kind == "three" else draw.randrange(NUM_STOPS)
    beside = [stop for stop in (a - 1, a + 1) if 0 <= stop < NUM_STOPS]
    b = draw.choice(beside)
    between = [(a, 2), (sum(beside) - b, 2)] * detours if kind == "three" else []
    stops = [(a, 2), (b, 2), *between, (a, away_chunks), (b, 2)]
    shift = draw.choice((-_SHIFT, _SHIFT)) if kind == "shift" else 0.0
    rests = [(float(FRAME_SIZE * stop), chunks) for stop, chunks in stops[:-1]]
    camera_moves = camera_way(*rests, (FRAME_SIZE * b + shift, 2), pan_chunks=pan_chunks)
    num_chunks = sum(chunks for _, chunks in stops) + pan_chunks * (len(stops) - 1)
    plan = TripPlan(num_chunks=num_chunks, split="test", subject_stop=a, apart=True)
    return ReturnTrip(
        **_contents(draw, plan),
        seed=seed,
        camera_moves=camera_moves,
        target_stop=b,
        first_visit=range(2 + pan_chunks, 4 + pan_chunks),
        second_visit=range(num_chunks - 2, num_chunks),
        prefix_chunks=num_chunks - 2 - pan_chunks,
    )


def change_trip(seed: int, attribute: str) -> Trip:
    """The camera holds at the subject's stop for 16 chunks; after 4 of them the prompt changes in one attribute.

    Both prompts are held-out combinations and both name what changes. Raises ValueError for an unknown attribute.
    """
    if attribute not in CHANGES:
        raise ValueError(f"`attribute` must be one of {', '.join(CHANGES)}; got {attribute!r}.")
    draw = random.Random(f"vidaccel change trip {attribute} {seed}")
    home = draw.randrange(NUM_STOPS)
    plan = TripPlan(
        num_chunks=_CHANGE_CHUNKS,
        split="test",
        subject_stop=home,
        apart=True,
        start_chunks=(0, _CHANGE_CHUNK),
        changes=(frozenset(), frozenset({attribute})),
    )
    contents = _contents(draw, plan)
    names = {name: getattr(contents["spans"][-1], name) for name in ("names_landmark", "names_place")}
    contents["spans"] = tuple(dataclasses.replace(span, **names) for span in contents["spans"])
    camera_moves = camera_way((float(FRAME_SIZE * home), _CHANGE_CHUNKS), pan_chunks=1)
    return Trip(**contents, seed=seed, camera_moves=camera_moves)


def swapped(trip: ReturnTrip, seed: int) -> ReturnTrip:
    """The same trip with a landmark of another kind and colour at the stop that is returned to."""
    draw = random.Random(f"vidaccel swapped trip {trip.seed} {seed}")
    old = trip.target
    kind = draw.choice([kind for kind in LANDMARK_KINDS if kind != old.kind])
    colour = draw.choice([colour for colour in ACCENTS if colour != old.colour])
    new = Landmark(kind=kind, colour=colour, x=old.x)
    stop = trip.target_stop
    spans = [
        dataclasses.replace(span, landmarks=(*span.landmarks[:stop], new, *span.landmarks[stop + 1 :]))
        for span in trip.spans
    ]
    return dataclasses.replace(trip, spans=tuple(spans))


def _check(**counts: int) -> None:
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"`{name}` must be at least 1, got {count}.")


def _contents(draw: random.Random, plan: TripPlan) -> dict[str, Any]:
    """All fields of a trip but its seed and the camera's way."""
    spans = draw_spans(draw, plan)
    return {
        "num_chunks": plan.num_chunks,
        "spans": spans,
        "subject_stop": plan.subject_stop,
        "subject_moves": draw_subject_moves(draw, plan, motions=[span.subject.motion for span in spans]),
        "phases": tuple(draw.uniform(0, 2 * math.pi) for _ in range(6)),
    }


def _wander(draw: random.Random, num_chunks: int, *, home: int, stays: bool) -> tuple[Move, ...]:
    """The camera's way over the stops from the subject's; with `stays` it holds there long at first."""
    here = home  # what a prompt asks for is in view when a video begins
    rests = [(float(FRAME_SIZE * home), draw.randint(*_LONG_HOLD_CHUNKS) if stays else _hold(draw))]
    pans: list[int] = []
    seen = {here}
    while sum(chunks for _, chunks in rests) + sum(pans) < num_chunks:
        beside = [stop for stop in (here - 1, here + 1) if 0 <= stop < NUM_STOPS]
        back = [stop for stop in beside if stop in seen]
        here = draw.choice(back if back and draw.random() < _BACK_SHARE else beside)
        seen.add(here)
        rests.append((_rest(draw, here), _hold(draw)))
        is_long = abs(rests[-1][0] - rests[-2][0]) > _LONG_PAN
        pans.append(2 if is_long else draw.choice((1, 1, 2)))
    return camera_way(*rests, pan_chunks=pans)


def _hold(draw: random.Random) -> int:
    return draw.choices(_HOLD_CHUNKS, _HOLD_WEIGHTS)[0]


def _rest(draw: random.Random, stop: int) -> float:
    """Left edge of the camera at a stop, or on a whole pixel beside it."""
    shift = draw.randint(-_MAX_SHIFT, _MAX_SHIFT) if draw.random() < _SHIFTED_SHARE else 0
    return float(FRAME_SIZE * stop + shift)


def _changed_attributes(draw: random.Random) -> frozenset[str]:
    first = draw.choices(CHANGES, [_CHANGE_WEIGHTS[name] for name in CHANGES])[0]
    others = [name for name in CHANGES if name != first]
    return frozenset({first, draw.choice(others)} if draw.random() < 0.1 else {first})


def _change_chunks(draw: random.Random, moves: Sequence[Move], *, num_chunks: int, home: int) -> list[int]:
    """Where the prompt changes: once or, now and then, twice, mostly while the camera rests at the subject's stop."""

    def sees_subject(chunk: int) -> bool:
        rest = rest_of(moves, chunk)
        return rest is not None and abs(rest - FRAME_SIZE * home) < _IN_VIEW_SHIFT

    anywhere = range(1, num_chunks - 1)
    in_view = [chunk for chunk in anywhere if sees_subject(chunk) and sees_subject(chunk + 1)]
    first = draw.choice(in_view if in_view and draw.random() < 0.85 else anywhere)
    later = [chunk for chunk in in_view or anywhere if chunk >= first + _MIN_SPAN_CHUNKS]
    return [first, draw.choice(later)] if later and draw.random() < 0.15 else [first]
