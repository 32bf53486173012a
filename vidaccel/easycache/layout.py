"""What a transformer denoises: its inputs matched with its outputs, taken apart and put together again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.utils import BaseOutput
from torch import Tensor

from vidaccel.catalog.traits import TransformerTraits
from vidaccel.easycache.batch import Batch


class Piece(NamedTuple):
    """An output in two parts: what is reused, and what lies behind it or None."""

    reused: Tensor
    rest: Tensor | None


Pieces = dict[int, list[Piece]]
"""By group of the batch, the pieces of every stream."""


@dataclass(frozen=True, kw_only=True)
class Matching:
    """The part of input and output that are reused against each other: the first `channels` along `dim`.

    Image-to-video models get conditions on further channels behind the latents, models that also predict a variance
    return further channels behind the prediction. dim: None if the shapes are equal.
    """

    dim: int | None = None
    channels: int = 0

    def narrow(self, tensor: Tensor) -> Tensor:
        """The reused part, a view."""
        return tensor if self.dim is None else tensor.narrow(self.dim, 0, self.channels)

    def behind(self, source: Tensor) -> Tensor | None:
        """The channels of an input behind the reused part, a view: conditions that go with the latents."""
        if self.dim is None or source.shape[self.dim] == self.channels:
            return None
        return source.narrow(self.dim, self.channels, source.shape[self.dim] - self.channels)

    def split(self, output: Tensor) -> Piece:
        """An output in its two parts, both views."""
        return Piece(self.narrow(output), self.behind(output))

    def whole(self, piece: Piece) -> Tensor:
        """An output from its two parts."""
        if piece.rest is None or self.dim is None:
            return piece.reused
        return torch.cat([piece.reused, piece.rest], dim=self.dim)


def match_channels(source: Tensor, output: Tensor, traits: TransformerTraits) -> Matching:
    """How an input is matched with its output. Raises ValueError if they do not fit."""
    channel_dim = traits.channel_dim
    if source.shape == output.shape:
        return Matching()
    dim = (source.ndim - 1 if source.ndim == 3 else 1) if channel_dim is None else channel_dim % source.ndim
    if output.ndim == source.ndim:
        matching = Matching(dim=dim, channels=min(source.shape[dim], output.shape[dim]))
        fits = matching.channels == output.shape[dim] or traits.holds_rest
        if fits and matching.narrow(source).shape == matching.narrow(output).shape:
            return matching
    raise ValueError(
        f"EasyCache cannot be applied: the transformer returned {tuple(output.shape)} for an input of "
        f"{tuple(source.shape)}; it needs an output shaped like the input, or like its leading channels."
    )


def split_outputs(outputs: Sequence[Tensor], matchings: Sequence[Matching], batch: Batch) -> list[list[Piece]]:
    """The pieces of every group of a batch, in order."""
    return [
        [matching.split(batch.take(output, group)) for output, matching in zip(outputs, matchings, strict=True)]
        for group in range(batch.num_groups)
    ]


def join_outputs(pieces: Pieces, matchings: Sequence[Matching], batch: Batch) -> list[Tensor]:
    """One output a stream from the pieces of all groups."""
    return [
        batch.join({group: matching.whole(parts[stream]) for group, parts in pieces.items()})
        for stream, matching in enumerate(matchings)
    ]


def unpack(result: Any, traits: TransformerTraits) -> list[Tensor]:
    """The tensors that a transformer returned, one a stream. Raises ValueError for anything else."""
    values = list(result.values()) if isinstance(result, BaseOutput) else result
    if isinstance(values, tuple | list) and len(values) == len(traits.streams):
        tensors = [value for value in values if isinstance(value, Tensor)]
        if len(tensors) == len(values):
            return tensors
    wanted = "one tensor" if len(traits.streams) == 1 else f"{len(traits.streams)} tensors"
    raise ValueError(
        f"EasyCache cannot be applied: the transformer must return {wanted}, as a tuple or an output of diffusers; "
        f"got {type(result).__name__}" + (f" of {len(values)} values." if isinstance(values, tuple | list) else ".")
    )


def pack(outputs: Sequence[Tensor], arguments: Mapping[str, Any], like: type | None) -> Any:
    """The tensors in the form the caller asked for; `like` is the class of the outputs seen so far."""
    if not arguments.get("return_dict", True):
        return tuple(outputs)
    if like is None:
        return Transformer2DModelOutput(sample=outputs[0]) if len(outputs) == 1 else tuple(outputs)
    return like(*outputs)
