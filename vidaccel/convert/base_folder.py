"""The parts of a diffusers folder that a student shares with the model it was made from: VAE, text encoder, tokenizer.

They are copied as they are, so that the new folder is complete and nothing done to it reaches the old one.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vidaccel.convert.checkpoint import find_checkpoints, is_pickled, read_json
from vidaccel.errors import UserError

_PARTS = ("vae", "text_encoder", "tokenizer")
_NETWORKS = ("vae", "text_encoder")


@dataclass(frozen=True, kw_only=True)
class BaseFolder:
    """A checked diffusers folder of Wan.

    classes: library and class of each shared part. files: what is copied, as paths below `path`.
    latent_channels, text_dim: of its VAE and text encoder. transformer: the config of its transformer, or nothing.
    """

    path: Path
    classes: dict[str, list[str]]
    files: tuple[Path, ...]
    latent_channels: int
    text_dim: int
    transformer: dict[str, Any]

    @property
    def num_bytes(self) -> int:
        """Size of what is copied."""
        return sum((self.path / file).stat().st_size for file in self.files)

    def copy_to(self, folder: Path) -> Iterator[tuple[str, int]]:
        """Copy the parts to `folder`; yields the part and the size of every file that is there."""
        for file in self.files:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.path / file, folder / file)
            yield file.parts[0], (folder / file).stat().st_size


def read_base(path: Path) -> BaseFolder:
    """Check that `path` is a diffusers folder with the parts that a Wan student needs, weights as safetensors.

    Raises `UserError` if it is none, a part is missing or its weights are damaged or pickled.
    """
    if not (path / "model_index.json").is_file():
        raise UserError(f"{path} has no model_index.json; `--base` takes a diffusers folder such as Wan2.1-T2V-1.3B's.")
    index = read_json(path / "model_index.json")
    classes: dict[str, list[str]] = {}
    for part in _PARTS:
        named = index.get(part)
        if not isinstance(named, list) or len(named) != 2 or not all(isinstance(word, str) for word in named):
            raise UserError(f"{path} has no {part}, which a student needs; give another --base.")
        if not (path / part).is_dir():
            raise UserError(f"{path / part} is missing, and model_index.json lists it; get it again.")
        classes[part] = named
    for part in _NETWORKS:
        find_checkpoints([path / part])  # whole by their headers
    transformer = path / "transformer" / "config.json"
    return BaseFolder(
        path=path,
        classes=classes,
        files=tuple(file.relative_to(path) for part in _PARTS for file in _files(path / part)),
        latent_channels=_number(path / "vae" / "config.json", "z_dim"),
        text_dim=_number(path / "text_encoder" / "config.json", "d_model"),
        transformer=read_json(transformer) if transformer.is_file() else {},
    )


def _files(folder: Path) -> list[Path]:
    """The files of a part, hidden and pickled ones left out."""
    return [
        file
        for file in sorted(folder.rglob("*"))
        if file.is_file() and not file.name.startswith(".") and not is_pickled(file)
    ]


def _number(path: Path, name: str) -> int:
    value = read_json(path).get(name)
    if not isinstance(value, int) or isinstance(value, bool):
        raise UserError(f"{path} does not say `{name}`; it is of another model than Wan.")
    return value
