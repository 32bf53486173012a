"""Decode a video chunk by chunk with diffusers' `AutoencoderKLWan`, and encode the frames a rollout starts from.

The autoencoder decodes one latent frame at a time and hands features from each to the next, but `vae.decode` forgets
them at the start and end of every call. Here they live in an object of one rollout.

Shapes: latents are (B, C, F, h, w), normalised as the transformer's; pixel frames are (B, f, 3, H, W). The first latent
frame is one pixel frame, each later one four.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, unpatchify
from torch import Tensor

from vidaccel.errors import UserError
from vidaccel.machine.components import onload
from vidaccel.video.frames import rounded_to_uint8

# diffusers' `AutoencoderKLWan`; its `config` and `device` are not typed there.
Vae: TypeAlias = Any

logger = logging.getLogger(__name__)

# What diffusers' temporal upsampling leaves in place of features after the first latent frame.
_REPEAT = "Rep"


class StreamingDecoder:
    """`vae.decode` for latents that come in pieces, with the same result as for all of them at once.

    State, the features that later frames need, belongs to this object and is of constant size; nothing stays on the
    autoencoder, so that several rollouts can share one. It works one latent frame at a time whatever is given at once.
    Slicing of the autoencoder is not applied, and tiling is refused.
    """

    def __init__(self, vae: Vae) -> None:
        """Raises UserError for an autoencoder that is no `AutoencoderKLWan`."""
        self.vae = vae
        self._num_features = sum(isinstance(module, WanCausalConv3d) for module in vae.decoder.modules())
        if not self._num_features:
            raise UserError(f"Chunks can be decoded with an AutoencoderKLWan only; got {type(vae).__name__}.")
        self.reset()

    def reset(self) -> None:
        """Forget the past, for a hard cut: the next latent frame is the first of a video."""
        self.num_frames = 0
        self._features: list[Tensor | str | None] = [None] * self._num_features

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Pixel frames (B, f, 3, H, W) uint8 of the next latents (B, C, F, h, w): f is 4 F, or 4 F - 3 the first time.

        Raises UserError for latents of another shape than the autoencoder's or the frames' before, and for an
        autoencoder with tiling. State is left as it was by an error.
        """
        pixels = self.decode_pixels(latents).float() * 0.5 + 0.5
        return rounded_to_uint8(pixels).transpose(1, 2).contiguous()

    @torch.no_grad()
    def decode_pixels(self, latents: Tensor) -> Tensor:
        """As `decode`, but what `vae.decode` returns: (B, 3, f, H, W) in [-1, 1], in the autoencoder's precision."""
        self._check(latents)
        latents = latents.to(onload(self.vae))
        features = list(self._features)
        mean, std = _statistics(self.vae, latents)
        # Divided by the inverse as in WanPipeline, so that not even the last bit differs from its video.
        denormalised = (latents.float() / (1.0 / std) + mean).to(self.vae.dtype)
        pieces = [
            self.vae.decoder(
                self.vae.post_quant_conv(frame), feat_cache=features, feat_idx=[0], first_chunk=frame_index == 0
            )
            for frame_index, frame in enumerate(denormalised.split(1, dim=2), self.num_frames)
        ]
        self._features = features
        self.num_frames += latents.shape[2]
        pixels = torch.cat(pieces, dim=2)
        if self.vae.config.patch_size is not None:
            pixels = unpatchify(pixels, patch_size=self.vae.config.patch_size)
        return pixels.clamp(-1.0, 1.0)

    def save_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and plain values (JSON) that `load_state` takes; later calls of this object do not change them."""
        tensors = {f"feature.{i}": entry for i, entry in enumerate(self._features) if isinstance(entry, Tensor)}
        kinds = ["tensor" if isinstance(entry, Tensor) else entry for entry in self._features]
        return tensors, {"num_frames": self.num_frames, "features": kinds}

    def load_state(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Go on where the object stood that gave these from `save_state`; tensors may be on another device.

        Raises UserError for the state of another autoencoder or of another kind; this object is then unchanged.
        """
        kinds, num_frames = values.get("features"), values.get("num_frames")
        if not isinstance(kinds, list) or not isinstance(num_frames, int) or len(kinds) != self._num_features:
            raise UserError(
                f"The decoder's state is not of this autoencoder, which keeps {self._num_features} features; "
                "resume with the model that the rollout was made with."
            )
        named = {f"feature.{i}" for i, kind in enumerate(kinds) if kind == "tensor"}
        if named != set(tensors) or any(kind not in ("tensor", _REPEAT, None) for kind in kinds):
            raise UserError("The decoder's state is incomplete: its tensors are not those that its values name.")
        self._features = [tensors[f"feature.{i}"] if kind == "tensor" else kind for i, kind in enumerate(kinds)]
        self.num_frames = num_frames

    def _check(self, latents: Tensor) -> None:
        channels = self.vae.config.z_dim
        if latents.ndim != 5 or latents.shape[1] != channels or 0 in latents.shape:
            raise UserError(
                f"Latents must be (B, {channels}, F, h, w) for this autoencoder; got {tuple(latents.shape)}."
            )
        if self.vae.use_tiling:
            raise UserError("Chunks are decoded as whole frames; call `vae.disable_tiling()` before a rollout.")
        before = next((entry for entry in self._features if isinstance(entry, Tensor)), None)
        if before is not None and (before.shape[0], *before.shape[3:]) != (latents.shape[0], *latents.shape[3:]):
            raise UserError(
                f"These latents are {tuple(latents.shape)}, but those before were of batch {before.shape[0]} and "
                f"{before.shape[3]} x {before.shape[4]}; call `reset()` before another video."
            )


