"""Seeded runs of one family for the test matrix: the pipeline is built once, EasyCache comes and goes."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from tests.support.device_reads import ReadsByVidaccel
from tests.support.family_calls import call_inputs, taken_arguments
from vidaccel import EasyCacheConfig, EasyCacheReport, apply_easycache, easycache_report, remove_easycache
from vidaccel.catalog.table import CATALOG, family_named
from vidaccel.easycache.report import StepDecision
from vidaccel.random_models.build import build_random

NUM_STEPS = 7
# Pipelines that do fewer steps than they are asked for: a strength below 1, the end of the schedule left out.
# Two experts each need steps to reuse.
MORE_STEPS = {
    **dict.fromkeys(("wan2.1-v2v", "cogvideox-v2v", "ltx-long"), 9),
    **dict.fromkeys(("wan2.2-t2v", "wan2.2-i2v", "wan2.2-t2v-blocks", "wan2.2-i2v-blocks"), 10),
}
# Whole chunks of 33 frames (Helios) or sections of 9 (FramePack): another number of them.
OTHER_FRAMES = {
    **dict.fromkeys(("helios", "helios-blocks", "framepack"), 33),
    "kandinsky5-i2v": 21,  # the first four latent frames are made like those that follow
    **dict.fromkeys(("helios-i2v", "helios-v2v", "helios-pyramid", "helios-pyramid-blocks"), 40),
}
FEW_STEPS = 3
WARMUP = 2
EVERY_THIRD = EasyCacheConfig(threshold=float("inf"), warmup_steps=WARMUP, max_consecutive_reuses=2)
NAMES = [family.name for family in CATALOG.families if family.refusal is None]
# Of one length: where diffusers pads a batch without a mask, a longer one would change the others.
PROMPTS = ("a red ball hops", "blue cats sleep", "rain on a green")
GUIDANCE = ("true_cfg_scale", "guidance_scale")
# Two prompts need two images or videos here; elsewhere one is for all.
INPUTS_PER_PROMPT = {
    *("lucy-edit", "hunyuan-video-i2v", "hunyuan-video-i2v-replace", "hunyuan-skyreels-i2v", "framepack"),
    *("ltx-i2v", "ltx2-i2v", "cogvideox-i2v", "cogvideox-v2v", "cogvideox-control", "consisid"),
    *("cosmos-v2w", "cosmos2-v2w", "kandinsky6-i2v", "helios-i2v", "helios-v2v"),
}
# Samples are compared with those of another batch, not with one alone: one generator draws some noise for all of them.
AMONG_OTHERS = {
    *("helios-i2v", "helios-v2v", "helios-pyramid", "helios-pyramid-blocks"),
    *("wan2.2-i2v-blocks", "ltx-condition", "ltx-i2v-blocks"),
    "latte",  # its own scheduler makes much of the rounding that batches of other sizes differ by
}
_INPUTS = ("image", "video", "control_video")


class InterruptionError(Exception):
    pass


@dataclass(frozen=True, kw_only=True)
class Watched:
    """One call with EasyCache: what it returned and did.

    decisions: as they were told when they were taken.
    num_forwards: how often a transformer really ran; num_held: latents held at most; num_reads: of the device.
    """

    outputs: list[Tensor]
    report: EasyCacheReport
    decisions: list[StepDecision]
    num_forwards: int
    num_held: int
    num_held_afterwards: int
    num_reads: int


class FamilyRuns:
    """One family's pipeline and the calls of it that several tests compare with; those are not to be changed."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.row = family_named(name)

    @classmethod
    def with_usual_runs(cls, name: str) -> FamilyRuns:
        """With the calls made that others are compared with, so that none is made with EasyCache on by oversight."""
        runs = cls(name)
        assert runs.plain
        assert runs.fresh
        return runs

    @cached_property
    def pipe(self) -> Any:
        """The pipeline that the tests share; each leaves it without EasyCache."""
        return build_random(self.name)

    @contextmanager
    def easycached(self, config: EasyCacheConfig | None = None, **options: Any) -> Iterator[Any]:
        """The shared pipeline with EasyCache, as new."""
        apply_easycache(self.pipe, config or self.config, **options)
        try:
            yield self.pipe
        finally:
            remove_easycache(self.pipe)

    def take_off(self) -> None:
        """Remove EasyCache wherever a failed test left it."""
        with suppress(ValueError):
            remove_easycache(self.pipe)

    def arguments(self, **changes: Any) -> dict[str, Any]:
        """Of one call: few steps, latents out."""
        settings = {"num_inference_steps": self.num_steps, "output_type": "latent"} | changes
        inputs = call_inputs(self.row, **settings)
        return {name: value for name, value in inputs.items() if self.takes(name)}

    @property
    def num_steps(self) -> int:
        """Steps that a usual call asks for."""
        return MORE_STEPS.get(self.name, NUM_STEPS)

    def takes(self, argument: str) -> bool:
        """Whether the pipeline's call has an argument."""
        return argument in taken_arguments(type(self.pipe))

    def run(self, pipe: Any = None, **changes: Any) -> list[Tensor]:
        """What a seeded call returns, of the shared pipeline unless another is given."""
        return tensors((pipe or self.pipe)(**self.arguments(**changes)))

    def watch(self, config: EasyCacheConfig, *, count_reads: bool = False) -> Watched:
        """A seeded call with EasyCache, closely watched; reads are counted only where that is asked for."""
        decisions: list[StepDecision] = []
        held: list[int] = []
        reads: list[str] = []
        handle = apply_easycache(self.pipe, config, on_step=decisions.append)
        count = transformers(self.pipe)[0].register_forward_hook(lambda *_: held.append(len(handle.tensors())))
        try:
            with counted_forwards(self.pipe) as calls, ReadsByVidaccel(reads) if count_reads else nullcontext():
                outputs = self.run()
            return Watched(
                outputs=outputs,
                report=easycache_report(self.pipe),
                decisions=decisions,
                num_forwards=len(calls),
                num_held=max(held),
                num_held_afterwards=len(handle.tensors()),
                num_reads=len(reads),
            )
        finally:
            count.remove()
            self.take_off()

    @cached_property
    def plain(self) -> list[Tensor]:
        """Without EasyCache."""
        return self.run()

    @cached_property
    def every_third(self) -> Watched:
        """Reused whenever it is allowed."""
        return self.watch(EVERY_THIRD)

    @cached_property
    def config(self) -> EasyCacheConfig:
        """A threshold between the errors of two steps that follow each other: the first is reused, not the second."""
        steps = self.every_third.report.decisions
        first, second = next(pair for pair in pairwise(steps) if not pair[0].computed and not pair[1].computed)
        assert first.accumulated_error is not None
        assert second.accumulated_error is not None
        return EasyCacheConfig(threshold=(first.accumulated_error + second.accumulated_error) / 2, warmup_steps=WARMUP)

    @cached_property
    def fresh(self) -> Watched:
        """What EasyCache just applied does with `config`."""
        return self.watch(self.config, count_reads=True)

    @cached_property
    def guidance(self) -> str | None:
        """The argument that says how strong the guidance is; None where a guider has it."""
        return next((word for word in GUIDANCE if self.takes(word)), None)

    @property
    def guiders(self) -> dict[str, Any]:
        return {name: part for name, part in self.pipe.components.items() if "guider" in name}

    def batch(self, *prompts: str) -> list[Tensor]:
        """What one call for several prompts returns; each sample has its noise, and its image if that is asked for."""
        generators = generator(0) if self.name in AMONG_OTHERS else [generator(seed) for seed in range(len(prompts))]
        arguments = self.arguments(prompt=list(prompts), generator=generators)
        if self.name in INPUTS_PER_PROMPT:
            arguments |= {name: [arguments[name]] * len(prompts) for name in _INPUTS if name in arguments}
        return tensors(self.pipe(**arguments))


