"""Which chunks of a clip are worth training on: returns, arrivals and changes, found from where the camera was.

A chunk shows something new where it shows columns of the canvas that the chunk before did not. What is new to it may
have been seen long ago, then only older memory has it, or never.
"""

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor

from vidaccel.world import FRAME_SIZE, Scene
from vidaccel.world.trip import Trip, latent_cameras

Rows = tuple[tuple[int, int], ...]
_BIN = 16  # pixels
_LEAST_BINS = 2
_CHANGED_CHUNKS = 4
_FIRST_TIMES = 5
_BESIDE = 32  # pixels from a stop where the camera still rests at it
_STILL = 0.5  # pixels a chunk


class RowTables(NamedTuple):
    """Chunks of clips, as pairs of a clip and a chunk.

    returns: the camera comes back to what older frames show and the chunk before does not.
    arrivals: it comes to what no frame shows, or has just come there and holds.
    changes: the first chunks after a change of the prompt, at the subject's stop; the very first one five times, since
        it alone remembers nothing that shows the new prompt.
    keyframes: of every clip the chunks in which the camera starts or stops or the prompt changes.
    """

    returns: Rows
    arrivals: Rows
    changes: Rows
    keyframes: tuple[tuple[int, ...], ...]


def clip_cameras(clip: Trip | Scene) -> tuple[list[float], list[float]]:
    """Where the camera stands in every latent frame, and how far it came; in pixels. Scenes have the same camera."""
    return latent_cameras(cast(Trip, clip))


def row_tables(clips: Sequence[Trip | Scene], *, chunk_frames: int) -> RowTables:
    """The tables of `clips`, which all have the same number of whole chunks."""
    columns = torch.tensor([clip_cameras(clip)[0] for clip in clips], dtype=torch.float32)
    starts = [_span_starts(clip) for clip in clips]
    in_chunks = columns.unflatten(1, (-1, chunk_frames))
    moves = in_chunks.amax(2) - in_chunks.amin(2) > _STILL
    returns, arrivals = _new_columns(columns, starts, chunk_frames=chunk_frames)
    arrivals[:, 1:] |= arrivals[:, :-1] & ~moves[:, 1:]
    return RowTables(
        returns=_pairs(returns),
        arrivals=_pairs(arrivals),
        changes=tuple(
            (row, chunk)
            for row, clip in enumerate(clips)
            for chunk in range(moves.shape[1])
            if _has_just_changed(clip, starts[row], chunk)
            for _ in range(_FIRST_TIMES if chunk in starts[row] else 1)
        ),
        keyframes=tuple(_keyframes(row, starts[index]) for index, row in enumerate(moves.tolist())),
    )


def _span_starts(clip: Trip | Scene) -> tuple[int, ...]:
    """First chunks of the prompts after the first one."""
    return tuple(span.start_chunk for span in clip.spans[1:]) if isinstance(clip, Trip) else ()


def _has_just_changed(clip: Trip | Scene, starts: tuple[int, ...], chunk: int) -> bool:
    rest = clip.holds(chunk) if isinstance(clip, Trip) else None
    if not isinstance(clip, Trip) or rest is None or abs(rest - FRAME_SIZE * clip.subject_stop) > _BESIDE:
        return False
    return any(start <= chunk < start + _CHANGED_CHUNKS for start in starts)


def _keyframes(moves: Sequence[bool], starts: tuple[int, ...]) -> tuple[int, ...]:
    changed = [chunk for chunk in range(1, len(moves)) if moves[chunk] != moves[chunk - 1]]
    return tuple(sorted({*changed, *starts}))


def _new_columns(columns: Tensor, starts: Sequence[tuple[int, ...]], *, chunk_frames: int) -> tuple[Tensor, Tensor]:
    """Whether chunks show enough that is new to them and was seen before, and that never was; both (N, chunks).

    Frames of an earlier prompt count as seen, but what they show cannot be copied from them.
    """
    low, high = float(columns.min()), float(columns.max())
    edges = torch.arange(low // _BIN * _BIN, high + FRAME_SIZE, _BIN)
    left = columns[..., None]
    shown = ((edges >= left) & (edges + _BIN <= left + FRAME_SIZE)).unflatten(1, (-1, chunk_frames)).any(2)
    num_chunks = shown.shape[1]
    spans = torch.tensor([[sum(start <= chunk for start in row) for chunk in range(num_chunks)] for row in starts])
    returns, arrivals = (torch.zeros(shown.shape[:2], dtype=torch.bool) for _ in range(2))
    arrivals[:, 0] = True
    for chunk in range(1, num_chunks):
        new = shown[:, chunk] & ~shown[:, chunk - 1]
        older = shown[:, : chunk - 1]
        same = (spans[:, : chunk - 1] == spans[:, chunk, None])[..., None]
        returns[:, chunk] = (new & (older & same).any(1)).sum(1) >= _LEAST_BINS
        arrivals[:, chunk] = (new & ~older.any(1)).sum(1) >= _LEAST_BINS
    return returns, arrivals


def _pairs(table: Tensor) -> Rows:
    return tuple((int(row), int(chunk)) for row, chunk in table.nonzero().tolist())
