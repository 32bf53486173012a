"""Pixels of trips: a change of the prompt is a cross-fade of two looks over the first chunk of its span.

Shapes as in `render`, which draws every look.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vidaccel.world.render import checked_length, draw_looks, draw_subjects, positions
from vidaccel.world.scene import Landmark, Subject
from vidaccel.world.trip import CHUNK_FRAMES, Trip, frame_of


@dataclass(frozen=True, kw_only=True)
class _SpanLook:
    background: str
    subject: Subject
    landmarks: tuple[Landmark, ...]
    phases: tuple[float, ...]


_Draw = Callable[[Sequence[_SpanLook], Tensor, Tensor], Tensor]


def render_trips(
    trips: Sequence[Trip],
    *,
    start: int = 0,
    num_frames: int | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Frames `start` to `start + num_frames` of every trip; (B, F, 3, H, W) float32 in [0, 1].

    num_frames: None renders up to the end of the shortest trip.
    Raises ValueError if a trip is shorter than that.
    """

    def draw(looks: Sequence[_SpanLook], camera: Tensor, subject_xy: Tensor) -> Tensor:
        return draw_looks(looks, camera, subject_xy, device=device)

    return _drawn(draw, trips, start, num_frames)


def trip_mask(
    trips: Sequence[Trip],
    *,
    start: int = 0,
    num_frames: int | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Share of every pixel that the moving subject covers; (B, F, H, W) float32 in [0, 1]."""

    def draw(looks: Sequence[_SpanLook], camera: Tensor, subject_xy: Tensor) -> Tensor:
        return draw_subjects(looks, subject_xy, device=device)[:, :, 3]

    return _drawn(draw, trips, start, num_frames)


def _drawn(draw: _Draw, trips: Sequence[Trip], start: int, num_frames: int | None) -> Tensor:
    """Everything in its first look, then later looks over it, each only where and when it is seen."""
    num_frames = checked_length(trips, start, num_frames)
    camera, subject_xy = positions(trips, start, num_frames)
    frames = draw([_look(trip, 0) for trip in trips], camera, subject_xy)
    for index in range(1, max(len(trip.spans) for trip in trips)):
        rows = [row for row, trip in enumerate(trips) if len(trip.spans) > index]
        begins = torch.tensor([frame_of(trips[row].spans[index].start_chunk) for row in rows]) - start
        first = max(int(begins.min()), 0)
        if first >= num_frames:
            continue
        looks = [_look(trips[row], index) for row in rows]
        later = draw(looks, camera[rows, first:], subject_xy[rows, first:])
        share = _faded(torch.arange(first, num_frames) - begins[:, None]).to(later.device)
        share = share.reshape(*share.shape, *(1,) * (later.ndim - 2))
        frames[rows, first:] = frames[rows, first:] * (1 - share) + later * share
    return frames


def _look(trip: Trip, index: int) -> _SpanLook:
    span = trip.spans[index]
    return _SpanLook(background=span.background, subject=span.subject, landmarks=span.landmarks, phases=trip.phases)


def _faded(elapsed: Tensor) -> Tensor:
    """How much of a new look is there, by frames since its span began: 0 before, 1 from the next chunk on."""
    return ((elapsed + 0.5) / CHUNK_FRAMES).clamp(0, 1).where(elapsed >= 0, torch.zeros(()))
