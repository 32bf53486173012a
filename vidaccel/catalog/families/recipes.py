"""Tiny versions of the parts that many families share: text and image encoders, VAEs, schedulers.

Each is a `Component`, so a row of data; a function where families need different sizes.
"""

from typing import Any

from vidaccel.catalog.families.family import Component

TEXT_DIM = 16
LLAMA_VOCABULARY = 512
LLAMA_IMAGE_TOKEN = 264  # after 256 bytes, five marks of Llama and three of its chat format
_QWEN2_FIRST_MARK = 259  # after 256 bytes, the end of text and two marks of the chat format
_TOKENIZERS = "vidaccel.random_models.tokenizers"

T5_TOKENIZER = Component(kind=f"{_TOKENIZERS}:t5_tokenizer")
CLIP_TOKENIZER = Component(kind=f"{_TOKENIZERS}:clip_tokenizer")
GEMMA_TOKENIZER = Component(kind=f"{_TOKENIZERS}:gemma_tokenizer")
BYT5_TOKENIZER = Component(kind=f"{_TOKENIZERS}:byt5_tokenizer")


def t5_encoder(model: str = "T5EncoderModel", **changes: Any) -> Component:
    """A T5 text encoder, hidden size 16; also `UMT5EncoderModel`. The vocabulary fits `T5_TOKENIZER` and ByT5's."""
    config = {
        "vocab_size": 512,
        "d_model": TEXT_DIM,
        "d_kv": 8,
        "d_ff": 32,
        "num_layers": 2,
        "num_heads": 2,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "decoder_start_token_id": 0,
    }
    return Component(kind=f"transformers:{model}", config=config | changes)


UMT5_ENCODER = t5_encoder("UMT5EncoderModel")


def flow_euler(**changes: Any) -> Component:
    """The Euler scheduler of flow matching."""
    return Component(kind="diffusers:FlowMatchEulerDiscreteScheduler", config={"shift": 3.0} | changes)


def flow_unipc(**changes: Any) -> Component:
    """The second-order scheduler of Wan and SkyReels-V2."""
    config = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    return Component(kind="diffusers:UniPCMultistepScheduler", config=config | changes)


def wan_vae(z_dim: int = 16, **changes: Any) -> Component:
    """The causal VAE of Wan2.1 with its strides: 4 in time, 8 in space."""
    config = {
        "base_dim": 4,
        "z_dim": z_dim,
        "dim_mult": [1, 1, 1, 1],
        "num_res_blocks": 1,
        "temperal_downsample": [False, True, True],
        "latents_mean": [0.0] * z_dim,
        "latents_std": [1.0] * z_dim,
    }
    return Component(kind="diffusers:AutoencoderKLWan", config=config | changes)


def clip_text(**changes: Any) -> Component:
    """CLIP's text model, hidden size 8, for `CLIP_TOKENIZER`."""
    config = {
        "vocab_size": 514,
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 77,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
    }
    return Component(kind="transformers:CLIPTextModel", config=config | changes)


def clip_vision(model: str = "CLIPVisionModel", **changes: Any) -> Component:
    """CLIP's image model, hidden size 8: 4 patches and one class token from a 16x16 image."""
    config = {
        "hidden_size": 8,
        "intermediate_size": 16,
        "projection_dim": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
    }
    return Component(kind=f"transformers:{model}", config=config | changes)


def clip_images(size: int = 16) -> Component:
    """What makes the square images of `clip_vision`."""
    config = {"size": {"shortest_edge": size}, "crop_size": {"height": size, "width": size}}
    return Component(kind="transformers:CLIPImageProcessor", config=config)


CLIP_PROCESSOR = Component(
    kind="transformers:CLIPProcessor", config={"image_processor": clip_images(), "tokenizer": CLIP_TOKENIZER}
)


def siglip_vision(**changes: Any) -> Component:
    """SigLIP's image model, hidden size 8: 4 patches from a 16x16 image."""
    config = {
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
    }
    return Component(kind="transformers:SiglipVisionModel", config=config | changes)


def siglip_images(size: int = 16) -> Component:
    """What makes the square images of `siglip_vision`."""
    return Component(kind="transformers:SiglipImageProcessor", config={"size": {"height": size, "width": size}})


def llama_tokenizer(template: str | None = None) -> Component:
    """Llama's tokenizer; `template` as `vidaccel.random_models.tokenizers.llama_tokenizer` says."""
    return Component(kind=f"{_TOKENIZERS}:llama_tokenizer", config={"template": template})


def llama(**changes: Any) -> Component:
    """A Llama model without a head, hidden size 16, for `llama_tokenizer`."""
    config = llama_config() | changes
    return Component(kind="transformers:LlamaModel", config=config)


def llama_config() -> dict[str, Any]:
    """The sizes of `llama`; three layers, of which pipelines leave out the last two."""
    return {
        "vocab_size": LLAMA_VOCABULARY,
        "hidden_size": TEXT_DIM,
        "intermediate_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
    }


def gemma(model: str = "Gemma2Model", **changes: Any) -> Component:
    """A Gemma model without a head, hidden size 16, for `GEMMA_TOKENIZER`."""
    config = {
        "vocab_size": 512,
        "hidden_size": TEXT_DIM,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
    }
    return Component(kind=f"transformers:{model}", config=config | changes)


def qwen2_tokenizer(**changes: Any) -> Component:
    """Qwen2's tokenizer; arguments as `vidaccel.random_models.tokenizers.qwen2_tokenizer` says."""
    return Component(kind=f"{_TOKENIZERS}:qwen2_tokenizer", config=changes)


def qwen2_vl_text(**changes: Any) -> Component:
    """The text half of Qwen2.5-VL, hidden size 16, for `qwen2_tokenizer`."""
    return Component(kind="transformers:Qwen2_5_VLTextModel", config=qwen2_vl_text_config() | changes)


def qwen2_vl_text_config() -> dict[str, Any]:
    """The sizes of `qwen2_vl_text`."""
    return {
        "vocab_size": 512,
        "hidden_size": TEXT_DIM,
        "intermediate_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "rope_scaling": {"type": "default", "rope_type": "default", "mrope_section": [1, 1, 2]},
        "pad_token_id": 0,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }


def qwen2_vl(**changes: Any) -> Component:
    """Qwen2.5-VL with both halves, hidden size 16; the image half takes patches of 14x14.

    A `qwen2_tokenizer` that has its marks gives them the numbers below.
    """
    vision = {
        "depth": 2,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": TEXT_DIM,
        "fullatt_block_indexes": [1],
        "window_size": 56,
    }
    marks = {
        f"{name}_token_id": _QWEN2_FIRST_MARK + index
        for index, name in enumerate(("vision_start", "vision_end", "image", "video"))
    }
    config = {"text_config": qwen2_vl_text_config(), "vision_config": vision, **marks}
    return Component(kind="transformers:Qwen2_5_VLForConditionalGeneration", config=config | changes)


def llava() -> Component:
    """Llava: `llama` that also sees a 48x48 image as 576 patches, one `<image>` token each."""
    vision = {
        "model_type": "clip_vision_model",
        "hidden_size": 8,
        "intermediate_size": 16,
        "projection_dim": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 48,
        "patch_size": 2,
    }
    config = {
        "text_config": llama_config() | {"model_type": "llama"},
        "vision_config": vision,
        "pad_token_id": 2,
        "image_token_index": LLAMA_IMAGE_TOKEN,
    }
    return Component(kind="transformers:LlavaForConditionalGeneration", config=config)
