"""What a row of the family table says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

Input = Literal["image", "last_image", "video", "control_video", "mask", "pose_video", "face_video"]
_NOTHING: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True, kw_only=True)
class Component:
    """One part of a tiny random pipeline: what makes it as `module:Name`, and the arguments that it is made with.

    A model of transformers is made from its configuration class, everything else (a class of diffusers, a tokenizer's
    recipe) by calling it. An argument that is a `Component` is made first.
    """

    kind: str
    config: Mapping[str, Any] = field(default_factory=lambda: _NOTHING)


@dataclass(frozen=True, kw_only=True)
class Family:
    """One family: a pipeline class, what it takes, and a tiny random model of it.

    name: as `vidaccel models` lists it and `--make-random` takes it.
    pipeline: `module:Name` of the pipeline class.
    components: by the name of the pipeline's parameter.
    settings: arguments of the pipeline that are no components, such as `boundary_ratio`.
    attributes: what `build_random` sets on the pipeline in memory to keep a call short, such as lengths of texts that
        the class itself fixes and no file records; a saved folder is without them.
    inputs: what a call takes besides the prompt.
    defaults: arguments of a small call: `num_frames`, `height`, `width`, `num_inference_steps`, ...
    untested: names of `vidaccel.catalog.families.checks.CHECKS` that do not apply or cannot be tested, with the reason.
    refusal: why EasyCache does not work here, or None.
    """

    name: str
    description: str
    pipeline: str
    components: Mapping[str, Component]
    settings: Mapping[str, Any] = field(default_factory=lambda: _NOTHING)
    attributes: Mapping[str, Any] = field(default_factory=lambda: _NOTHING)
    inputs: tuple[Input, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=lambda: _NOTHING)
    untested: Mapping[str, str] = field(default_factory=lambda: _NOTHING)
    refusal: str | None = None

    @property
    def pipeline_name(self) -> str:
        """The pipeline's class name without its module."""
        return self.pipeline.rpartition(":")[2]
