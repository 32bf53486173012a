"""The parts of STDiT3: embeddings, attention, the block that serves space and time, and the final layer."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.models.normalization import RMSNorm
from torch import Tensor, nn
from torch.nn import functional as F

from vidaccel.models.stdit3_positions import rotated

EPSILON = 1e-6
NUM_SINUSOIDS = 256


class STDiT3PatchEmbedding(nn.Module):
    """Latents (B, channels, F, H, W) to tokens (B, F, rows, columns, C); zeros fill up the last row and column."""

    def __init__(self, channels: int, hidden_size: int, patch_size: tuple[int, int, int]) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv3d(channels, hidden_size, kernel_size=patch_size, stride=patch_size)

    def forward(self, latents: Tensor) -> Tensor:
        _, tall, wide = self.patch_size
        height, width = latents.shape[-2:]
        return self.proj(F.pad(latents, (0, -width % wide, 0, -height % tall))).permute(0, 2, 3, 4, 1)


class STDiT3ScalarEmbedding(nn.Module):
    """One number per sample, (B,), to (B, C): a timestep or frames per second."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(NUM_SINUSOIDS, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, numbers: Tensor) -> Tensor:
        waves = get_timestep_embedding(numbers, NUM_SINUSOIDS, flip_sin_to_cos=True, downscale_freq_shift=0)
        return self.mlp(waves.to(numbers.dtype))


class STDiT3MLP(nn.Module):
    """Two linear layers around a GELU (tanh form)."""

    def __init__(self, size: int, inner_size: int, out_size: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(size, inner_size)
        self.act = nn.GELU(approximate="tanh")
        self.fc2 = nn.Linear(inner_size, out_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(hidden_states)))


class STDiT3CaptionEmbedding(nn.Module):
    """Text tokens (B, L, caption channels) to (B, L, C).

    y_embedding: what stands for no text, (max length, caption channels), in place of the text encoder's output.
    """

    def __init__(self, caption_channels: int, hidden_size: int, max_length: int) -> None:
        super().__init__()
        self.y_embedding: Tensor
        self.register_buffer("y_embedding", torch.randn(max_length, caption_channels) / caption_channels**0.5)
        self.y_proj = STDiT3MLP(caption_channels, hidden_size, hidden_size)

    def forward(self, text: Tensor) -> Tensor:
        return self.y_proj(text)


