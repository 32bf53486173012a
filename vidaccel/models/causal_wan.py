"""A chunk-causal Wan transformer: the weights and config of diffusers' `WanTransformer3DModel`, run chunk after chunk.

Two ways that agree. With a memory: one chunk attends to what is remembered and to itself, and its keys and values are
written into the memory's buffers (Context Forcing, arXiv 2602.06028; Self-Forcing, arXiv 2506.08009). Without: one
full pass over all frames with a mask on the level of frames, for training and as the slow twin.
Shapes: latents (B, C, T, H, W) with T latent frames; tokens (B, L, heads * D), frame after frame.
"""

from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin as ModelMixin  # what diffusers looks for in a component's module
from diffusers.models.transformers.transformer_wan import WanAttention, WanTransformer3DModel, WanTransformerBlock
from diffusers.utils.peft_utils import apply_lora_scale
from torch import Tensor, nn

from vidaccel.machine.private_names import is_context_parallel
from vidaccel.memory.buffers import MemoryShape
from vidaccel.memory.rotary import RotaryTable, rotate
from vidaccel.models.split_attention import KeySplit, split_attention

Rotary = tuple[Tensor, Tensor]
KeysValues = tuple[Tensor, Tensor]
LayerView = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class PromptCache:
    """Keys and values of a prompt for the cross-attention of every block, each (B, text tokens, heads, D)."""

    layers: tuple[KeysValues, ...]

    def copy_(self, other: "PromptCache") -> None:
        """Take over the values of a prompt of the same shape, where they lie: passes that were captured go on."""
        for kept, new in zip(self.layers, other.layers, strict=True):
            for side, changed in zip(kept, new, strict=True):
                side.copy_(changed)


