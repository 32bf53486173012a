"""The autoencoder of Open-Sora 1.2 (`hpcai-tech/OpenSora-VAE-v1.2`), under the names of its published weights.

Every frame goes through an image autoencoder (diffusers' `AutoencoderKL` with SDXL's sizes), then chunks of frames
through a temporal one; no state crosses a chunk. Shapes: videos (B, 3, F, H, W) in [-1, 1], latents
(B, 4, F', H/8, W/8) where 17 frames become 5 latent frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from diffusers import AutoencoderKL
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import AutoencoderMixin, DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

from vidaccel.models.open_sora_temporal_vae import TemporalSizes, TemporalVAE

Generators = torch.Generator | list[torch.Generator] | None


class AutoencoderKLOpenSora(ModelMixin, AutoencoderMixin, ConfigMixin):  # type: ignore[misc]
    """Image autoencoder and temporal autoencoder in one; the defaults are those of version 1.2.

    latent_channels: channels of the latents, of both autoencoders.
    block_out_channels, layers_per_block, norm_num_groups: of the image autoencoder.
    scaling_factor: image latents are multiplied by it. Not SDXL's: the weights were trained on with this one.
    temporal_channels, temporal_res_blocks, temporal_downsample: see `TemporalSizes`.
    micro_frame_size: frames of a chunk, which the temporal autoencoder takes at once.
    micro_batch_size: frames the image autoencoder takes at once.
    latents_mean, latents_std: of each channel, for `normalized` and `denormalized`; a checkpoint overrules them.
    """

    @register_to_config
    def __init__(
        self,
        latent_channels: int = 4,
        block_out_channels: Sequence[int] = (128, 256, 512, 512),
        layers_per_block: int = 2,
        norm_num_groups: int = 32,
        scaling_factor: float = 0.18215,
        temporal_channels: Sequence[int] = (128, 256, 256, 512),
        temporal_res_blocks: int = 4,
        temporal_downsample: Sequence[bool] = (False, True, True),
        micro_frame_size: int = 17,
        micro_batch_size: int = 4,
        latents_mean: Sequence[float] = (-0.10, 0.34, 0.27, 0.98),
        latents_std: Sequence[float] = (3.85, 2.32, 2.33, 3.06),
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        levels = len(block_out_channels)
        self.spatial_vae = _Wrapped(
            AutoencoderKL(
                down_block_types=("DownEncoderBlock2D",) * levels,
                up_block_types=("UpDecoderBlock2D",) * levels,
                block_out_channels=tuple(block_out_channels),
                layers_per_block=layers_per_block,
                latent_channels=latent_channels,
                norm_num_groups=norm_num_groups,
                sample_size=512,
                scaling_factor=scaling_factor,
            )
        )
        sizes = TemporalSizes(
            latent_channels=latent_channels,
            channels=temporal_channels,
            res_blocks=temporal_res_blocks,
            halves_time=temporal_downsample,
        )
        self.temporal_vae = TemporalVAE(sizes)
        self.scale: Tensor
        self.shift: Tensor
        self.register_buffer("scale", torch.tensor(latents_std).view(1, -1, 1, 1, 1))
        self.register_buffer("shift", torch.tensor(latents_mean).view(1, -1, 1, 1, 1))
        self.spatial_compression_ratio = 2 ** (levels - 1)
        self.temporal_compression_ratio = sizes.compression
        self.scaling_factor = scaling_factor
        self.micro_frame_size = micro_frame_size
        self.micro_batch_size = micro_batch_size
        self.use_slicing = False

    @property
    def micro_latent_size(self) -> int:
        """Latent frames of one chunk."""
        return -(-self.micro_frame_size // self.temporal_compression_ratio)

    def latent_size(self, num_frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Latent frames, rows and columns of a video of that size in frames and pixels."""
        chunks, rest = divmod(num_frames, self.micro_frame_size)
        latent_frames = chunks * self.micro_latent_size - (-rest // self.temporal_compression_ratio)
        return latent_frames, height // self.spatial_compression_ratio, width // self.spatial_compression_ratio

    def most_frames(self, num_latent_frames: int) -> int:
        """The largest number of frames with that many latent frames."""
        chunks, rest = divmod(num_latent_frames, self.micro_latent_size)
        return chunks * self.micro_frame_size + rest * self.temporal_compression_ratio

    def normalized(self, latents: Tensor) -> Tensor:
        """Latents as the transformer takes them, of about mean 0 and deviation 1 in every channel."""
        return (latents - self.shift.to(latents)) / self.scale.to(latents)

    def denormalized(self, latents: Tensor) -> Tensor:
        """The inverse of `normalized`: latents as `decode` takes them."""
        return latents * self.scale.to(latents) + self.shift.to(latents)

    @apply_forward_hook
    def encode(
        self,
        x: Tensor,
        return_dict: bool = True,
        *,
        generator: Generators = None,
        sample_frames: bool = True,
    ) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution]:
        """The distribution of the latents of a video (B, 3, F, H, W); H and W may have a rest over 8, which is lost.

        sample_frames: draw each frame's image latents, with `generator`, as the original does; False takes their mode.
        """
        videos = x.split(1) if self.use_slicing else (x,)
        generators = generator if isinstance(generator, list) and self.use_slicing else [generator] * len(videos)
        moments = torch.cat(
            [self._encoded(one, draw, sample_frames) for one, draw in zip(videos, generators, strict=True)]
        )
        posterior = DiagonalGaussianDistribution(moments)
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    @apply_forward_hook
    def decode(
        self, z: Tensor, return_dict: bool = True, *, num_frames: int | None = None
    ) -> DecoderOutput | tuple[Tensor]:
        """The video (B, 3, num_frames, 8 H, 8 W) of latents (B, 4, F', H, W).

        num_frames: by default the largest number of frames with as many latent frames. Raises ValueError for a number
            that has another number of latent frames.
        """
        num_latent_frames = z.shape[2]
        wanted = self.most_frames(num_latent_frames) if num_frames is None else num_frames
        if self.latent_size(wanted, 1, 1)[0] != num_latent_frames:
            raise ValueError(
                f"`num_frames` is {wanted}, which is {self.latent_size(wanted, 1, 1)[0]} latent frames; the latents "
                f"have {num_latent_frames}, at most {self.most_frames(num_latent_frames)} frames."
            )
        videos = torch.cat([self._decoded(one, wanted) for one in (z.split(1) if self.use_slicing else (z,))])
        return DecoderOutput(sample=videos) if return_dict else (videos,)

    def forward(
        self,
        sample: Tensor,
        sample_posterior: bool = False,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
    ) -> DecoderOutput | tuple[Tensor]:
        """Encode and decode again; (B, 3, F, 8 * (H // 8), 8 * (W // 8))."""
        encoded = self.encode(sample, generator=generator, sample_frames=sample_posterior)
        posterior = cast(AutoencoderKLOutput, encoded).latent_dist
        latents = posterior.sample(generator) if sample_posterior else posterior.mode()
        return self.decode(latents, return_dict=return_dict, num_frames=sample.shape[2])

    def enable_tiling(self) -> None:
        """Let the image autoencoder work on overlapping tiles of frames larger than 512 pixels, to save memory."""
        self.spatial_vae.module.enable_tiling()

    def disable_tiling(self) -> None:
        """Whole frames again."""
        self.spatial_vae.module.disable_tiling()

    def _encoded(self, video: Tensor, generator: Generators, sample_frames: bool) -> Tensor:
        batch = video.shape[0]
        frames = video.transpose(1, 2).flatten(0, 1)
        moments = torch.cat(
            [
                self.spatial_vae.module.encode(some).latent_dist.parameters
                for some in frames.split(self.micro_batch_size)
            ]
        )
        posterior = DiagonalGaussianDistribution(moments.unflatten(0, (batch, -1)).transpose(1, 2))
        latents = posterior.sample(generator) if sample_frames else posterior.mode()  # type: ignore[arg-type]
        chunks = (latents * self.scaling_factor).split(self.micro_frame_size, dim=2)
        return torch.cat([self.temporal_vae.encode(chunk) for chunk in chunks], dim=2)

    def _decoded(self, latents: Tensor, num_frames: int) -> Tensor:
        batch = latents.shape[0]
        chunks = []
        for chunk in latents.split(self.micro_latent_size, dim=2):
            count = min(self.micro_frame_size, num_frames)
            chunks.append(self.temporal_vae.decode(chunk, count))
            num_frames -= count
        frames = torch.cat(chunks, dim=2).transpose(1, 2).flatten(0, 1) / self.scaling_factor
        decoded = [self.spatial_vae.module.decode(some).sample for some in frames.split(self.micro_batch_size)]
        return torch.cat(decoded).unflatten(0, (batch, -1)).transpose(1, 2)


class _Wrapped(nn.Module):
    """Gives the image autoencoder the place it has in the published weights, `spatial_vae.module`."""

    def __init__(self, module: AutoencoderKL) -> None:
        super().__init__()
        self.module: Any = module
