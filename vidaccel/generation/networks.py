"""The networks of a saved pipeline, each loaded by its own class, and refused where its files do not fill it.

The libraries draw random numbers for weights that a file lacks and only log it, so what they report is read here.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import diffusers
import torch
import transformers

from vidaccel.errors import UserError
from vidaccel.generation.expert_files import TransformerFile
from vidaccel.generation.single_file import load_single_file, some_weights


def load_networks(
    folder: Path,
    index: Mapping[str, Any],
    *,
    dtypes: Mapping[str, torch.dtype],
    files: Mapping[str, TransformerFile] = MappingProxyType({}),
) -> dict[str, torch.nn.Module]:
    """Every network of diffusers or transformers that `folder` holds, by name.

    index: the content of its `model_index.json`. dtypes: number formats by name, `default` for the others.
    files: by name, those whose weights are in one file somewhere else; the folder then gives the configuration alone.

    Raises `UserError` where weights are missing or have another shape, or where a file of a diffusers model holds
    weights that the model has no place for.
    """
    found = {}
    for name, entry in index.items():
        kind = _network_class(entry) if (folder / name).is_dir() else None
        if kind is None:
            continue
        dtype = dtypes.get(name, dtypes["default"])
        if name in files:
            found[name] = load_single_file(kind, files[name], config=folder / name, dtype=dtype)
            continue
        if issubclass(kind, diffusers.ModelMixin):
            found[name], report = kind.from_pretrained(
                folder / name,
                torch_dtype=dtype,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
            )
        else:
            found[name], report = kind.from_pretrained(
                folder / name,
                dtype=dtype,
                use_safetensors=True,
                local_files_only=True,
                ignore_mismatched_sizes=True,  # which puts them into the report
                output_loading_info=True,
            )
        check_report(report, place=folder / name, kind=kind)
    return found


def check_report(report: Mapping[str, Any], *, place: Path, kind: type) -> None:
    """Raise `UserError` for what a library reports of loading `place`: weights missing, of another shape, or left over.

    Weights left over are no error for networks of transformers: text encoders are often saved as a part of more.
    """
    wrong = {
        "lacks": sorted(report["missing_keys"]),
        "has other shapes for": sorted(str(one[0]) for one in report["mismatched_keys"]),
    }
    surplus = sorted(report["unexpected_keys"])
    if not any(wrong.values()) and not (surplus and issubclass(kind, diffusers.ModelMixin)):
        return
    wrong["has no place for"] = surplus
    parts = [f"{words} {some_weights(names)}" for words, names in wrong.items() if names]
    raise UserError(
        f"The weights in {place} do not fill the {kind.__name__} of its config.json: the file {'; it '.join(parts)}."
    )


def _network_class(entry: Any) -> Any:
    """The class of an entry of `model_index.json` if it is a network of diffusers or transformers, else None.

    Modules that are not loaded are left alone: which ones a folder may name is the caller's to decide.
    """
    if not isinstance(entry, list) or len(entry) != 2 or not all(isinstance(word, str) for word in entry):
        return None
    library, name = entry
    module = getattr(diffusers.pipelines, library, None) or sys.modules.get(library)
    kind = getattr(module, name, None)
    networks = (diffusers.ModelMixin, transformers.PreTrainedModel)
    return kind if isinstance(kind, type) and issubclass(kind, networks) else None
