"""From checkpoints to a complete diffusers folder: parts are recognised, planned in full, then written in a stream.

Nothing stands under the output's name before everything is written.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import diffusers
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from vidaccel.catalog.registry import SETTINGS_FILE
from vidaccel.catalog.spec import GenerationDefaults
from vidaccel.convert.checkpoint import Checkpoint, find_checkpoints
from vidaccel.convert.formats import Format
from vidaccel.convert.plan import ConversionPlan, make_plan
from vidaccel.convert.tokenizers import find_tokenizer, save_tokenizer
from vidaccel.convert.weights import MOST_SHARD_BYTES, write_weights
from vidaccel.errors import UserError
from vidaccel.files.atomic import atomic_folder, check_model_folder
from vidaccel.files.tensors import num_bytes


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One pipeline that published weights become.

    pipeline: name of its class. parts: its networks by component, of which `transformer` tells the version.
    tokenizers: the text encoder that each belongs to. scheduler: settings of `FlowMatchEulerDiscreteScheduler`.
    settings: of the pipeline itself, beside its parts.
    """

    name: str
    version: str
    pipeline: str
    parts: Mapping[str, Format]
    tokenizers: Mapping[str, str]
    scheduler: Mapping[str, Any]
    defaults: GenerationDefaults
    settings: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))


@dataclass(frozen=True, kw_only=True)
class ConvertProgress:
    """`done` of `total` bytes are written; `component` is the part that is being written."""

    done: int
    total: int
    component: str


@dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    """dtype: of floating numbers, None keeps each as it is. most_shard_bytes: of one file of weights."""

    dtype: torch.dtype | None = None
    overwrite: bool = False
    most_shard_bytes: int = MOST_SHARD_BYTES
    on_progress: Callable[[ConvertProgress], None] | None = None


def convert(
    paths: Sequence[Path],
    output: Path,
    *,
    recipes: Sequence[Recipe],
    refused: Sequence[Format] = (),
    version: str = "auto",
    options: ConvertOptions | None = None,
) -> Recipe:
    """Write the pipeline that the weights in `paths` (files or folders) make to the folder `output`.

    Returns the recipe that was followed. Raises `UserError` for weights that are missing, damaged, of another model or
    there twice, for an output that may not be replaced, and where the disk has too little room.
    """
    options = options or ConvertOptions()
    check_model_folder(output, paths, overwrite=options.overwrite)
    checkpoints = find_checkpoints(paths)
    _check_refused(paths, checkpoints, recipes, refused)
    recipe = _choose_recipe(checkpoints, recipes, refused, version)
    plans = {
        component: make_plan(recipe.parts[component], checkpoint, dtype=options.dtype)
        for component, checkpoint in _choose_parts(recipe, checkpoints, paths).items()
    }
    tokenizers = {
        name: find_tokenizer(plans[encoder].checkpoint.folder, component=encoder, paths=paths)
        for name, encoder in recipe.tokenizers.items()
    }
    check_room(output, sum(plan.num_bytes for plan in plans.values()))
    with atomic_folder(output) as folder:
        classes: dict[str, tuple[str, str]] = {}
        for name, source in tokenizers.items():
            classes[name] = ("transformers", save_tokenizer(source, folder / name))
        for component, plan in plans.items():
            classes[component] = plan.form.library_and_class
        write_networks(folder, plans, options)
        write_settings(folder, recipe, classes)
    return recipe


def _check_refused(
    paths: Sequence[Path], checkpoints: Sequence[Checkpoint], recipes: Sequence[Recipe], refused: Sequence[Format]
) -> None:
    """Files that were given by name must be of use; what else lies in a folder is passed over."""
    known = [form for recipe in recipes for form in recipe.parts.values()]
    for checkpoint in checkpoints:
        if checkpoint.path not in paths or any(form.recognises(checkpoint.tensors) for form in known):
            continue
        for form in refused:
            if form.recognises(checkpoint.tensors):
                raise UserError(f"{checkpoint.path} is {form.title}: {form.refusal}.")
        first = min(checkpoint.tensors, default="nothing")
        titles = "; ".join(dict.fromkeys(form.title for form in known))
        raise UserError(
            f"{checkpoint.path} is none of: {titles}. It has {len(checkpoint.tensors)} tensors, {first} first."
        )


