"""The blocks of the causal Wan transformer: self-attention of a chunk to what is remembered, cached prompts.

Shapes: tokens (B, L, heads * D), frame after frame; keys and values (B, tokens, heads, D).
"""

from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_wan import WanAttention, WanTransformerBlock
from torch import Tensor

from vidaccel.memory.depth import DepthMap
from vidaccel.memory.rotary import rotate
from vidaccel.models.split_attention import KeySplit, split_attention

Rotary = tuple[Tensor, Tensor]
KeysValues = tuple[Tensor, Tensor]
LayerView = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class PromptCache:
    """Keys and values of a prompt for the cross-attention of every block, each (B, text tokens, heads, D)."""

    layers: tuple[KeysValues, ...]

    def repeated(self, copies: int) -> "PromptCache":
        """Every sample `copies` times in a row."""
        return PromptCache(_repeated(self.layers, copies))

    def copy_(self, other: "PromptCache") -> None:
        """Take over the values of a prompt of the same shape, where they lie: passes that were captured go on."""
        for kept, new in zip(self.layers, other.layers, strict=True):
            for side, changed in zip(kept, new, strict=True):
                side.copy_(changed)


@dataclass(frozen=True)
class History:
    """Remembered frames as tensors with gradients: keys, rotated, and values of every block, each (B, S, heads, D).

    mask: which of the S tokens count, (B, S) bool; None: all.
    """

    layers: tuple[KeysValues, ...]
    mask: Tensor | None = None

    def repeated(self, copies: int) -> "History":
        """Every sample `copies` times in a row."""
        mask = None if self.mask is None else self.mask.repeat_interleave(copies, 0)
        return History(_repeated(self.layers, copies), mask)

    def read_by(self, depth: DepthMap) -> "History":
        """What every block finds in it if it reads the keys and values of its leader.

        Raises ValueError for a map of another number of blocks.
        """
        if len(depth.leaders) != len(self.layers):
            raise ValueError(f"The map is of {len(depth.leaders)} layers, and the history of {len(self.layers)}.")
        return History(tuple(self.layers[leader] for leader in depth.leaders), self.mask)

    def seen_with(self, num_tokens: int) -> Tensor | None:
        """The attention mask (B, 1, 1, S + `num_tokens`) of a chunk that sees the history and itself."""
        if self.mask is None:
            return None
        own = self.mask.new_ones(len(self.mask), num_tokens)
        return torch.cat([self.mask, own], dim=1)[:, None, None]


def _repeated(layers: tuple[KeysValues, ...], copies: int) -> tuple[KeysValues, ...]:
    return tuple((keys.repeat_interleave(copies, 0), values.repeat_interleave(copies, 0)) for keys, values in layers)


class AttendedMemory(Protocol):
    """What the transformer needs of a memory while it works on a chunk; `KeyValueMemory` is one."""

    @property
    def rotary(self) -> Rotary:
        """Cosines and sines of the chunk's tokens, two tensors (B, L, 1, D)."""
        ...

    @property
    def motions(self) -> Tensor | None:
        """How the camera moves in the chunk's latent frames, (B, F) in patch columns; None: it holds."""
        ...

    @property
    def attention_mask(self) -> Tensor | None:
        """Which keys count, (B, 1, 1, S) bool; None: all."""
        ...

    def view(self, block_index: int) -> LayerView:
        """Of one block: where the chunk's keys go before rotation (B, L, heads, D), and all attended keys and values
        (B, S, heads, D), whose last L tokens are the chunk's and are written by the block."""
        ...


