"""Helios, AnyFlow and ChronoEdit, which are built on the blocks and the VAE of Wan."""

from typing import Any

from vidaccel.catalog.families.family import Component, Family, Input
from vidaccel.catalog.families.recipes import (
    T5_TOKENIZER,
    TEXT_DIM,
    UMT5_ENCODER,
    clip_images,
    clip_vision,
    flow_euler,
    wan_vae,
)

_CALL = {
    "num_frames": 9,
    "height": 32,
    "width": 32,
    "num_inference_steps": 12,
    "guidance_scale": 5.0,
    "max_sequence_length": 64,
}
_UMT5_AND_WAN_VAE = {"tokenizer": T5_TOKENIZER, "text_encoder": UMT5_ENCODER, "vae": wan_vae()}
_BLOCKS: dict[str, Any] = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": TEXT_DIM,
    "freq_dim": 32,
    "ffn_dim": 32,
    "num_layers": 2,
}

_HELIOS_TRANSFORMER = Component(
    kind="diffusers:HeliosTransformer3DModel",
    config=_BLOCKS
    | {
        "rope_dim": (4, 4, 4),
        "has_multi_term_memory_patch": True,
        "guidance_cross_attn": True,
        "zero_history_timestep": True,
        "is_amplify_history": False,
    },
)


def _helios(name: str, description: str, *inputs: Input, num_frames: int) -> Family:
    scheduler = {"stage_range": [0, 1], "stages": 1, "use_dynamic_shifting": True}
    return Family(
        name=name,
        description=description,
        pipeline="diffusers:HeliosPipeline",
        components=_UMT5_AND_WAN_VAE
        | {
            "transformer": _HELIOS_TRANSFORMER,
            "scheduler": Component(kind="diffusers:HeliosScheduler", config=scheduler),
        },
        inputs=inputs,
        defaults=_CALL | {"num_frames": num_frames},
    )


def _anyflow(**changes: Any) -> dict[str, Component]:
    config = _BLOCKS | {"rope_max_seq_len": 32, "gate_value": 0.25, "deltatime_type": "r"} | changes
    name = "AnyFlowFARTransformer3DModel" if changes else "AnyFlowTransformer3DModel"
    return _UMT5_AND_WAN_VAE | {
        "scheduler": Component(kind="diffusers:FlowMapEulerDiscreteScheduler", config={"shift": 5.0}),
        "transformer": Component(kind=f"diffusers:{name}", config=config),
    }


_CHRONOEDIT = _UMT5_AND_WAN_VAE | {
    "scheduler": flow_euler(),
    "image_encoder": clip_vision(),
    "image_processor": clip_images(),
    "transformer": Component(
        kind="diffusers:ChronoEditTransformer3DModel",
        config=_BLOCKS | {"in_channels": 36, "image_dim": 8, "rope_max_seq_len": 32},
    ),
}

WAN_BASED_FAMILIES: tuple[Family, ...] = (
    _helios("helios", "Helios text to video, chunk by chunk", num_frames=40),  # two chunks
    _helios("helios-i2v", "Helios image to video, chunk by chunk", "image", num_frames=33),
    _helios("helios-v2v", "Helios continues a video, chunk by chunk", "video", num_frames=33),
    Family(
        name="helios-pyramid",
        description="Helios text to video, each chunk in three sizes",
        pipeline="diffusers:HeliosPyramidPipeline",
        components=_UMT5_AND_WAN_VAE
        | {
            "transformer": _HELIOS_TRANSFORMER,
            # The class's own 1/3 makes a covariance that is singular: some processors cannot factorize it.
            "scheduler": Component(kind="diffusers:HeliosScheduler", config={"gamma": 0.3}),
        },
        defaults=_CALL | {"height": 64, "width": 64, "num_inference_steps": 8},  # for each size
        untested={"interrupt": "the pipeline does not end when it is told to"},
    ),
    Family(
        name="anyflow",
        description="AnyFlow text to video, a flow map over any number of steps",
        pipeline="diffusers:AnyFlowPipeline",
        components=_anyflow(),
        defaults=_CALL,
    ),
    Family(
        name="anyflow-far",
        description="AnyFlow text to video, frame chunk by frame chunk",
        pipeline="diffusers:AnyFlowFARPipeline",
        components=_anyflow(compressed_patch_size=(1, 4, 4), full_chunk_limit=3, chunk_partition=(1, 1)),
        defaults=_CALL | {"num_frames": 5},
        refusal="the transformer keeps keys and values of earlier chunks, and a reused step would not write any",
    ),
    Family(
        name="chronoedit",
        description="ChronoEdit image editing as a short video",
        pipeline="diffusers:ChronoEditPipeline",
        components=_CHRONOEDIT,
        inputs=("image",),
        defaults=_CALL,
        untested={"frames": "the pipeline makes its two latent frames whatever it is asked for"},
    ),
)
