"""Loading a diffusers pipeline so that what is wrong with the model, the machine or a flag is said before it runs."""

import inspect
import json
import os
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, cast, get_args

import diffusers
import torch
from diffusers import DiffusionPipeline, ModelMixin
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import SafetensorError

from vidaccel.catalog.pipelines import pipeline_class
from vidaccel.catalog.registry import pipeline_name, spec_of
from vidaccel.catalog.spec import ModelSpec
from vidaccel.catalog.table import component_modules, pipeline_traits
from vidaccel.errors import UserError
from vidaccel.generation.adapters import load_loras
from vidaccel.generation.expert_files import EXPERT_PARTS, LoraFile, TransformerFile
from vidaccel.generation.networks import load_networks
from vidaccel.generation.options import Offload, check_options
from vidaccel.generation.single_file import parts_of
from vidaccel.machine.attention import (
    NATIVE,
    check_attention_backend,
    check_attention_of_folder,
    set_attention_backend,
)
from vidaccel.machine.components import denoisers, modules
from vidaccel.machine.footprint import available_bytes, gigabytes, weight_bytes
from vidaccel.machine.progress_bars import without_progress_bars


def load_pipeline(
    model: str,
    *,
    device: str = "auto",
    dtype: str = "auto",
    offload: str = "none",
    attention: str = NATIVE,
    compile: bool = False,
    loras: Sequence[LoraFile | str] = (),
    transformer_files: Sequence[TransformerFile | str] = (),
) -> DiffusionPipeline:
    """Load the pipeline class that the model's `model_index.json` names, one of diffusers or of `vidaccel.pipelines`.

    model: a name of `vidaccel.catalog.models.MODELS`, a local folder, or a Hub id.
    device: `auto` (CUDA if there is one), `cpu`, `cuda`, `cuda:1`, `mps`.
    dtype: `auto`, `float32`, `bfloat16`, `float16`. `auto` is bfloat16 on CUDA; on a CPU float32, and bfloat16 for
        the VAE where the CPU calculates in it (see `component_dtypes`).
    offload: `none`, `model`, `sequential` or `group`: what waits in main memory while a GPU works.
    attention: a backend name of diffusers; the call that the model will make is tried before its weights are loaded.
    compile: compile the repeated blocks of the transformer (`compile_repeated_blocks(fullgraph=True)`).
    loras: LoRA files, or `[high=|low=]FILE[:WEIGHT]`; all are on, each with its weight.
    transformer_files: .safetensors or .gguf files, or `[high=|low=]FILE`, instead of the model's own transformers.

    Raises `UserError`, with one line that says what to change.
    """
    adapters = [LoraFile.parse(lora) if isinstance(lora, str) else lora for lora in loras]
    files = [TransformerFile.parse(file) if isinstance(file, str) else file for file in transformer_files]
    target = resolve_device(device)
    spec = spec_of(model)
    dtypes = component_dtypes(dtype, target, pipeline=pipeline_name(spec))
    check_options(offload=offload, device=str(target), compile=compile)
    check_attention_backend(attention, device=target, dtype=dtypes["default"])  # before a download
    if compile:
        _check_compiler(target)
    folder = model_folder(spec, without=[EXPERT_PARTS[file.expert or "high"] for file in files])
    index = _read_index(folder)
    replaced = parts_of(index, files)
    if attention != NATIVE:
        with _loading_errors(folder):
            check_attention_of_folder(folder, attention, device=target, dtype=dtypes["default"])
    for place in {torch.device("cpu"), target} if offload == "none" else {torch.device("cpu")}:
        _check_room_for_weights(folder, place, dtypes["default"], replaced)
    kind = _pipeline_class(folder, index)
    with _loading_errors(folder), without_progress_bars():
        networks = load_networks(folder, index, dtypes=dtypes, files=replaced)
        pipe = kind.from_pretrained(str(folder), dtype=dtypes, local_files_only=True, use_safetensors=True, **networks)
    _check_parts(pipe)
    load_loras(pipe, adapters)  # before an offload, whose hooks diffusers would have to take off and put on again
    if pipeline_traits(kind).tiles_vae:
        cast(Any, pipe).vae.enable_tiling()
    _place(pipe, target, cast(Offload, offload))
    for denoiser in denoisers(pipe):
        if attention != NATIVE:
            set_attention_backend(denoiser, attention)
        if compile:
            denoiser.compile_repeated_blocks(fullgraph=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def resolve_device(device: str) -> torch.device:
    """The device meant by `auto`, or the named one if this machine has it; else `UserError`."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    check_options(device=device)
    target = torch.device(device)
    if target.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (target.index or 0) >= count:
            raise UserError(
                f"Device {device!r} was asked for, but PyTorch sees {count} CUDA devices; use --device cpu."
            )
    elif target.type == "mps" and not torch.backends.mps.is_available():
        raise UserError(f"Device {device!r} was asked for, but PyTorch has no MPS here; use --device cpu.")
    return target


def component_dtypes(dtype: str, device: torch.device, *, pipeline: str | None) -> dict[str, torch.dtype]:
    """The number format of each component, as `from_pretrained(dtype=...)` takes it: `default` and exceptions.

    With `auto` on a CPU that calculates in bfloat16 (AVX512-BF16 or AMX) the VAE of Wan alone is bfloat16: PyTorch's
    float32 3-D convolution takes a slow path for one clip, 9.4 s against 2.0 s for 49 frames of 128x128 on one core,
    and the frames differ by 60 dB PSNR. Pipelines of other families want one format for all components.
    """
    if dtype != "auto":
        check_options(dtype=dtype)
        return {"default": getattr(torch, dtype)}
    if device.type == "cuda":
        return {"default": torch.bfloat16}
    kind = None if pipeline is None else pipeline_class(pipeline)
    if device.type == "cpu" and pipeline_traits(kind).vae_in_bfloat16 and cpu_has_bfloat16():
        return {"default": torch.float32, "vae": torch.bfloat16}
    return {"default": torch.float32}


def cpu_has_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16 numbers itself, instead of PyTorch emulating it."""
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def _check_compiler(device: torch.device) -> None:
    if device.type == "cpu" and not any(shutil.which(name) for name in (os.environ.get("CXX", ""), "c++", "g++", "cl")):
        raise UserError("--compile on a CPU needs a C++ compiler and there is none on the path; leave --compile out.")


def model_folder(spec: ModelSpec, *, without: Collection[str] = ()) -> Path:
    """The folder of a model, fetched from the Hub where it is not here yet.

    without: components of which the configuration alone is fetched. Raises `UserError` if there is no such model.
    """
    if (folder := spec.folder) is not None:
        if not (folder / "model_index.json").is_file():
            raise UserError(f"The model {spec.name!r} has no model_index.json in {folder}; install or save it again.")
        return folder
    try:
        parts: dict[str, Any] = dict.fromkeys(without)
        folder = Path(DiffusionPipeline.download(spec.source, use_safetensors=True, **parts))
        for name in without:
            hf_hub_download(spec.source, f"{name}/config.json")
        return folder
    except HFValidationError as error:
        raise UserError(f"{spec.source!r} is no Hub id (owner/name).") from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise UserError(
            f"The weights of {spec.name!r} are not on this machine and the Hub gave none "
            f"({_first_sentence(error)}); check the name and the network, or pass a local folder to --model."
        ) from error


def _read_index(folder: Path) -> dict[str, Any]:
    """The content of `model_index.json`.

    Modules that the catalog names for components are imported, as diffusers does not do it; a folder brings no code of
    its own.
    """
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        for library in {str(entry[0]) for entry in index.values() if isinstance(entry, list) and entry}:
            if library.startswith("vidaccel.models.") or library in component_modules():
                import_module(library)
        return {**index, "_class_name": str(index["_class_name"])}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        raise UserError(f"{folder / 'model_index.json'} cannot be used ({_first_sentence(error)}).") from error


def _pipeline_class(folder: Path, index: Mapping[str, Any]) -> Any:
    """The class that a `model_index.json` names, found here."""
    name = index["_class_name"]
    kind = pipeline_class(name)
    if kind is None:
        raise UserError(
            f"The model in {folder} cannot be loaded: it names the pipeline {name}, which neither diffusers "
            f"{diffusers.__version__} nor this package has."
        )
    return kind


def _check_room_for_weights(
    folder: Path, device: torch.device, dtype: torch.dtype, replaced: Mapping[str, TransformerFile]
) -> None:
    with _loading_errors(folder):
        need = weight_bytes(folder, dtype.itemsize)
        for name, file in replaced.items():
            need += file.path.stat().st_size - weight_bytes(folder / name, dtype.itemsize)
    free = available_bytes(device)
    if need > free:
        raise UserError(
            f"The weights need {gigabytes(need)} of memory on {device} and {gigabytes(free)} are free; "
            "use --offload, a smaller --dtype or a smaller --model."
        )


@contextmanager
def _loading_errors(folder: Path) -> Iterator[None]:
    kinds = (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, ImportError, SafetensorError)
    try:
        yield
    except UserError:
        raise
    except kinds as error:
        raise UserError(
            f"The model in {folder} cannot be loaded, it may be corrupt or incomplete ({_first_sentence(error)})."
        ) from error


def _check_parts(pipe: DiffusionPipeline) -> None:
    """Refuse diffusers models of another class than the pipeline says it works with; diffusers only warns."""
    name = type(pipe).__name__
    if not denoisers(pipe):
        raise UserError(f"{name} has no transformer, which is what this package runs; use another --model.")
    for part, parameter in inspect.signature(type(pipe)).parameters.items():
        kinds = [kind for kind in get_args(parameter.annotation) or (parameter.annotation,) if isinstance(kind, type)]
        wanted = tuple(kind for kind in kinds if issubclass(kind, ModelMixin))
        found = modules(pipe).get(part)
        if wanted and found is not None and not isinstance(found, wanted):
            raise UserError(
                f"{name} needs a {wanted[0].__name__} as its `{part}`, and the model has a {type(found).__name__}."
            )


def _place(pipe: Any, device: torch.device, offload: Offload) -> None:
    if offload == "none":
        try:
            pipe.to(device)
        except torch.OutOfMemoryError as error:
            raise UserError(f"The model does not fit on {device}; use --offload model or sequential.") from error
    elif offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif offload == "sequential":
        pipe.enable_sequential_cpu_offload(device=device)
    else:
        # With a stream the next layer comes while this one calculates; without, it is slower than sequential.
        pipe.enable_group_offload(onload_device=device, offload_type="leaf_level", use_stream=device.type == "cuda")


def _first_sentence(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 160 else text[:157] + "..."
