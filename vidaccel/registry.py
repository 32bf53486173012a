"""The models that have a name: where they come from and with which settings they are at their best.

A model is a row of `MODELS`. Folders and Hub ids without a row get one from `spec_of`, with the settings that the
folder itself records (`vidaccel.json`) or else those of Wan2.1.
"""

import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from vidaccel.errors import UserError

SETTINGS_FILE = "vidaccel.json"
Weights = Literal["trained", "toy", "random", "external"]
_ASSET = "asset:"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass(frozen=True, kw_only=True)
class GenerationDefaults:
    """What a call takes when the caller says nothing; the values are those of Wan2.1 at 480p.

    max_sequence_length: tokens the prompt is padded to; None leaves it to the pipeline.
    """

    num_frames: int = 81
    height: int = 480
    width: int = 832
    fps: int = 16
    guidance_scale: float = 5.0
    num_inference_steps: int = 50
    max_sequence_length: int | None = None

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            kinds = (int, float) if name in ("guidance_scale", "fps") else (int,)
            if name == "max_sequence_length" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, kinds):
                raise UserError(f"`{name}` must be a {'number' if len(kinds) > 1 else 'whole number'}, got {value!r}.")

    def to_dict(self) -> dict[str, float | None]:
        """The settings as plain numbers, for `vidaccel.json`."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """One model: `source` is a folder, `asset:NAME` for one that comes with the package, or a Hub id.

    weights: what a measurement made with it is worth, "external" are weights made elsewhere.
    """

    name: str
    source: str
    description: str
    weights: Weights = "external"
    defaults: GenerationDefaults = field(default_factory=GenerationDefaults)

    @property
    def folder(self) -> Path | None:
        """The folder on this machine, or None where the weights come from the Hub."""
        if self.source.startswith(_ASSET):
            return asset_path(self.source.removeprefix(_ASSET))
        path = _expanded(self.source)
        return path if path.is_dir() else None


EMBEDDED_MODEL = "wan-tiny"

MODELS: tuple[ModelSpec, ...] = (
    ModelSpec(
        name=EMBEDDED_MODEL,
        source=_ASSET + EMBEDDED_MODEL,
        description="embedded: small Wan model of the storybook world, 128x128, runs on a CPU",
        weights="trained",
        defaults=GenerationDefaults(num_frames=49, height=128, width=128, max_sequence_length=64),
    ),
    ModelSpec(
        name="wan2.1-t2v-1.3b",
        source="Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
        description="Wan2.1 text to video, 480p",
    ),
    ModelSpec(
        name="wan2.1-t2v-14b",
        source="Wan-AI/Wan2.1-T2V-14B-Diffusers",
        description="Wan2.1 text to video, 480p and 720p",
    ),
    ModelSpec(
        name="wan2.1-i2v-14b-480p",
        source="Wan-AI/Wan2.1-I2V-14B-480P-Diffusers",
        description="Wan2.1 image to video, 480p; needs --image",
    ),
    ModelSpec(
        name="wan2.1-i2v-14b-720p",
        source="Wan-AI/Wan2.1-I2V-14B-720P-Diffusers",
        description="Wan2.1 image to video, 720p; needs --image",
        defaults=GenerationDefaults(height=720, width=1280),
    ),
    ModelSpec(
        name="wan2.2-t2v-a14b",
        source="Wan-AI/Wan2.2-T2V-A14B-Diffusers",
        description="Wan2.2 text to video, two experts, 720p",
        defaults=GenerationDefaults(height=720, width=1280, guidance_scale=4.0, num_inference_steps=40),
    ),
    ModelSpec(
        name="wan2.2-ti2v-5b",
        source="Wan-AI/Wan2.2-TI2V-5B-Diffusers",
        description="Wan2.2 5B text to video, 720p at 24 frames a second",
        defaults=GenerationDefaults(num_frames=121, height=704, width=1280, fps=24),
    ),
)


def asset_path(name: str) -> Path:
    """The folder or file `name` of the package's assets; the same in a checkout, an editable install and a wheel.

    Raises `UserError` where this installation has no such asset.
    """
    path = _find_asset(name)
    if path is None:
        raise UserError(f"This installation has no asset {name!r}; install vidaccel again from a complete checkout.")
    return path


def spec_of(model: str) -> ModelSpec:
    """The row of a registered name, or a new one for a folder with a `model_index.json` or for a Hub id.

    Raises `UserError` for anything else.
    """
    for spec in MODELS:
        if model == spec.name:
            return spec
    folder = _expanded(model)
    if model and folder.is_dir():
        return _spec_of_folder(folder)
    for spec in MODELS:
        if model == spec.source:
            return spec
    if _HUB_ID.fullmatch(model) and not folder.exists():
        return ModelSpec(name=model, source=model, description="from the Hub")
    names = ", ".join(spec.name for spec in MODELS)
    raise UserError(f"`model` must be one of {names}, a local folder or a Hub id (owner/name); got {model!r}.")


def _expanded(path: str) -> Path:
    try:
        return Path(path).expanduser()
    except RuntimeError:  # ~name of nobody here
        return Path(path)


def _spec_of_folder(folder: Path) -> ModelSpec:
    if not (folder / "model_index.json").is_file():
        raise UserError(
            f"The folder {folder} has no model_index.json; save one with `pipeline.save_pretrained(folder)`."
        )
    recorded = _recorded_settings(folder / SETTINGS_FILE)
    try:
        defaults = GenerationDefaults(**recorded.get("defaults", {}))
    except (TypeError, ValueError) as error:
        raise UserError(f"{folder / SETTINGS_FILE} has a wrong setting ({error}); correct or delete it.") from error
    weights = recorded.get("weights", "external")
    if weights not in get_args(Weights):
        raise UserError(f"`weights` in {folder / SETTINGS_FILE} must be one of {get_args(Weights)}, got {weights!r}.")
    return ModelSpec(
        name=str(folder), source=str(folder), description="local folder", weights=weights, defaults=defaults
    )


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


def _find_asset(name: str) -> Path | None:
    package = Path(__file__).resolve().parent
    for root in (package / "assets", package.parent / "assets"):
        if (root / name).exists():
            return root / name
    return None
