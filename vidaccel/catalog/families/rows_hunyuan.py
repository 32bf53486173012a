"""The HunyuanVideo families: the first version, what was built on it, and version 1.5."""

from typing import Any

from vidaccel.catalog.families.family import Component, Family
from vidaccel.catalog.families.recipes import (
    BYT5_TOKENIZER,
    CLIP_TOKENIZER,
    TEXT_DIM,
    clip_images,
    clip_text,
    flow_euler,
    llama,
    llama_tokenizer,
    llava,
    qwen2_tokenizer,
    qwen2_vl_text,
    siglip_images,
    siglip_vision,
    t5_encoder,
)

_CALL = {"num_frames": 9, "height": 32, "width": 32, "num_inference_steps": 12, "guidance_scale": 6.0}
_TRUE_GUIDANCE = {"guidance_scale": 1.0, "true_cfg_scale": 6.0, "negative_prompt": "blurred, still"}
_MODULE = "diffusers.pipelines.hunyuan_video"
_CLIP_TEXT = {"text_encoder_2": clip_text(), "tokenizer_2": CLIP_TOKENIZER}


_FIXED_GUIDANCE = "diffusers takes guidance on or off before the first step"
_NO_CALLBACK = "the pipeline has no callback"
_NO_BLOCKS = "diffusers names no blocks of this transformer to compile"


def _vae() -> Component:
    config = {
        "latent_channels": 4,
        "down_block_types": ("HunyuanVideoDownBlock3D",) * 4,
        "up_block_types": ("HunyuanVideoUpBlock3D",) * 4,
        "block_out_channels": (8, 8, 8, 8),
        "layers_per_block": 1,
        "norm_num_groups": 4,
    }
    return Component(kind="diffusers:AutoencoderKLHunyuanVideo", config=config)


def _transformer(model: str = "HunyuanVideoTransformer3DModel", **changes: Any) -> Component:
    config = {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 10,
        "num_layers": 1,
        "num_single_layers": 1,
        "num_refiner_layers": 1,
        "patch_size": 2,
        "patch_size_t": 1,
        "guidance_embeds": True,
        "text_embed_dim": TEXT_DIM,
        "pooled_projection_dim": 8,
        "rope_axes_dim": (2, 4, 4),
    }
    return Component(kind=f"diffusers:{model}", config=config | changes)


def _components(module: str, transformer: Component, **changes: Component) -> dict[str, Component]:
    """The parts of the first version; `module` is the pipeline's, whose prompt template the tokenizer is made for."""
    parts = {
        "text_encoder": llama(),
        "tokenizer": llama_tokenizer(f"{_MODULE}.{module}:DEFAULT_PROMPT_TEMPLATE"),
        "vae": _vae(),
        "scheduler": flow_euler(shift=7.0),
        "transformer": transformer,
    }
    return parts | _CLIP_TEXT | changes


def _image_to_video(**changes: Any) -> dict[str, Component]:
    # Llama sees the image too, as 24x24 patches.
    return _components(
        "pipeline_hunyuan_video_image2video",
        _transformer(**changes),
        text_encoder=llava(),
        image_processor=clip_images(48),
    )