class STDiT3AttnProcessor:
    """Runs both kinds of attention through diffusers' dispatcher, so that every attention backend applies."""

    _attention_backend: Any = None
    _parallel_config: Any = None

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Attention of `attn` from (N, L, C) to itself or to text (N, L', C).

        attention_mask: (N, 1, 1, L'), true for text that counts.
        """
        query, key, value = attn.queries_keys_values(hidden_states, encoder_hidden_states)
        if rotary_emb is not None:
            query, key = rotated(query, rotary_emb), rotated(key, rotary_emb)
        attended = dispatch_attention_fn(
            query,
            key,
            value,
            attn_mask=attention_mask,
            backend=self._attention_backend,
            parallel_config=self._parallel_config if encoder_hidden_states is None else None,
        )
        return attn.proj(attended.flatten(2, 3).type_as(query))


class STDiT3SelfAttention(nn.Module, AttentionModuleMixin):
    """Attention among tokens, queries and keys normalised per head before they are turned."""

    _default_processor_cls: Any = STDiT3AttnProcessor
    _available_processors: Any = (STDiT3AttnProcessor,)
    _supports_qkv_fusion = False
    is_cross_attention = False

    def __init__(self, hidden_size: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.q_norm = RMSNorm(hidden_size // heads, eps=EPSILON)
        self.k_norm = RMSNorm(hidden_size // heads, eps=EPSILON)
        self.proj = nn.Linear(hidden_size, hidden_size)
        self.processor: Any = STDiT3AttnProcessor()

    def queries_keys_values(self, hidden_states: Tensor, _: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Each (N, L, heads, head size)."""
        query, key, value = self.qkv(hidden_states).unflatten(2, (3, self.heads, -1)).unbind(2)
        return self.q_norm(query), self.k_norm(key), value

    def forward(self, hidden_states: Tensor, rotary_emb: tuple[Tensor, Tensor] | None = None) -> Tensor:
        return self.processor(self, hidden_states, rotary_emb=rotary_emb)


class STDiT3CrossAttention(nn.Module, AttentionModuleMixin):
    """Attention from tokens to text."""

    _default_processor_cls: Any = STDiT3AttnProcessor
    _available_processors: Any = (STDiT3AttnProcessor,)
    _supports_qkv_fusion = False
    is_cross_attention = True

    def __init__(self, hidden_size: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_linear = nn.Linear(hidden_size, hidden_size)
        self.kv_linear = nn.Linear(hidden_size, 2 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)
        self.processor: Any = STDiT3AttnProcessor()

    def queries_keys_values(self, hidden_states: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Each (N, L, heads, head size)."""
        key, value = self.kv_linear(text).unflatten(2, (2, self.heads, -1)).unbind(2)
        return self.q_linear(hidden_states).unflatten(2, (self.heads, -1)), key, value

    def forward(self, hidden_states: Tensor, text: Tensor, text_mask: Tensor | None = None) -> Tensor:
        return self.processor(self, hidden_states, text, text_mask)


class STDiT3Block(nn.Module):
    """Self-attention over space or over time, attention to the text (no norm, no gate), and an MLP."""

    def __init__(self, hidden_size: int, heads: int, mlp_size: int, *, temporal: bool) -> None:
        super().__init__()
        self.temporal = temporal
        self.norm1 = nn.LayerNorm(hidden_size, eps=EPSILON, elementwise_affine=False)
        self.attn = STDiT3SelfAttention(hidden_size, heads)
        self.cross_attn = STDiT3CrossAttention(hidden_size, heads)
        self.norm2 = nn.LayerNorm(hidden_size, eps=EPSILON, elementwise_affine=False)
        self.mlp = STDiT3MLP(hidden_size, mlp_size, hidden_size)
        self.scale_shift_table = nn.Parameter(torch.randn(6, hidden_size) / hidden_size**0.5)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        encoder_attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Tokens (B, F, S, C) to tokens; `temb` is (B, F or 1, 6, C), the text (B, L, C)."""
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = (self.scale_shift_table + temb).unsqueeze(3).unbind(2)
        modulated = self.norm1(hidden_states) * (1 + scale) + shift
        hidden_states = hidden_states + gate * self._attended(modulated, rotary_emb)
        text_part = self.cross_attn(hidden_states.flatten(1, 2), encoder_hidden_states, encoder_attention_mask)
        hidden_states = hidden_states + text_part.view_as(hidden_states)
        modulated = self.norm2(hidden_states) * (1 + mlp_scale) + mlp_shift
        return hidden_states + mlp_gate * self.mlp(modulated)

    def _attended(self, tokens: Tensor, rotary_emb: tuple[Tensor, Tensor] | None) -> Tensor:
        batch = tokens.shape[0]
        if not self.temporal:
            return self.attn(tokens.flatten(0, 1)).unflatten(0, (batch, -1))
        over_time = self.attn(tokens.transpose(1, 2).flatten(0, 1), rotary_emb)
        return over_time.unflatten(0, (batch, -1)).transpose(1, 2)


class STDiT3FinalLayer(nn.Module):
    """Tokens (B, F, S, C) to patches (B, F, S, out size)."""

    def __init__(self, hidden_size: int, out_size: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, eps=EPSILON, elementwise_affine=False)
        self.scale_shift_table = nn.Parameter(torch.randn(2, hidden_size) / hidden_size**0.5)
        self.linear = nn.Linear(hidden_size, out_size)

    def forward(self, tokens: Tensor, temb: Tensor, clean_temb: Tensor | None, x_mask: Tensor | None) -> Tensor:
        """Frames that `x_mask` (B, F) says are clean are modulated a second time, on top of the first.

        That looks like a slip in the original, but the weights were trained with it.
        """
        tokens = self._modulated(tokens, temb)
        if x_mask is not None and clean_temb is not None:
            tokens = torch.where(x_mask[:, :, None, None], tokens, self._modulated(tokens, clean_temb))
        return self.linear(tokens)

    def _modulated(self, tokens: Tensor, temb: Tensor) -> Tensor:
        shift, scale = (self.scale_shift_table + temb[:, None]).unflatten(1, (2, 1, 1)).unbind(1)
        return self.norm_final(tokens) * (1 + scale) + shift
