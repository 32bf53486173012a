"""Checkpoints of a training: averaged weights in float32 and one JSON file that says which files count.

A checkpoint is flat and its files are small, so that it travels easily. New weights are written under new names and
`state.json` is replaced last, so an interruption leaves the old checkpoint or the new one. Optimizers are kept only by
a distillation; any other training that is resumed starts from the averaged weights with a short warm-up.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from vidaccel.errors import UserError
from vidaccel.files.atomic import atomic_write

STATE_FILE = "state.json"
_SHARD_BYTES = 14_000_000
_MOST_SHARDS = 100  # of more bytes where there are too many

Kind = Literal["vae", "transformer", "causal"]


@dataclass(frozen=True, kw_only=True)
class TrainingState:
    """How far a training is.

    step: optimizer steps over all rounds; round_step: those of the current round.
    fraction: share of the current round's budget that is used; 1 means the round is finished.
    seconds: time of all rounds, preparation and validation included.
    architecture: constructor arguments of the networks, by network.
    recipe: settings of the current round. results: its latest validation.
    history: the finished rounds before it, each with its `steps`, `seconds` and `recipe`.
    latents_mean, latents_std: normalisation of the latents per channel (transformer only).
    origin: what made the weights, where it was something else than `vidaccel train` alone; the card says it.
    progress: what else a distillation that was stopped needs to go on as if it had not been; see `CausalDistillation`.
    """

    kind: Kind
    step: int = 0
    round: int = 0
    round_step: int = 0
    fraction: float = 0.0
    seconds: float = 0.0
    architecture: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    results: dict[str, float] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None
    origin: str | None = None
    progress: dict[str, Any] = field(default_factory=dict)


def save_checkpoint(folder: Path, state: TrainingState, tensors: Mapping[str, Tensor]) -> None:
    """Write a checkpoint over the one that may be there.

    Raises FloatingPointError if a weight is not finite, and UserError if the disk cannot be written; the old one is
    kept then.
    """
    tensors = {name: tensor.detach().float().cpu().contiguous() for name, tensor in tensors.items()}
    if broken := [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]:
        again = f"resume from {folder}" if (folder / STATE_FILE).is_file() else "begin again"
        raise FloatingPointError(
            f"training diverged at step {state.step}: {broken[0]} is not finite; {again} with a lower learning rate."
        )
    folder.mkdir(parents=True, exist_ok=True)
    names = []
    for index, shard in enumerate(_shards(tensors)):
        names.append(f"weights-{state.step:06d}-{index}.safetensors")
        with atomic_write(folder / names[-1]) as unfinished:  # a step may be saved twice
            try:
                save_file(shard, unfinished)
            except SafetensorError as error:  # a full disk is one too
                raise OSError(str(error)) from error
    text = json.dumps({**asdict(state), "files": names}, indent=2)
    with atomic_write(folder / STATE_FILE) as unfinished:
        unfinished.write_text(text + "\n", encoding="utf-8")
    for path in folder.glob("weights-*.safetensors"):
        if path.name not in names:
            path.unlink()


def load_checkpoint(folder: Path, *, kind: Kind) -> tuple[TrainingState, dict[str, Tensor]]:
    """State and weights of a checkpoint. Raises `UserError` if there is none, it is broken or of another kind."""
    if folder.is_file():
        raise UserError(f"A checkpoint is a folder and {folder} is a file; give {folder.parent}.")
    try:
        recorded = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
        files = recorded.pop("files")
        for name in ("latents_mean", "latents_std"):
            recorded[name] = tuple(recorded[name]) if recorded[name] is not None else None
        state = TrainingState(**recorded)
        tensors = {}
        for name in files:
            tensors.update(load_file(folder / name))
    except FileNotFoundError as error:
        raise UserError(f"{folder} is not a complete checkpoint: {error.filename or error} is missing.") from error
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(f"The checkpoint in {folder} cannot be read ({error}); train it again.") from error
    if state.kind != kind:
        raise UserError(f"{folder} is a checkpoint of the {state.kind}, not of the {kind}.")
    return state, tensors


def _shards(tensors: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    most = max(_SHARD_BYTES, sum(tensor.nbytes for tensor in tensors.values()) // _MOST_SHARDS)
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > most:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    return shards
