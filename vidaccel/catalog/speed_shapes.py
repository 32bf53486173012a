"""Published transformer shapes and the call of the pipeline around each, as data: the rows of the speed benchmarks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal

from vidaccel.catalog.families.family import Component
from vidaccel.catalog.pipelines import STUDENT_TRANSFORMER

Fill = Literal["noise", "ones"]


@dataclass(frozen=True, kw_only=True)
class Embedding:
    """A tensor given to the pipeline in place of what an encoder makes: its size without the batch of 1."""

    size: tuple[int, ...]
    fill: Fill = "noise"


@dataclass(frozen=True, kw_only=True)
class SpeedShape:
    """One transformer at its published size, and diffusers' own loop around it.

    pipeline: `module:Name` of the pipeline class; parts that are not named here are left out (None).
    transformer, parts: made from their configuration. The transformer alone is timed.
    embeddings: tensors of the call, one batch entry each.
    arguments: further arguments of the call.
    guidance: where the guidance scale goes: a call's argument, or the `guider` part of the pipeline.
    counted: the first part of the transformer that runs in every forward and is no repeated (compilable) block.
    causal: `module:Name` of the causal form of the transformer, where there is one.
    frame_step, frame_offset: a number of frames is a multiple of the first plus the second.
    pixel_step: height and width are multiples of it.
    """

    pipeline: str
    transformer: Component
    embeddings: Mapping[str, Embedding]
    counted: str
    guidance_scale: float
    num_frames: int
    height: int
    width: int
    parts: Mapping[str, Component]
    arguments: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    guidance: Literal["call", "guider"] = "call"
    causal: str | None = None
    frame_step: int = 4
    frame_offset: int = 1
    pixel_step: int = 16

    def tiny(self, config: Mapping[str, Any], sizes: Mapping[str, tuple[int, ...]]) -> SpeedShape:
        """The same row around a transformer of another configuration, with embeddings of other sizes."""
        embeddings = {name: replace(one, size=sizes.get(name, one.size)) for name, one in self.embeddings.items()}
        transformer = Component(kind=self.transformer.kind, config=config)
        return replace(self, transformer=transformer, embeddings=embeddings, num_frames=5, height=32, width=32)


_WAN_TEXT = MappingProxyType(dict.fromkeys(("prompt_embeds", "negative_prompt_embeds"), Embedding(size=(512, 4096))))
_WAN_1_3B = SpeedShape(
    pipeline="diffusers:WanPipeline",
    transformer=Component(
        kind="diffusers:WanTransformer3DModel",
        config={
            "num_attention_heads": 12,
            "attention_head_dim": 128,
            "num_layers": 30,
            "ffn_dim": 8960,
            "text_dim": 4096,
            "freq_dim": 256,
        },
    ),
    parts={
        "scheduler": Component(
            kind="diffusers:UniPCMultistepScheduler",
            config={"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0},
        )
    },
    embeddings=_WAN_TEXT,
    causal=STUDENT_TRANSFORMER,
    counted="patch_embedding",
    guidance_scale=5.0,
    num_frames=81,
    height=480,
    width=832,
)
_WAN_14B = replace(
    _WAN_1_3B,
    transformer=Component(
        kind=_WAN_1_3B.transformer.kind,
        config={**_WAN_1_3B.transformer.config, "num_attention_heads": 40, "num_layers": 40, "ffn_dim": 13824},
    ),
)
_HUNYUAN = SpeedShape(
    pipeline="diffusers:HunyuanVideoPipeline",
    transformer=Component(
        kind="diffusers:HunyuanVideoTransformer3DModel",
        config={
            "num_attention_heads": 24,
            "attention_head_dim": 128,
            "num_layers": 20,
            "num_single_layers": 40,
            "num_refiner_layers": 2,
            "text_embed_dim": 4096,
            "pooled_projection_dim": 768,
            "guidance_embeds": True,
        },
    ),
    parts={"scheduler": Component(kind="diffusers:FlowMatchEulerDiscreteScheduler", config={"shift": 7.0})},
    embeddings={
        "prompt_embeds": Embedding(size=(256, 4096)),
        "prompt_attention_mask": Embedding(size=(256,), fill="ones"),
        "pooled_prompt_embeds": Embedding(size=(768,)),
    },
    counted="time_text_embed",
    guidance_scale=6.0,
    num_frames=129,
    height=720,
    width=1280,
)
_HUNYUAN_15 = SpeedShape(
    pipeline="diffusers:HunyuanVideo15Pipeline",
    transformer=Component(
        kind="diffusers:HunyuanVideo15Transformer3DModel",
        config={"num_attention_heads": 16, "attention_head_dim": 128, "num_layers": 54, "task_type": "t2v"},
    ),
    parts={
        "scheduler": Component(kind="diffusers:FlowMatchEulerDiscreteScheduler", config={"shift": 5.0}),
        "guider": Component(kind="diffusers:ClassifierFreeGuidance"),
        # Never called; the pipeline reads its number of latent channels. Published strides, smallest widths.
        "vae": Component(
            kind="diffusers:AutoencoderKLHunyuanVideo15",
            config={"block_out_channels": (32, 32, 32, 32, 32), "layers_per_block": 1},
        ),
    },
    embeddings={
        "prompt_embeds": Embedding(size=(1000, 3584)),
        "prompt_embeds_mask": Embedding(size=(1000,), fill="ones"),
        "prompt_embeds_2": Embedding(size=(256, 1472)),
        "prompt_embeds_mask_2": Embedding(size=(256,), fill="ones"),
        "negative_prompt_embeds": Embedding(size=(1000, 3584)),
        "negative_prompt_embeds_mask": Embedding(size=(1000,), fill="ones"),
        "negative_prompt_embeds_2": Embedding(size=(256, 1472)),
        "negative_prompt_embeds_mask_2": Embedding(size=(256,), fill="ones"),
    },
    counted="time_embed",
    guidance="guider",
    guidance_scale=6.0,
    num_frames=121,
    height=480,
    width=832,
)
_LTX = SpeedShape(
    pipeline="diffusers:LTXPipeline",
    transformer=Component(
        kind="diffusers:LTXVideoTransformer3DModel",
        config={"num_attention_heads": 32, "attention_head_dim": 64, "num_layers": 28},
    ),
    parts={
        "scheduler": Component(
            kind="diffusers:FlowMatchEulerDiscreteScheduler",
            config={
                "use_dynamic_shifting": True,
                "base_image_seq_len": 1024,
                "max_image_seq_len": 4096,
                "base_shift": 0.95,
                "max_shift": 2.05,
                "shift_terminal": 0.1,
            },
        )
    },
    embeddings={
        "prompt_embeds": Embedding(size=(128, 4096)),
        "prompt_attention_mask": Embedding(size=(128,), fill="ones"),
        "negative_prompt_embeds": Embedding(size=(128, 4096)),
        "negative_prompt_attention_mask": Embedding(size=(128,), fill="ones"),
    },
    counted="proj_in",
    guidance_scale=3.0,
    num_frames=161,
    height=512,
    width=704,
    frame_step=8,
    pixel_step=32,
)
_OPEN_SORA = SpeedShape(
    pipeline="vidaccel.pipelines.open_sora:OpenSoraPipeline",
    transformer=Component(
        kind="vidaccel.models.stdit3:STDiT3",
        config={"hidden_size": 1152, "depth": 28, "num_heads": 16, "caption_channels": 4096, "model_max_length": 300},
    ),
    parts={
        "scheduler": Component(kind="diffusers:FlowMatchEulerDiscreteScheduler", config={"shift": 1.0}),
        # Never called; the pipeline reads its strides.
        "vae": Component(
            kind="vidaccel.models.open_sora_vae:AutoencoderKLOpenSora",
            config={
                "block_out_channels": (8, 8, 8, 8),
                "layers_per_block": 1,
                "norm_num_groups": 4,
                "temporal_channels": (32, 32, 32, 32),
                "temporal_res_blocks": 1,
            },
        ),
    },
    embeddings={"prompt_embeds": Embedding(size=(300, 4096))},
    counted="x_embedder",
    guidance_scale=7.0,
    num_frames=51,
    height=480,
    width=854,
    frame_step=17,
    frame_offset=0,
    pixel_step=2,
)
_TOY_BLOCKS = MappingProxyType({"num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 2})
_TOY_TEXT = (8, 16)
_TOY_AXES = MappingProxyType({"rope_axes_dim": (4, 4, 4), "num_refiner_layers": 1, "text_embed_dim": 16})
SHAPES: Mapping[str, SpeedShape] = MappingProxyType(
    {
        "wan2.1-1.3b": _WAN_1_3B,
        "wan2.1-14b": _WAN_14B,
        "hunyuan-video": _HUNYUAN,
        "hunyuan-video-1.5": _HUNYUAN_15,
        "ltx": _LTX,
        "open-sora-1.2": _OPEN_SORA,
        "toy": _WAN_1_3B.tiny(
            {**_TOY_BLOCKS, "ffn_dim": 32, "text_dim": 16, "freq_dim": 32},
            {"prompt_embeds": _TOY_TEXT, "negative_prompt_embeds": _TOY_TEXT},
        ),
        "toy-hunyuan-video": _HUNYUAN.tiny(
            {**_TOY_BLOCKS, **_TOY_AXES, "num_single_layers": 1, "pooled_projection_dim": 8},
            {"prompt_embeds": _TOY_TEXT, "prompt_attention_mask": (8,), "pooled_prompt_embeds": (8,)},
        ),
        "toy-hunyuan-video-1.5": _HUNYUAN_15.tiny(
            {**_TOY_BLOCKS, **_TOY_AXES, "text_embed_2_dim": 8, "image_embed_dim": 8, "task_type": "t2v"},
            {
                **dict.fromkeys(("prompt_embeds", "negative_prompt_embeds"), _TOY_TEXT),
                **dict.fromkeys(("prompt_embeds_mask", "negative_prompt_embeds_mask"), (8,)),
                **dict.fromkeys(("prompt_embeds_2", "negative_prompt_embeds_2"), (4, 8)),
                **dict.fromkeys(("prompt_embeds_mask_2", "negative_prompt_embeds_mask_2"), (4,)),
            },
        ),
        "toy-ltx": replace(
            _LTX.tiny(
                {**_TOY_BLOCKS, "cross_attention_dim": 24, "caption_channels": 16, "in_channels": 8, "out_channels": 8},
                {
                    **dict.fromkeys(("prompt_embeds", "negative_prompt_embeds"), _TOY_TEXT),
                    **dict.fromkeys(("prompt_attention_mask", "negative_prompt_attention_mask"), (8,)),
                },
            ),
            num_frames=9,
            height=64,
            width=64,
        ),
        "toy-open-sora-1.2": replace(
            _OPEN_SORA.tiny(
                {"hidden_size": 24, "depth": 1, "num_heads": 2, "caption_channels": 16, "model_max_length": 8},
                {"prompt_embeds": _TOY_TEXT},
            ),
            num_frames=17,
        ),
    }
)
