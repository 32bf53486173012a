"""What the swap-in pipelines share: a diffusers call with EasyCache in it, and nothing of it before or after.

    class EasyCacheWanPipeline(EasyCacheSwapIn, WanPipeline):
        __call__ = easycache_call(WanPipeline, EasyCacheWanPipelineOutput)

Nothing here knows a model: any diffusers pipeline with a transformer can be made a swap-in this way.
"""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import fields, replace
from functools import wraps
from pathlib import Path
from typing import Any, Self

import diffusers
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.utils.torch_utils import unwrap_module

from vidaccel.catalog.presets import Preset
from vidaccel.easycache.apply import apply_easycache, find_transformers, remove_easycache
from vidaccel.easycache.config import EasyCacheConfig
from vidaccel.machine.private_names import offload_device_of, progress_bar_config

_ARGUMENTS = {"threshold": float | None, "warmup_steps": int | None, "easycache": EasyCacheConfig | None}
_DOCUMENTATION = """{base}'s call with EasyCache: the same arguments and result, fewer forwards of the transformer.

threshold: tolerated accumulated relative change; 0 computes every step. None for the value published for
    the model (`vidaccel.catalog.presets`), or where there is none the default of `EasyCacheConfig`.
warmup_steps: first steps that are always computed. None likewise.
easycache: all settings at once, in place of the two above.

The result also has `report`, an `EasyCacheReport`, or None where EasyCache stays away (training mode); with
`return_dict=False` it is the last element of the tuple. Raises ValueError for settings out of range or given twice, and
where outputs cannot be reused: another cache, or an EasyCache applied by hand, is on the transformer, or it is compiled
as a whole; also if a call of another pipeline around the same transformer is under way.

{documentation}"""


class EasyCacheSwapIn:
    """Goes before the diffusers class in the bases of a swap-in pipeline; its call is made by `easycache_call`.

    A pipeline of such a class keeps no settings: they belong to each call.
    """

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> Self:
        """As the diffusers class loads; a folder that holds another family's transformer is refused before it is.

        Raises ValueError for such a folder, and what diffusers raises.
        """
        _check_folder(cls, Path(pretrained_model_name_or_path), kwargs)
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)  # type: ignore[misc, no-any-return]

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **changes: Any) -> Self:
        """This pipeline around the components and settings of another one, or those given by name.

        The components are shared and stay as they are: number formats, LoRA, offloading, attention backends. diffusers'
        own `from_pipe` casts them to float32; with `dtype` or `torch_dtype` given, this one casts as diffusers does.

        Raises ValueError for unknown names, missing components, or a transformer of a class that this pipeline cannot
        run.
        """
        if "dtype" in changes or "torch_dtype" in changes:
            made: Self = super().from_pipe(pipeline, **changes)  # type: ignore[misc]
        else:
            made = cls(**_parts_for(cls, pipeline, changes))
        _keep_handling(pipeline, made)
        return made

    def to_json_string(self) -> str:
        """The `model_index.json`, under the diffusers class's name: the folder loads with and without this package."""
        content = json.loads(super().to_json_string())  # type: ignore[misc]
        return json.dumps(content | {"_class_name": _base_of(type(self)).__name__}, indent=2, sort_keys=True) + "\n"


def easycache_call(base: type[Any], output: type[Any]) -> Callable[..., Any]:
    """The `__call__` of a swap-in pipeline: that of `base` with the arguments threshold, warmup_steps and easycache.

    output: a dataclass with the fields of `base`'s output and `report`.

    The signature of the result shows the parameters of `base`, then these three.
    """

    @wraps(base.__call__)
    def call(
        self: Any,
        *args: Any,
        threshold: float | None = None,
        warmup_steps: int | None = None,
        easycache: EasyCacheConfig | None = None,
        **kwargs: Any,
    ) -> Any:
        with ExitStack() as stack:
            run = apply_easycache(self, _settings(self, threshold, warmup_steps, easycache))
            for transformer in find_transformers(self).values():
                stack.callback(remove_easycache, transformer)
            result = base.__call__(self, *args, **kwargs)
        if isinstance(result, tuple):
            return *result, run.report
        return output(**{field.name: getattr(result, field.name) for field in fields(result)}, report=run.report)

    parameters = list(inspect.signature(base.__call__).parameters.values())
    gathers = parameters[-1].kind is inspect.Parameter.VAR_KEYWORD
    at = len(parameters) - gathers
    parameters[at:at] = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
        for name, annotation in _ARGUMENTS.items()
    ]
    call.__signature__ = inspect.Signature(parameters, return_annotation=output | tuple)  # type: ignore[attr-defined]
    call.__doc__ = _DOCUMENTATION.format(base=base.__name__, documentation=base.__call__.__doc__)
    return call


