"""Where the keys and values of remembered frames lie: buffers that never move or grow, so that passes can be captured.

Policies decide which frames stay, this follows. The remembered frames lie in front, in any order, because attention
does not mind the order of keys, and the chunk being made behind them. A frame keeps its place unless it lies behind the
gap that forgotten frames left; then it is copied forward. Once per chunk keys are rotated anew: of the frames whose
position changed, of those that were copied, and always of the chunk finished last, which its layers rotated. Inside the
layers nothing is decided and nothing waits for the host. An example with 3+3+6 frames in which 9 is a keyframe, place
by place:

    while 12 13 14 are made    0 1 2 9 10 11 | 12 13 14        the chunk has places 6 to 8
    15 16 17 begin             0 1 2 9 13 14 12 | 15 16 17     10 and 11 are forgotten, so 7 frames take places 0 to 6:
                                                               12 lies there already, 13 and 14 are copied to 4 and 5
    positions                  0 1 2 3 5  6  4  | 7  8  9      only 12 13 14 are rotated anew

Of students that are told of a camera every frame also has the column at which its own camera stood, for as long as it
is remembered: its keys are rotated for both.
Layers may share what is remembered (`DepthMap`): then there are buffers of the kept layers only, and a layer that reads
another one's writes the chunk's rotated keys and values over that layer's, which are put back before they are needed.
Shapes: buffers (kept layers, B, frames * tokens_per_frame, heads, D).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vidaccel.errors import UserError
from vidaccel.memory.camera import Camera
from vidaccel.memory.depth import DepthMap
from vidaccel.memory.rotary import RotaryTable, rotate_frames
from vidaccel.memory.shared_depth import SharedDepth
from vidaccel.memory.transfer import sent

FrameKey = tuple[int, int | str | None]  # which frame, and which copy of it: the pass that it was taken from, or None
_HELD = (0.0, 0.0)  # column and motion of a camera that holds


@dataclass(frozen=True, kw_only=True)
class MemoryShape:
    """Sizes of the buffers, which follow from a transformer's config and the size of the latents.

    has_camera: whether the transformer is told of a camera. num_columns: tokens in a row of a frame.
    """

    num_layers: int
    batch_size: int
    tokens_per_frame: int
    num_heads: int
    head_dim: int
    has_camera: bool = False
    num_columns: int = 1


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What one sample attends to.

    kept: the position of each remembered frame. chunk: the position of each frame of the chunk being made.
    """

    kept: dict[FrameKey, int]
    chunk: dict[int, int]


