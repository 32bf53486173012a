"""STDiT3, the transformer of Open-Sora 1.2 (`hpcai-tech/OpenSora-STDiT-v3`), under the names of its published weights.

Pairs of blocks: one attends over the places of each frame, the next over the frames at each place; both attend to the
text. Shapes: B batch, F latent frames, S places of a frame (rows first), L text tokens, C hidden size, H and W latent
height and width. The output is the velocity `clean - noise`, the opposite of diffusers' sign, and as many channels of a
learned sigma, which no sampler uses.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from vidaccel.models.stdit3_blocks import (
    STDiT3Block,
    STDiT3CaptionEmbedding,
    STDiT3FinalLayer,
    STDiT3PatchEmbedding,
    STDiT3ScalarEmbedding,
)
from vidaccel.models.stdit3_positions import STDiT3TemporalPositions, spatial_positions


class STDiT3(ModelMixin, ConfigMixin, AttentionMixin, CacheMixin, PeftAdapterMixin):  # type: ignore[misc]
    """Spatial-temporal diffusion transformer of Open-Sora 1.2; the defaults are STDiT3-XL/2.

    in_channels: latent channels; twice as many come out.
    patch_size: (frames, rows, columns) of latents in one token; one frame is the only choice.
    depth: pairs of blocks.
    caption_channels: size of a text token as the text encoder gives it.
    model_max_length: text tokens, and learned tokens that stand for no text.
    input_sq_size: side of the square, in pixels, whose positions count as they are; other sizes are scaled to it.
    round_positions: keep the frequencies of both position embeddings in the model's number format, as the original
        does in training and sampling. Changes nothing in float32; False is more exact and not what the weights know.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules: Any = ("STDiT3Block",)
    _repeated_blocks: Any = ("STDiT3Block",)
    _skip_layerwise_casting_patterns: Any = (
        "x_embedder",
        "t_embedder",
        "fps_embedder",
        "t_block",
        "y_embedder",
        "final_layer",
        "norm",
        "rope",
    )

    @register_to_config
    def __init__(
        self,
        in_channels: int = 4,
        patch_size: Sequence[int] = (1, 2, 2),
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        caption_channels: int = 4096,
        model_max_length: int = 300,
        input_sq_size: int = 512,
        round_positions: bool = True,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        frames, tall, wide = _checked(patch_size, hidden_size, num_heads)
        self.out_channels = 2 * in_channels
        self.patch_size = (tall, wide)
        self.input_side = input_sq_size
        self.round_positions = round_positions
        self.rope = STDiT3TemporalPositions(hidden_size // num_heads, rounded=round_positions)
        self.x_embedder = STDiT3PatchEmbedding(in_channels, hidden_size, (frames, tall, wide))
        self.t_embedder = STDiT3ScalarEmbedding(hidden_size)
        self.fps_embedder = STDiT3ScalarEmbedding(hidden_size)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))
        self.y_embedder = STDiT3CaptionEmbedding(caption_channels, hidden_size, model_max_length)
        mlp_size = int(hidden_size * mlp_ratio)
        self.spatial_blocks = nn.ModuleList(
            STDiT3Block(hidden_size, num_heads, mlp_size, temporal=False) for _ in range(depth)
        )
        self.temporal_blocks = nn.ModuleList(
            STDiT3Block(hidden_size, num_heads, mlp_size, temporal=True) for _ in range(depth)
        )
        self.final_layer = STDiT3FinalLayer(hidden_size, tall * wide * self.out_channels)
        self.gradient_checkpointing = False

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor | None = None,
        x_mask: Tensor | None = None,
        fps: float | Tensor = 24.0,
        height: float | Tensor | None = None,
        width: float | Tensor | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Velocity (first half of the channels) and learned sigma, (B, 2 * in_channels, F, H, W) in float32.

        hidden_states: noisy latents, (B, in_channels, F, H, W); H and W need not be even.
        timestep: 1000 times the share of noise, (B,).
        encoder_hidden_states: text tokens as the encoder gives them, (B, L, caption_channels) or (B, 1, L, ...).
        encoder_attention_mask: (B, L), true for tokens that count; None if all do. With fewer rows, say one for both
            branches of guidance, they are repeated in order.
        x_mask: (B, F), true for frames that are generated; the others are given clean and stay. None if all are.
        fps: frames per second; 120 stands for an image.
        height, width: size of the video in pixels; by default 8 times that of the latents.
        """
        _, _, num_frames, rows, columns = hidden_states.shape
        dtype = self.x_embedder.proj.weight.dtype
        height, width = _number(height, 8 * rows), _number(width, 8 * columns)
        tokens = self.x_embedder(hidden_states.to(dtype))  # (B, F, rows, columns, C)
        grid = tokens.shape[2:4]
        tokens = tokens.flatten(2, 3) + spatial_positions(
            grid,
            channels=tokens.shape[-1],
            scale=math.sqrt(height * width) / self.input_side,
            frequency_dtype=dtype if self.round_positions else torch.float32,
            device=tokens.device,
        ).to(dtype)
        embedded, modulation = self._time_conditions(timestep.to(dtype), fps, x_mask)
        text, text_mask = self._text(encoder_hidden_states.to(dtype), encoder_attention_mask)
        rotary_emb = self.rope(num_frames)
        for spatial, temporal in zip(self.spatial_blocks, self.temporal_blocks, strict=True):
            tokens = self._run(spatial, tokens, text, modulation, text_mask, None)
            tokens = self._run(temporal, tokens, text, modulation, text_mask, rotary_emb)
        output = self._unpatched(self.final_layer(tokens, *embedded, x_mask), grid)[..., :rows, :columns].float()
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)

    def _time_conditions(
        self, timestep: Tensor, fps: float | Tensor, x_mask: Tensor | None
    ) -> tuple[tuple[Tensor, Tensor | None], Tensor]:
        """Embeddings (B, C) of the timestep and of a clean frame, and what the blocks take, (B, F or 1, 6, C)."""
        batch = timestep.shape[0]
        rate = torch.as_tensor(fps, device=timestep.device, dtype=timestep.dtype).flatten()
        rate_emb = self.fps_embedder(rate.repeat(batch // rate.shape[0]))
        embedded = self.t_embedder(timestep) + rate_emb
        modulation = self.t_block(embedded).unflatten(1, (1, 6, -1))
        if x_mask is None:
            return (embedded, None), modulation
        clean = self.t_embedder(torch.zeros_like(timestep)) + rate_emb
        clean_modulation = self.t_block(clean).unflatten(1, (1, 6, -1))
        return (embedded, clean), torch.where(x_mask[:, :, None, None], modulation, clean_modulation)

    def _text(self, text: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        text = self.y_embedder(text.squeeze(1) if text.ndim == 4 else text)
        if mask is None:
            return text, None
        return text, mask.bool().repeat(text.shape[0] // mask.shape[0], 1)[:, None, None]

    def _run(self, block: nn.Module, *arguments: Any) -> Tensor:
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return cast(Any, self._gradient_checkpointing_func)(block, *arguments)
        return block(*arguments)

    def _unpatched(self, tokens: Tensor, grid: Sequence[int]) -> Tensor:
        """(B, F, S, patch * channels), channels fastest, to (B, channels, F, H, W)."""
        return (
            tokens.unflatten(3, (*self.patch_size, self.out_channels))
            .unflatten(2, tuple(grid))
            .permute(0, 6, 1, 2, 4, 3, 5)
            .flatten(5, 6)
            .flatten(3, 4)
        )


def _number(value: float | Tensor | None, otherwise: int) -> float:
    if value is None:
        return float(otherwise)
    return float(value.flatten()[0]) if isinstance(value, Tensor) else float(value)


def _checked(patch_size: Sequence[int], hidden_size: int, num_heads: int) -> tuple[int, int, int]:
    if len(patch_size) != 3 or patch_size[0] != 1:
        raise ValueError(f"`patch_size` must be (1, rows, columns); got {tuple(patch_size)}.")
    if hidden_size % 4 or hidden_size % (2 * num_heads):
        raise ValueError(
            f"`hidden_size` must be a multiple of 4 and of twice `num_heads` ({num_heads}); got {hidden_size}."
        )
    frames, rows, columns = patch_size
    return frames, rows, columns