def _settings(
    pipe: Any, threshold: float | None, warmup_steps: int | None, easycache: EasyCacheConfig | None
) -> EasyCacheConfig | None:
    """What `apply_easycache` is given: None stands for all of the model's preset."""
    named = {"threshold": threshold, "warmup_steps": warmup_steps}
    given: dict[str, Any] = {name: value for name, value in named.items() if value is not None}
    if easycache is None:
        if not given:
            return None
        return replace(EasyCacheConfig.published(Preset.for_pipeline(pipe)), **given)
    if not isinstance(easycache, EasyCacheConfig):
        raise ValueError(
            f"`easycache` must be an EasyCacheConfig, got {easycache!r}; `threshold` takes a number, 0 computes all."
        )
    if given:
        raise ValueError(f"`easycache` sets everything; put {' and '.join(given)} into it or leave `easycache` out.")
    return easycache


def _check_folder(cls: Any, folder: Path, arguments: Mapping[str, Any]) -> None:
    index = folder / "model_index.json"
    if not index.is_file():
        return  # a Hub id; diffusers says what is wrong with any other
    content = json.loads(index.read_text(encoding="utf-8"))
    for name, kinds in cls._get_signature_types().items():
        if not name.startswith("transformer") or name in arguments or not isinstance(content.get(name), list):
            continue
        library, found = content[name]
        kind = getattr(diffusers, found, None) if library == "diffusers" else None
        if kind is not None and not issubclass(kind, kinds):
            raise ValueError(
                f"{cls.__name__} needs a {kinds[0].__name__} as its `{name}` and {folder} has a {found}; use the "
                "swap-in of that model, or apply_easycache on the pipeline of diffusers."
            )


def _parts_for(cls: type, pipeline: Any, changes: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `cls`: those of `pipeline`, changed. Of diffusers models only transformers are checked, as
    other VAEs may stand in."""
    parameters = inspect.signature(cls).parameters
    if unknown := [name for name in changes if name not in parameters]:
        raise ValueError(f"{cls.__name__} takes {', '.join(parameters)} and dtype; got {', '.join(unknown)}.")
    known = {**pipeline.config, **pipeline.components, **changes}
    parts = {name: known[name] for name in parameters if name in known}
    empty = inspect.Parameter.empty
    if missing := [name for name, value in parameters.items() if value.default is empty and name not in parts]:
        raise ValueError(f"{cls.__name__} also needs {', '.join(missing)}; pass them by name to from_pipe.")
    kinds = cls._get_signature_types()  # type: ignore[attr-defined]
    for name, part in parts.items():
        model = unwrap_module(part)
        if name.startswith("transformer") and isinstance(model, ModelMixin) and not isinstance(model, kinds[name]):
            raise ValueError(
                f"{cls.__name__} needs a {kinds[name][0].__name__} as its `{name}` and the pipeline has a "
                f"{type(model).__name__}; pass {name}= to from_pipe, or use the swap-in of that model."
            )
    return parts


def _keep_handling(pipeline: Any, made: Any) -> None:
    """Let `made` offload and show its progress as `pipeline` does; diffusers keeps this on the pipeline."""
    if pipeline.name_or_path is not None:
        made.register_to_config(_name_or_path=pipeline.name_or_path)
    made.hf_device_map = pipeline.hf_device_map
    made.set_progress_bar_config(**progress_bar_config(pipeline))
    if (device := offload_device_of(pipeline)) is not None:
        made.enable_model_cpu_offload(device=device)


def _base_of(cls: type) -> type:
    return next(kind for kind in cls.__mro__ if not issubclass(kind, EasyCacheSwapIn))
