"""Frames that Open-Sora 1.2 is given instead of generating them: images, ends of videos, and edits in between.

A mask holds one number per latent frame, (B, F'): 1 generates the frame freely, 0 keeps it as given, and e in between
(an edit ratio) joins it with noise once the timestep has fallen to 1000 e. Latents are (B, C, F', H', W').
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vidaccel.errors import UserError

NUM_TRAIN_TIMESTEPS = 1000


@dataclass(frozen=True, kw_only=True)
class MaskStrategy:
    """Put latent frames of a reference into those to be generated; the written form is the six values in this order.

    loop: clip of a long video.
    reference: index of the image or video.
    reference_start, target_start: first latent frame, counted from the end if negative.
    length: latent frames.
    edit_ratio: their value in the mask.
    """

    loop: int = 0
    reference: int = 0
    reference_start: int = 0
    target_start: int = 0
    length: int = 1
    edit_ratio: float = 0.0


def continuation(loop: int, reference: int, *, length: int, edit_ratio: float = 0.0) -> MaskStrategy:
    """Begin a clip with the last latent frames of a reference."""
    return MaskStrategy(loop=loop, reference=reference, reference_start=-length, length=length, edit_ratio=edit_ratio)


def usual_strategies(num_images: int, videos: Sequence[Tensor], *, length: int) -> list[MaskStrategy]:
    """What references mean that come without strategies.

    One image is the first frame, two are the first and the last, one video (its latents) is gone on with from its last
    `length` latent frames. Raises `UserError` for anything else.
    """
    if not num_images and len(videos) == 1:
        return [continuation(0, 0, length=min(length, videos[0].shape[2]))]
    if num_images > 2 or (num_images and videos):
        raise UserError(f"{num_images} images and {len(videos)} videos need a `mask_strategy` that says where they go.")
    return [MaskStrategy(reference=index, target_start=-index) for index in range(num_images)]


def parse_mask_strategies(text: str) -> list[MaskStrategy]:
    """The strategies of a text such as "0;0,1,0,-1,1,0.3": groups by semicolons, values by commas, last ones optional.

    Raises `UserError` for anything else.
    """
    return [_parsed(group.strip(), text) for group in text.split(";") if group.strip()]


def _parsed(group: str, text: str) -> MaskStrategy:
    values = group.split(",")
    try:
        numbers = [int(value) for value in values[:5]]
        ratio = float(values[5]) if len(values) > 5 else 0.0
    except ValueError:
        numbers, ratio = [], -1.0
    if not numbers or len(values) > 6 or not 0 <= ratio <= 1:
        raise UserError(
            "`mask_strategy` must be groups, divided by semicolons, of up to five whole numbers and an edit ratio from "
            f"0 to 1: loop, reference, reference start, target start, length, ratio; got {group!r} in {text!r}."
        )
    names = ("loop", "reference", "reference_start", "target_start", "length")
    given: dict[str, Any] = dict(zip(names, numbers, strict=False))
    return MaskStrategy(**given, edit_ratio=ratio)


def apply_mask_strategies(
    latents: Tensor,
    references: Sequence[Tensor],
    strategies: Sequence[MaskStrategy],
    *,
    loop: int = 0,
    align: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Latents with the references' frames in place, and their mask (B, F') on the CPU.

    references: latents of each, (B, C, any number of frames, H', W').
    align: move both starts to the nearest multiple of this many latent frames, a chunk of the autoencoder.
    Raises `UserError` for a reference that there is not, or a start outside of it.
    """
    latents = latents.clone()
    num_frames = latents.shape[2]
    mask = torch.ones(latents.shape[0], num_frames)
    for strategy in strategies:
        if strategy.loop != loop:
            continue
        if not 0 <= strategy.reference < len(references):
            raise UserError(
                f"`mask_strategy` names reference {strategy.reference} of {len(references)}; they are counted from 0."
            )
        reference = references[strategy.reference]
        source = _start(strategy.reference_start, reference.shape[2], align)
        target = _start(strategy.target_start, num_frames, align)
        length = max(min(strategy.length, num_frames - target, reference.shape[2] - source), 0)
        latents[:, :, target : target + length] = reference[:, :, source : source + length].to(latents)
        mask[:, target : target + length] = strategy.edit_ratio
    return latents, mask


def _start(index: int, count: int, align: int | None) -> int:
    if not -count <= index < count:
        raise UserError(f"`mask_strategy` starts at latent frame {index} of {count}.")
    index %= count
    if align is None:
        return index
    chunk, rest = divmod(index, align)
    is_nearer_to_next = rest > align / 2 and chunk < count // align - 1
    return (chunk + is_nearer_to_next) * align


class FrameMask:
    """Follows, through one clip's steps, which frames are generated and which have yet to be noised."""

    def __init__(self, mask: Tensor) -> None:
        """`mask` as above, on the CPU; frames of value 1 are noise from the start."""
        self._entry = mask * NUM_TRAIN_TIMESTEPS
        self._joined = mask == 1

    def enter(self, latents: Tensor, timestep: float, noise: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
        """Begin a step: latents in which the frames that join now are noised, and all that have joined, (B, F').

        noise: called for noise shaped like the latents, only if frames join.
        """
        active = self._entry >= timestep
        joining = active & ~self._joined
        self._joined = active
        if joining.any():
            share = timestep / NUM_TRAIN_TIMESTEPS
            noisy = (1 - share) * latents + share * noise().to(latents)
            latents = torch.where(_as_frames(joining, latents), noisy, latents)
        return latents, active.to(latents.device)


def kept_apart(generated: Tensor, before: Tensor, active: Tensor) -> Tensor:
    """`generated` where frames are active (B, F'), `before` elsewhere: the end of a step."""
    return torch.where(_as_frames(active, generated), generated, before)


def _as_frames(mask: Tensor, latents: Tensor) -> Tensor:
    return mask.to(latents.device)[:, None, :, None, None]
