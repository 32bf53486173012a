"""Files of weights that a command names beside its model: which one, how strong, and for which expert of two.

Reading such a name loads no PyTorch, so that a wrong one is said at once. `vidaccel.generation.adapters` loads LoRA
files, `vidaccel.generation.single_file` whole transformers.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from vidaccel.errors import UserError

Expert = Literal["high", "low"]
# The component of each expert: diffusers' `transformer` works while there is much noise, `transformer_2` after it.
EXPERT_PARTS: Mapping[Expert, str] = MappingProxyType({"high": "transformer", "low": "transformer_2"})
_PICKLED = (".pt", ".pth", ".bin", ".ckpt")


@dataclass(frozen=True)
class ExpertFile:
    """A file, and the expert it is for: "high" noise (the first steps) or "low" noise; None where nobody says."""

    path: Path
    expert: Expert | None = None

    @cached_property
    def digest(self) -> str:
        """The sha256 of the file."""
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def _check(self, what: str, suffixes: tuple[str, ...]) -> None:
        suffix = self.path.suffix.lower()
        if self.expert not in (None, *EXPERT_PARTS):
            raise UserError(f"An expert is {' or '.join(EXPERT_PARTS)}, got {self.expert!r}.")
        if not self.path.is_file():
            raise UserError(f"There is no file {self.path} for the {what}.")
        if suffix in _PICKLED:
            raise UserError(f"{self.path.name} is a pickle, which runs code when it is read; give a .safetensors file.")
        if suffix not in suffixes:
            raise UserError(f"The file of a {what} ends in {' or '.join(suffixes)}, got {self.path.name!r}.")


@dataclass(frozen=True)
class LoraFile(ExpertFile):
    """One file of LoRA weights, in any naming that the pipeline's `load_lora_weights` reads.

    weight: its strength; 1 is what it was trained for, negative values turn it round.

    Raises `UserError` for a file that is missing or no .safetensors file, for a weight that is no number, and where
    peft is not installed, which diffusers needs for this.
    """

    weight: float = 1.0

    def __post_init__(self) -> None:
        self._check("LoRA", (".safetensors",))
        if not math.isfinite(self.weight):
            raise UserError(f"The weight of a LoRA must be a finite number, got {self.weight}.")
        if find_spec("peft") is None:
            raise UserError('LoRA files need the package peft: pip install "peft>=0.18".')

    @classmethod
    def parse(cls, text: str) -> LoraFile:
        """`[high=|low=]FILE[:WEIGHT]`; a file whose own name ends like a weight is taken by its name."""
        expert, rest = _without_expert(text)
        name, colon, number = rest.rpartition(":")
        if not colon or Path(rest).exists() or not _is_number(number):
            name, number = rest, "1"
        return cls(Path(name).expanduser(), expert, float(number))

    def to_dict(self) -> dict[str, Any]:
        """What decides the pixels, as sidecars and sessions record it: the content, not the name."""
        return {"digest": self.digest, "weight": self.weight, "expert": self.expert}


@dataclass(frozen=True)
class TransformerFile(ExpertFile):
    """A whole transformer in one .safetensors or .gguf file, in any naming that diffusers' `from_single_file` reads.

    Raises `UserError` for a file that is missing or of another kind, and where gguf is not installed for one of those.
    """

    def __post_init__(self) -> None:
        self._check("transformer", (".safetensors", ".gguf"))
        if self.is_gguf and find_spec("gguf") is None:
            raise UserError('GGUF files need the package gguf: pip install "gguf>=0.17".')

    @property
    def is_gguf(self) -> bool:
        """Whether the weights are packed as GGUF."""
        return self.path.suffix.lower() == ".gguf"

    @classmethod
    def parse(cls, text: str) -> TransformerFile:
        """`[high=|low=]FILE`."""
        expert, name = _without_expert(text)
        return cls(Path(name).expanduser(), expert)

    def to_dict(self) -> dict[str, Any]:
        """What decides the pixels, as sidecars record it."""
        return {"digest": self.digest, "expert": self.expert}


def _without_expert(text: str) -> tuple[Expert | None, str]:
    """The expert before the equals sign, if one is named there, and the rest."""
    word, equals, rest = text.partition("=")
    expert = next((one for one in EXPERT_PARTS if equals and word == one), None)
    return (None, text) if expert is None else (expert, rest)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
