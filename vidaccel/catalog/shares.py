"""Parts that a model folder does not hold itself because they are those of an embedded model.

`vidaccel.json` of such a folder says `"shares": "wan-tiny"`: autoencoder, text encoder and tokenizer are loaded from
the assets, so that they are shipped once.
"""

import json
import os
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from vidaccel.catalog.registry import SETTINGS_FILE
from vidaccel.catalog.spec import asset_path
from vidaccel.errors import UserError


def shared_folder(folder: Path) -> Path | None:
    """The folder of the embedded model whose parts `folder` shares, None where it holds all it needs.

    Raises UserError for a name that is no embedded model.
    """
    try:
        recorded = json.loads((folder / SETTINGS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # whoever needs the settings says what is wrong with them
        return None
    name = recorded.get("shares") if isinstance(recorded, dict) else None
    if name is None:
        return None
    if not isinstance(name, str) or Path(name).name != name or name in (".", ".."):
        raise UserError(f"`shares` in {folder / SETTINGS_FILE} must name an embedded model, got {name!r}.")
    return asset_path(name)


def shared_components(folder: str | os.PathLike[str], *, given: Mapping[str, Any]) -> dict[str, Any]:
    """The parts that a model folder takes from an embedded model, loaded; those in `given` are left out.

    given: keyword arguments of `from_pretrained`; its `dtype` (or `torch_dtype`) holds for these parts too.
    """
    path = Path(folder)
    source = shared_folder(path) if path.is_dir() else None
    if source is None:
        return {}
    index = json.loads((source / "model_index.json").read_text(encoding="utf-8"))
    dtypes = given.get("dtype", given.get("torch_dtype"))
    parts = {}
    for name, entry in index.items():
        is_here = (path / name).is_dir() or name in given
        if is_here or not isinstance(entry, list) or not (source / name).is_dir():
            continue
        kind = getattr(import_module(entry[0]), entry[1])
        dtype = dtypes.get(name, dtypes.get("default")) if isinstance(dtypes, Mapping) else dtypes
        is_network = hasattr(kind, "dtype") and dtype is not None
        parts[name] = kind.from_pretrained(source / name, **({"dtype": dtype} if is_network else {}))
    return parts