class ChunkSelfAttention:
    """Self-attention over given tokens, and over what is remembered.

    That is a memory whose last tokens are those of the chunk (`view`), or a history in front of them. With `alone`, a
    number of frames, each of them attends to itself only; without a memory its keys and values are returned too.
    split: how keys of a memory are attended to instead of by diffusers' backend, see `use_split_attention`.
    """

    _attention_backend = None
    _parallel_config = None
    split: KeySplit | None = None

    def __call__(
        self,
        attn: WanAttention,
        hidden_states: Tensor,
        encoder_hidden_states: None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: Rotary | None = None,
        view: LayerView | None = None,
        history: KeysValues | None = None,
        alone: int = 0,
    ) -> Any:
        assert rotary_emb is not None
        if getattr(attn, "fused_projections", False):
            query, key, value = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        else:
            query, key, value = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        query = attn.norm_q(query).unflatten(2, (attn.heads, -1))
        key = attn.norm_k(key).unflatten(2, (attn.heads, -1))
        value = value.unflatten(2, (attn.heads, -1))
        query, rotated = rotate(query, *rotary_emb), rotate(key, *rotary_emb)
        own = (rotated, value)
        if view is not None:
            raw_keys, keys, values = view
            raw_keys.copy_(key)
            keys[:, -key.shape[1] :].copy_(rotated)
            values[:, -key.shape[1] :].copy_(value)
            rotated, value = keys, values
        if history is not None:
            rotated, value = torch.cat([history[0], rotated], dim=1), torch.cat([history[1], value], dim=1)
        if alone:
            query, rotated, value = (part.unflatten(1, (alone, -1)).flatten(0, 1) for part in (query, *own))
            attention_mask = None
        if not alone and self.split is not None and view is not None and attention_mask is None:
            attended = split_attention(query, rotated, value, self.split)
        else:
            attended = dispatch_attention_fn(
                query,
                rotated,
                value,
                attn_mask=attention_mask,
                backend=self._attention_backend,
                parallel_config=self._parallel_config,
            )
        if alone:
            attended = attended.unflatten(0, (-1, alone)).flatten(1, 2)
        result = attn.to_out[1](attn.to_out[0](attended.flatten(2, 3).type_as(query)))
        return (result, *own) if alone and view is None else result


class PromptAttention:
    """Cross-attention to keys and values of a prompt that are computed once."""

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attn: WanAttention,
        hidden_states: Tensor,
        encoder_hidden_states: KeysValues | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: Rotary | None = None,
    ) -> Tensor:
        assert encoder_hidden_states is not None
        query = attn.norm_q(attn.to_q(hidden_states)).unflatten(2, (attn.heads, -1))
        key, value = encoder_hidden_states
        attended = dispatch_attention_fn(query, key, value, backend=self._attention_backend)
        return attn.to_out[1](attn.to_out[0](attended.flatten(2, 3).type_as(query)))


class CausalWanTransformerBlock(WanTransformerBlock):
    """diffusers' block with a time for every frame, cached prompts and an optional view of a memory."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.attn1.set_processor(cast(Any, ChunkSelfAttention()))
        self.attn2.set_processor(cast(Any, PromptAttention()))

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        encoder_hidden_states: KeysValues,
        temb: Tensor,
        rotary_emb: Rotary,
        attention_mask: Tensor | None = None,
        view: LayerView | None = None,
        history: KeysValues | None = None,
        alone: int = 0,
    ) -> Any:
        """Tokens (B, L, dim) to tokens; temb: (B, frames or 1, 6, dim).

        history: keys and values (B, S, heads, D) in front of those of the tokens. alone: the number of frames, each of
        which then attends to itself only; without `view` the result is (tokens, rotated keys, values).
        """
        modulation = (self.scale_shift_table + temb.float()).unsqueeze(3).unbind(2)
        shift, scale, gate, ff_shift, ff_scale, ff_gate = modulation  # each (B, frames or 1, 1, dim)
        frames = temb.shape[1]
        normed = self.norm1(hidden_states.float())
        normed = (normed.unflatten(1, (frames, -1)) * (1 + scale) + shift).flatten(1, 2).type_as(hidden_states)
        attended = self.attn1(normed, None, attention_mask, rotary_emb, view=view, history=history, alone=alone)
        attended, *own = attended if alone and view is None else (attended,)
        hidden_states = _gated(hidden_states, attended, gate)

        normed = self.norm2(hidden_states.float()).type_as(hidden_states)
        hidden_states = hidden_states + self.attn2(normed, encoder_hidden_states, None, None)

        normed = self.norm3(hidden_states.float())
        normed = (normed.unflatten(1, (frames, -1)) * (1 + ff_scale) + ff_shift).flatten(1, 2).type_as(hidden_states)
        hidden_states = _gated(hidden_states, self.ffn(normed), ff_gate)
        return (hidden_states, *own) if own else hidden_states


def _gated(hidden_states: Tensor, change: Tensor, gate: Tensor) -> Tensor:
    gated = (change.float().unflatten(1, (gate.shape[1], -1)) * gate).flatten(1, 2)
    return (hidden_states.float() + gated).type_as(hidden_states)