class AttendedMemory(Protocol):
    """What the transformer needs of a memory while it works on a chunk; `KeyValueMemory` is one."""

    @property
    def rotary(self) -> Rotary:
        """Cosines and sines of the chunk's tokens, two tensors (B, L, 1, D)."""
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
    """Self-attention over given tokens, or over a memory whose last tokens are those of the chunk.

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
    ) -> Tensor:
        assert rotary_emb is not None
        if getattr(attn, "fused_projections", False):
            query, key, value = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        else:
            query, key, value = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        query = attn.norm_q(query).unflatten(2, (attn.heads, -1))
        key = attn.norm_k(key).unflatten(2, (attn.heads, -1))
        value = value.unflatten(2, (attn.heads, -1))
        query, rotated = rotate(query, *rotary_emb), rotate(key, *rotary_emb)
        if view is not None:
            raw_keys, keys, values = view
            raw_keys.copy_(key)
            keys[:, -key.shape[1] :].copy_(rotated)
            values[:, -key.shape[1] :].copy_(value)
            rotated, value = keys, values
        if self.split is not None and view is not None and attention_mask is None:
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
        return attn.to_out[1](attn.to_out[0](attended.flatten(2, 3).type_as(query)))


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
    ) -> Tensor:
        """Tokens (B, L, dim) to tokens; temb: (B, frames or 1, 6, dim)."""
        modulation = (self.scale_shift_table + temb.float()).unsqueeze(3).unbind(2)
        shift, scale, gate, ff_shift, ff_scale, ff_gate = modulation  # each (B, frames or 1, 1, dim)
        frames = temb.shape[1]
        normed = self.norm1(hidden_states.float())
        normed = (normed.unflatten(1, (frames, -1)) * (1 + scale) + shift).flatten(1, 2).type_as(hidden_states)
        attended = self.attn1(normed, None, attention_mask, rotary_emb, view=view)
        hidden_states = _gated(hidden_states, attended, gate)

        normed = self.norm2(hidden_states.float()).type_as(hidden_states)
        hidden_states = hidden_states + self.attn2(normed, encoder_hidden_states, None, None)

        normed = self.norm3(hidden_states.float())
        normed = (normed.unflatten(1, (frames, -1)) * (1 + ff_scale) + ff_shift).flatten(1, 2).type_as(hidden_states)
        return _gated(hidden_states, self.ffn(normed), ff_gate)


def _gated(hidden_states: Tensor, change: Tensor, gate: Tensor) -> Tensor:
    gated = (change.float().unflatten(1, (gate.shape[1], -1)) * gate).flatten(1, 2)
    return (hidden_states.float() + gated).type_as(hidden_states)


class CausalWanTransformer3DModel(WanTransformer3DModel):
    """Wan's transformer, causal from chunk to chunk; loads every text-to-video checkpoint of `WanTransformer3DModel`.

    Keys are remembered before rotation, prompts can be cached (`cache_prompt`), and every frame may have its own
    timestep. Attention goes through diffusers' dispatcher, so `set_attention_backend` and `compile_repeated_blocks`
    work. Raises ValueError for a config with image embeddings.
    """

    _no_split_modules: Any = ("CausalWanTransformerBlock",)
    _repeated_blocks: Any = ("CausalWanTransformerBlock",)

    @register_to_config
    def __init__(
        self,
        patch_size: tuple[int, ...] = (1, 2, 2),
        num_attention_heads: int = 40,
        attention_head_dim: int = 128,
        in_channels: int = 16,
        out_channels: int = 16,
        text_dim: int = 4096,
        freq_dim: int = 256,
        ffn_dim: int = 13824,
        num_layers: int = 40,
        cross_attn_norm: bool = True,
        qk_norm: str | None = "rms_norm_across_heads",
        eps: float = 1e-6,
        image_dim: int | None = None,
        added_kv_proj_dim: int | None = None,
        rope_max_seq_len: int = 1024,
        pos_embed_seq_len: int | None = None,
    ) -> None:
        if image_dim is not None or added_kv_proj_dim is not None:
            raise ValueError(
                "A causal Wan transformer takes no image embeddings, and this config has them (`image_dim`, "
                "`added_kv_proj_dim`); use a text-to-video checkpoint and start the rollout from an image instead."
            )
        if patch_size[0] != 1:
            raise ValueError(f"`patch_size` must leave frames apart (first entry 1), got {tuple(patch_size)}.")
        super().__init__(
            patch_size=patch_size,
            num_attention_heads=num_attention_heads,
            attention_head_dim=attention_head_dim,
            in_channels=in_channels,
            out_channels=out_channels,
            text_dim=text_dim,
            freq_dim=freq_dim,
            ffn_dim=ffn_dim,
            num_layers=0,
            cross_attn_norm=cross_attn_norm,
            qk_norm=qk_norm,
            eps=eps,
            rope_max_seq_len=rope_max_seq_len,
        )
        dim = num_attention_heads * attention_head_dim
        self.register_to_config(num_layers=num_layers)  # type: ignore[no-untyped-call]
        self.blocks = nn.ModuleList(
            CausalWanTransformerBlock(dim, ffn_dim, num_attention_heads, qk_norm, cross_attn_norm, eps)
            for _ in range(num_layers)
        )

    @property
    def _config(self) -> Any:
        return self.config

    @property
    def in_channels(self) -> int:
        """Channels of the latents."""
        return int(self._config.in_channels)

    def memory_shape(self, height: int, width: int, *, batch_size: int = 1) -> MemoryShape:
        """Sizes of a memory for latents of `height` x `width`. Raises ValueError where they do not fit the patches."""
        _, rows, columns = self._config.patch_size
        if height % rows or width % columns:
            raise ValueError(f"The latent size {height} x {width} must be a multiple of the patch {rows} x {columns}.")
        return MemoryShape(
            num_layers=self._config.num_layers,
            batch_size=batch_size,
            tokens_per_frame=(height // rows) * (width // columns),
            num_heads=self._config.num_attention_heads,
            head_dim=self._config.attention_head_dim,
        )

    def rotary_table(self, height: int, width: int) -> RotaryTable:
        """Cosines and sines for latents of `height` x `width`. Raises ValueError beyond `rope_max_seq_len` patches."""
        _, rows, columns = (
            size // patch for size, patch in zip((1, height, width), self._config.patch_size, strict=True)
        )
        if max(rows, columns) > self._config.rope_max_seq_len:
            raise ValueError(
                f"Latents of {height} x {width} are {rows} x {columns} patches, and the transformer has positions for "
                f"{self._config.rope_max_seq_len} (`rope_max_seq_len`); take a smaller size."
            )
        rope: Any = self.rope
        tables = torch.stack([rope.freqs_cos, rope.freqs_sin]).float()
        time, row, column = tables.split([rope.t_dim, rope.h_dim, rope.w_dim], dim=-1)
        row = row[:, :rows, None].expand(-1, -1, columns, -1)
        column = column[:, None, :columns].expand(-1, rows, -1, -1)
        return RotaryTable(temporal=time, spatial=torch.cat([row, column], dim=-1).flatten(1, 2))

    def cache_prompt(self, encoder_hidden_states: Tensor) -> PromptCache:
        """Keys and values of a prompt (B, text tokens, text_dim) for every block."""
        text = self.condition_embedder.text_embedder(encoder_hidden_states)
        return PromptCache(tuple(_prompt_keys_values(block.attn2, text) for block in self.blocks))

    @apply_lora_scale("attention_kwargs")
    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor | PromptCache,
        encoder_hidden_states_image: None = None,
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
        *,
        memory: AttendedMemory | None = None,
        chunk_frames: int | None = None,
        frame_positions: Tensor | None = None,
        visibility: Tensor | None = None,
    ) -> Any:
        """Velocity for latents (B, C, T, H, W).

        timestep: (B,), or (B, T) with one for every frame.
        encoder_hidden_states: embeddings (B, text tokens, text_dim), or what `cache_prompt` made of them.
        memory: after its `begin_chunk`; then the latents are one chunk, and the memory gets its keys and values.
            Without gradients only.
        chunk_frames: without a memory, frames of a chunk: a frame sees its own chunk and those before; None: all.
        visibility: instead, (T, T) bool: whether the frame of the row sees that of the column.
        frame_positions: (T,) rotary positions, 0 to T - 1 by default.
        attention_kwargs: `scale` is the weight of LoRA layers in this pass, as in diffusers.

        Returns a `Transformer2DModelOutput`, or a tuple without `return_dict`. Raises ValueError for arguments that
        exclude each other.
        """
        batch_size, _, num_frames, height, width = hidden_states.shape
        mask: Tensor | None
        if memory is not None:
            self._check_cached(chunk_frames, frame_positions, visibility)
            rotary, mask = memory.rotary, memory.attention_mask
        else:
            rotary = self._rotary(hidden_states, frame_positions)
            mask = _token_mask(visibility, chunk_frames, like=hidden_states, tokens=rotary[0].shape[-3])
        prompt = encoder_hidden_states
        if not isinstance(prompt, PromptCache):
            prompt = self.cache_prompt(prompt)
        tokens = self.patch_embedding(hidden_states).flatten(2).transpose(1, 2).contiguous()
        temb, modulation = self._time(timestep.view(batch_size, -1), tokens.dtype)
        for index, block in enumerate(self.blocks):
            inputs = (tokens, prompt.layers[index], modulation, rotary, mask)
            if memory is not None:
                tokens = block(*inputs, memory.view(index))
            elif torch.is_grad_enabled() and self.gradient_checkpointing:
                tokens = cast(Any, self._gradient_checkpointing_func)(block, *inputs)
            else:
                tokens = block(*inputs)
        sample = self._to_latents(tokens, temb, (num_frames, height, width))
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def _check_cached(self, *others: object) -> None:
        if any(other is not None for other in others):
            raise ValueError(
                "`memory` decides what is seen: leave out `chunk_frames`, `frame_positions`, `visibility`."
            )
        if torch.is_grad_enabled():
            raise ValueError("A pass with `memory` writes in place and has no gradients; call it in `torch.no_grad()`.")
        if is_context_parallel(self):
            raise ValueError("A pass with `memory` runs on one device; context parallelism is for passes without.")

    def _rotary(self, hidden_states: Tensor, frame_positions: Tensor | None) -> Rotary:
        if frame_positions is None:
            return self.rope(hidden_states)  # through the module, where diffusers' context parallelism splits it
        cosines, sines = self.rotary_table(*hidden_states.shape[-2:]).at(frame_positions)
        return cosines[None], sines[None]

    def _time(self, timestep: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Time embeddings (B, frames or 1, dim) and the six modulations of the blocks (B, frames or 1, 6, dim)."""
        embedder = self.condition_embedder
        frequencies = embedder.timesteps_proj(timestep.flatten())
        frequencies = frequencies.to(next(embedder.time_embedder.parameters()).dtype)
        temb = embedder.time_embedder(frequencies).to(dtype)
        modulation = embedder.time_proj(embedder.act_fn(temb))
        frames = timestep.shape[1]
        return temb.unflatten(0, (-1, frames)), modulation.unflatten(0, (-1, frames)).unflatten(-1, (6, -1))

    def _to_latents(self, tokens: Tensor, temb: Tensor, size: tuple[int, int, int]) -> Tensor:
        table = self.scale_shift_table.to(temb.device)
        shift, scale = (table + temb.unsqueeze(2)).unsqueeze(3).unbind(2)  # each (B, frames or 1, 1, dim)
        normed = self.norm_out(tokens.float()).unflatten(1, (temb.shape[1], -1))
        tokens = self.proj_out((normed * (1 + scale) + shift).flatten(1, 2).type_as(tokens))
        grid = [side // patch for side, patch in zip(size, self._config.patch_size, strict=True)]
        patches = tokens.unflatten(1, grid).unflatten(-1, (*self._config.patch_size, -1))  # (B, T, h, w, pt, ph, pw, C)
        return patches.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)