class FrameBuffers:
    """Keys before rotation, rotated keys and values of `num_frames` frames, and which frame lies where.

    raw, keys, values: the buffers. slots: for every sample the frame at each place, None for a free one. current: the
    places of the chunk being made. mask: which keys count, (B, 1, 1, S) bool, None while all do.
    """

    def __init__(
        self,
        shape: MemoryShape,
        table: RotaryTable,
        *,
        num_frames: int,
        chunk_frames: int,
        depth: DepthMap,
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> None:
        """Reserve the bytes. Raises ValueError for more frames than `table` has positions, and as `SharedDepth`."""
        if num_frames > table.num_positions:
            raise ValueError(
                f"The memory holds {num_frames} frames and the transformer has {table.num_positions} positions "
                "(`rope_max_seq_len`); choose a smaller memory."
            )
        self.shape, self.num_frames = shape, num_frames
        tokens = num_frames * shape.tokens_per_frame
        size = (len(depth.kept), shape.batch_size, tokens, shape.num_heads, shape.head_dim)
        self.raw, self.keys, self.values = (torch.zeros(size, device=device, dtype=dtype) for _ in range(3))
        self._depth = SharedDepth(depth, like=self.raw[:, :, : chunk_frames * shape.tokens_per_frame])
        self._table = table.to(device)
        head = (shape.batch_size, chunk_frames * shape.tokens_per_frame, 1, shape.head_dim)
        self._rotary = torch.zeros(2, *head, device=device)
        self._motions = torch.zeros(shape.batch_size, chunk_frames, device=device) if shape.has_camera else None
        self._rotate_frames: Callable[..., None] = rotate_frames
        self.clear()

    def compile(self) -> None:
        """Compile the rotation of remembered keys, a tenth of the traffic; takes seconds in the second chunk."""
        rotate = torch.compile(rotate_frames)

        def rotate_any_number(*sides_and_frames: Tensor) -> None:
            for tensor in sides_and_frames[2:]:
                torch._dynamo.maybe_mark_dynamic(tensor, 0)
            rotate(*sides_and_frames)

        self._rotate_frames = rotate_any_number

    def clear(self) -> None:
        """All places are free; the buffers stay as they are."""
        # Of every frame that is remembered or being made: column and motion of its camera.
        self._cameras: list[dict[int, tuple[float, float]]] = [{} for _ in range(self.shape.batch_size)]
        self._free_places()

    def _free_places(self) -> None:
        self.slots: list[list[FrameKey | None]] = [[None] * self.num_frames for _ in range(self.shape.batch_size)]
        self._positions: list[dict[FrameKey, int]] = [{} for _ in range(self.shape.batch_size)]  # of the rotated keys
        self.current = range(0)
        self.mask: Tensor | None = None

    # What is read

    @property
    def rotary(self) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the chunk's tokens, two tensors (B, L, 1, D)."""
        tokens = len(self.current) * self.shape.tokens_per_frame
        return self._rotary[0, :, :tokens], self._rotary[1, :, :tokens]

    @property
    def motions(self) -> Tensor | None:
        """How the camera moves in the chunk's latent frames, (B, F) in patch columns; None without `has_camera`."""
        return None if self._motions is None else self._motions[:, : len(self.current)]

    def view(self, block_index: int) -> tuple[Tensor, Tensor, Tensor]:
        """Of one block: the chunk's keys before rotation, all attended keys, all attended values.

        To be asked for in the order of the blocks, each when the one before has written.
        """
        row, tokens = self._depth.rows[block_index], self._tokens_of_chunk
        keys, values = self.keys[row, :, : tokens.stop], self.values[row, :, : tokens.stop]
        spare = self._depth.begin(block_index, keys[:, tokens], values[:, tokens])
        return self.raw[row, :, tokens] if spare is None else spare, keys, values

    @property
    def _tokens_of_chunk(self) -> slice:
        """Where the tokens of the chunk being made lie."""
        return slice(*(place * self.shape.tokens_per_frame for place in (self.current.start, self.current.stop)))

    @property
    def frame_bytes(self) -> int:
        """Bytes that one frame of one sample takes in all layers that are kept."""
        return 3 * self.raw[:, :1, : self.shape.tokens_per_frame].nbytes

    @property
    def nbytes(self) -> int:
        """Bytes reserved."""
        motions = 0 if self._motions is None else self._motions.nbytes
        return 3 * self.raw.nbytes + self._depth.nbytes + self._rotary.nbytes + motions

    def mean_keys(self) -> Tensor:
        """Mean keys of the chunk being made, (kept layers, B, heads * D)."""
        return self.raw[:, :, self._tokens_of_chunk].mean(2, dtype=torch.float32).flatten(2)

    def mean_keys_of(self, sample: int, frames: range) -> Tensor | None:
        """Mean keys of those of `frames` that are remembered, (kept layers, heads * D); None where none is."""
        places = [place for place, slot in enumerate(self.slots[sample]) if slot and slot[0] in frames]
        if not places:
            return None
        rows = sent(torch.tensor(places), self.raw.device)
        kept: Tensor = self.raw[:, sample].unflatten(1, (-1, self.shape.tokens_per_frame))
        return kept[:, rows].mean((1, 2), dtype=torch.float32).flatten(1)

    # How the buffers follow

    def set_camera(self, chunks: Sequence[Sequence[int]], camera: Camera | None) -> None:
        """Where the camera of the chunk being made stands, for every sample its frames; None: it holds at 0."""
        if self._motions is None:
            return
        points = [[_HELD] * len(frames) for frames in chunks]
        if camera is not None:
            sides = (side.tolist() for side in camera)
            points = [list(zip(*rows, strict=True)) for rows in zip(*sides, strict=True)]
        for cameras, frames, row in zip(self._cameras, chunks, points, strict=True):
            cameras.update(zip(frames, row, strict=True))

    def cameras_of(self, sample: int, frames: Sequence[int]) -> list[tuple[float, float]]:
        """Column and motion of the camera of remembered frames of a sample, and of those being made."""
        return [self._cameras[sample].get(frame, _HELD) for frame in frames]

    def arrange(self, layouts: Sequence[Layout]) -> None:
        """Lay the buffers out for a pass over the current chunk: remembered frames in front, the chunk behind them."""
        start = self._close_up(layouts)
        self.current = range(start, start + len(layouts[0].chunk))
        for sample, layout in enumerate(layouts):
            self._rotate_changed(sample, layout.kept)
        self._set_rotary([list(layout.chunk.items()) for layout in layouts])
        self._set_mask(self.current.start)

    def _close_up(self, layouts: Sequence[Layout]) -> int:
        """Let the remembered frames of all samples take the first places; returns how many these are."""
        self._put_back()  # what is remembered next, or copied, is what the kept layers wrote
        start = max(len(layout.kept) for layout in layouts)
        for sample, layout in enumerate(layouts):  # an interrupt between the lines leaves tables that are true
            slots, moves = self._moves(sample, layout, start)
            self._copy_frames(sample, moves)
            self.slots[sample] = slots
        return start

    def missing(self, layouts: Sequence[Layout]) -> list[list[FrameKey]]:
        """For every sample the frames to be attended to that have no keys here."""
        missing = []
        for layout, slots in zip(layouts, self.slots, strict=True):
            known = {*slots, *((frame, None) for frame in layout.chunk)}
            missing.append([key for key in layout.kept if key not in known and (key[0], None) not in known])
        return missing

    def write_missing(
        self,
        missing: Sequence[Sequence[FrameKey]],
        layouts: Sequence[Layout],
        cameras: Sequence[Mapping[int, tuple[float, float]]],
        *,
        group_frames: int,
    ) -> Iterator[list[list[FrameKey]]]:
        """Write what is `missing`; yields groups of `group_frames` or fewer, to be passed as if they were made.

        In samples with fewer of them a frame of another one is passed in place of none; it is not written.
        cameras: column and motion of every frame that is missing.
        """
        for known, found in zip(self._cameras, cameras, strict=True):
            known.update(found)
        for start in range(0, max(map(len, missing)), group_frames):
            groups = [list(row[start : start + group_frames]) for row in missing]
            rows = zip(layouts, self.slots, strict=True)
            here = [{key: at for key, at in layout.kept.items() if key in slots} for layout, slots in rows]
            first = self._close_up([Layout(kept=kept, chunk={}) for kept in here])
            size = max(map(len, groups))
            self.current = range(first, first + size)
            for sample, kept in enumerate(here):
                self._rotate_changed(sample, kept)
            spare = next(group[0] for group in groups if group)
            padded = [[*group, *[spare] * (size - len(group))] for group in groups]
            samples = zip(padded, layouts, strict=True)
            self._set_rotary([[(key[0], layout.kept.get(key, 0)) for key in group] for group, layout in samples])
            self._set_mask(self.current.start)
            yield padded
            self._put_back()
            for slots, group in zip(self.slots, groups, strict=True):
                slots[first : first + len(group)] = group
        self.current = range(0)

    def keep(self, chunks: Sequence[Sequence[int]]) -> None:
        """The chunk being made lies where it was written, and is remembered: for every sample its frames."""
        self._put_back()
        for slots, frames in zip(self.slots, chunks, strict=True):
            for place, frame in zip(self.current, frames, strict=True):
                slots[place] = (frame, None)
        for slots, cameras in zip(self.slots, self._cameras, strict=True):
            for frame in cameras.keys() - {slot[0] for slot in slots if slot}:
                del cameras[frame]
        self.current = range(0)

    def write_anew(self, kept: Sequence[dict[FrameKey, int]], group_frames: int) -> Iterator[list[list[FrameKey]]]:
        """Give every frame a place in the order of `kept`; yields groups in turn, to be passed as if they were made."""
        rows = [list(positions) for positions in kept]
        self._free_places()
        longest = max(len(row) for row in rows)
        for start in range(0, longest, group_frames):
            self.current = range(start, min(start + group_frames, longest))
            for slots, row in zip(self.slots, rows, strict=True):
                slots[start : self.current.stop] = (row + [None] * longest)[start : self.current.stop]
            padded = [[*row, *[row[-1]] * (longest - len(row))][start : self.current.stop] for row in rows]
            samples = zip(padded, kept, strict=True)
            self._set_rotary([[(slot[0], positions[slot]) for slot in group] for group, positions in samples])
            self._set_mask(self.current.stop)
            yield padded
            self._put_back()

    def _put_back(self) -> None:
        """Let the chunk's places hold what the kept layers wrote there, not what layers that share them wrote after."""
        tokens = self._tokens_of_chunk
        self._depth.put_back(self.keys[:, :, tokens], self.values[:, :, tokens])

    def _moves(self, sample: int, layout: Layout, stop: int) -> tuple[list[FrameKey | None], list[tuple[int, int]]]:
        """The table of slots in which what is kept lies before `stop`, and which frames to copy where for it."""
        before = {slot: place for place, slot in enumerate(self.slots[sample]) if slot is not None}
        current = dict(zip(layout.chunk, self.current, strict=False))
        slots = [slot if slot in layout.kept else None for slot in self.slots[sample]]
        misplaced = [slot for slot in layout.kept if not before.get(slot, stop) < stop]
        free = [place for place in range(stop) if slots[place] is None]
        moves = []
        for slot, place in zip(misplaced, free, strict=False):
            source = before.get(slot, before.get((slot[0], None)))  # a new copy is taken from the frame itself
            source = current[slot[0]] if source is None else source
            moves.append((source, place))
            if slot in before:
                slots[before[slot]] = None
            slots[place] = slot
            self._positions[sample].pop(slot, None)
        return slots, moves

    def _copy_frames(self, sample: int, moves: Sequence[tuple[int, int]]) -> None:
        """Copy frames to free places; no place is the source of another move."""
        for buffer in (self.raw, self.values):
            frames = buffer[:, sample].unflatten(1, (-1, self.shape.tokens_per_frame))
            for source, place in moves:
                frames[:, place].copy_(frames[:, source])

    def _rotate_changed(self, sample: int, positions: Mapping[FrameKey, int]) -> None:
        """Rotate the keys of frames at another position than they were last rotated for here.

        Those that moved, those that were copied, and always the chunk finished last, which its layers rotated.
        """
        known = self._positions[sample]
        changed = [frame for frame, position in positions.items() if known.get(frame) != position]
        self._positions[sample] = {frame: at for frame, at in positions.items() if frame not in changed}
        if not changed:
            return
        places = [self.slots[sample].index(frame) for frame in changed]
        rows, rotations = (
            sent(torch.tensor(values), self.raw.device) for values in (places, [positions[frame] for frame in changed])
        )
        columns, _ = self._camera_of([[frame for frame, _ in changed]], first_sample=sample)
        turns = self._table.at(rotations, None if columns is None else columns[0])
        cosines, sines = (part.unflatten(0, (len(changed), -1)) for part in turns)
        for raw, keys in zip(self.raw[:, sample], self.keys[:, sample], strict=True):
            sides = (side.unflatten(0, (-1, self.shape.tokens_per_frame)) for side in (raw, keys))
            self._rotate_frames(*sides, rows, cosines, sines)
        self._positions[sample] = dict(positions)

    def _set_rotary(self, chunks: Sequence[Sequence[tuple[int, int]]]) -> None:
        """Positions and camera of the chunk being made: for every sample frames, each with its position."""
        values = sent(torch.tensor([[position for _, position in chunk] for chunk in chunks]), self.raw.device)
        columns, motions = self._camera_of([[frame for frame, _ in chunk] for chunk in chunks])
        tokens = values.shape[1] * self.shape.tokens_per_frame
        for part, buffer in zip(self._table.at(values, columns), self._rotary, strict=True):
            buffer[:, :tokens].copy_(part)
        if self._motions is not None and motions is not None:
            self._motions[:, : motions.shape[1]].copy_(motions)

    def _camera_of(self, chunks: Sequence[Sequence[int]], first_sample: int = 0) -> tuple[Tensor | None, Tensor | None]:
        """Columns and motions (samples, frames) of the frames of samples from `first_sample` on, on the device."""
        if self._motions is None:
            return None, None
        known = self._cameras[first_sample:]
        points = [[cameras.get(frame, _HELD) for frame in row] for cameras, row in zip(known, chunks, strict=False)]
        columns, motions = sent(torch.tensor(points, dtype=torch.float32), self.raw.device).unbind(-1)
        return columns, motions

    def _set_mask(self, first_counted: int) -> None:
        """Tell apart the places in use of every sample, where they differ; from `first_counted` on all are."""
        stop = self.current.stop
        rows = [enumerate(row[:stop]) for row in self.slots]
        used = [[slot is not None or place >= first_counted for place, slot in row] for row in rows]
        self.mask = None
        if not all(map(all, used)):
            frames = sent(torch.tensor(used), self.raw.device)
            self.mask = frames.repeat_interleave(self.shape.tokens_per_frame, dim=1)[:, None, None]

    # Saving

    def save_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Keys before rotation and values of the places in use, as views; and as JSON values what lies where.

        With a camera also its column and motion for every frame that is remembered.
        """
        used = max(place + 1 if slot else 0 for row in self.slots for place, slot in enumerate(row))
        tokens = used * self.shape.tokens_per_frame
        slots = [[None if slot is None else list(slot) for slot in row] for row in self.slots]
        values: dict[str, Any] = {"slots": slots}
        if self.shape.has_camera:
            values["cameras"] = [[[frame, *at] for frame, at in cameras.items()] for cameras in self._cameras]
        return {"keys": self.raw[:, :, :tokens], "values": self.values[:, :, :tokens]}, values

    def load_state(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Take over what `save_state` gave; without a camera in it, one that holds at 0.

        Raises UserError, and changes nothing, if it is of another shape.
        """
        keys, slots = tensors["keys"], values["slots"]
        if "cameras" in values and not self.shape.has_camera:
            raise UserError("The saved memory has a camera, of which this student is not told; take the one it is of.")
        wanted = (*self.raw.shape[:2], keys.shape[2] if keys.ndim == 5 else -1, *self.raw.shape[3:])
        fits = keys.shape == tensors["values"].shape == wanted and keys.shape[2] <= self.raw.shape[2]
        if not fits or keys.dtype != self.raw.dtype or len(slots) != self.shape.batch_size:
            raise UserError(
                f"The saved memory has keys {tuple(keys.shape)} {keys.dtype}, and this rollout needs {wanted} "
                f"{self.raw.dtype}: resume with the model, size and dtype it was saved with."
            )
        self.clear()
        self.slots = [[None if slot is None else (slot[0], slot[1]) for slot in row] for row in slots]
        for cameras, row in zip(self._cameras, values.get("cameras", ()), strict=False):
            cameras.update({frame: (column, motion) for frame, column, motion in row})
        for buffer, saved in ((self.raw, keys), (self.values, tensors["values"])):
            buffer[:, :, : keys.shape[2]].copy_(saved)
