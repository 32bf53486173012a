"""One pass over a whole clip through the modules of an `AutoencoderKLWan`, for training and for encoding many clips.

diffusers runs this autoencoder in chunks of four frames with a feature cache. A causal convolution with zeros on the
left gives the same numbers over the whole clip at once, in a fraction of the kernel launches; only the two temporal
resamplings need care, because both leave the first frame alone. Tests compare it with the chunked path.

Shapes: video is (B, 3, 4k + 1, H, W) in [-1, 1]; moments and latents are (B, channels, k + 1, H / 8, W / 8).
"""

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import WanResample
from einops import rearrange
from torch import Tensor, nn

from vidaccel.training.architecture import Vae


def encode_clip(vae: Vae, video: Tensor) -> Tensor:
    """Moments (mean and log variance) of a whole clip; (B, 2 * z_dim, k + 1, H / 8, W / 8)."""
    encoder = vae.encoder
    hidden_states = encoder.conv_in(video)
    for layer in encoder.down_blocks:
        is_resampling = isinstance(layer, WanResample)
        hidden_states = _downsample(layer, hidden_states) if is_resampling else layer(hidden_states)
    hidden_states = encoder.mid_block(hidden_states)
    hidden_states = encoder.conv_out(encoder.nonlinearity(encoder.norm_out(hidden_states)))
    return vae.quant_conv(hidden_states)


def decode_clip(vae: Vae, latents: Tensor) -> Tensor:
    """Video of whole latents, not clamped; (B, 3, 4k + 1, H, W)."""
    decoder = vae.decoder
    hidden_states = decoder.mid_block(decoder.conv_in(vae.post_quant_conv(latents)))
    for block in decoder.up_blocks:
        for resnet in block.resnets:
            hidden_states = resnet(hidden_states)
        if block.upsamplers is not None:
            hidden_states = _upsample(block.upsamplers[0], hidden_states)
    return decoder.conv_out(decoder.nonlinearity(decoder.norm_out(hidden_states)))


def _downsample(layer: WanResample, hidden_states: Tensor) -> Tensor:
    hidden_states = _each_frame(layer.resample, hidden_states)
    if layer.mode != "downsample3d" or hidden_states.shape[2] == 1:
        return hidden_states
    return torch.cat([hidden_states[:, :, :1], layer.time_conv(hidden_states)], dim=2)


def _upsample(layer: WanResample, hidden_states: Tensor) -> Tensor:
    if layer.mode == "upsample3d" and hidden_states.shape[2] > 1:
        doubled = layer.time_conv(hidden_states[:, :, 1:])
        later = rearrange(doubled, "b (two c) f h w -> b c (f two) h w", two=2)
        hidden_states = torch.cat([hidden_states[:, :, :1], later], dim=2)
    return _each_frame(layer.resample, hidden_states)


def _each_frame(module: nn.Module, hidden_states: Tensor) -> Tensor:
    frames = module(rearrange(hidden_states, "b c f h w -> (b f) c h w"))
    return rearrange(frames, "(b f) c h w -> b c f h w", b=hidden_states.shape[0])
