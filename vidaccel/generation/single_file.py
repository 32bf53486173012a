"""A whole transformer from one file, in every naming that diffusers' `from_single_file` reads, and from GGUF.

8-bit floating weights (e4m3, e5m2) are read as the numbers they stand for; those with a scale beside them (ComfyUI's
scaled fp8) are multiplied by it. GGUF weights stay packed and are unpacked layer by layer as the model runs.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import GGUFQuantizationConfig
from diffusers.loaders.single_file_model import FromOriginalModelMixin
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from vidaccel.errors import UserError, first_line
from vidaccel.generation.expert_files import EXPERT_PARTS, TransformerFile
from vidaccel.machine.private_names import kept_in_float32

logger = logging.getLogger(__name__)

_UNREADABLE = (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, IndexError, SafetensorError)
_NAMES_SAID = 3  # of the weights that are missing, or have no place
_SCALES = (".scale_weight", ".weight_scale")
_NOT_WEIGHTS = ("scaled_fp8", ".scale_input", ".input_scale", ".comfy_quant")


def parts_of(index: Mapping[str, Any], files: Sequence[TransformerFile]) -> dict[str, TransformerFile]:
    """Which component of a pipeline each file is.

    index: the content of `model_index.json`. Raises `UserError` where that is not clear.
    """
    networks = [part for part in EXPERT_PARTS.values() if (entry := index.get(part)) and entry[-1] is not None]
    found: dict[str, TransformerFile] = {}
    for file in files:
        if not networks:
            raise UserError(f"{index['_class_name']} has no transformer that a file could be.")
        if file.expert is None and len(networks) > 1:
            raise UserError("The model has two experts; say which one a file is: --transformer high=FILE or low=FILE.")
        part = networks[0] if file.expert is None else EXPERT_PARTS[file.expert]
        if part not in networks or (file.expert is not None and len(networks) < 2):
            raise UserError(f"The model has one transformer and no experts; give --transformer {file.path.name}.")
        if part in found:
            raise UserError(f"{found[part].path.name} and {file.path.name} are for one transformer; give one of them.")
        found[part] = file
    return found


def load_single_file(kind: Any, file: TransformerFile, *, config: Path, dtype: torch.dtype) -> Any:
    """The network of class `kind` with the weights of `file`.

    config: folder of the `config.json` that says its size.

    Raises `UserError` for a class that diffusers reads no single files of, and for weights that do not fill it.
    """
    if not issubclass(kind, FromOriginalModelMixin):
        raise UserError(f"diffusers reads no single files of {kind.__name__}; convert it to a folder and give --model.")
    options: dict[str, Any] = {"config": str(config), "local_files_only": True}
    if file.is_gguf:
        options |= {"torch_dtype": dtype, "quantization_config": GGUFQuantizationConfig(compute_dtype=dtype)}
    try:
        with _telling_what_is_left_over(file.path):
            network = kind.from_single_file(str(file.path) if file.is_gguf else _readable(file.path, dtype), **options)
    except NotImplementedError as error:  # a weight that nothing was read for cannot be moved
        lacking = _lacking(kind, file.path, config)
        names = f": {some_weights(lacking)}" if lacking else ""
        raise UserError(f"{file.path.name} lacks weights that a {kind.__name__} of {config} has{names}.") from error
    except _UNREADABLE as error:
        raise UserError(
            f"{file.path.name} does not hold the weights of a {kind.__name__} as {config} describes it "
            f"({first_line(error)[:200]})."
        ) from error
    return network if file.is_gguf else _converted(network, dtype)


def _lacking(kind: Any, path: Path, config: Path) -> list[str]:
    """The weights that a file in diffusers' own naming lacks; empty for files in another, or packed ones."""
    if path.suffix.lower() != ".safetensors":
        return []
    with init_empty_weights(), safe_open(path, framework="pt") as file:
        wanted = kind.from_config(kind.load_config(config, local_files_only=True)).state_dict().keys()
        lacking = sorted(wanted - set(file.keys()))
    return lacking if 2 * len(lacking) < len(wanted) else []


def some_weights(names: Sequence[str]) -> str:
    """How many weights, and the names of the first few."""
    rest = ", ..." if len(names) > _NAMES_SAID else ""
    return f"{len(names)} weight{'s' * (len(names) > 1)} ({', '.join(names[:_NAMES_SAID])}{rest})"


def _converted(network: Any, dtype: torch.dtype) -> Any:
    """The network in `dtype` but for the layers that its class keeps in float32, as `from_pretrained` loads it.

    `from_single_file` would convert those too.
    """
    kept = kept_in_float32(network)
    for name, weight in (*network.named_parameters(), *network.named_buffers()):
        if weight.is_floating_point():
            weight.data = weight.data.to(torch.float32 if kept & set(name.split(".")) else dtype)
    return network


@contextmanager
def _telling_what_is_left_over(path: Path) -> Iterator[None]:
    """Pass on what diffusers only logs, whatever its level of talking: weights that the network has no place for."""
    records: list[logging.LogRecord] = []
    listener = logging.Handler(logging.WARNING)
    listener.emit = records.append  # type: ignore[method-assign, assignment]
    library = logging.getLogger("diffusers.loaders.single_file_model")
    level, propagate = library.level, library.propagate
    library.addHandler(listener)
    library.setLevel(logging.WARNING)
    library.propagate = False  # its own line would repeat what is said here, or what the error says
    try:
        yield
    finally:
        library.removeHandler(listener)
        library.setLevel(level)
        library.propagate = propagate
    if any("were not used" in record.getMessage() for record in records):
        logger.warning(
            "%s holds weights that the network has no place for; if the video is noise, it is for another --model.",
            path.name,
        )


def _readable(path: Path, dtype: torch.dtype) -> str | dict[str, torch.Tensor]:
    """The path, or where weights have scales beside them the weights multiplied by those."""
    with safe_open(path, framework="pt") as file:
        names = list(file.keys())
    if not any(name.endswith(_SCALES) for name in names):
        return str(path)
    stored = load_file(path)
    scales = {name.removesuffix(end): stored[name] for end in _SCALES for name in names if name.endswith(end)}
    weights: dict[str, torch.Tensor] = {}
    for name, value in stored.items():
        scale = scales.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        if name.endswith((*_SCALES, *_NOT_WEIGHTS)):
            continue
        weights[name] = value if scale is None else _scaled(value, scale).to(dtype)
    return weights


def _scaled(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The numbers that 8-bit weights (out, in) stand for; `scale` is one number, or one for each row."""
    scale = scale.float()
    return weight.float() * (scale if scale.numel() == 1 else scale.reshape(-1, *[1] * (weight.ndim - 1)))