@torch.no_grad()
def encode_start(vae: Vae, frames: Tensor) -> Tensor:
    """Latents (B, C, F, h, w) float32, normalised as the transformer's, of the frames that a rollout goes on from.

    frames: as `whole_start` takes them. The mode of the autoencoder's distribution is taken, nothing is drawn.

    Raises UserError as `whole_start` does.
    """
    kept = whole_start(vae, frames).transpose(1, 2).to(onload(vae))
    video = kept.float() / 255 if kept.dtype == torch.uint8 else kept.float()
    mode = vae.encode((video * 2 - 1).to(vae.dtype)).latent_dist.mode().float()
    mean, std = _statistics(vae, mode)
    latents: Tensor = (mode - mean) * (1.0 / std)
    return latents


def whole_start(vae: Vae, frames: Tensor) -> Tensor:
    """Those of the frames (B, f, 3, H, W) that a rollout goes on from.

    frames: (f, 3, H, W) or (B, f, 3, H, W), floating in [0, 1] or uint8: one frame for an image, or a clip. A clip of
    other than 4 k + 1 frames loses its first ones, which is logged: the rollout continues its end.

    Raises UserError for another shape, and for sides that the autoencoder cannot divide.
    """
    step, side = vae.config.scale_factor_temporal, vae.config.scale_factor_spatial
    batch = frames.unsqueeze(0) if frames.ndim == 4 else frames
    if batch.ndim != 5 or batch.shape[2] != 3 or 0 in batch.shape:
        raise UserError(f"Frames must be (f, 3, H, W) or (B, f, 3, H, W); got {tuple(frames.shape)}.")
    if batch.shape[3] % side or batch.shape[4] % side:
        raise UserError(
            f"The sides of the frames must be multiples of {side}; got {batch.shape[3]} x {batch.shape[4]}. "
            "Cut or scale them first."
        )
    surplus = (batch.shape[1] - 1) % step
    if surplus:
        logger.warning(
            f"The clip has {batch.shape[1]} frames and the autoencoder takes {step} k + 1: "
            f"the first {surplus} are left out."
        )
    return batch[:, surplus:]


def _statistics(vae: Vae, latents: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the autoencoder's latents per channel, (1, C, 1, 1, 1) float32."""
    mean, std = (
        torch.tensor(values, dtype=torch.float32, device=latents.device).view(1, -1, 1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return mean, std
