"""LoRA files into the denoisers of a pipeline, by its own `load_lora_weights`, and nothing half or nowhere.

diffusers logs what a file holds too much or too little of and goes on; here it is an error, or a warning where only a
part of a file finds no place.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from vidaccel.errors import UserError, first_line
from vidaccel.generation.expert_files import EXPERT_PARTS, LoraFile
from vidaccel.machine.components import denoisers, modules

logger = logging.getLogger(__name__)

_MATRIX = re.compile(r"\.(?:lora[._](?P<lora>A|B|up|down)|lokr_)")
_PEFT = "base_model.model."


def load_loras(pipe: Any, loras: Sequence[LoraFile]) -> None:
    """Load each file into the denoisers it is for, then switch all of them on with their weights.

    A file without an expert goes into every denoiser. Raises `UserError` for a pipeline that takes none, for a file
    that fits nothing in the model, has another shape, or lacks one of the two matrices of a layer.
    """
    if not loras:
        return
    if not hasattr(pipe, "load_lora_weights"):
        raise UserError(f"{type(pipe).__name__} takes no LoRA; leave --lora out, or use another --model.")
    active: dict[str, dict[str, float]] = {}
    for number, lora in enumerate(loras):
        for part in _parts(pipe, lora):
            _load(pipe, part, lora, name=f"lora_{number}")
            active.setdefault(part, {})[f"lora_{number}"] = lora.weight
    for part, weights in active.items():
        getattr(pipe, part).set_adapters(list(weights), list(weights.values()))


def merge_loras(pipe: Any) -> None:
    """Add the active LoRAs to the weights of the denoisers, for good: their layers are plain products again."""
    pipe.fuse_lora(components=_denoiser_names(pipe))
    pipe.unload_lora_weights()


def _parts(pipe: Any, lora: LoraFile) -> list[str]:
    """The names of the denoisers that a file is for."""
    names = _denoiser_names(pipe)
    if lora.expert is None:
        return names
    part = EXPERT_PARTS[lora.expert]
    if len(names) < 2 or part not in names:
        raise UserError(
            f"{type(pipe).__name__} here has one denoiser and no experts; give --lora {lora.path.name} without "
            f"{lora.expert}=."
        )
    return [part]


def _denoiser_names(pipe: Any) -> list[str]:
    networks = denoisers(pipe)
    return [name for name, module in modules(pipe).items() if any(module is one for one in networks)]


def _load(pipe: Any, part: str, lora: LoraFile, *, name: str) -> None:
    second = {"load_into_transformer_2": True} if part == "transformer_2" else {}
    kinds = (ValueError, RuntimeError, KeyError, TypeError, AttributeError, IndexError, OSError, SafetensorError)
    layers: dict[str, set[str]] = {}
    try:
        source, options = _source(lora, getattr(pipe, part))
        layers = _layers(pipe.lora_state_dict(source, **options))
        pipe.load_lora_weights(source, adapter_name=name, **options, **second)
    except kinds as error:
        _refuse_halves(lora, layers)  # the likely reason, which the error does not say
        raise UserError(
            f"The LoRA {lora.path.name} does not fit the {part} of {type(pipe).__name__} ({first_line(error)[:200]})."
        ) from error
    _check(getattr(pipe, part), lora, layers, name=name)


def _source(lora: LoraFile, denoiser: Any) -> tuple[Any, dict[str, Any]]:
    """What to give to `load_lora_weights`: the file, or its weights where they lack the prefix that diffusers goes by.

    peft and DiffSynth write `blocks.0...`, perhaps behind `base_model.model.` and with `.default.` in between.
    """
    with safe_open(lora.path, framework="pt") as file:
        names = [name.removeprefix(_PEFT) for name in file.keys()]  # noqa: SIM118
    children = {child for child, _ in denoiser.named_children()}
    if not any(name.partition(".")[0] in children for name in names):
        return str(lora.path.parent), {"weight_name": lora.path.name, "use_safetensors": True, "local_files_only": True}
    is_original = any(".self_attn." in name or ".cross_attn." in name for name in names)  # Wan's own names of layers
    prefix = "diffusion_model." if is_original else "transformer."
    weights = load_file(lora.path)
    return {prefix + key.removeprefix(_PEFT).replace(".default.", "."): value for key, value in weights.items()}, {}


def _layers(weights: Mapping[str, torch.Tensor]) -> dict[str, set[str]]:
    """The layers of a LoRA in diffusers' names, without the component's, and which matrices the file has of each."""
    found: dict[str, set[str]] = {}
    for key in weights:
        match = _MATRIX.search(key)
        if match is not None:
            layer = key[: match.start()].partition(".")[2]
            found.setdefault(layer, set()).add({"up": "B", "down": "A"}.get(match["lora"], match["lora"] or "AB"))
    return found


def _check(denoiser: Any, lora: LoraFile, layers: Mapping[str, set[str]], *, name: str) -> None:
    adapted = {
        place
        for place, module in denoiser.named_modules()
        if any(name in getattr(module, matrices, ()) for matrices in ("lora_A", "lokr_w1"))
    }
    kind = type(denoiser).__name__
    if not adapted:
        raise UserError(
            f"The LoRA {lora.path.name} fits no layer of the {kind}: it is for another model, or named in a way that "
            "diffusers does not read."
        )
    _refuse_halves(lora, {layer: layers[layer] for layer in adapted & layers.keys()})
    homeless = sorted(layers.keys() - adapted)
    if homeless:
        logger.warning(
            "%d of %d layers in %s fit nothing in the %s and have no effect, %s among them.",
            len(homeless),
            len(layers),
            lora.path.name,
            kind,
            homeless[0],
        )


def _refuse_halves(lora: LoraFile, layers: Mapping[str, set[str]]) -> None:
    halves = sorted(layer for layer, matrices in layers.items() if not {"A", "B"} <= set("".join(matrices)))
    if halves:
        raise UserError(
            f"The LoRA {lora.path.name} is incomplete: of {len(halves)} layers, {halves[0]} among them, it has one "
            "matrix of two."
        )
