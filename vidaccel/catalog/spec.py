"""What is recorded about a model: where it comes from, and the settings with which it is at its best."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import MappingProxyType, NoneType
from typing import Any, Literal, get_args, get_type_hints

from vidaccel.errors import UserError

Weights = Literal["trained", "toy", "random", "external"]
ASSET = "asset:"


@dataclass(frozen=True, kw_only=True)
class GenerationDefaults:
    """What a call takes when the caller says nothing; the values are those of Wan2.1 at 480p.

    guidance_scale, true_cfg_scale, max_sequence_length: as in `GenerationRequest`; None leaves them to the pipeline.
    arguments: further arguments of the pipeline's call by name.
    """

    num_frames: int = 81
    height: int = 480
    width: int = 832
    fps: float = 16
    guidance_scale: float | None = 5.0
    true_cfg_scale: float | None = None
    num_inference_steps: int = 50
    max_sequence_length: int | None = None
    arguments: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))

    def __post_init__(self) -> None:
        _check_names(self.arguments)
        for name, hint in get_type_hints(type(self)).items():
            kinds = get_args(hint) or (hint,)  # of `float | None`, or `int` alone
            value = getattr(self, name)
            if name == "arguments" or (value is None and NoneType in kinds):
                continue
            number = "number" if float in kinds else "whole number"
            if isinstance(value, bool) or not isinstance(value, (int, *kinds)):
                raise UserError(f"`{name}` must be a {number}, got {value!r}.")

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain values, for `vidaccel.json`."""
        values = {item.name: getattr(self, item.name) for item in fields(self) if item.name != "arguments"}
        return values | ({"arguments": dict(self.arguments)} if self.arguments else {})


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """One model: `source` is a folder, `asset:NAME` for one that comes with the package, or a Hub id.

    weights: what a measurement made with it is worth, "external" are weights made elsewhere.
    pipeline: the pipeline class whose usual settings this row has, for folders that record none.
    """

    name: str
    source: str
    description: str
    weights: Weights = "external"
    pipeline: str | None = None
    defaults: GenerationDefaults = field(default_factory=GenerationDefaults)

    @property
    def folder(self) -> Path | None:
        """The folder on this machine, or None where the weights come from the Hub."""
        if self.source.startswith(ASSET):
            return asset_path(self.source.removeprefix(ASSET))
        path = expanded(self.source)
        return path if path.is_dir() else None


def asset_path(name: str) -> Path:
    """The folder or file `name` of the package's assets; the same in a checkout, an editable install and a wheel.

    Raises `UserError` where this installation has no such asset.
    """
    path = _find_asset(name)
    if path is None:
        raise UserError(f"This installation has no asset {name!r}; install vidaccel again from a complete checkout.")
    return path


def expanded(path: str) -> Path:
    """The path with `~` replaced where it stands for somebody's home."""
    try:
        return Path(path).expanduser()
    except RuntimeError:  # ~name of nobody here
        return Path(path)


def _check_names(arguments: Any) -> None:
    if not isinstance(arguments, Mapping) or not all(isinstance(name, str) for name in arguments):
        raise UserError(f"`arguments` must be an object of names and values, got {arguments!r}.")


def _find_asset(name: str) -> Path | None:
    package = Path(__file__).resolve().parents[1]
    for root in (package / "assets", package.parent / "assets"):
        if (root / name).exists():
            return root / name
    return None
