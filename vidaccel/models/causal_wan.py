"""A chunk-causal Wan transformer: the weights and config of diffusers' `WanTransformer3DModel`, run chunk after chunk.

Three ways that agree. With a memory: one chunk attends to what is remembered and to itself, and its keys and values are
written into the memory's buffers (Context Forcing, arXiv 2602.06028; Self-Forcing, arXiv 2506.08009). With a history:
the same with gradients, for training. Without either: one full pass over all frames with a mask on the level of
frames, the slow twin.
Shapes: latents (B, C, T, H, W) with T latent frames; tokens (B, L, heads * D), frame after frame.
"""

from collections.abc import Sequence
from typing import Any, Literal, cast, get_args

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import TimestepEmbedding
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin as ModelMixin  # what diffusers looks for in a component's module
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from diffusers.utils.peft_utils import apply_lora_scale
from torch import Tensor, nn

from vidaccel.machine.private_names import is_context_parallel
from vidaccel.memory.buffers import MemoryShape
from vidaccel.memory.camera import Camera
from vidaccel.memory.rotary import RotaryTable
from vidaccel.models.causal_blocks import (
    AttendedMemory,
    CausalWanTransformerBlock,
    History,
    KeysValues,
    PromptCache,
    Rotary,
)

CleanPass = Literal["chunk", "frame"]
_MOTION_SCALE = 0.5  # of columns a latent frame: a pan of one screen in one chunk moves the embedded model by 2.7


