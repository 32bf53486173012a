"""What the embedded model is made of: sizes of the three networks, the tokenizer, the scheduler, and how they begin.

The sizes keep all weights under 18 MB in bf16 and a default clip within seconds on two CPU cores.
"""

from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanTransformer3DModel
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from vidaccel.catalog.pipelines import WAN_TEXT_TOKENS

# diffusers' and transformers' classes carry no types: these say what is meant.
Vae: TypeAlias = Any
Transformer: TypeAlias = Any
TextEncoder: TypeAlias = Any
WordTokenizer: TypeAlias = Any

VAE_ARCHITECTURE: Mapping[str, Any] = {
    "base_dim": 16,
    "z_dim": 16,
    "dim_mult": [1, 2, 4, 4],
    "num_res_blocks": 1,
    "temperal_downsample": [False, True, True],
}
TEMPORAL_STRIDE = 2 ** sum(VAE_ARCHITECTURE["temperal_downsample"])  # frames of a latent frame after the first
TRANSFORMER_ARCHITECTURE: Mapping[str, Any] = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 4,
    "attention_head_dim": 64,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 64,
    "freq_dim": 128,
    "ffn_dim": 704,
    "num_layers": 6,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 1024,
}
TEXT_ENCODER_ARCHITECTURE: Mapping[str, Any] = {
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 128,
    "num_layers": 2,
    "num_heads": 4,
    "dropout_rate": 0.0,
}
FLOW_SHIFT = 3.0
NUM_TRAIN_TIMESTEPS = 1000
PAD, END, UNKNOWN = 0, 1, 2
SPECIAL_TOKENS = ("<pad>", "</s>", "<unk>")


def new_vae(architecture: Mapping[str, Any]) -> Vae:
    """An untrained autoencoder that treats every frame alone.

    The past taps of every temporal kernel are zero and the temporal resamplings copy the newest frame, so a clip is
    coded frame by frame: images can be learnt first and motion only has to be added. With random past taps, which
    images never touch, a short training on clips does not get rid of the noise.
    """
    vae: Vae = AutoencoderKLWan(**architecture)
    with torch.no_grad():
        for name, module in vae.named_modules():
            if isinstance(module, nn.Conv3d) and module.kernel_size[0] > 1:
                module.weight[:, :, :-1] = 0
                if name.endswith("time_conv"):
                    _copy_newest_frame(module)
    return vae


def _copy_newest_frame(time_conv: nn.Conv3d) -> None:
    """Identity on the newest tap; an upsampler has two outputs a channel, both get the same frame."""
    assert time_conv.bias is not None
    repeats = time_conv.out_channels // time_conv.in_channels
    time_conv.weight.zero_()
    time_conv.bias.zero_()
    time_conv.weight[:, :, -1, 0, 0] = torch.eye(time_conv.in_channels).repeat(repeats, 1)


def new_transformer(architecture: Mapping[str, Any]) -> Transformer:
    """An untrained transformer in float32."""
    return WanTransformer3DModel(**architecture)


def new_text_encoder(architecture: Mapping[str, Any], *, words: Iterable[str]) -> TextEncoder:
    """An untrained text encoder for the tokens of `new_tokenizer(words)`."""
    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=len(token_ids(words)),
            pad_token_id=PAD,
            eos_token_id=END,
            decoder_start_token_id=PAD,
            **architecture,
        )
    )


def token_ids(words: Iterable[str]) -> dict[str, int]:
    """Token of every word: the three special tokens, then the words in their order."""
    return {word: index for index, word in enumerate((*SPECIAL_TOKENS, *words))}


def new_tokenizer(words: Iterable[str]) -> WordTokenizer:
    """One token per word; upper case and punctuation do not matter, other words become `<unk>`."""
    tokenizer = Tokenizer(models.WordLevel(token_ids(words), unk_token=SPECIAL_TOKENS[UNKNOWN]))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Lowercase(), normalizers.Replace(Regex(r"[^\p{L}\p{N}]+"), " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {SPECIAL_TOKENS[END]}", special_tokens=[(SPECIAL_TOKENS[END], END)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=SPECIAL_TOKENS[PAD],
        eos_token=SPECIAL_TOKENS[END],
        unk_token=SPECIAL_TOKENS[UNKNOWN],
        model_max_length=WAN_TEXT_TOKENS,
        padding_side="right",
    )


def new_scheduler() -> Any:
    """The scheduler Wan2.1 uses at this size."""
    return UniPCMultistepScheduler(
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        num_train_timesteps=NUM_TRAIN_TIMESTEPS,
        flow_shift=FLOW_SHIFT,
    )
