"""What a published checkpoint is made of, as data: how to recognise it, and where each tensor goes.

A `Format` is one row: marks that tell it from others, the class that its weights become, and rules from published
names to the names of that class. A new model is a new row; the machinery (`plan`, `folder`) knows no model.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from vidaccel.catalog.pipelines import named_class
from vidaccel.convert.checkpoint import Checkpoint
from vidaccel.errors import UserError

Config = Mapping[str, Any]
Transform = Callable[[Sequence[Tensor], Config], Tensor]
"""`(tensors of the checkpoint, configuration of the model) -> tensor of the model`; runs on the meta device too."""

_NOTHING = ("\0",)  # the beginning of no name


def unchanged(tensors: Sequence[Tensor], config: Config) -> Tensor:
    """The tensor itself."""
    return tensors[0]


@dataclass(frozen=True)
class Rule:
    """One tensor of the model, or one in every block: where it comes from and what is done to it.

    target, sources: names, in which `{block}` runs over the blocks and `{part}` over `parts`.
    blocks: the setting of the model that says how many blocks there are.
    """

    target: str
    sources: str | tuple[str, ...]
    transform: Transform = unchanged
    blocks: str | None = None
    parts: tuple[str, ...] = ("weight", "bias")

    def expand(self, config: Config) -> Iterable[tuple[str, tuple[str, ...]]]:
        """Every (target, sources) that the rule stands for."""
        sources = (self.sources,) if isinstance(self.sources, str) else self.sources
        for block in range(config[self.blocks]) if self.blocks else (0,):
            for part in self.parts if "{part}" in self.target else ("",):
                yield (
                    self.target.format(block=block, part=part),
                    tuple(source.format(block=block, part=part) for source in sources),
                )


@dataclass(frozen=True, kw_only=True)
class Format:
    """One kind of published checkpoint.

    title: for people. marks: beginnings of names, one of each is there. foreign: beginnings that must not be there.
    prefix: what may stand in front of all names that are used; marks are without it.
    target: `module:Name` of the class the weights become.
    settings: of that class, for the published weights; a `config.json` beside the weights may change them.
    says: class names that such a `config.json` may give itself.
    measured: settings that the tensors themselves tell, `(checkpoint, settings so far) -> settings`.
    rules: names; None where they are those of the class already.
    dropped: beginnings of names that the class has no use for, such as the decoder of T5.
    refusal: why such a checkpoint cannot be converted, or None.
    """

    title: str
    marks: tuple[str, ...]
    target: str = ""
    foreign: tuple[str, ...] = ()
    settings: Config = field(default_factory=lambda: MappingProxyType({}))
    says: tuple[str, ...] = ()
    measured: Callable[[Checkpoint, Config], Config] | None = None
    rules: tuple[Rule, ...] | None = None
    prefix: str = ""
    dropped: tuple[str, ...] = ()
    refusal: str | None = None

    def recognises(self, names: Iterable[str]) -> bool:
        """Whether these are the names of such a checkpoint."""
        return self.prefix_of(names) is not None

    def prefix_of(self, names: Iterable[str]) -> str | None:
        """What stands in front of the names, `prefix` or nothing; None if they are not of such a checkpoint."""
        names = tuple(names)
        if any(name.startswith(self.foreign or _NOTHING) for name in names):
            return None
        for prefix in dict.fromkeys((self.prefix, "")):
            if all(any(name.startswith(prefix + mark) for name in names) for mark in self.marks):
                return prefix
        return None

    def drops(self, name: str) -> bool:
        """Whether the class has no use for a tensor of that name."""
        return name.startswith(self.dropped or _NOTHING)

    @property
    def library_and_class(self) -> tuple[str, str]:
        """What `model_index.json` says of the network."""
        module, _, name = self.target.partition(":")
        return module, name

    @property
    def is_transformers(self) -> bool:
        """Whether the class is of transformers, whose files have other names."""
        return self.target.startswith("transformers:")


def empty_model(form: Format, checkpoint: Checkpoint) -> tuple[nn.Module, Config]:
    """The model that the checkpoint becomes, without memory (meta device), and its settings."""
    kind, given = named_class(form.target), checkpoint.config()
    if form.is_transformers:
        if not given:
            raise UserError(f"{checkpoint.folder} has no config.json, which {form.title} needs beside its weights.")
        config = kind.config_class.from_dict(_text_part(given))
        with torch.device("meta"):
            return kind(config), config.to_dict()
    settings = dict(form.settings)
    names = {given.get("_class_name"), given.get("model_type"), *given.get("architectures", ())} - {None}
    if not names or names & set(form.says):
        parameters = inspect.signature(kind.__init__).parameters
        settings |= {key: value for key, value in given.items() if key in parameters}
    if form.measured is not None:
        settings |= form.measured(checkpoint, settings)
    try:
        with torch.device("meta"):
            model = kind(**settings)
    except (TypeError, ValueError, RuntimeError, ZeroDivisionError) as error:
        raise UserError(f"{checkpoint.folder / 'config.json'} describes no {kind.__name__} ({error}).") from error
    return model, settings | dict(model.config)


def _text_part(config: dict[str, Any]) -> dict[str, Any]:
    """The text encoder's part of a configuration of CLIP, which has one for each of its two encoders."""
    return config.get("text_config") or config