def _choose_recipe(
    checkpoints: Sequence[Checkpoint], recipes: Sequence[Recipe], refused: Sequence[Format], version: str
) -> Recipe:
    versions = ("auto", *(recipe.version for recipe in recipes))
    if version not in versions:
        raise UserError(f"`--version` must be one of {', '.join(versions)}; got {version!r}.")
    names = [checkpoint.tensors for checkpoint in checkpoints]
    found = [recipe for recipe in recipes if any(map(recipe.parts["transformer"].recognises, names))]
    wanted = [recipe for recipe in found if version in ("auto", recipe.version)]
    if len(wanted) == 1:
        return wanted[0]
    if wanted:
        raise UserError(f"There are transformers of {', '.join(recipe.version for recipe in wanted)}; give --version.")
    if found:
        raise UserError(f"The transformer is of version {found[0].version}, and --version {version} was asked for.")
    for form in refused:
        if any(map(form.recognises, names)):
            raise UserError(f"There is only {form.title}: {form.refusal}.")
    titles = " or ".join(recipe.parts["transformer"].title for recipe in recipes if version in ("auto", recipe.version))
    raise UserError(f"{checkpoints[0].path.name} and what lies beside it hold no transformer; give {titles}.")


def _choose_parts(recipe: Recipe, checkpoints: Sequence[Checkpoint], paths: Sequence[Path]) -> dict[str, Checkpoint]:
    parts = {}
    for component, form in recipe.parts.items():
        found = [checkpoint for checkpoint in checkpoints if form.recognises(checkpoint.tensors)]
        named = [checkpoint for checkpoint in found if checkpoint.path in paths]  # a file given by name comes first
        found = named or found
        if len(found) > 1:
            both = " and ".join(str(checkpoint.path) for checkpoint in found[:2])
            raise UserError(f"{form.title} is there more than once: {both}; name one of the files with --checkpoint.")
        if not found:
            raise UserError(
                f"{form.title} is missing for {recipe.name} {recipe.version}; add --checkpoint with its folder."
            )
        parts[component] = found[0]
    return parts


def check_room(output: Path, num_bytes: int) -> None:
    """Raise `UserError` if `num_bytes` do not fit on the disk of `output`."""
    place = next(folder for folder in output.resolve().parents if folder.is_dir())
    free = shutil.disk_usage(place).free
    if num_bytes > free:
        raise UserError(
            f"The converted weights take {num_bytes / 1e9:.1f} GB and {place} has {free / 1e9:.1f} GB free; make room, "
            "use a smaller --dtype or another --output."
        )


def write_networks(folder: Path, plans: Mapping[str, ConversionPlan], options: ConvertOptions) -> None:
    """Write each planned network to the folder of its component, tensor by tensor."""
    total, done = sum(plan.num_bytes for plan in plans.values()), 0
    for component, plan in plans.items():
        (folder / component).mkdir()
        model: Any = plan.model
        stem = "diffusion_pytorch_model"
        if plan.form.is_transformers:
            stem = "model"
            model.config.architectures = [type(model).__name__]
            model.config.save_pretrained(folder / component)
        else:
            model.save_config(folder / component)
        written = write_weights(folder / component, stem, plan.tensors, plan.make, most_bytes=options.most_shard_bytes)
        for tensor in written:
            done += num_bytes(tensor)
            if options.on_progress is not None:
                options.on_progress(ConvertProgress(done=done, total=total, component=component))


def write_settings(folder: Path, recipe: Recipe, classes: Mapping[str, Sequence[str]]) -> None:
    """Write the scheduler, `model_index.json` and `vidaccel.json`. classes: library and class of each component."""
    scheduler: Any = FlowMatchEulerDiscreteScheduler(**recipe.scheduler)
    scheduler.save_pretrained(folder / "scheduler")
    index: dict[str, Any] = {"_class_name": recipe.pipeline, "_diffusers_version": diffusers.__version__}
    index |= {name: list(value) for name, value in sorted(classes.items())}
    index |= recipe.settings
    index["scheduler"] = ["diffusers", type(scheduler).__name__]
    settings = {"defaults": recipe.defaults.to_dict(), "weights": "external"}
    for name, value in (("model_index.json", index), (SETTINGS_FILE, settings)):
        (folder / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
