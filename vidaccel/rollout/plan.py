"""How much memory a rollout will take, said before anything is loaded, and what to change where it does not fit.

What is said is the bytes of the tensors that the rollout itself makes, see `vidaccel.rollout.sizes`. Libraries take
more beside them: workspaces of convolutions, fragments of the allocator, the context of CUDA.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from vidaccel.errors import UserError
from vidaccel.machine.footprint import available_bytes, gigabytes
from vidaccel.memory import MemoryConfig
from vidaccel.memory.settings import Retrieve
from vidaccel.rollout.sizes import (
    PHASES,
    ModelSizes,
    PlanPart,
    RolloutSize,
    decoder_parts,
    latent_frame_bytes,
    latent_size,
    transformer_parts,
)

_SMALLER_SIDES = (0.75, 0.5, 0.375, 0.25)


@dataclass(frozen=True, kw_only=True)
class Advice:
    """One change, on top of those before it: what it saves and what all of them come to."""

    change: str
    saved_bytes: int
    total_bytes: int
    fits: bool


@dataclass(frozen=True, kw_only=True)
class RolloutPlan:
    """What a rollout will hold on a device of which `free_bytes` are free.

    denoiser: the transformer, its memory and its work. decoder: the autoencoder's.
    """

    model: ModelSizes
    size: RolloutSize
    device: torch.device
    free_bytes: int
    denoiser: tuple[PlanPart, ...]
    decoder: tuple[PlanPart, ...]

    @property
    def parts(self) -> tuple[PlanPart, ...]:
        """Everything that is held."""
        return (*self.denoiser, *self.decoder, *_text_encoder_parts(self.model, self.size))

    @property
    def total_bytes(self) -> int:
        """Most bytes at once: those of the phase that holds most."""
        return max(sum(part.num_bytes for part in self.parts if phase in part.phases) for phase in PHASES)

    @property
    def fits(self) -> bool:
        """Whether there is room."""
        return self.total_bytes <= self.free_bytes

    def bytes_of(self, name: str) -> int:
        """Bytes of the part called `name`."""
        return next(part.num_bytes for part in self.parts if part.name == name)

    @property
    def state_bytes(self) -> int:
        """Size of an exact state on disk once the memory is full.

        Keys before rotation and values, which are two thirds of the memory, and what the decoder keeps.
        """
        return sum(map(self.bytes_of, ("sink", "slow", "fast"))) * 2 // 3 + self.bytes_of("decoder")

    @property
    def latent_frame_bytes(self) -> int:
        """Bytes of the latents of one frame of all videos, of which an archive keeps every one."""
        size = (int(self.model.transformer["in_channels"]), *latent_size(self.model, self.size))
        return latent_frame_bytes(size, self.size.batch_size)

    def advice(self) -> tuple[Advice, ...]:
        """Changes in the order of how little they cost, each on top of those before, up to the first that fits.

        Empty where the rollout fits as it is. If the last does not fit either, nothing known here makes it fit.
        """
        found: list[Advice] = []
        plan = self
        for lever in _LEVERS:
            if plan.fits:
                break
            change, smaller = _pulled(lever, plan)
            saved = plan.total_bytes - smaller.total_bytes
            if saved > 0:
                total = smaller.total_bytes
                found.append(Advice(change=change, saved_bytes=saved, total_bytes=total, fits=smaller.fits))
                plan = smaller
        return tuple(found)

    def check(self) -> None:
        """Raise UserError where the rollout does not fit, with the changes that would make it fit."""
        if self.fits:
            return
        advice = self.advice()
        need, free = gigabytes(self.total_bytes), gigabytes(self.free_bytes)
        changes = "; ".join(f"{one.change} (then {gigabytes(one.total_bytes)})" for one in advice)
        enough = advice and advice[-1].fits
        way_out = (
            f"change in this order: {changes}" if enough else f"nothing here makes it fit ({changes or 'no change'})"
        )
        raise UserError(f"The rollout needs {need} of memory on {self.device} and {free} are free; {way_out}.")

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain values for JSON."""
        return {
            "device": str(self.device),
            "free_bytes": self.free_bytes,
            "total_bytes": self.total_bytes,
            "fits": self.fits,
            "parts": [vars(part) | {"phases": list(part.phases)} for part in self.parts],
            "advice": [vars(advice) for advice in self.advice()],
        }


def plan_rollout(
    model: ModelSizes, size: RolloutSize, *, device: torch.device, free_bytes: int | None = None
) -> RolloutPlan:
    """What a rollout of any length will hold on `device`.

    free_bytes: what there is; None asks the device, for which nothing should be loaded yet.

    Raises UserError for a size that the model cannot make and for configurations that are none of Wan's.
    """
    free = available_bytes(device) if free_bytes is None else free_bytes
    latent = latent_size(model, size)
    denoiser = tuple(transformer_parts(model, size, latent, device))
    decoder = tuple(decoder_parts(model, size, latent, device))
    return RolloutPlan(model=model, size=size, device=device, free_bytes=free, denoiser=denoiser, decoder=decoder)


def _replanned(plan: RolloutPlan, size: RolloutSize) -> RolloutPlan:
    """The plan for another size; what does not depend on the change is not measured again."""
    latent = latent_size(plan.model, size)
    denoiser, decoder = plan.denoiser, plan.decoder
    if replace(size, text_encoder=plan.size.text_encoder) != plan.size:
        denoiser = tuple(transformer_parts(plan.model, size, latent, plan.device))
    if _decoder_size(size) != _decoder_size(plan.size):
        decoder = tuple(decoder_parts(plan.model, size, latent, plan.device))
    return replace(plan, size=size, denoiser=denoiser, decoder=decoder)


