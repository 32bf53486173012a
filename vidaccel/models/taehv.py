"""The decoder of TAEHV's kind for Wan's latents: 4 % of the full autoencoder's operations, for previews and live use.

Facts of the public repository madebyollin/taehv (MIT): layers, names of the weights (`taew2_1`; `taew2_2` for the 5B
model of Wan2.2), the frames cut off in front, and the ranges: latents are normalised as the transformer's, pixels lie
in [0, 1]. Only the decoder is here. It sees a frame and features of the one before, so that chunks decode one after
another as the whole video at once.

Shapes: latents (B, C, F, h, w), pixel frames (B, f, 3, H, W). Inside, frames of all samples are one batch of images,
time outermost: (F * B, C, h, w).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from vidaccel.errors import UserError
from vidaccel.machine.private_names import is_compiled
from vidaccel.video.frames import rounded_to_uint8

_BLOCKS = 3  # of every level
_SIZE_OF_LEVEL = 6  # layers between one level's first block and the next level's


class TinyWanDecoder(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """Latents to pixel frames; the defaults are those of `taew2_1`, for Wan2.1 and Wan2.2's 14B models.

    latent_channels: channels of the latents (16; 48 for Wan2.2 5B).
    channels: of the three levels, each half as fine as the next, and of the last convolution.
    time_factors: frames made of one frame behind each level.
    patch_size: side of the square of pixels that one place of the last convolution makes (1; 2 for Wan2.2 5B).
    """

    @register_to_config
    def __init__(
        self,
        latent_channels: int = 16,
        channels: Sequence[int] = (256, 128, 64, 64),
        time_factors: Sequence[int] = (1, 2, 2),
        patch_size: int = 1,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        if len(channels) != len(time_factors) + 1:
            raise ValueError(
                f"`channels` must have one entry more than `time_factors`; got {len(channels)} and {len(time_factors)}."
            )
        # The place in this list is part of the published names of the weights.
        layers: list[nn.Module] = [_SoftBound(), _convolution(latent_channels, channels[0]), nn.ReLU(inplace=True)]
        for level, factor in enumerate(time_factors):
            layers += [MemoryBlock(channels[level]) for _ in range(_BLOCKS)]
            layers += [nn.Identity(), Growth(channels[level], factor)]
            layers += [_convolution(channels[level], channels[level + 1], bias=False)]
        layers += [nn.ReLU(inplace=True), _convolution(channels[-1], 3 * patch_size**2)]
        self.decoder = nn.ModuleList(layers)
        self.time_factor, self.patch_size, self.latent_channels = math.prod(time_factors), patch_size, latent_channels
        self.spatial_factor = 2 ** len(time_factors) * patch_size
        self.past_channels = [channels[level] for level in range(len(time_factors)) for _ in range(_BLOCKS)]

    @classmethod
    def from_single_file(cls, path: str | Path, *, torch_dtype: torch.dtype = torch.float32) -> Self:
        """The published weights, `taew2_1.safetensors` for one; sizes follow from them, the encoder is left out.

        Raises UserError for a file that is missing, truncated or pickled, and for weights of another form.
        """
        weights = _read(Path(path))
        model = cls(**_sizes_of(weights, Path(path).name))
        expected = {name: weight.shape for name, weight in model.state_dict().items()}
        for name in sorted(expected.keys() | weights.keys()):
            got = weights[name].shape if name in weights else None
            if got != expected.get(name):
                raise UserError(
                    f"{Path(path).name} holds no decoder of this form: {name} has shape {_shape(got)}, "
                    f"wanted {_shape(expected.get(name))}."
                )
        model.load_state_dict({name: weight.to(torch_dtype) for name, weight in weights.items()}, assign=True)
        return model.eval()

    def initial_past(self, latents: Tensor) -> list[Tensor]:
        """What stands for the frames before the first, zeros; one (B, channels, h', w') for each memory block."""
        batch, _, _, height, width = latents.shape
        past = []
        for block, channels in enumerate(self.past_channels):
            enlarged = 2 ** (block // _BLOCKS)
            size = (batch, channels, enlarged * height, enlarged * width)
            zeros = torch.zeros(size, dtype=self.dtype, device=latents.device)
            past.append(zeros.to(memory_format=self.memory_format))
        return past

    def forward(self, latents: Tensor, past: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Pixel frames (B, 4 F, 3, H, W) in [0, 1] of the next latents (B, C, F, h, w), and the past of those after.

        The first 3 frames of a video stand before its beginning; `decode` and `StreamingTinyDecoder` leave them out.
        """
        batch = latents.shape[0]
        hidden_states = latents.to(past[0].dtype).permute(2, 0, 1, 3, 4).flatten(0, 1)
        hidden_states = hidden_states.contiguous(memory_format=self.memory_format)
        earlier, later = iter(past), []
        for layer in self.decoder:
            if isinstance(layer, MemoryBlock):
                later.append(hidden_states[-batch:])
                hidden_states = layer(hidden_states, next(earlier))
            elif isinstance(layer, Growth):
                hidden_states = layer(hidden_states, batch)
            else:
                hidden_states = layer(hidden_states)
        pixels = F.pixel_shuffle(hidden_states, self.patch_size).clamp(0, 1)
        return pixels.unflatten(0, (-1, batch)).transpose(0, 1), later

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """A whole video (B, 4 F - 3, 3, H, W) in [0, 1] of all its latents (B, C, F, h, w)."""
        return self(latents, self.initial_past(latents))[0][:, self.time_factor - 1 :]

    @property
    def memory_format(self) -> torch.memory_format:
        """The one that `.to(memory_format=torch.channels_last)` has given the weights, or the usual one."""
        weight = next(self.parameters())
        is_last = weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
        return torch.channels_last if is_last else torch.contiguous_format


