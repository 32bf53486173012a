"""The Cosmos world models, versions 1 to 3.

Real ones need the package `cosmos_guardrail`, which checks prompts and videos; random ones say by a part of their own
that nothing is checked. Real ones also need torchvision for a padding mask that the tiny transformers leave out.
"""

from typing import Any

from vidaccel.catalog.families.family import Component, Family
from vidaccel.catalog.families.recipes import (
    T5_TOKENIZER,
    TEXT_DIM,
    flow_euler,
    qwen2_tokenizer,
    qwen2_vl,
    t5_encoder,
    wan_vae,
)

_CALL = {
    "num_frames": 9,
    "height": 32,
    "width": 32,
    "num_inference_steps": 12,
    "guidance_scale": 7.0,
    "max_sequence_length": 128,
    "negative_prompt": "blurred",  # the pipelines' own has hundreds of words
}
_UNCHECKED = Component(kind="vidaccel.random_models.parts:NoSafetyChecker")


def _transformer(in_channels: int, out_channels: int, **changes: Any) -> Component:
    config = {
        "in_channels": in_channels,
        "out_channels": out_channels,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_layers": 2,
        "mlp_ratio": 2,
        "text_embed_dim": TEXT_DIM,
        "adaln_lora_dim": 4,
        "max_size": (4, 32, 32),
        "patch_size": (1, 2, 2),
        "rope_scale": (2.0, 1.0, 1.0),
        "concat_padding_mask": False,
        "extra_pos_embed_type": "learnable",
    }
    return Component(kind="diffusers:CosmosTransformer3DModel", config=config | changes)


_T5 = {"tokenizer": T5_TOKENIZER, "text_encoder": t5_encoder(), "safety_checker": _UNCHECKED}
_COSMOS1 = _T5 | {
    "scheduler": Component(
        kind="diffusers:EDMEulerScheduler",
        config={"sigma_max": 80.0, "final_sigmas_type": "sigma_min"},
    ),
    "vae": Component(
        kind="diffusers:AutoencoderKLCosmos",
        config={
            "latent_channels": 4,
            "encoder_block_out_channels": (8, 8, 8, 8),
            "decode_block_out_channels": (8, 8, 8, 8),
            "attention_resolutions": (8,),
            "resolution": 64,
            "num_layers": 1,
            "spatial_compression_ratio": 4,
            "temporal_compression_ratio": 4,
        },
    ),
}
_COSMOS25 = {
    "tokenizer": qwen2_tokenizer(),
    "text_encoder": qwen2_vl(),
    "safety_checker": _UNCHECKED,
    "scheduler": Component(
        kind="diffusers:UniPCMultistepScheduler",
        config={"prediction_type": "flow_prediction", "use_flow_sigmas": True, "use_karras_sigmas": True},
    ),
    "vae": wan_vae(),
    "transformer": _transformer(17, 16, text_embed_dim=3 * TEXT_DIM),  # all layers of the text encoder
}
_COSMOS3 = {
    "text_tokenizer": qwen2_tokenizer(marks=("<|vision_start|>",)),
    "scheduler": Component(kind="diffusers:UniPCMultistepScheduler"),
    "vae": wan_vae(),
    "transformer": Component(
        kind="diffusers:Cosmos3OmniTransformer",
        config={
            "head_dim": 8,
            "hidden_size": 16,
            "intermediate_size": 16,
            "latent_channel": 16,
            "latent_patch_size": 2,
            "patch_latent_dim": 64,
            "num_attention_heads": 2,
            "num_hidden_layers": 1,
            "num_key_value_heads": 1,
            "rope_axes_dim": [2, 1, 1],
            "vocab_size": 512,
        },
    ),
}

_UNTESTED = {"compile": "diffusers names no blocks of this transformer to compile"}

COSMOS_FAMILIES: tuple[Family, ...] = (
    Family(
        name="cosmos-t2w",
        description="Cosmos 1 text to world",
        pipeline="diffusers:CosmosTextToWorldPipeline",
        components=_COSMOS1 | {"transformer": _transformer(4, 4)},
        defaults=_CALL,
        untested=_UNTESTED,
    ),
    Family(
        name="cosmos-v2w",
        description="Cosmos 1 image or video to world",
        pipeline="diffusers:CosmosVideoToWorldPipeline",
        components=_COSMOS1 | {"transformer": _transformer(5, 4)},
        inputs=("image",),
        defaults=_CALL,
        untested=_UNTESTED,
    ),
    Family(
        name="cosmos2-v2w",
        description="Cosmos Predict 2 image or video to world",
        pipeline="diffusers:Cosmos2VideoToWorldPipeline",
        components=_T5
        | {
            "scheduler": flow_euler(use_karras_sigmas=True),
            "vae": wan_vae(),
            "transformer": _transformer(17, 16),
        },
        inputs=("image",),
        defaults=_CALL,
        untested=_UNTESTED
        | {"host reads": "the pipeline makes all tensors anew for every pass; they are compared on the device"},
    ),
    Family(
        name="cosmos2.5-t2w",
        description="Cosmos Predict 2.5 text to world; from an image too where torchvision is installed",
        pipeline="diffusers:Cosmos2_5_PredictBasePipeline",
        components=_COSMOS25,
        defaults=_CALL,
        untested=_UNTESTED,
    ),
    Family(
        name="cosmos2.5-v2w",
        description="Cosmos Predict 2.5 video to world",
        pipeline="diffusers:Cosmos2_5_PredictBasePipeline",
        components=_COSMOS25,
        inputs=("video",),
        defaults=_CALL,
        untested=_UNTESTED | {"batch": "the pipeline takes one prompt where it takes a video"},
    ),
    Family(
        name="cosmos3",
        description="Cosmos 3 Omni text to video",
        pipeline="diffusers:Cosmos3OmniPipeline",
        components=_COSMOS3,
        settings={"enable_safety_checker": False},
        defaults={name: value for name, value in _CALL.items() if name != "max_sequence_length"}
        | {"use_system_prompt": False, "fps": 24.0},
        refusal="the transformer takes lists of video, sound and action tokens instead of latents, and returns lists",
    ),
)