def _prompt_keys_values(attn: Any, text: Tensor) -> KeysValues:
    if getattr(attn, "fused_projections", False):
        key, value = attn.to_kv(text).chunk(2, dim=-1)
    else:
        key, value = attn.to_k(text), attn.to_v(text)
    return attn.norm_k(key).unflatten(2, (attn.heads, -1)), value.unflatten(2, (attn.heads, -1))


def _token_mask(visibility: Tensor | None, chunk_frames: int | None, *, like: Tensor, tokens: int) -> Tensor | None:
    """The mask (1, 1, L, L) of a full pass over the frames of `like` (B, C, T, H, W); None where all is seen."""
    num_frames = like.shape[2]
    if visibility is not None:
        if chunk_frames is not None:
            raise ValueError("Give one of `chunk_frames` and `visibility`.")
        if visibility.shape != (num_frames, num_frames):
            raise ValueError(f"`visibility` must be ({num_frames}, {num_frames}), got {tuple(visibility.shape)}.")
    elif chunk_frames is None or chunk_frames >= num_frames:
        return None
    elif chunk_frames < 1:
        raise ValueError(f"`chunk_frames` must be at least 1, got {chunk_frames}.")
    else:
        chunk = torch.arange(num_frames, device=like.device) // chunk_frames
        visibility = chunk[:, None] >= chunk[None, :]
    per_frame = tokens // num_frames
    return visibility.repeat_interleave(per_frame, 0).repeat_interleave(per_frame, 1)[None, None]