class StreamingTinyDecoder:
    """Chunk by chunk what `TinyWanDecoder.decode` makes of all latents; the interface of `StreamingDecoder`.

    State belongs to this object, is of constant size and stays where it is on the device, so that the model's forward
    pass can be compiled or captured in a graph.
    """

    def __init__(self, model: TinyWanDecoder) -> None:
        self.model = model
        self.reset()

    def compile(self) -> None:
        """Compile the model, in place and once, with weights in the order that convolutions of a GPU are fastest in."""
        model: Any = self.model
        if not is_compiled(model):
            model.to(memory_format=torch.channels_last)
            model.compile(fullgraph=True)

    def reset(self) -> None:
        """Forget the past, for a hard cut: the next latent frame is the first of a video."""
        self.num_frames = 0
        self._past: list[Tensor] = []

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Pixel frames (B, f, 3, H, W) uint8 of the next latents (B, C, F, h, w): f is 4 F, or 4 F - 3 the first time.

        Raises UserError for latents of another shape than the model's or the frames' before.
        """
        self._check(latents)
        latents = latents.to(self.model.device)
        past = self._past or self.model.initial_past(latents)
        frames, later = self.model(latents, past)
        for kept, new in zip(past, later, strict=True):
            kept.copy_(new)
        is_first, self._past = self.num_frames == 0, past
        self.num_frames += latents.shape[2]
        return rounded_to_uint8(frames[:, self.model.time_factor - 1 :] if is_first else frames).contiguous()

    def save_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and plain values (JSON) that `load_state` takes; later calls of this object do not change them."""
        return {f"past.{i}": kept.clone() for i, kept in enumerate(self._past)}, {"num_frames": self.num_frames}

    def load_state(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Go on where the object stood that gave these from `save_state`; tensors may be on another device.

        Raises UserError for the state of another model or of another kind; this object is then unchanged.
        """
        num_frames = values.get("num_frames")
        past = [tensors[name] for name in (f"past.{i}" for i in range(len(tensors))) if name in tensors]
        wanted = self.model.past_channels if num_frames else []
        if not isinstance(num_frames, int) or [kept.shape[1] for kept in past if kept.ndim == 4] != wanted:
            raise UserError("The decoder's state is not of this model; resume with the one the rollout was made with.")
        self._past = [
            kept.to(self.model.device, self.model.dtype, copy=True, memory_format=self.model.memory_format)
            for kept in past
        ]
        self.num_frames = num_frames

    def _check(self, latents: Tensor) -> None:
        channels = self.model.latent_channels
        if latents.ndim != 5 or latents.shape[1] != channels or 0 in latents.shape:
            raise UserError(f"Latents must be (B, {channels}, F, h, w) for this decoder; got {tuple(latents.shape)}.")
        if self._past and (latents.shape[0], *latents.shape[3:]) != (self._past[0].shape[0], *self._past[0].shape[2:]):
            before = self._past[0].shape
            raise UserError(
                f"These latents are {tuple(latents.shape)}, but those before were of batch {before[0]} and "
                f"{before[2]} x {before[3]}; call `reset()` before another video."
            )


class MemoryBlock(nn.Module):
    """Three convolutions over a frame and the one before it, beside the frame itself."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            _convolution(2 * channels, channels),
            nn.ReLU(inplace=True),
            _convolution(channels, channels),
            nn.ReLU(inplace=True),
            _convolution(channels, channels),
        )

    def forward(self, hidden_states: Tensor, past: Tensor) -> Tensor:
        """past: (B, C, h, w), the frames of all samples before the first of `hidden_states` (F * B, C, h, w)."""
        before = torch.cat([past, hidden_states[: -past.shape[0]]])
        return F.relu(self.conv(torch.cat([hidden_states, before], dim=1)) + hidden_states)


