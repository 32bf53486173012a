"""The tensors of a rollout's memory: keys and values of sink, slow and fast frames (arXiv 2602.06028, section 3.3).

`MemoryIndex` decides which frames stay; this holds their keys and values in buffers that never grow. A frame keeps its
place in the buffers and changes only its rotary position, because attention does not mind the order of keys: the
remembered frames lie in front, in any order, and the chunk being made behind them. Once per chunk keys whose position
changed are rotated anew. Inside the layers nothing is decided and nothing waits for the host.
Shapes: buffers (layers, B, frames * tokens_per_frame, heads, D).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vidaccel.errors import UserError
from vidaccel.memory.clean import Entry
from vidaccel.memory.config import MemoryConfig
from vidaccel.memory.index import MemoryIndex
from vidaccel.memory.rotary import RotaryTable, rotate_frames

Slot = tuple[int, int | str | None]  # frame, and for a copy the pass that it was taken from


@dataclass(frozen=True, kw_only=True)
class MemoryShape:
    """Sizes of the buffers, which follow from a transformer's config and the size of the latents."""

    num_layers: int
    batch_size: int
    tokens_per_frame: int
    num_heads: int
    head_dim: int


class SlowFastMemory:
    """Keys and values of the remembered frames of a rollout.

    Every sample of a batch has its own index, so that it remembers what it would alone.
    For every chunk: `begin_chunk`, any number of passes of the transformer at falling noise (`observe` after each),
    one pass with the finished latents at timestep 0, `commit`.

    indexes: the integers, one `MemoryIndex` a sample.
    """

    def __init__(
        self,
        config: MemoryConfig,
        shape: MemoryShape,
        table: RotaryTable,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Reserve the buffers.

        Raises ValueError for more frames than `table` has positions, and for sizes whose keys the official mode
        cannot follow.
        """
        _check_official(config)
        if config.total_frames > table.num_positions:
            raise ValueError(
                f"The memory holds {config.total_frames} frames and the transformer has {table.num_positions} "
                "positions (`rope_max_seq_len`); choose a smaller memory."
            )
        self.config, self.shape = config, shape
        tokens = config.total_frames * shape.tokens_per_frame
        size = (shape.num_layers, shape.batch_size, tokens, shape.num_heads, shape.head_dim)
        self._raw, self._keys, self._values = (torch.zeros(size, device=device, dtype=dtype) for _ in range(3))
        self._table = RotaryTable(temporal=table.temporal.to(device), spatial=table.spatial.to(device))
        head = (shape.batch_size, config.chunk_frames * shape.tokens_per_frame, 1, shape.head_dim)
        self._rotary = torch.zeros(2, *head, device=device)
        self._rotate_frames: Callable[..., None] = rotate_frames
        self.reset()

    def compile(self) -> None:
        """Compile the rotation of remembered keys, a tenth of the traffic; takes seconds in the second chunk."""
        rotate = torch.compile(rotate_frames)

        def rotate_any_number(*sides_and_frames: Tensor) -> None:
            for tensor in sides_and_frames[2:]:
                torch._dynamo.maybe_mark_dynamic(tensor, 0)
            rotate(*sides_and_frames)

        self._rotate_frames = rotate_any_number

    def reset(self) -> None:
        """Forget everything: the next chunk is the first of a video."""
        batch = range(self.shape.batch_size)
        self._indexes = [MemoryIndex(self.config) for _ in batch]
        self._slots: list[list[Slot | None]] = [[None] * self.config.total_frames for _ in batch]
        self._positions: list[dict[Slot, int]] = [{} for _ in batch]
        self._current: range = range(0)
        self._mask: Tensor | None = None
        self._previous: Tensor | None = None
        self._similarity: Tensor | None = None
        self._is_changed_by_pass = False

    # What the transformer reads

    @property
    def device(self) -> torch.device:
        """Where the buffers are."""
        return self._raw.device

    @property
    def dtype(self) -> torch.dtype:
        """Number format of keys and values."""
        return self._raw.dtype

    @property
    def rotary(self) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the chunk's tokens, two tensors (B, L, 1, D)."""
        tokens = len(self._current) * self.shape.tokens_per_frame
        return self._rotary[0, :, :tokens], self._rotary[1, :, :tokens]

    @property
    def attention_mask(self) -> Tensor | None:
        """Which keys count, (B, 1, 1, S) bool; None while all samples remember equally many frames."""
        return self._mask

    def view(self, block_index: int) -> tuple[Tensor, Tensor, Tensor]:
        """Of one block: the chunk's keys before rotation, all attended keys, all attended values."""
        start, stop = self._token_span
        return (
            self._raw[block_index, :, start:stop],
            self._keys[block_index, :, :stop],
            self._values[block_index, :, :stop],
        )

    @property
    def _token_span(self) -> tuple[int, int]:
        """Where the chunk's tokens lie in the buffers."""
        return self._current.start * self.shape.tokens_per_frame, self._current.stop * self.shape.tokens_per_frame

    @property
    def attended_frames(self) -> int:
        """Frames that the passes of this chunk attend to, the chunk's own among them."""
        return self._current.stop

    # What the rollout calls

    @property
    def indexes(self) -> Sequence[MemoryIndex]:
        """The index of every sample."""
        return self._indexes

    def begin_chunk(self, num_frames: int | None = None) -> None:
        """Make room for a chunk of `num_frames` (`chunk_frames` by default): evict, promote, rotate.

        A chunk that was begun and not committed begins again, with nothing left of its passes. Raises UserError in the
        official mode, whose passes change the memory.
        """
        if self._is_changed_by_pass:
            raise UserError(
                "The memory was changed by passes of a chunk that was interrupted, as the official mode does; go on "
                "from a saved state, or use the clean mode."
            )
        for index in self._indexes:
            index.begin_chunk(num_frames)
        self._arrange()

    def observe(self, similarity: Tensor | None = None) -> Tensor | None:
        """To be called after a denoising pass: the official mode may copy a frame of that pass into the slow part.

        Differs from the released code in one thing: one decision for all layers, after the pass instead of inside
        it, so that the pass which decides does not see the copy beside the same frame.

        similarity: as `commit` takes it. Returns the similarity that decided, for the memories of other branches.
        """
        if self.config.mode != "official":
            return None
        mean = self._mean_of_chunk() if similarity is None else None
        similarity = self._similarity_to_previous(mean) if similarity is None else similarity
        values = _values(similarity, self.shape.batch_size)
        self._previous, self._is_changed_by_pass = mean, True
        for index, value in zip(self._indexes, values, strict=True):
            index.observe(value)
        self._arrange()
        return similarity

    def commit(self, similarity: Tensor | None = None) -> None:
        """To be called after the pass at timestep 0: the chunk is now remembered. Waits for the device.

        similarity: (B,) to decide with another memory's similarity, as the branches of guidance must.
        """
        mean = self._mean_of_chunk() if similarity is None else None
        similarity = self._similarity_to_previous(mean) if similarity is None else similarity
        values = _values(similarity, self.shape.batch_size)  # the wait; what comes now is not interrupted by errors
        for index, slots, value in zip(self._indexes, self._slots, values, strict=True):
            frames = index.current
            index.commit(value)
            for slot, frame in zip(self._current, frames, strict=True):
                slots[slot] = (frame, None)
        self._current, self._is_changed_by_pass = range(0), False
        self._similarity, self._previous = similarity, mean

    @property
    def similarity(self) -> Tensor | None:
        """Similarity of the last committed chunk's keys with those of the chunk before, (B,) on the device, or None.

        The cosine of the keys' means over the tokens (arXiv 2602.06028, equation 7), averaged over the layers.
        """
        return self._similarity

    def bytes_by_part(self) -> dict[str, int]:
        """Bytes in use by sink, slow and fast frames, and all bytes reserved."""
        per_frame = 3 * self._raw[:, :1, : self.shape.tokens_per_frame].nbytes
        parts = ("sink", "slow", "fast")
        used = {part: per_frame * sum(len(getattr(index, part)) for index in self.indexes) for part in parts}
        return used | {"reserved": 3 * self._raw.nbytes + self._rotary.nbytes}

    def save_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything that later chunks depend on, between two chunks: tensors and JSON values.

        The tensors are the frames in use; rotated keys follow from them. They are views of the buffers: write or clone
        them before the next chunk.
        """
        indexes = [index.state() for index in self.indexes]
        used = max((_used(slots) for slots in self._slots), default=0) * self.shape.tokens_per_frame
        tensors = {"keys": self._raw[:, :, :used], "values": self._values[:, :, :used]}
        if self._previous is not None:
            tensors["previous"] = self._previous
        slots = [[None if slot is None else list(slot) for slot in row] for row in self._slots]
        return tensors, {"indexes": indexes, "slots": slots}

    def load_state(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Take over what `save_state` gave. Raises UserError if it is of another memory."""
        keys = tensors["keys"]
        wanted = (*self._raw.shape[:2], keys.shape[2] if keys.ndim == 5 else -1, *self._raw.shape[3:])
        fits = keys.shape == tensors["values"].shape == wanted and keys.shape[2] <= self._raw.shape[2]
        if not fits or keys.dtype != self._raw.dtype or len(values["indexes"]) != self.shape.batch_size:
            raise UserError(
                f"The saved memory has keys {tuple(keys.shape)} {keys.dtype}, and this rollout needs {wanted} "
                f"{self._raw.dtype}: resume with the model, size and dtype it was saved with."
            )
        self.reset()
        self._indexes = [MemoryIndex.from_state(self.config, state) for state in values["indexes"]]
        self._slots = [[None if slot is None else (slot[0], slot[1]) for slot in row] for row in values["slots"]]
        for buffer, saved in ((self._raw, keys), (self._values, tensors["values"])):
            buffer[:, :, : keys.shape[2]].copy_(saved)
        if "previous" in tensors:
            self._previous = tensors["previous"].to(self._raw.device)

    def rebuild(self) -> Iterator[tuple[tuple[int, ...], ...]]:
        """Let the remembered frames be written anew, under another prompt for one.

        Yields groups of at most `chunk_frames` frames in the order of their positions, for every sample its frames;
        the caller runs a pass at timestep 0 with their latents before it takes the next group. A sample with fewer
        frames than the others gets its last frame repeated, which is then not kept.
        """
        rows = [_slots_of(index.entries) for index in self.indexes]
        positions = [dict(zip(_slots_of(index.entries), index.positions, strict=True)) for index in self.indexes]
        self._slots = [[None] * self.config.total_frames for _ in rows]
        longest = max(len(row) for row in rows)
        for start in range(0, longest, self.config.chunk_frames):
            self._current = range(start, min(start + self.config.chunk_frames, longest))
            for slots, row in zip(self._slots, rows, strict=True):
                slots[start : self._current.stop] = (row + [None] * longest)[start : self._current.stop]
            padded = [[*row, *[row[-1]] * (longest - len(row))][start : self._current.stop] for row in rows]
            pairs = zip(padded, positions, strict=True)
            self._set_rotary([[places[slot] for slot in group] for group, places in pairs])
            self._set_mask(current_in_table=True)
            yield tuple(tuple(frame for frame, _ in group) for group in padded)
        self._positions = [{} for _ in rows]
        self._previous = self._mean_of_last_chunk()

    # How the buffers follow the indexes

    def _arrange(self) -> None:
        """Lay the buffers out for a pass over the current chunk: remembered frames in front, the chunk behind them."""
        kept = [_slots_of(entry for entry in index.entries if entry.part != "current") for index in self._indexes]
        start = max(map(len, kept))
        for sample in range(self.shape.batch_size):  # an interrupt between the lines leaves tables that are true
            slots, moves = self._moves(sample, kept[sample], start)
            self._copy_frames(sample, moves)
            self._slots[sample] = slots
        size = len(self._indexes[0].current)
        self._current = range(start, start + size)
        for sample, index in enumerate(self._indexes):  # the chunk's own entries are the last ones
            self._rotate_changed(sample, dict(zip(kept[sample], index.positions, strict=False)))
        self._set_rotary([index.positions[-size:] for index in self._indexes])
        self._set_mask()

    def _moves(self, sample: int, kept: Sequence[Slot], stop: int) -> tuple[list[Slot | None], list[tuple[int, int]]]:
        """The table of slots in which what is kept lies before `stop`, and which frames to copy where for it."""
        wanted = set(kept)
        before = {slot: place for place, slot in enumerate(self._slots[sample]) if slot is not None}
        current = dict(zip(self._indexes[sample].current, self._current, strict=False))
        slots = [slot if slot in wanted else None for slot in self._slots[sample]]
        misplaced = [slot for slot in kept if not before.get(slot, stop) < stop]
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
        for buffer in (self._raw, self._values):
            frames = buffer[:, sample].unflatten(1, (-1, self.shape.tokens_per_frame))
            for source, place in moves:
                frames[:, place].copy_(frames[:, source])

    def _rotate_changed(self, sample: int, places: Mapping[Slot, int]) -> None:
        """Rotate the keys of the frames whose position changed, or that were not rotated since they were copied."""
        known = self._positions[sample]
        changed = [slot for slot, place in places.items() if known.get(slot) != place]
        self._positions[sample] = {slot: place for slot, place in places.items() if slot not in changed}
        if not changed:
            return
        where = [self._slots[sample].index(slot) for slot in changed]
        rows, positions = (
            torch.tensor(values, device=self._raw.device) for values in (where, [places[slot] for slot in changed])
        )
        cosines, sines = (part.unflatten(0, (len(changed), -1)) for part in self._table.at(positions))
        for raw, keys in zip(self._raw[:, sample], self._keys[:, sample], strict=True):
            sides = (side.unflatten(0, (-1, self.shape.tokens_per_frame)) for side in (raw, keys))
            self._rotate_frames(*sides, rows, cosines, sines)
        self._positions[sample] = dict(places)

    def _set_rotary(self, positions: Sequence[Sequence[int]]) -> None:
        places = torch.tensor(positions, device=self._raw.device)
        tokens = places.shape[1] * self.shape.tokens_per_frame
        for part, buffer in zip(self._table.at(places), self._rotary, strict=True):
            buffer[:, :tokens].copy_(part)

    def _set_mask(self, *, current_in_table: bool = False) -> None:
        """Tell apart the slots in use of every sample, where they differ."""
        start, stop = self._current.stop if current_in_table else self._current.start, self._current.stop
        used = [[slot is not None or place >= start for place, slot in enumerate(row[:stop])] for row in self._slots]
        self._mask = None
        if not all(map(all, used)):
            frames = torch.tensor(used, device=self._raw.device)
            self._mask = frames.repeat_interleave(self.shape.tokens_per_frame, dim=1)[:, None, None]

    def _mean_of_chunk(self) -> Tensor | None:
        """Mean keys of the chunk, (layers, B, heads * D); None if the rule does not ask for them."""
        if self.config.keyframe_rule != "similarity":
            return None
        start, stop = self._token_span
        return self._raw[:, :, start:stop].mean(2, dtype=torch.float32).flatten(2)

    def _similarity_to_previous(self, mean: Tensor | None) -> Tensor | None:
        """Compare the chunk's mean keys with the previous ones, (B,); None without need or previous."""
        if mean is None or self._previous is None:
            return None
        return F.cosine_similarity(mean, self._previous, dim=-1).mean(0)

    def _mean_of_last_chunk(self) -> Tensor | None:
        """Mean keys of the frames of the last chunk, as far as they are remembered."""
        if self.config.keyframe_rule != "similarity" or self._previous is None:
            return None
        means = self._previous.clone()
        frames = self._raw.unflatten(2, (-1, self.shape.tokens_per_frame))
        for sample, index in enumerate(self._indexes):
            last = range(index.num_frames - self.config.chunk_frames, index.num_frames)
            places = [place for place, slot in enumerate(self._slots[sample]) if slot and slot[0] in last]
            if places:
                rows = torch.tensor(places, device=frames.device)
                means[:, sample] = frames[:, sample, rows].mean((1, 2), dtype=torch.float32).flatten(1)
        return means


def _slots_of(entries: Iterator[Entry] | Sequence[Entry]) -> list[Slot]:
    return [(entry.frame, entry.source if entry.is_copy else None) for entry in entries]


def _used(slots: Sequence[Slot | None]) -> int:
    return max((place + 1 for place, slot in enumerate(slots) if slot is not None), default=0)


def _check_official(config: MemoryConfig) -> None:
    """Refuse sizes with which the released code copies into slots that are in use, or in use only later."""
    least = max(config.sink_frames, config.chunk_frames + config.total_frames % config.chunk_frames)
    if config.mode == "official" and (config.keyframe_frames > 1 or config.fast_frames < least):
        raise ValueError(
            f"In the official mode keys can be kept with `keyframe_frames` 1 and, for these sizes, `fast_frames` of at "
            f"least {least}; got {config.keyframe_frames} and {config.fast_frames}."
        )


def _values(similarity: Tensor | None, count: int) -> list[float] | list[None]:
    return [None] * count if similarity is None else similarity.tolist()