def default_of(pipeline: type, argument: str) -> Any:
    """The default of an argument of the pipeline's call."""
    return inspect.signature(pipeline.__call__).parameters[argument].default


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tensors(output: Any) -> list[Tensor]:
    """All tensors of a pipeline's output: videos, and sound where there is some."""
    if isinstance(output, Tensor):
        return [output]
    if hasattr(output, "shape"):
        return [torch.as_tensor(output)]
    values = output.values() if hasattr(output, "values") else output
    return [tensor for value in values if value is not None for tensor in tensors(value)]


def equal(left: list[Tensor], right: list[Tensor]) -> bool:
    """Bit for bit."""
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def transformers(pipe: Any) -> list[Any]:
    found = [getattr(pipe, part, None) for part in ("transformer", "transformer_2")]
    return [model for model in found if model is not None]


def first_layer(model: Any) -> Any:
    """The first child with weights: it runs in every forward."""
    return next(child for child in model.children() if any(True for _ in child.parameters()))


@contextmanager
def counted_forwards(pipe: Any) -> Iterator[list[int]]:
    """One entry for every transformer forward that really runs."""
    calls: list[int] = []
    handles = [first_layer(model).register_forward_pre_hook(lambda *_: calls.append(1)) for model in transformers(pipe)]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def failing(pipe: Any, at: int, *, inside: bool) -> Iterator[None]:
    """Make the `at`-th transformer call raise: in its first layer, or after the whole call."""
    seen: list[int] = []

    def fail(*_: Any) -> None:
        seen.append(1)
        if len(seen) == at + 1:
            raise InterruptionError

    handles = [
        first_layer(model).register_forward_pre_hook(fail) if inside else model.register_forward_hook(fail)
        for model in transformers(pipe)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