class Growth(nn.Module):
    """Each frame becomes `factor` frames of twice the height and width.

    The published order is the same with the enlargement first. A convolution of one place and the repetition of places
    can change theirs, and a quarter of the work is then left.
    """

    def __init__(self, channels: int, factor: int) -> None:
        super().__init__()
        self.factor = factor
        self.conv = nn.Conv2d(channels, channels * factor, 1, bias=False)

    def forward(self, hidden_states: Tensor, batch: int) -> Tensor:
        grown = self.conv(hidden_states)
        if self.factor > 1:
            split = grown.unflatten(0, (-1, batch)).unflatten(2, (self.factor, -1))  # (F, B, factor, C, h, w)
            grown = split.transpose(1, 2).flatten(0, 2)
        return F.interpolate(grown, scale_factor=2.0, mode="nearest")


class _SoftBound(nn.Module):
    """Latents bent into -3 to 3."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return 3 * torch.tanh(hidden_states / 3)


def _convolution(in_channels: int, out_channels: int, *, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=bias)


def _read(path: Path) -> dict[str, Tensor]:
    """The decoder's tensors of a safetensors file."""
    if path.suffix != ".safetensors":
        raise UserError(
            f"{path.name} is no .safetensors file. Reading a pickle can run any code; take the file that is published "
            "beside it, or write one with `safetensors.torch.save_file(torch.load(path, weights_only=True), ...)`."
        )
    if not path.is_file():
        raise UserError(f"There is no file {path}.")
    try:
        weights = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path.name} is truncated or no safetensors file ({error}); get it again.") from error
    return {name: weight for name, weight in weights.items() if name.startswith("decoder.")}


def _sizes_of(weights: Mapping[str, Tensor], name: str) -> dict[str, Any]:
    """Arguments of `TinyWanDecoder` that fit the weights; what does not fit after all is found with the shapes."""
    levels = range(_BLOCKS)
    ends = [f"decoder.{2 + _SIZE_OF_LEVEL * (level + 1)}.weight" for level in levels]
    growths = [f"decoder.{1 + _SIZE_OF_LEVEL * (level + 1)}.conv.weight" for level in levels]
    needed = ["decoder.1.weight", *ends, *growths, "decoder.22.weight"]
    if missing := [key for key in needed if key not in weights or weights[key].ndim != 4]:
        raise UserError(
            f"{name} holds no decoder of this form: {missing[0]} is not in it. Known files are taew2_1.safetensors and "
            "taew2_2.safetensors; larger ones (`super`, `wide`) are built differently."
        )
    first, last = weights[needed[0]], weights[needed[-1]]
    return {
        "latent_channels": first.shape[1],
        "channels": (first.shape[0], *(weights[key].shape[0] for key in ends)),
        "time_factors": tuple(weights[key].shape[0] // weights[key].shape[1] for key in growths),
        "patch_size": max(1, round((last.shape[0] / 3) ** 0.5)),
    }


def _shape(shape: torch.Size | None) -> str:
    return "none (it is not there)" if shape is None else str(tuple(shape))