def _decoder_size(size: RolloutSize) -> tuple[object, ...]:
    dtypes = (size.dtype("vae"), size.dtype("transformer"))  # of the autoencoder and of a small decoder
    return (*dtypes, size.batch_size, size.memory.chunk_frames, size.height, size.width)


def _text_encoder_parts(model: ModelSizes, size: RolloutSize) -> tuple[PlanPart, ...]:
    if not model.text_encoder_numbers or size.text_encoder == "elsewhere":
        return ()
    num_bytes = model.text_encoder_numbers * size.dtype("text_encoder").itemsize
    is_kept = size.text_encoder == "kept"
    words = "weights" if is_kept else "weights, until the prompts are encoded"
    phases = PHASES if is_kept else PHASES[:1]
    return (PlanPart(name="text encoder", num_bytes=num_bytes, description=words, phases=phases),)


# What can be changed, from what costs least to what costs most. Each gives the sizes to try, mildest first.
Lever = Callable[[RolloutPlan], list[tuple[str, RolloutSize]]]


def _pulled(lever: Lever, plan: RolloutPlan) -> tuple[str, RolloutPlan]:
    """The mildest change of a lever that is enough, else its strongest; with the plan it leads to."""
    changes = lever(plan)
    if not changes:
        return "", plan
    change, strongest = changes[-1][0], _replanned(plan, changes[-1][1])
    if strongest.fits:
        for milder, size in changes[:-1]:
            if (smaller := _replanned(plan, size)).fits:
                return milder, smaller
    return change, strongest


def _drop_text_encoder(plan: RolloutPlan) -> list[tuple[str, RolloutSize]]:
    if plan.size.text_encoder != "kept" or not plan.model.text_encoder_numbers:
        return []
    return [("drop the text encoder when the prompts are encoded", replace(plan.size, text_encoder="dropped"))]


def _encode_elsewhere(plan: RolloutPlan) -> list[tuple[str, RolloutSize]]:
    if plan.device.type == "cpu" or not plan.model.text_encoder_numbers:
        return []
    return [("encode the prompts on the CPU", replace(plan.size, text_encoder="elsewhere"))]


def _half_precision(plan: RolloutPlan) -> list[tuple[str, RolloutSize]]:
    if all(dtype.itemsize == torch.bfloat16.itemsize for dtype in plan.size.dtypes.values()):
        return []
    dtypes = dict.fromkeys(plan.size.dtypes, torch.bfloat16)
    return [("calculate in bfloat16", replace(plan.size, dtypes=dtypes))]


def _one_at_a_time(plan: RolloutPlan) -> list[tuple[str, RolloutSize]]:
    if plan.size.batch_size == 1:
        return []
    return [("make one video at a time", replace(plan.size, batch_size=1))]


def _smaller_memory(plan: RolloutPlan) -> list[tuple[str, RolloutSize]]:
    """As many keyframes less as are needed, then also fewer of the last frames where they are more than two chunks."""
    memory, chunk = plan.size.memory, plan.size.memory.chunk_frames
    if not isinstance(memory, MemoryConfig):  # what another policy can do without is not known
        return []
    missing = plan.total_bytes - plan.free_bytes
    per_chunk = plan.bytes_of("fast") // memory.fast_frames * chunk
    chunks = math.ceil(missing / per_chunk)
    fewer = min(chunks, memory.slow_frames // chunk)
    shorter = min(chunks - fewer, (memory.fast_frames - 1) // chunk - 1)
    slow, fast = memory.slow_frames - fewer * chunk, memory.fast_frames - max(0, shorter) * chunk
    found = []
    if fewer > 0:
        words = f"keep {slow} keyframes instead of {memory.slow_frames}"
        found.append((words, _remembering(memory, slow=slow, fast=memory.fast_frames)))
    if shorter > 0:
        words = f"remember the last {fast} frames instead of {memory.fast_frames}"
        found.append((f"{found[-1][0]} and {words}" if found else words, _remembering(memory, slow=slow, fast=fast)))
    return [(change, replace(plan.size, memory=smaller)) for change, smaller in found]


def _remembering(memory: MemoryConfig, *, slow: int, fast: int) -> MemoryConfig:
    """The memory with other sizes; it forgets now, so that a longest video has no meaning any more.

    Without places of slow memory nothing comes back into it.
    """
    by: Retrieve = memory.retrieve_by if slow else "none"
    most = None if memory.retrieved_frames is None or by == "none" else min(memory.retrieved_frames, slow)
    return replace(memory, slow_frames=slow, fast_frames=fast, max_frames=None, retrieve_by=by, retrieved_frames=most)


def _smaller_picture(plan: RolloutPlan) -> list[tuple[str, RolloutSize]]:
    size = plan.size
    latent = latent_size(plan.model, size)
    patches = plan.model.transformer["patch_size"][1:]
    unit = [size.height // latent[0] * patches[0], size.width // latent[1] * patches[1]]
    found = []
    for factor in _SMALLER_SIDES:
        height, width = (
            max(step, round(side * factor / step) * step)
            for side, step in zip((size.height, size.width), unit, strict=True)
        )
        change = f"make {width}x{height} pixels instead of {size.width}x{size.height}"
        found.append((change, replace(size, height=height, width=width)))
    return found


# Twice, and again with a smaller picture: what saves nothing while another phase holds most may do so afterwards.
_HARMLESS: tuple[Lever, ...] = (_drop_text_encoder, _encode_elsewhere, _half_precision, _one_at_a_time)
_LEVERS = (*_HARMLESS, _smaller_memory, *_HARMLESS, _smaller_memory, _smaller_picture, *_HARMLESS)
