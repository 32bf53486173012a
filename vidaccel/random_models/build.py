"""Tiny random pipelines from the rows of the family table: complete, offline, the same for the same seed.

The weights are random, so a video of such a pipeline is noise; what runs with it runs with the real one.
"""

from __future__ import annotations

import copy
import json
import zlib
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

import torch

from vidaccel.catalog.families.family import Component, Family
from vidaccel.catalog.pipelines import is_modular, named_class
from vidaccel.catalog.registry import SETTINGS_FILE
from vidaccel.catalog.spec import GenerationDefaults
from vidaccel.catalog.table import family_named
from vidaccel.errors import UserError
from vidaccel.files.atomic import atomic_folder

# What a request fills in from its own settings, under the names that some pipelines have for them.
_FILLED_IN = {"frames", "video_length", "frame_rate", "negative_prompt", "pyramid_num_inference_steps_list"}
_FOLDER_STEPS = 20  # EasyCache computes the first 10 and the last unless told otherwise; some are left to reuse


def build_random(family: Family | str, *, seed: int = 0) -> Any:
    """A tiny random pipeline of `family`, on the CPU in float32, ready to be called with a prompt string.

    The weights of a component depend on `seed` and its name alone, and PyTorch's own random numbers are left as they
    were. Raises `UserError` for a name that is no family.
    """
    family = family_named(family) if isinstance(family, str) else family
    parts = {name: build_part(part, seed=_seed_of(name, seed)) for name, part in family.components.items()}
    pipe = _assemble(named_class(family.pipeline), parts, copy.deepcopy(dict(family.settings)))
    for name, value in family.attributes.items():
        if not hasattr(pipe, name):
            raise AttributeError(f"{family.pipeline_name} has no attribute {name!r} to set.")
        setattr(pipe, name, value)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _assemble(kind: Any, parts: Mapping[str, Any], settings: Mapping[str, Any]) -> Any:
    if not is_modular(kind):
        return kind(**parts, **settings)
    pipe = kind()
    pipe.update_components(**parts, **settings)
    return pipe


def make_random(family: Family | str, folder: str | Path, *, seed: int = 0, overwrite: bool = False) -> Path:
    """Write `build_random(family)` to `folder`, about 1 MB, as `DiffusionPipeline.from_pretrained(folder)` loads it.

    The folder's `vidaccel.json` says that the weights are random and what a small call takes. All or nothing: the
    folder appears when it is complete. Returns `folder`.
    Raises `UserError` for a name that is no family, for a family of blocks, which has no such folder, and for a folder
    that is not empty unless `overwrite`.
    """
    family, folder = family_named(family) if isinstance(family, str) else family, Path(folder)
    if is_modular(named_class(family.pipeline)):
        raise UserError(f"{family.name} is put together from blocks in Python and has no folder; take another family.")
    _check_free(folder, overwrite=overwrite)
    pipe = build_random(family, seed=seed)
    try:
        with atomic_folder(folder) as unfinished:
            pipe.save_pretrained(unfinished)
            (unfinished / SETTINGS_FILE).write_text(_settings_text(family), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror or error}.") from error
    return folder


def _check_free(folder: Path, *, overwrite: bool) -> None:
    if folder.is_file():
        raise UserError(f"{folder} is a file; give the name of a folder.")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not overwrite:
        raise UserError(f"The folder {folder} is not empty; give --overwrite or another folder.")
    if not (folder / "model_index.json").is_file():
        raise UserError(f"The folder {folder} holds no model, so it is not replaced; give another folder.")


def _settings_text(family: Family) -> str:
    known = {setting.name for setting in fields(GenerationDefaults)}
    defaults: dict[str, Any] = {name: value for name, value in family.defaults.items() if name in known}
    further = {name: value for name, value in family.defaults.items() if name not in known | _FILLED_IN}
    defaults["arguments"] = dict(further)
    defaults["num_inference_steps"] = _FOLDER_STEPS
    return json.dumps({"defaults": defaults, "weights": "random"}, indent=2) + "\n"


def _seed_of(name: str, seed: int) -> int:
    return zlib.crc32(f"{name} {seed}".encode())


def build_part(component: Component, *, seed: int) -> Any:
    """One part of a pipeline, on the CPU; a network gets random weights that depend on `seed` alone."""
    arguments = {
        name: build_part(value, seed=_seed_of(name, seed)) if isinstance(value, Component) else copy.deepcopy(value)
        for name, value in component.config.items()
    }
    kind: Any = named_class(component.kind)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        part = _call(kind, arguments)
        if isinstance(part, torch.nn.Module):
            _fill_zeros(part)
            part.eval().requires_grad_(False)
    return part


def _call(kind: Any, arguments: Mapping[str, Any]) -> Any:
    from transformers import PreTrainedModel

    if isinstance(kind, type) and issubclass(kind, PreTrainedModel):
        return kind(cast(Any, kind).config_class(**arguments))
    return kind(**arguments)


def _fill_zeros(module: torch.nn.Module) -> None:
    """Give matrices that start at zero, such as output layers, weights of the size that others start with.

    A network whose output is zero would make every test of reuse pass.
    """
    for parameter in module.parameters():
        if parameter.ndim >= 2 and not parameter.any():
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
