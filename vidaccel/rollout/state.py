"""Everything that the next chunk of a rollout depends on, in one object that belongs to one rollout."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from vidaccel.errors import UserError
from vidaccel.memory.keys_values import KeyValueMemory
from vidaccel.memory.policy import MemoryPolicy
from vidaccel.memory.prefixes import with_prefix, without_prefix
from vidaccel.memory.transfer import sent
from vidaccel.rollout.archive import LatentArchive
from vidaccel.rollout.chunk import Student

_COUNTS = {"num_chunks": "num_chunks", "num_frames": "num_frames", "scene_start": "shot_start"}  # saved name, field
SavedState = tuple[dict[str, Tensor], dict[str, Any]]


class Decoder(Protocol):
    """Latents to pixels, chunk after chunk."""

    def decode(self, latents: Tensor) -> Tensor:
        """(B, C, F, H, W) to (B, f, 3, H, W) uint8."""
        ...

    def reset(self) -> None:
        """The next chunk begins a video."""
        ...

    def save_state(self) -> SavedState:
        """Tensors and JSON values."""
        ...

    def load_state(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Take over what `save_state` gave."""
        ...


@dataclass(kw_only=True)
class RolloutState:
    """The running values of one rollout.

    memories: one for each branch of guidance, the prompt's first; they also keep the camera of what they remember.
    seeds: one for each sample; with the number of a chunk they give its noise.
    size: of a latent frame, (C, H, W).
    remembered: latents of the frames in the memory, (B, C, H, W) by frame of the shot.
    archive: latents of all frames of the shot, where frames come back into the memory.
    shot_start: first frame of what the memory knows, in frames of the rollout; moves at a hard cut.
    shot: first chunk and prompt of the shot that the memory was written under, None before the first chunk.
    """

    memories: tuple[KeyValueMemory, ...]
    seeds: tuple[int, ...]
    size: tuple[int, int, int]
    decoder: Decoder | None = None
    num_chunks: int = 0
    num_frames: int = 0
    shot_start: int = 0
    shot: tuple[int, str] | None = None
    remembered: dict[int, Tensor] = field(default_factory=dict)
    archive: LatentArchive = field(default_factory=LatentArchive)

    @property
    def memory(self) -> KeyValueMemory:
        """The memory of the prompt's branch."""
        return self.memories[0]

    def remember(self, latents: Tensor, first_frame: int) -> None:
        """Keep the latents of frames that are in the memory, and no others; `first_frame` counts from the shot.

        They are copies: what is done to the latents of a chunk afterwards does not matter.
        """
        indexes = self.memory.indexes
        used = {frame for index in indexes for frame in (*index.sink, *index.slow, *index.fast)}
        new = dict(enumerate(latents.unbind(2), first_frame))
        before = {frame: self.latents_of(frame) for frame in used - new.keys()}
        self.remembered = before | {frame: part.clone() for frame, part in new.items() if frame in used}
        if self.memory.policy.retrieval is not None:
            self.archive.add(first_frame, latents)

    def latents_of(self, frame: int) -> Tensor:
        """The latents (B, C, H, W) of a frame that is in the memory or comes back into it."""
        if frame in self.remembered:
            return self.remembered[frame]
        return sent(self.archive[frame], self.memory.device)

    def forget(self) -> None:
        """A new shot begins: nothing is remembered of the one before."""
        for memory in self.memories:
            memory.reset()
        if self.decoder is not None:
            self.decoder.reset()
        self.remembered, self.shot_start = {}, self.num_frames
        self.archive.load({}, shot_start=self.shot_start)

    def last_frames(self, count: int) -> Tensor | None:
        """The latents (B, C, `count`, H, W) of the last frames of the shot; None where not all are remembered."""
        end = self.num_frames - self.shot_start
        frames = range(end - count, end)
        if not all(frame in self.remembered for frame in frames):
            return None
        return torch.stack([self.remembered[frame] for frame in frames], dim=2)

    def save_state(self) -> SavedState:
        """Tensors and JSON values from which the rollout goes on exactly. Not within a chunk.

        Some tensors are views of what the next chunk changes: write or clone them before it.
        """
        parts = [memory.save_state() for memory in self.memories]
        tensors: dict[str, Tensor] = {}
        for number, (saved, _) in enumerate(parts):
            tensors |= with_prefix(f"memory{number}", saved)
        tensors |= {f"latents.{frame}": latents for frame, latents in self.remembered.items()}
        tensors |= {f"archive.{frame}": latents.contiguous() for frame, latents in self.archive.frames.items()}
        values: dict[str, Any] = {name: getattr(self, field_name) for name, field_name in _COUNTS.items()}
        values["scene"] = None if self.shot is None else list(self.shot)
        values["seeds"] = list(self.seeds)
        values["memories"] = [saved for _, saved in parts]
        if self.decoder is not None:
            saved, values["decoder"] = self.decoder.save_state()
            tensors |= with_prefix("decoder", saved)
        return tensors, values

    def load_state(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Take over what `save_state` gave. Raises UserError if it is of another model, size or number of videos."""
        if len(values["memories"]) != len(self.memories) or tuple(values["seeds"]) != self.seeds:
            raise UserError(
                f"The saved rollout has seeds {values['seeds']} and {len(values['memories'])} memories, this one "
                f"{list(self.seeds)} and {len(self.memories)}: resume with the same seed and guidance."
            )
        for number, memory in enumerate(self.memories):
            memory.load_state(without_prefix(f"memory{number}", tensors), values["memories"][number])
        if self.decoder is not None:
            self.decoder.load_state(without_prefix("decoder", tensors), values.get("decoder", {}))
        latents = without_prefix("latents", tensors)
        self.remembered = {int(frame): part.to(self.memory.device) for frame, part in latents.items()}
        for name, field_name in _COUNTS.items():
            setattr(self, field_name, values[name])
        archived = without_prefix("archive", tensors)
        self.archive.load({int(frame): part for frame, part in archived.items()}, shot_start=self.shot_start)
        self.shot = None if values["scene"] is None else (values["scene"][0], values["scene"][1])


def new_state(
    student: Student,
    memory: MemoryPolicy,
    *,
    height: int,
    width: int,
    seeds: Sequence[int] = (0,),
    decoder: Decoder | None = None,
    device: torch.device | None = None,
) -> RolloutState:
    """The state before the first chunk, for latents of `height` x `width` and one video a seed.

    device: where the transformer computes, if its weights wait elsewhere (offload); None: where they are.
    Raises ValueError for sizes that the transformer or its positions do not allow, and for no seed.
    """
    if not isinstance(seeds, Sequence) or not seeds or not all(type(seed) is int for seed in seeds):
        raise ValueError(f"`seeds` must have a whole number for every video, at least one, as (0,); got {seeds!r}.")
    transformer = student.transformer
    shape = transformer.memory_shape(height, width, batch_size=len(seeds))
    parameter: Tensor = transformer.patch_embedding.weight
    memories = [
        KeyValueMemory(
            memory,
            shape,
            transformer.rotary_table(height, width),
            device=device or parameter.device,
            dtype=parameter.dtype,
        )
        for _ in range(student.num_branches)
    ]
    size = (transformer.in_channels, height, width)
    return RolloutState(memories=tuple(memories), seeds=tuple(seeds), size=size, decoder=decoder)
