"""What a causal student sees when it makes a chunk: remembered frames, slots and visibility, as the rollout has them.

A training sequence is `[remembered frames, padded | copies of the current chunk]`. Chunks of remembered frames are
causal among themselves; every copy sees all of them and itself, no copy sees another.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vidaccel.memory import MemoryConfig, MemoryIndex

_KEYFRAME, _NO_KEYFRAME = -1.0, 1.0  # similarities that make a chunk one, or not


@dataclass(frozen=True, kw_only=True)
class ChunkLayout:
    """The slots at the time of one chunk.

    context: remembered frames in slot order. chunks: the chunk that each of them was made in.
    current: frames of the chunk itself. index: which chunk it is.
    positions: RoPE positions of context and current frames.
    """

    context: tuple[int, ...]
    chunks: tuple[int, ...]
    current: tuple[int, ...]
    index: int
    positions: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class ChunkSequence:
    """A layout as the transformer takes it: T = slots for remembered frames + copies * frames of the chunk.

    frame_positions: (T,) long. visibility: (T, T) bool, row sees column.
    """

    num_slots: int
    frame_positions: Tensor
    visibility: Tensor


def num_context_slots(memory: MemoryConfig) -> int:
    """Frames that can be remembered while a chunk is made."""
    return memory.total_frames - memory.chunk_frames


def chunk_layouts(
    memory: MemoryConfig, *, chunk_sizes: Sequence[int], keyframes: Sequence[bool] | None = None
) -> Iterator[ChunkLayout]:
    """The layouts of chunks with `chunk_sizes` frames, one after the other.

    keyframes: for each chunk whether it becomes one; None leaves it to the rule of `memory`, which must not need
        similarities.
    """
    if keyframes is not None:
        memory = replace(memory, keyframe_rule="similarity")
    index = MemoryIndex(memory)
    ends = [0]
    for number, size in enumerate(chunk_sizes):
        index.begin_chunk(size)
        ends.append(ends[-1] + size)
        yield layout_of(index, ends=ends)
        if keyframes is None:
            index.commit()
        else:
            index.commit(similarity=_KEYFRAME if keyframes[number] else _NO_KEYFRAME)


def layout_of(index: MemoryIndex, *, ends: Sequence[int]) -> ChunkLayout:
    """The layout between `begin_chunk` and `commit`; `ends`: 0 and the number of frames after each chunk so far."""
    context = tuple(entry.frame for entry in index.entries if entry.part != "current")
    return ChunkLayout(
        context=context,
        chunks=tuple(sum(end <= frame for end in ends) - 1 for frame in context),
        current=tuple(index.current),
        index=len(ends) - 2,
        positions=tuple(index.positions),
    )


def draw_layouts(
    memory: MemoryConfig, *, num_frames: int, image_share: float, draw: random.Random
) -> tuple[ChunkLayout, ChunkLayout | None]:
    """The layout of a random chunk of a clip of `num_frames` frames and that of the chunk before it, None for none.

    Half of the time the keyframes are those of the uniform rule, else each chunk is one with a probability that is
    itself drawn: a similarity threshold can come to any of them.
    image_share: how often the clip begins with a single frame that is given, as an image is.
    """
    begins_with_image = draw.random() < image_share
    lead = [1] if begins_with_image else []
    num_chunks = (num_frames - len(lead)) // memory.chunk_frames
    target = len(lead) + draw.randrange(num_chunks)
    sizes = [*lead, *[memory.chunk_frames] * (target + 1 - len(lead))]
    keyframes = None
    if draw.random() < 0.5:
        memory = replace(memory, keyframe_rule="uniform")
    else:
        share = draw.random()
        keyframes = [draw.random() < share for _ in sizes]
    *earlier, layout = chunk_layouts(memory, chunk_sizes=sizes, keyframes=keyframes)
    return layout, earlier[-1] if earlier else None


def chunk_sequence(
    layout: ChunkLayout,
    *,
    num_slots: int,
    copies: int,
    device: torch.device | str = "cpu",
    hide: random.Random | None = None,
) -> ChunkSequence:
    """Positions and visibility of `[context padded to num_slots | copies of the chunk]`.

    Padding sees itself and is seen by nobody.
    hide: hides every second earlier chunk, by chance, from each remembered one. In a rollout a frame was remembered
        when other frames were in reach than now, so its keys and values must not hang on what it saw.
    """
    num_context, size = len(layout.context), len(layout.current)
    padding = (0,) * (num_slots - num_context)
    positions = (*layout.positions[:num_context], *padding, *layout.positions[num_context:] * copies)
    visibility = torch.eye(len(positions), dtype=torch.bool)
    chunks = torch.tensor(layout.chunks, dtype=torch.long)
    visibility[:num_context, :num_context] = chunks[:, None] >= chunks[None, :]
    if hide is not None:
        visibility[:num_context, :num_context] &= _seen_by_chance(layout.chunks, hide)
    visibility[num_slots:, :num_context] = True
    for first in range(num_slots, len(positions), size):
        visibility[first : first + size, first : first + size] = True
    return ChunkSequence(
        num_slots=num_slots,
        frame_positions=torch.tensor(positions, dtype=torch.long, device=device),
        visibility=visibility.to(device),
    )


def _seen_by_chance(chunks: tuple[int, ...], draw: random.Random) -> Tensor:
    """Every second pair of different chunks is False; (frames, frames)."""
    numbers = sorted(set(chunks))
    rows = torch.tensor([numbers.index(chunk) for chunk in chunks], dtype=torch.long)
    seen = torch.tensor([[first == second or draw.random() < 0.5 for second in numbers] for first in numbers])
    return seen.view(len(numbers), len(numbers))[rows[:, None], rows[None, :]].bool()
