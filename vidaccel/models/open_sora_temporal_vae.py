"""The temporal autoencoder of Open-Sora 1.2: frames of image latents to a quarter as many video latents, and back.

It looks back in time only, within one chunk of frames. Shapes: (B, channels, frames, height, width); height and width
stay as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

NORM_GROUPS = 32


@dataclass(frozen=True, kw_only=True)
class TemporalSizes:
    """Sizes of the network.

    latent_channels: channels of the frames given and of the latents made.
    channels: of each level, the first at the frames' side.
    res_blocks: in each level and in the middle.
    halves_time: for every level but the last, whether the number of frames is halved behind it.
    """

    latent_channels: int
    channels: Sequence[int]
    res_blocks: int
    halves_time: Sequence[bool]

    def __post_init__(self) -> None:
        if len(self.halves_time) != len(self.channels) - 1:
            raise ValueError(
                f"`temporal_downsample` must have one entry fewer than there are levels ({len(self.channels)}); "
                f"got {len(self.halves_time)}."
            )

    @property
    def compression(self) -> int:
        """Frames to one latent frame."""
        return 2 ** sum(self.halves_time)


class TemporalVAE(nn.Module):
    """Encoder to the moments of the latents, and decoder."""

    def __init__(self, sizes: TemporalSizes) -> None:
        super().__init__()
        self.compression = sizes.compression
        self.encoder = TemporalEncoder(sizes)
        self.quant_conv = CausalConv3d(2 * sizes.latent_channels, 2 * sizes.latent_channels, 1)
        self.post_quant_conv = CausalConv3d(sizes.latent_channels, sizes.latent_channels, 1)
        self.decoder = TemporalDecoder(sizes)

    def encode(self, frames: Tensor) -> Tensor:
        """Mean and log variance, (B, 2 * channels, ceil(frames / compression), H, W)."""
        filled = F.pad(frames, (0, 0, 0, 0, -frames.shape[2] % self.compression, 0))
        return self.quant_conv(self.encoder(filled))

    def decode(self, latents: Tensor, num_frames: int) -> Tensor:
        """The last `num_frames` frames that the latents stand for: encoding fills up in front."""
        return self.decoder(self.post_quant_conv(latents))[:, :, -num_frames:]


class CausalConv3d(nn.Module):
    """Convolution whose output at a frame sees that frame and earlier ones; zeros stand where there are none."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, *, time_stride: int = 1, bias: bool = True
    ) -> None:
        super().__init__()
        side, front = kernel_size // 2, kernel_size - time_stride
        self.padding = (side, side, side, side, front, 0)
        self.conv = nn.Conv3d(in_channels, out_channels, kernel_size, stride=(time_stride, 1, 1), bias=bias)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.conv(F.pad(hidden_states, self.padding))


class TemporalResBlock(nn.Module):
    """Two normalised convolutions beside a shortcut."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(NORM_GROUPS, in_channels)
        self.conv1 = CausalConv3d(in_channels, out_channels, 3, bias=False)
        self.norm2 = nn.GroupNorm(NORM_GROUPS, out_channels)
        self.conv2 = CausalConv3d(out_channels, out_channels, 3, bias=False)
        if in_channels != out_channels:
            self.conv3 = CausalConv3d(in_channels, out_channels, 1, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        inner = self.conv1(F.silu(self.norm1(hidden_states)))
        inner = self.conv2(F.silu(self.norm2(inner)))
        return inner + (self.conv3(hidden_states) if hasattr(self, "conv3") else hidden_states)


class TemporalEncoder(nn.Module):
    """Frames to moments: levels from few channels to many, time halved behind some of them."""

    def __init__(self, sizes: TemporalSizes) -> None:
        super().__init__()
        inner = sizes.channels[-1]
        self.conv_in = CausalConv3d(sizes.latent_channels, sizes.channels[0], 3, bias=False)
        self.block_res_blocks = nn.ModuleList()
        self.conv_blocks = nn.ModuleList()
        before = sizes.channels[0]
        for channels, halves in zip(sizes.channels, (*sizes.halves_time, False), strict=True):
            self.block_res_blocks.append(_res_blocks(before, channels, sizes.res_blocks))
            self.conv_blocks.append(CausalConv3d(channels, channels, 3, time_stride=2) if halves else nn.Identity())
            before = channels
        self.res_blocks = _res_blocks(inner, inner, sizes.res_blocks)
        self.norm1 = nn.GroupNorm(NORM_GROUPS, inner)
        self.conv2 = CausalConv3d(inner, 2 * sizes.latent_channels, 1)

    def forward(self, hidden_states: Tensor) -> Tensor:
        hidden_states = self.conv_in(hidden_states)
        for blocks, shorten in zip(self.block_res_blocks, self.conv_blocks, strict=True):
            hidden_states = shorten(blocks(hidden_states))
        return self.conv2(F.silu(self.norm1(self.res_blocks(hidden_states))))


class TemporalDecoder(nn.Module):
    """Latents to frames: the encoder's levels in the opposite order, under the same numbers."""

    def __init__(self, sizes: TemporalSizes) -> None:
        super().__init__()
        inner = sizes.channels[-1]
        self.conv1 = CausalConv3d(sizes.latent_channels, inner, 3)
        self.res_blocks = _res_blocks(inner, inner, sizes.res_blocks)
        inputs = (*sizes.channels[1:], inner)
        self.block_res_blocks = nn.ModuleList(
            _res_blocks(before, channels, sizes.res_blocks)
            for before, channels in zip(inputs, sizes.channels, strict=True)
        )
        self.conv_blocks = nn.ModuleList(
            DoubledTime(channels) if halves else nn.Identity()
            for channels, halves in zip(sizes.channels[1:], sizes.halves_time, strict=True)
        )
        self.norm1 = nn.GroupNorm(NORM_GROUPS, sizes.channels[0])
        self.conv_out = CausalConv3d(sizes.channels[0], sizes.latent_channels, 3)

    def forward(self, hidden_states: Tensor) -> Tensor:
        hidden_states = self.res_blocks(self.conv1(hidden_states))
        for level in reversed(range(len(self.block_res_blocks))):
            hidden_states = self.block_res_blocks[level](hidden_states)
            if level:
                hidden_states = self.conv_blocks[level - 1](hidden_states)
        return self.conv_out(F.silu(self.norm1(hidden_states)))


class DoubledTime(CausalConv3d):
    """Twice as many frames: a convolution to twice the channels, of which pairs become consecutive frames."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, 2 * channels, 3)

    def forward(self, hidden_states: Tensor) -> Tensor:
        doubled = super().forward(hidden_states).unflatten(1, (-1, 2))  # (B, C, 2, F, H, W)
        return doubled.transpose(2, 3).flatten(2, 3)


def _res_blocks(in_channels: int, out_channels: int, count: int) -> nn.Sequential:
    sizes = (in_channels, *(out_channels,) * (count - 1))
    return nn.Sequential(*(TemporalResBlock(size, out_channels) for size in sizes))