_HUNYUAN_VIDEO: tuple[Family, ...] = (
    Family(
        name="hunyuan-video-t2v",
        description="HunyuanVideo text to video, guidance distilled into the transformer",
        pipeline="diffusers:HunyuanVideoPipeline",
        components=_components("pipeline_hunyuan_video", _transformer()),
        defaults=_CALL,
    ),
    Family(
        name="hunyuan-video-t2v-cfg",
        description="HunyuanVideo text to video, guided by a negative prompt",
        pipeline="diffusers:HunyuanVideoPipeline",
        components=_components("pipeline_hunyuan_video", _transformer(guidance_embeds=False)),
        defaults=_CALL | _TRUE_GUIDANCE,
        untested={"switch": _FIXED_GUIDANCE},
    ),
    Family(
        name="hunyuan-video-i2v",
        description="HunyuanVideo image to video, the image beside the latents (33 channels)",
        pipeline="diffusers:HunyuanVideoImageToVideoPipeline",
        components=_image_to_video(in_channels=9, guidance_embeds=False, image_condition_type="latent_concat"),
        inputs=("image",),
        defaults=_CALL | {"guidance_scale": 1.0},
    ),
    Family(
        name="hunyuan-video-i2v-replace",
        description="HunyuanVideo image to video, the image in place of the first latents (16 channels)",
        pipeline="diffusers:HunyuanVideoImageToVideoPipeline",
        components=_image_to_video(image_condition_type="token_replace"),
        inputs=("image",),
        defaults=_CALL,
    ),
    Family(
        name="hunyuan-skyreels-i2v",
        description="SkyReels-V1 image to video on HunyuanVideo, guided by a negative prompt",
        pipeline="diffusers:HunyuanSkyreelsImageToVideoPipeline",
        components=_components("pipeline_hunyuan_skyreels_image2video", _transformer(in_channels=8)),
        inputs=("image",),
        defaults=_CALL | _TRUE_GUIDANCE,
        untested={"switch": _FIXED_GUIDANCE},
    ),
    Family(
        name="framepack",
        description="FramePack image to video on HunyuanVideo, section after section",
        pipeline="diffusers:HunyuanVideoFramepackPipeline",
        components=_components(
            "pipeline_hunyuan_video_framepack",
            _transformer(
                "HunyuanVideoFramepackTransformer3DModel",
                has_image_proj=True,
                image_proj_dim=8,
                has_clean_x_embedder=True,
            ),
            image_encoder=siglip_vision(),
            feature_extractor=siglip_images(),
        ),
        inputs=("image",),
        defaults=_CALL | {"num_frames": 17, "latent_window_size": 3},
        untested={"compile": _NO_BLOCKS},
    ),
)

_SHORT_TEXTS = {"tokenizer_max_length": 64, "tokenizer_2_max_length": 16}  # 1000 and 256 tokens otherwise
_1_5_CALL = {"num_frames": 9, "height": 32, "width": 32, "num_inference_steps": 12}


def _components_1_5(task: str, **changes: Component) -> dict[str, Component]:
    """The parts of version 1.5. Its pipelines cut off 108 tokens of instructions before the prompt."""
    vae = {
        "latent_channels": 4,
        "block_out_channels": (16, 16, 16, 16),
        "layers_per_block": 1,
        "spatial_compression_ratio": 8,
        "temporal_compression_ratio": 4,
        "downsample_match_channel": False,
        "upsample_match_channel": False,
    }
    transformer = {
        "in_channels": 9,
        "out_channels": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "num_layers": 1,
        "num_refiner_layers": 1,
        "mlp_ratio": 2.0,
        "text_embed_dim": TEXT_DIM,
        "text_embed_2_dim": TEXT_DIM,
        "image_embed_dim": 8,
        "rope_axes_dim": (2, 2, 4),
        "target_size": 32,
        "task_type": task,
    }
    parts = {
        "text_encoder": qwen2_vl_text(),
        "tokenizer": qwen2_tokenizer(head_tokens=108),
        "text_encoder_2": t5_encoder(),
        "tokenizer_2": BYT5_TOKENIZER,
        "vae": Component(kind="diffusers:AutoencoderKLHunyuanVideo15", config=vae),
        "scheduler": flow_euler(shift=7.0),
        "guider": Component(kind="diffusers:ClassifierFreeGuidance", config={"guidance_scale": 6.0}),
        "transformer": Component(kind="diffusers:HunyuanVideo15Transformer3DModel", config=transformer),
    }
    return parts | changes


_HUNYUAN_VIDEO_1_5: tuple[Family, ...] = (
    Family(
        name="hunyuan-video-1.5-t2v",
        description="HunyuanVideo 1.5 text to video",
        pipeline="diffusers:HunyuanVideo15Pipeline",
        components=_components_1_5("t2v"),
        attributes=_SHORT_TEXTS,
        defaults=_1_5_CALL,
        untested={"callback": _NO_CALLBACK, "interrupt": _NO_CALLBACK},
    ),
    Family(
        name="hunyuan-video-1.5-i2v",
        description="HunyuanVideo 1.5 image to video",
        pipeline="diffusers:HunyuanVideo15ImageToVideoPipeline",
        components=_components_1_5("i2v", image_encoder=siglip_vision(), feature_extractor=siglip_images()),
        attributes=_SHORT_TEXTS,
        inputs=("image",),
        defaults=_1_5_CALL,
        untested={"callback": _NO_CALLBACK, "interrupt": _NO_CALLBACK},
    ),
)

HUNYUAN_FAMILIES: tuple[Family, ...] = (*_HUNYUAN_VIDEO, *_HUNYUAN_VIDEO_1_5)
