"""The model that a name, a folder or a Hub id stands for.

Folders and Hub ids without a row in the table get one from `spec_of`: with the settings that the folder itself records
(`vidaccel.json`), else with those of a row of the same pipeline, else with those of the pipeline's signature.
"""

import inspect
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_args

from vidaccel.catalog.models import MODELS
from vidaccel.catalog.pipelines import pipeline_class
from vidaccel.catalog.presets import Preset
from vidaccel.catalog.spec import GenerationDefaults, ModelSpec, Weights, expanded
from vidaccel.errors import UserError

SETTINGS_FILE = "vidaccel.json"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
# Other names of settings in the signatures of pipelines.
_SYNONYMS = {"frames": "num_frames", "video_length": "num_frames", "frame_rate": "fps"}


def spec_of(model: str) -> ModelSpec:
    """The row of a registered name, or a new one for a folder with a `model_index.json` or for a Hub id.

    Raises `UserError` for anything else.
    """
    for spec in MODELS:
        if model == spec.name:
            return spec
    folder = expanded(model)
    if model and folder.is_dir():
        return _spec_of_folder(folder)
    for spec in MODELS:
        if model == spec.source:
            return spec
    if _HUB_ID.fullmatch(model) and not folder.exists():
        return ModelSpec(name=model, source=model, description="from the Hub")
    if folder.is_file():
        raise UserError(
            f"{model} is one file and a model has more parts: give it as --transformer {model}, with the folder or Hub "
            "id that has the rest as --model."
        )
    near = get_close_matches(model, [spec.name for spec in MODELS], n=3)
    meant = f" Near to it: {', '.join(near)}." if near else ""
    raise UserError(
        "`model` must be a name that `vidaccel models` lists, a local folder or a Hub id (owner/name); "
        f"got {model!r}.{meant}"
    )


def _spec_of_folder(folder: Path) -> ModelSpec:
    if not (folder / "model_index.json").is_file():
        if (folder / "modular_model_index.json").is_file():
            raise UserError(
                f"{folder} holds a modular pipeline, whose blocks have no one call to make a video with; run it with "
                "diffusers' ModularPipeline, or save a whole pipeline with `pipeline.save_pretrained(folder)`."
            )
        raise UserError(
            f"The folder {folder} has no model_index.json; save one with `pipeline.save_pretrained(folder)`."
        )
    recorded = _recorded_settings(folder / SETTINGS_FILE)
    try:
        defaults = replace(_settings_of_pipeline(folder), **recorded.get("defaults", {}))
    except (TypeError, ValueError) as error:
        raise UserError(f"{folder / SETTINGS_FILE} has a wrong setting ({error}); correct or delete it.") from error
    weights = recorded.get("weights", "external")
    if weights not in get_args(Weights):
        raise UserError(f"`weights` in {folder / SETTINGS_FILE} must be one of {get_args(Weights)}, got {weights!r}.")
    return ModelSpec(
        name=str(folder), source=str(folder), description="local folder", weights=weights, defaults=defaults
    )


def recorded_defaults(model: str | os.PathLike[str], names: Sequence[str]) -> dict[str, Any]:
    """What the `vidaccel.json` of a folder says of `names`, where a call says nothing; without those it leaves open.

    Raises UserError for one that cannot be read.
    """
    defaults = _recorded_settings(Path(model) / SETTINGS_FILE).get("defaults", {})
    return {name: defaults[name] for name in names if defaults.get(name) is not None}


def pipeline_name(spec: ModelSpec) -> str | None:
    """The class name of a model's pipeline, None where neither its folder nor its row says it."""
    return spec.pipeline if spec.folder is None else _named_pipeline(spec.folder)


def model_index(spec: ModelSpec) -> Mapping[str, Any] | None:
    """The `model_index.json` of a model, None where it is not on this machine or is none."""
    if (folder := spec.folder) is not None:
        return _index_in(folder / "model_index.json")
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(spec.source, "model_index.json")
    return _index_in(Path(cached)) if isinstance(cached, str) else None


def recorded_preset(index: Mapping[str, Any]) -> Preset | None:
    """The published settings for the model of a `model_index.json`, as `Preset.for_pipeline` finds them later."""
    kind: Any = pipeline_class(index["_class_name"])
    networks = [index.get(name) for name in ("transformer", "transformer_2")]
    named = [str(network[1]) for network in networks if isinstance(network, list) and len(network) == 2 and network[1]]
    pipelines = set() if kind is None else {owner.__name__ for owner in kind.__mro__}
    return Preset.for_classes(pipelines=pipelines, transformers=named[:1], config=index)


def _index_in(path: Path) -> Mapping[str, Any] | None:
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # loading says what is wrong with it
        return None
    return index if isinstance(index, dict) and isinstance(index.get("_class_name"), str) else None


def _named_pipeline(folder: Path) -> str | None:
    index = _index_in(folder / "model_index.json")
    return None if index is None else str(index["_class_name"])


def _settings_of_pipeline(folder: Path) -> GenerationDefaults:
    """What a folder's pipeline takes by itself: of the first row with that pipeline, else of its signature.

    Where that says None, its config decides, as it does for a student of ours.
    """
    index = _index_in(folder / "model_index.json")
    if index is None:
        return GenerationDefaults()
    name = index["_class_name"]
    for spec in MODELS:
        if spec.pipeline == name:
            return spec.defaults
    kind: Any = pipeline_class(name)
    known = GenerationDefaults()
    if kind is None:
        return known
    found: dict[str, Any] = {}
    for parameter in inspect.signature(kind.__call__).parameters.values():
        setting = _SYNONYMS.get(parameter.name, parameter.name)
        value = index.get(parameter.name) if parameter.default is None else parameter.default
        if hasattr(known, setting) and isinstance(value, int | float) and not isinstance(value, bool):
            found[setting] = value
    return replace(known, **({"guidance_scale": None, "true_cfg_scale": None} | found))


def _recorded_settings(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        recorded = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not readable as JSON ({error}); correct or delete it.") from error
    if not isinstance(recorded, dict) or not isinstance(recorded.get("defaults", {}), dict):
        raise UserError(f"{path} must hold an object with `defaults` and `weights`; correct or delete it.")
    return recorded