class CausalWanTransformer3DModel(WanTransformer3DModel):
    """Wan's transformer, causal from chunk to chunk; loads every text-to-video checkpoint of `WanTransformer3DModel`.

    camera_dim: width of the layers that take the camera's motion; None: the student is not told of a camera.
    clean_pass: what a finished chunk attends to while it is remembered: "chunk", what it attended to while it was made,
        or "frame": every frame to itself alone, so that what is remembered of it does not depend on what came before.
    kv_routing, depth_every: how the layers were trained to read each other's memory, which changes no pass: with which
        probability one of an earlier layer (arXiv 2604.22782), or the one of every so many layers; 0 and 1: never.
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
        camera_dim: int | None = None,
        clean_pass: CleanPass = "chunk",
        kv_routing: float = 0.0,
        depth_every: int = 1,
    ) -> None:
        if image_dim is not None or added_kv_proj_dim is not None:
            raise ValueError(
                "A causal Wan transformer takes no image embeddings, and this config has them (`image_dim`, "
                "`added_kv_proj_dim`); use a text-to-video checkpoint and start the rollout from an image instead."
            )
        if patch_size[0] != 1:
            raise ValueError(f"`patch_size` must leave frames apart (first entry 1), got {tuple(patch_size)}.")
        if clean_pass not in get_args(CleanPass):
            raise ValueError(f"`clean_pass` must be one of {', '.join(get_args(CleanPass))}, got {clean_pass!r}.")
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
        if camera_dim is not None:
            self.camera_embedder = TimestepEmbedding(2, camera_dim, out_dim=dim)
            for parameter in self.camera_embedder.linear_2.parameters():
                nn.init.zeros_(parameter)  # a student that begins from other weights begins as it was

    @property
    def _config(self) -> Any:
        return self.config

    @property
    def in_channels(self) -> int:
        """Channels of the latents."""
        return int(self._config.in_channels)

    @property
    def takes_camera(self) -> bool:
        """Whether the student is told where its camera stands and how it moves."""
        return self._config.camera_dim is not None

    @property
    def clean_pass(self) -> CleanPass:
        """What a finished chunk attends to while it is remembered."""
        return cast(CleanPass, self._config.clean_pass)

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
            has_camera=self.takes_camera,
            num_columns=width // columns,
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
        return RotaryTable(
            temporal=time,
            spatial=torch.cat([row, column], dim=-1).flatten(1, 2),
            column_frequencies=torch.atan2(tables[1, 1, -rope.w_dim :], tables[0, 1, -rope.w_dim :]),
        )

    def cache_prompt(self, encoder_hidden_states: Tensor) -> PromptCache:
        """Keys and values of a prompt (B, text tokens, text_dim) for every block."""
        text = self.condition_embedder.text_embedder(encoder_hidden_states)
        return PromptCache(tuple(_prompt_keys_values(block.attn2, text) for block in self.blocks))

    def remember(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: PromptCache,
        *,
        positions: Tensor,
        camera: Camera | None = None,
        mask: Tensor | None = None,
    ) -> History:
        """What a chunk can attend to of finished frames (B, C, S, H, W), each encoded alone; with gradients.

        positions: (S,) or (B, S) rotary positions. mask: (B, S) bool, which of the frames there are; None: all.
        The student must be one whose `clean_pass` is "frame". Raises ValueError for another, and for a camera that
        it does not take.
        """
        if self.clean_pass != "frame":
            raise ValueError(
                f"`remember` encodes frames alone, and the `clean_pass` of this student is {self.clean_pass!r}; "
                "use a memory."
            )
        batch_size, _, num_frames, _, _ = hidden_states.shape
        tokens = self._tokens(hidden_states)
        rotary = self._rotary(hidden_states, positions, camera)
        times = hidden_states.new_zeros(batch_size, num_frames, dtype=torch.float32)
        _, modulation = self._time(
            times, tokens.dtype, self._motions(None if camera is None else camera.motions, times.shape)
        )
        layers: list[KeysValues] = []
        for block, prompt in zip(self.blocks, encoder_hidden_states.layers, strict=True):
            tokens, keys, values = self._run(block, tokens, prompt, modulation, rotary, None, None, None, num_frames)
            layers.append((keys, values))
        if mask is not None:
            mask = mask.repeat_interleave(tokens.shape[1] // num_frames, 1)
        return History(tuple(layers), mask)

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
        history: History | None = None,
        alone: bool = False,
        chunk_frames: int | None = None,
        frame_positions: Tensor | None = None,
        visibility: Tensor | None = None,
        camera: Camera | None = None,
    ) -> Any:
        """Velocity for latents (B, C, T, H, W).

        timestep: (B,), or (B, T) with one for every frame.
        encoder_hidden_states: embeddings (B, text tokens, text_dim), or what `cache_prompt` made of them.
        memory: after its `begin_chunk`; then the latents are one chunk, and the memory gets its keys and values.
            Without gradients only; positions and camera are the memory's.
        history: what `remember` made of earlier frames; the latents are a chunk that sees it and itself.
        alone: every frame sees itself only; with `memory` this is the clean pass "frame".
        chunk_frames: without a memory, frames of a chunk: a frame sees its own chunk and those before; None: all.
        visibility: instead, (T, T) bool: whether the frame of the row sees that of the column.
        frame_positions: (T,) or (B, T) rotary positions, 0 to T - 1 by default.
        camera: of the T frames; None: it holds at 0.
        attention_kwargs: `scale` is the weight of LoRA layers in this pass, as in diffusers.

        Returns a `Transformer2DModelOutput`, or a tuple without `return_dict`. Raises ValueError for arguments that
        exclude each other, and for a camera that the student does not take.
        """
        batch_size, _, num_frames, height, width = hidden_states.shape
        mask: Tensor | None
        if memory is not None:
            self._check_cached(history, chunk_frames, frame_positions, visibility, camera)
            rotary, mask, motions = memory.rotary, memory.attention_mask, memory.motions
            if alone:  # where a frame stands says nothing about itself: not even a last bit is to depend on it
                rotary = self._rotary(hidden_states, hidden_states.new_zeros(num_frames, dtype=torch.long), None)
        else:
            rotary = self._rotary(hidden_states, frame_positions, camera)
            motions = None if camera is None else camera.motions
            mask = self._mask(hidden_states, rotary, history, chunk_frames, visibility)
        prompt = encoder_hidden_states
        if not isinstance(prompt, PromptCache):
            prompt = self.cache_prompt(prompt)
        tokens = self._tokens(hidden_states)
        motions = self._motions(motions, (batch_size, num_frames))
        temb, modulation = self._time(timestep.view(batch_size, -1), tokens.dtype, motions)
        for index, block in enumerate(self.blocks):
            view = None if memory is None else memory.view(index)
            past = None if history is None else history.layers[index]
            frames = num_frames if alone else 0
            tokens = self._run(block, tokens, prompt.layers[index], modulation, rotary, mask, view, past, frames)
            tokens = tokens[0] if isinstance(tokens, tuple) else tokens
        sample = self._to_latents(tokens, temb, (num_frames, height, width))
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def _run(self, block: nn.Module, *inputs: Any) -> Any:
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return cast(Any, self._gradient_checkpointing_func)(block, *inputs)
        return block(*inputs)

    def _tokens(self, hidden_states: Tensor) -> Tensor:
        tokens: Tensor = self.patch_embedding(hidden_states).flatten(2).transpose(1, 2).contiguous()
        return tokens

    def _mask(
        self,
        hidden_states: Tensor,
        rotary: Rotary,
        history: History | None,
        chunk_frames: int | None,
        visibility: Tensor | None,
    ) -> Tensor | None:
        tokens = rotary[0].shape[-3]
        if history is None:
            return _token_mask(visibility, chunk_frames, like=hidden_states, tokens=tokens)
        if chunk_frames is not None or visibility is not None:
            raise ValueError("`history` decides what is seen: leave out `chunk_frames` and `visibility`.")
        return history.seen_with(tokens)

    def _motions(self, known: Tensor | None, shape: Sequence[int]) -> Tensor | None:
        """The motions that are known, or of a camera that holds; None for a student that is not told."""
        if known is not None or not self.takes_camera:
            return known
        return self.patch_embedding.weight.new_zeros(*shape)

    def _check_cached(self, *others: object) -> None:
        if any(other is not None for other in others):
            raise ValueError(
                "`memory` decides what is seen and where: leave out `history`, `chunk_frames`, `frame_positions`, "
                "`visibility` and `camera`."
            )
        if torch.is_grad_enabled():
            raise ValueError("A pass with `memory` writes in place and has no gradients; call it in `torch.no_grad()`.")
        if is_context_parallel(self):
            raise ValueError("A pass with `memory` runs on one device; context parallelism is for passes without.")

    def _rotary(self, hidden_states: Tensor, frame_positions: Tensor | None, camera: Camera | None) -> Rotary:
        if camera is not None and not self.takes_camera:
            raise ValueError("This student is not told of a camera (`camera_dim` of its config is None); leave it out.")
        if frame_positions is None and camera is None:
            return self.rope(hidden_states)  # through the module, where diffusers' context parallelism splits it
        if frame_positions is None:
            frame_positions = torch.arange(hidden_states.shape[2], device=hidden_states.device)
        if camera is not None:
            frame_positions = frame_positions.expand(camera.columns.shape)
        table = self.rotary_table(*hidden_states.shape[-2:])
        cosines, sines = table.at(frame_positions, None if camera is None else camera.columns)
        return (cosines, sines) if frame_positions.ndim == 2 else (cosines[None], sines[None])

    def _time(self, timestep: Tensor, dtype: torch.dtype, motions: Tensor | None) -> tuple[Tensor, Tensor]:
        """Time embeddings (B, frames or 1, dim) and the six modulations of the blocks (B, frames or 1, 6, dim)."""
        embedder = self.condition_embedder
        frequencies = embedder.timesteps_proj(timestep.flatten())
        frequencies = frequencies.to(next(embedder.time_embedder.parameters()).dtype)
        temb = embedder.time_embedder(frequencies).to(dtype).unflatten(0, timestep.shape)
        if motions is not None:
            scaled = (motions * _MOTION_SCALE).to(self.camera_embedder.linear_1.weight.dtype)
            temb = temb + self.camera_embedder(torch.stack([scaled, scaled.abs()], dim=-1)).to(dtype)
        modulation = embedder.time_proj(embedder.act_fn(temb))
        return temb, modulation.unflatten(-1, (6, -1))

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
