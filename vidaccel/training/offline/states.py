"""States of chunks that are being denoised, with all that the network sees beside them, as a store keeps them.

Shapes: n states; latents (n, C, frames, h, w) bf16, S slots for remembered frames and f frames of the chunk. Latents
are rounded before a teacher is asked, so that a target belongs to exactly the state that is stored beside it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from vidaccel.errors import UserError
from vidaccel.memory.camera import Camera
from vidaccel.models.causal_blocks import History, PromptCache
from vidaccel.training.chunk_batch import ChunkContext, Surroundings, positions_of

Embed = Callable[[Tensor], Tensor]  # tokens (n, length) to embeddings (n, text length, text_dim)
STORED = torch.bfloat16


@dataclass(frozen=True, kw_only=True)
class States:
    """n noisy chunks and what they are denoised beside.

    noisy: (n, C, f, h, w) at noise levels sigmas, (n,). context: remembered frames in slot order, (n, C, S, h, w), of
    which those of mask, (n, S) bool, are there. columns, motions: of the camera in the S + f frames, (n, S + f).
    tokens: of the prompt, (n, length).
    """

    noisy: Tensor
    sigmas: Tensor
    context: Tensor
    mask: Tensor
    columns: Tensor
    motions: Tensor
    tokens: Tensor

    def __len__(self) -> int:
        return len(self.noisy)

    def rows(self, rows: Tensor | slice) -> "States":
        """Some of them."""
        return States(**{name: tensor[rows] for name, tensor in self.tensors().items()})

    def at(self, noisy: Tensor, sigmas: Tensor) -> "States":
        """The same chunks elsewhere on their way."""
        return replace(self, noisy=noisy.to(STORED), sigmas=sigmas)

    def surroundings(self, embeddings: Tensor, *, view: "HistoryView | None" = None) -> Surroundings:
        """What a network is given beside the noisy chunks, `context_of` them; it is shown `view`, None: everything."""
        num_slots, size = self.mask.shape[1], self.noisy.shape[2]
        mask = self.mask if view is None else view.of(self.mask)
        context_positions, chunk_positions = positions_of(mask, size)
        return Surroundings(
            context=self.context.float(),
            context_mask=mask,
            context_camera=Camera(self.columns[:, :num_slots], self.motions[:, :num_slots]),
            context_positions=context_positions,
            chunk_camera=Camera(self.columns[:, num_slots:], self.motions[:, num_slots:]),
            chunk_positions=chunk_positions,
            embeddings=embeddings,
        )

    def tensors(self) -> dict[str, Tensor]:
        """By name, as a store takes them."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def of(cls, records: Mapping[str, Tensor], device: torch.device) -> "States":
        """From the tensors of a store; others are left out."""
        return cls(**{field.name: records[field.name].to(device) for field in fields(cls)})

    @classmethod
    def joined(cls, parts: Sequence["States"]) -> "States":
        """All of several."""
        tensors = [part.tensors() for part in parts]
        return cls(**{name: torch.cat([one[name] for one in tensors]) for name in tensors[0]})


@dataclass(frozen=True, kw_only=True)
class HistoryView:
    """What of the remembered frames a network is shown: the last `frames` of them, None: all that the student has.

    Raises ValueError for less than one frame.
    """

    frames: int | None = None

    def __post_init__(self) -> None:
        if self.frames is not None and self.frames < 1:
            raise ValueError(f"`frames` of a history must be at least 1 or None, got {self.frames}.")

    @classmethod
    def parse(cls, text: str) -> "HistoryView":
        """The view of that name. Raises UserError for another text."""
        word, _, number = text.partition(":")
        if text == "own":
            return cls()
        if word == "last" and number.isascii() and number.isdigit() and int(number) > 0:
            return cls(frames=int(number))
        raise UserError(f"`history` must be own or last:N with N frames, such as last:3; got {text!r}.")

    @property
    def name(self) -> str:
        """`own` or `last:N`, as fingerprints have it."""
        return "own" if self.frames is None else f"last:{self.frames}"

    def of(self, mask: Tensor) -> Tensor:
        """The frames of `mask` (n, S) that are shown."""
        if self.frames is None:
            return mask
        later = mask.flip(1).cumsum(1).flip(1)
        return mask & (later <= self.frames)


def first_of(context: ChunkContext, count: int) -> ChunkContext:
    """That of the first `count` chunks."""
    history = context.history
    if history is not None:
        history = History(_first(history.layers, count), None if history.mask is None else history.mask[:count])
    return ChunkContext(
        PromptCache(_first(context.prompt.layers, count)),
        history,
        Camera(*(part[:count] for part in context.camera)),
        context.positions[:count],
    )


def _first(layers: tuple[tuple[Tensor, Tensor], ...], count: int) -> tuple[tuple[Tensor, Tensor], ...]:
    return tuple((keys[:count], values[:count]) for keys, values in layers)
