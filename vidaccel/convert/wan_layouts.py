"""The weights of a causal Wan student out of what training codes wrap around them, under Wan's own names.

Facts of the published codes: Self-Forcing, LongLive, Context Forcing, Causal Forcing and Rolling Forcing save
`generator`, `generator_ema` (averaged) and `critic` side by side, CausVid `generator` alone, the released
`self_forcing_dmd.pt` `generator_ema` alone, LongLive 2.0 `generator_optimizer` and `step` too; Krea's file is the
generator itself. Inside, names begin with `model.`; averaged ones keep the wrappers of FSDP at any depth. LongLive's
second stage is `generator_lora`, in the names of PEFT. Only names are changed here; tensors are read one at a time,
when they are written.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from vidaccel.convert.checkpoint import Checkpoint, StoredTensor
from vidaccel.errors import UserError

Choice = Literal["auto", "ema", "plain"]

_WRAPPERS = frozenset({"_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_orig_mod", "module"})
_MODELS = frozenset({"base_model", "diffusion_model", "model"})  # what may stand in front of Wan's names
_EMA, _PLAIN, _LORA = "generator_ema", "generator", "generator_lora"
_UNUSED = frozenset({"critic", "critic_lora"})  # networks of the training, which make no video
# What the optimisers, schedules and counters of a training saved beside its networks.
_STATE = re.compile(r"(.*_)?(optimi[sz]er|scheduler|scaler|config|args|rng_state|epoch|step|steps|iteration)")
_BARE = ""  # names that stand in no group: a state dict saved by itself
_NAMES = {_EMA: "ema", _PLAIN: "plain", _BARE: "unnamed"}
_LOW_RANK = re.compile(r"(.+)\.lora_([AB])(?:\.default)?\.weight")


@dataclass(frozen=True, kw_only=True)
class LowRank:
    """A LoRA: to the weight of `layers[name]` belongs the change `scale * up @ down`.

    layers: by Wan's name of the weight, the names of `down` (rank, in) and `up` (out, rank) in `checkpoint`.
    alpha: the scale is `alpha / rank`; None: alpha is the rank, as LongLive has it.
    """

    checkpoint: Checkpoint
    layers: Mapping[str, tuple[str, str]]
    alpha: float | None = None

    def change(self, name: str) -> Tensor:
        """What is added to a weight, (out, in) in float32 or better."""
        down, up = (self.checkpoint.read(part) for part in self.layers[name])
        exact = torch.promote_types(down.dtype, torch.float32)
        scale = 1.0 if self.alpha is None else self.alpha / down.shape[0]
        return (up.to(exact) @ down.to(exact)) * scale


@dataclass(frozen=True, kw_only=True)
class AdaptedCheckpoint(Checkpoint):
    """A checkpoint to whose weights a LoRA is added as they are read; they keep their number format."""

    adapter: LowRank

    def read(self, key: str) -> Tensor:
        """One tensor, changed if the LoRA changes it."""
        weight = super().read(key)
        if key not in self.adapter.layers:
            return weight
        change = self.adapter.change(key)
        return (weight.to(torch.promote_types(weight.dtype, change.dtype)) + change).to(weight.dtype)


def student_weights(checkpoint: Checkpoint, weights: str = "auto") -> tuple[Checkpoint, str]:
    """The generator of a checkpoint under Wan's names, and which of its weights these are: ema, plain or unnamed.

    weights: "ema" for the averaged ones, "plain" for the others, "auto" for "ema" where they are there.
    Raises `UserError` where those that are asked for are not there, and for names that fit no known layout.
    """
    if weights not in get_args(Choice):
        raise UserError(f"`weights` must be one of {', '.join(get_args(Choice))}; got {weights!r}.")
    groups = _grouped(checkpoint)
    if _LORA in groups or any(".lora_" in name for name in groups.get(_BARE, ())):
        raise UserError(f"{checkpoint.path} holds a LoRA; give it with --lora, and what it changes with --checkpoint.")
    if not groups or (_BARE in groups and len(groups) > 1):
        first = min(groups.get(_BARE, checkpoint.tensors), default="nothing")
        raise UserError(
            f"{checkpoint.path} is no layout of a student that is known: {first} stands beside or instead of "
            f"{_PLAIN} and {_EMA}; save its generator alone."
        )
    order = {"auto": (_EMA, _PLAIN, _BARE), "ema": (_EMA,), "plain": (_PLAIN,)}[weights]
    for group in order:
        if group in groups:
            return replace(checkpoint, tensors=groups[group]), _NAMES[group]
    there = " and ".join(_NAMES[group] for group in groups)
    raise UserError(
        f"{checkpoint.path} holds {there} weights and --weights {weights} was asked for; leave --weights out."
    )


def with_lora(checkpoint: Checkpoint, lora: Checkpoint, alpha: float | None = None) -> AdaptedCheckpoint:
    """A student's weights with the LoRA in `lora` added.

    Raises `UserError` unless every tensor of the LoRA belongs to a pair that fits a weight of the checkpoint.
    """
    if alpha is not None and not 0 < alpha < math.inf:
        raise UserError(f"`lora_alpha` must be above 0 and finite, got {alpha}; left out it is the LoRA's rank.")
    groups = _grouped(lora)
    tensors = groups.get(_LORA, groups.get(_BARE, {}))
    unknown = [name for group, names in groups.items() for name in names if tensors is not names or not _part(name)]
    if unknown or not tensors:
        first = min(unknown, default="nothing")
        raise UserError(f"{lora.path} is no LoRA of a generator: {first} is in it; give {_LORA} of LongLive.")
    pairs: dict[str, dict[str, str]] = {}
    for name in tensors:
        layer, side = _part(name) or ("", "")
        pairs.setdefault(f"{layer}.weight", {})[side] = name
    for name, pair in pairs.items():
        _check_pair(name, [tensors.get(pair.get(side, "")) for side in "AB"], checkpoint, lora)
    adapter = LowRank(
        checkpoint=replace(lora, tensors=tensors),
        layers={name: (pair["A"], pair["B"]) for name, pair in pairs.items()},
        alpha=alpha,
    )
    return AdaptedCheckpoint(path=checkpoint.path, tensors=checkpoint.tensors, adapter=adapter)


def _grouped(checkpoint: Checkpoint) -> dict[str, dict[str, StoredTensor]]:
    """The tensors by the network they belong to, their names without what is wrapped around them."""
    groups: dict[str, dict[str, StoredTensor]] = {}
    for full, stored in checkpoint.tensors.items():
        parts = [part for part in full.split(".") if part not in _WRAPPERS]
        if _is_training_state(parts, stored):
            continue
        group = parts.pop(0) if parts and parts[0] in {_EMA, _PLAIN, _LORA, *_UNUSED} else _BARE
        while parts and parts[0] in _MODELS:
            parts.pop(0)
        if group in _UNUSED:
            continue
        name, names = ".".join(parts), groups.setdefault(group, {})
        if name in names:
            raise UserError(
                f"{checkpoint.path} holds {name} twice, as {names[name].name} and {full}; save one of them."
            )
        names[name] = stored
    return groups


def _is_training_state(parts: Sequence[str], stored: StoredTensor) -> bool:
    """Whether an entry is no weight of a network: a single number, or what a training needs to go on."""
    is_number = len(parts) == 1 and math.prod(stored.shape) == 1
    return is_number or bool(parts and _STATE.fullmatch(parts[0]))


def _part(name: str) -> tuple[str, str] | None:
    """The layer that a tensor of a LoRA changes and its side, A (down) or B (up)."""
    found = _LOW_RANK.fullmatch(name)
    return (found[1], found[2]) if found else None


def _check_pair(name: str, pair: list[StoredTensor | None], checkpoint: Checkpoint, lora: Checkpoint) -> None:
    down, up = pair
    if down is None or up is None:
        raise UserError(f"{lora.path} has one of the two tensors that change {name}; it is incomplete.")
    if name not in checkpoint.tensors:
        raise UserError(f"{lora.path} changes {name}, which {checkpoint.path} does not have; it is of another model.")
    shape = checkpoint.tensors[name].shape
    flat = len(down.shape) == len(up.shape) == 2
    if not flat or (up.shape[0], down.shape[1]) != shape or down.shape[0] != up.shape[1] or 0 in down.shape:
        raise UserError(
            f"{lora.path} changes {name} by {list(up.shape)} times {list(down.shape)}, and {checkpoint.path} has "
            f"{list(shape)} there; it is of another size."
        )
