"""The causal student: how it begins from a trained pipeline, and what it shares with it.

Shapes: latents (B, C, F, h, w), normalised; embeddings (B, length, text_dim).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diffusers import AutoencoderKLWan
from torch import Tensor
from transformers import PreTrainedTokenizerFast, UMT5EncoderModel

from vidaccel.catalog.registry import spec_of
from vidaccel.catalog.shares import shared_folder
from vidaccel.errors import UserError
from vidaccel.machine.progress_bars import without_progress_bars
from vidaccel.models.causal_wan import CausalWanTransformer3DModel
from vidaccel.training.architecture import TextEncoder, Transformer, Vae, WordTokenizer

_FRESH = "camera_embedder."  # layers that a student may have and what it begins from may not


@dataclass(frozen=True, kw_only=True)
class Donor:
    """A trained Wan pipeline: the student begins as its transformer and shares the rest, which stays as it is."""

    transformer: Transformer
    text_encoder: TextEncoder
    tokenizer: WordTokenizer
    vae: Vae


@without_progress_bars()
def load_donor(model: str, *, option: str = "init") -> Donor:
    """The networks of a registered name or folder, in float32: a Wan model of short videos, or a causal student.

    option: what it was given as. Raises `UserError` if it is no Wan pipeline on disk.
    """
    folder = spec_of(model).folder
    if folder is None:
        raise UserError(f"`{option}` must be a registered model or a folder on this machine, got {model!r}.")
    shared = shared_folder(folder) or folder
    try:
        return Donor(
            transformer=CausalWanTransformer3DModel.from_pretrained(folder / "transformer").float(),
            text_encoder=UMT5EncoderModel.from_pretrained(shared / "text_encoder").float().eval().requires_grad_(False),
            tokenizer=PreTrainedTokenizerFast.from_pretrained(shared / "tokenizer"),
            vae=AutoencoderKLWan.from_pretrained(shared / "vae").float().eval().requires_grad_(False),
        )
    except (OSError, ValueError) as error:
        raise UserError(f"`{option}` must be a Wan pipeline, {folder} cannot be read as one: {error}") from error


def student_architecture(transformer: Transformer, *, num_layers: int, camera_dim: int) -> dict[str, Any]:
    """Constructor arguments of a student as wide as `transformer`, with `num_layers` layers.

    It is told of its camera and remembers frames that were encoded alone. camera_dim: as in its config, unless
    `transformer` has layers for a camera already.
    """
    config = {name: value for name, value in transformer.config.items() if not name.startswith("_")}
    return {
        **config,
        "patch_size": list(config["patch_size"]),
        "num_layers": num_layers,
        "camera_dim": config.get("camera_dim") or camera_dim,
        "clean_pass": "frame",
    }


def student_tensors(transformer: Transformer, *, layers: Sequence[int] | None = None) -> dict[str, Tensor]:
    """Weights of a student with these `layers` in their order; None: all.

    Raises `UserError` for one that is not there or is named twice.
    """
    num_layers = transformer.config.num_layers
    layers = range(num_layers) if layers is None else layers
    if not layers or any(not 0 <= layer < num_layers for layer in layers):
        raise UserError(f"`layers` must be some of 0 to {num_layers - 1}, got {list(layers)}.")
    if len(set(layers)) < len(layers):
        raise UserError(f"`layers` must be different ones, got {list(layers)}.")
    tensors = transformer.state_dict()
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith("blocks.")}
    for new, old in enumerate(layers):
        start = f"blocks.{old}."
        kept |= {
            f"blocks.{new}.{name.removeprefix(start)}": tensor
            for name, tensor in tensors.items()
            if name.startswith(start)
        }
    return kept


def new_student(architecture: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Transformer:
    """A student with these weights, in float32; layers for its camera that they lack are new and change nothing.

    Raises `UserError` for weights of another architecture.
    """
    student = CausalWanTransformer3DModel(**architecture)
    new = {name: tensor for name, tensor in student.state_dict().items() if name.startswith(_FRESH)}
    try:
        student.load_state_dict(new | dict(tensors))
    except RuntimeError as error:
        raise UserError(f"The weights do not fit the architecture they came with: {error}") from error
    return student
