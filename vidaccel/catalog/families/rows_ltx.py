"""LTX-Video and LTX-2, which makes sound along with the video."""

from typing import Any

from vidaccel.catalog.families.family import Component, Family
from vidaccel.catalog.families.recipes import GEMMA_TOKENIZER, T5_TOKENIZER, TEXT_DIM, flow_euler, gemma, t5_encoder

_CALL = {
    "num_frames": 9,
    "height": 32,
    "width": 32,
    "num_inference_steps": 12,
    "guidance_scale": 3.0,
    "max_sequence_length": 64,
}

_LTX = {
    "tokenizer": T5_TOKENIZER,
    "text_encoder": t5_encoder(),
    "scheduler": flow_euler(),
    "transformer": Component(
        kind="diffusers:LTXVideoTransformer3DModel",
        config={
            "in_channels": 8,
            "out_channels": 8,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "cross_attention_dim": 16,
            "num_layers": 2,
            "caption_channels": TEXT_DIM,
        },
    ),
    "vae": Component(
        kind="diffusers:AutoencoderKLLTXVideo",
        config={
            "latent_channels": 8,
            "block_out_channels": (8, 8, 8, 8),
            "decoder_block_out_channels": (8, 8, 8, 8),
            "layers_per_block": (1, 1, 1, 1, 1),
            "decoder_layers_per_block": (1, 1, 1, 1, 1),
            "spatio_temporal_scaling": (True, True, False, False),
            "decoder_spatio_temporal_scaling": (True, True, False, False),
            "decoder_inject_noise": (False, False, False, False, False),
            "upsample_residual": (False, False, False, False),
            "upsample_factor": (1, 1, 1, 1),
            "patch_size": 1,
        },
    ),
}


def _connector(stream: str) -> dict[str, Any]:
    return {
        f"{stream}_connector_num_attention_heads": 2,
        f"{stream}_connector_attention_head_dim": 8,
        f"{stream}_connector_num_layers": 1,
        f"{stream}_connector_num_learnable_registers": None,
    }


# Gemma 3 as it is published, with an image half, which the pipelines do not use.
_GEMMA3 = Component(
    kind="transformers:Gemma3ForConditionalGeneration",
    config={
        "text_config": gemma().config,
        "vision_config": {
            "hidden_size": 8,
            "intermediate_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "image_size": 8,
            "patch_size": 4,
        },
        "mm_tokens_per_image": 4,
        "image_token_index": 511,
    },
)
_LTX2 = {
    "tokenizer": GEMMA_TOKENIZER,
    "text_encoder": _GEMMA3,
    "scheduler": flow_euler(),
    "connectors": Component(
        kind="diffusers.pipelines.ltx2:LTX2TextConnectors",
        config={
            "caption_channels": TEXT_DIM,
            "text_proj_in_factor": 3,  # the text encoder's layers and its embedding
            "connector_rope_base_seq_len": 32,
            "rope_double_precision": False,
            "rope_type": "split",
            **_connector("video"),
            **_connector("audio"),
        },
    ),
    "transformer": Component(
        kind="diffusers:LTX2VideoTransformer3DModel",
        config={
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "cross_attention_dim": 16,
            "audio_in_channels": 4,
            "audio_out_channels": 4,
            "audio_num_attention_heads": 2,
            "audio_attention_head_dim": 4,
            "audio_cross_attention_dim": 8,
            "num_layers": 2,
            "caption_channels": TEXT_DIM,
            "rope_double_precision": False,
            "rope_type": "split",
        },
    ),
    "vae": Component(
        kind="diffusers:AutoencoderKLLTX2Video",
        config={
            "latent_channels": 4,
            "block_out_channels": (8,),
            "decoder_block_out_channels": (8,),
            "layers_per_block": (1,),
            "decoder_layers_per_block": (1, 1),
            "spatio_temporal_scaling": (True,),
            "decoder_spatio_temporal_scaling": (True,),
            "decoder_inject_noise": (False, False),
            "downsample_type": ("spatial",),
            "upsample_residual": (False,),
            "upsample_factor": (1,),
            "patch_size": 2,
        },
    ),
    "audio_vae": Component(
        kind="diffusers:AutoencoderKLLTX2Audio",
        config={
            "base_channels": 4,
            "ch_mult": (1,),
            "num_res_blocks": 1,
            "resolution": 32,
            "latent_channels": 2,
            "mel_bins": 8,
        },
    ),
    "vocoder": Component(
        kind="diffusers.pipelines.ltx2:LTX2Vocoder",
        config={
            "in_channels": 16,  # two channels of sound, eight bands each
            "hidden_channels": 16,
            "upsample_kernel_sizes": [4, 4],
            "upsample_factors": [2, 2],
            "resnet_kernel_sizes": [3],
            "resnet_dilations": [[1, 3, 5]],
            "output_sampling_rate": 16000,
        },
    ),
}
_LTX2_CALL = _CALL | {"frame_rate": 24.0, "spatio_temporal_guidance_blocks": [1]}

_LTX2_UNTESTED = {"switch": "guidance is in the batch of the first pass, and turning it off leaves the other passes"}

LTX_FAMILIES: tuple[Family, ...] = (
    Family(
        name="ltx-t2v",
        description="LTX-Video text to video",
        pipeline="diffusers:LTXPipeline",
        components=_LTX,
        defaults=_CALL,
    ),
    Family(
        name="ltx-i2v",
        description="LTX-Video image to video",
        pipeline="diffusers:LTXImageToVideoPipeline",
        components=_LTX,
        inputs=("image",),
        defaults=_CALL,
    ),
    Family(
        name="ltx-condition",
        description="LTX-Video from images and videos at any frames",
        pipeline="diffusers:LTXConditionPipeline",
        components=_LTX,
        inputs=("image",),
        defaults=_CALL,
    ),
    Family(
        name="ltx-long",
        description="LTX-Video, long videos window by window, each with its prompt",
        pipeline="diffusers:LTXI2VLongMultiPromptPipeline",
        components=_LTX,
        # Three windows over 4 latent frames, each two frames long and one of them shared with the next.
        defaults=_CALL | {"num_frames": 13, "temporal_tile_size": 8, "temporal_overlap": 4},
        untested={
            "sections": "the pipeline encodes its prompt anew for every window, so the report has the last window only",
            "batch": "the pipeline takes a list of prompts as the prompts of its windows",
        },
    ),
    Family(
        name="ltx2-t2v",
        description="LTX-2 text to video with sound",
        pipeline="diffusers:LTX2Pipeline",
        components=_LTX2,
        defaults=_LTX2_CALL,
        untested=_LTX2_UNTESTED,
    ),
    Family(
        name="ltx2-i2v",
        description="LTX-2 image to video with sound",
        pipeline="diffusers:LTX2ImageToVideoPipeline",
        components=_LTX2,
        inputs=("image",),
        defaults=_LTX2_CALL | {"image_crf": 0},  # anything else needs PyAV
        untested=_LTX2_UNTESTED,
    ),
    Family(
        name="ltx2-condition",
        description="LTX-2 from images and videos at any frames, with sound",
        pipeline="diffusers:LTX2ConditionPipeline",
        components=_LTX2,
        defaults=_LTX2_CALL,
        untested=_LTX2_UNTESTED,
    ),
)
