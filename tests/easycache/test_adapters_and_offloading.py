"""EasyCache, offloading and adapters together, in every order: reuse goes on, whichever hooks come and go beneath it.

Loading, deleting or unloading an adapter takes the hooks of group offloading off the transformer and puts them on
again, and those of model offloading too. The tiny Wan pipelines, with one expert and with two, go through every
combination. Of the other transformers each class goes through one: what comes and goes are hooks of the module, and the
code that does it is shared by all pipelines, so that only the transformer's own layers can make a difference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from itertools import pairwise, permutations
from typing import Any

import pytest
import torch
from diffusers.hooks import HookRegistry, ModelHook
from torch import Tensor, nn

from tests.support.family_runs import FamilyRuns, counted_forwards, equal, transformers
from tests.support.tiny_models import call_arguments, tiny_wan_t2v, tiny_wan_two_experts
from vidaccel import EasyCacheConfig, apply_easycache, easycache_report, remove_easycache
from vidaccel.catalog.pipelines import named_class
from vidaccel.catalog.table import CATALOG

peft = pytest.importorskip("peft")

CPU = torch.device("cpu")
NUM_STEPS = 12
CONFIG = EasyCacheConfig(threshold=float("inf"), warmup_steps=2)
PIPELINES: dict[str, Callable[[], Any]] = {
    "one expert": tiny_wan_t2v,
    "two experts": partial(tiny_wan_two_experts, boundary_ratio=0.87),
}
each_pipeline = pytest.mark.parametrize("kind", PIPELINES)


def offload_models(pipe: Any) -> None:
    # Adapters are loaded between taking it off and putting it on, then without a device, which must be an accelerator.
    pipe.enable_model_cpu_offload = partial(type(pipe).enable_model_cpu_offload, pipe, device="cpu")
    pipe.enable_model_cpu_offload()


def offload_groups(pipe: Any, *, offload_type: str) -> None:
    for model in transformers(pipe):
        model.enable_group_offload(onload_device=CPU, offload_type=offload_type, num_blocks_per_group=1)


OFFLOADING: dict[str, Callable[[Any], None]] = {
    "none": lambda pipe: None,
    "model": offload_models,
    "leaves": partial(offload_groups, offload_type="leaf_level"),
    "blocks": partial(offload_groups, offload_type="block_level"),
}


def adapter_weights(model: nn.Module, seed: int) -> dict[str, Tensor]:
    """A random adapter of the first block that has linear layers, as a checkpoint names it."""
    blocks = next(part for part in model.children() if isinstance(part, nn.ModuleList) and list(linear_layers(part)))
    prefix = next(name for name, part in model.named_children() if part is blocks)
    generator = torch.Generator().manual_seed(seed)
    weights: dict[str, Tensor] = {}
    for name, layer in list(linear_layers(blocks))[:4]:
        for part, shape in {"lora_A": (2, layer.in_features), "lora_B": (layer.out_features, 2)}.items():
            weights[f"transformer.{prefix}.{name}.{part}.weight"] = torch.randn(shape, generator=generator) / 2
    return weights


def linear_layers(part: nn.Module) -> list[tuple[str, nn.Linear]]:
    return [(name, layer) for name, layer in part.named_modules() if type(layer) is nn.Linear]


def load(pipe: Any, name: str, seed: int) -> None:
    """Into every expert, by the pipeline's own `load_lora_weights`."""
    pipe.load_lora_weights(adapter_weights(clean(pipe.transformer), seed), adapter_name=name)
    if len(transformers(pipe)) > 1:
        second = adapter_weights(clean(pipe.transformer), seed + 10)
        pipe.load_lora_weights(second, adapter_name=name, load_into_transformer_2=True)


def clean(model: nn.Module) -> nn.Module:
    """A model of the same layers without adapters."""
    return type(model).from_config(model.config)  # type: ignore[attr-defined]


# One after the other, on one pipeline.
CHANGES: dict[str, Callable[[Any], Any]] = {
    "load": lambda pipe: load(pipe, "first", 1),
    "load another": lambda pipe: load(pipe, "second", 2),
    "set": lambda pipe: pipe.set_adapters(["first", "second"], [0.5, 2.0]),
    "delete": lambda pipe: pipe.delete_adapters("second"),
    "fuse": lambda pipe: pipe.fuse_lora(components=parts(pipe), adapter_names=["first"]),
    "unfuse": lambda pipe: pipe.unfuse_lora(components=parts(pipe)),
    "unload": lambda pipe: pipe.unload_lora_weights(),
}


def parts(pipe: Any) -> list[str]:
    return ["transformer", "transformer_2"][: len(transformers(pipe))]


def run(pipe: Any, **changes: Any) -> Tensor:
    """A seeded call, checked: its own report, and as many forwards as that says."""
    before = pipe_report(pipe)
    with counted_forwards(pipe) as forwards:
        latents = pipe(**call_arguments(pipe, num_inference_steps=NUM_STEPS, **changes)).frames
    report = easycache_report(pipe)
    assert report is not before, "the report is of an earlier call"
    assert len(forwards) == report.num_computed_passes < report.num_passes
    assert report.num_steps == NUM_STEPS
    return latents


def pipe_report(pipe: Any) -> Any:
    try:
        return easycache_report(pipe)
    except ValueError:  # no call yet
        return None


@cache
def expected(kind: str) -> dict[str, Tensor]:
    """What a pipeline that is not offloaded gives after each change, in order."""
    pipe = PIPELINES[kind]()
    apply_easycache(pipe, CONFIG)
    results = {"nothing": run(pipe)}
    for name, change in CHANGES.items():
        change(pipe)
        results[name] = run(pipe)
    assert all(not torch.equal(left, right) for left, right in pairwise([*results.values()][:4]))
    return results


@each_pipeline
@pytest.mark.parametrize("way", OFFLOADING)
@pytest.mark.parametrize("order", list(permutations(("cache", "offload", "adapter"))), ids="-".join)
def test_every_order_of_cache_offloading_and_adapter_reuses_in_every_call(
    kind: str, way: str, order: Sequence[str]
) -> None:
    wanted = expected(kind)
    pipe = PIPELINES[kind]()
    steps = {
        "cache": lambda: apply_easycache(pipe, CONFIG),
        "offload": lambda: OFFLOADING[way](pipe),
        "adapter": lambda: CHANGES["load"](pipe),
    }
    for step in order:
        steps[step]()
    assert torch.equal(run(pipe), wanted["load"])
    for name in list(CHANGES)[1:]:
        CHANGES[name](pipe)
        torch.testing.assert_close(run(pipe), wanted[name], rtol=1e-3, atol=1e-3)
    remove_easycache(pipe)
    assert {name for model in transformers(pipe) for name in model._diffusers_hook.hooks} <= {"group_offloading"}
    plain = PIPELINES[kind]()  # fused weights come apart again up to rounding
    torch.testing.assert_close(pipe(**call_arguments(pipe))[0], plain(**call_arguments(plain))[0], rtol=1e-3, atol=1e-3)


ORDERS = list(permutations(("cache", "offload")))
# Which expert runs makes no difference to where the hooks of both are: two experts go through one order and way.
WITHIN_A_CALL = [
    *(("one expert", way, order) for way in OFFLOADING for order in ORDERS),
    ("two experts", "leaves", ("offload", "cache")),
]


@pytest.mark.parametrize(("kind", "way", "order"), WITHIN_A_CALL)
@pytest.mark.parametrize("name", CHANGES)
def test_a_change_within_a_call_is_followed_by_a_computed_step_and_then_by_reuse(
    kind: str, way: str, order: Sequence[str], name: str
) -> None:
    pipe, at = PIPELINES[kind](), 7
    steps = {"cache": lambda: apply_easycache(pipe, CONFIG), "offload": lambda: OFFLOADING[way](pipe)}
    for step in order:
        steps[step]()
    for earlier in list(CHANGES)[: list(CHANGES).index(name)]:
        CHANGES[earlier](pipe)

    def change(pipe: Any, index: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if index == at:
            CHANGES[name](pipe)
        return kwargs

    run(pipe, callback_on_step_end=change)
    reasons = [step.reason for step in easycache_report(pipe).decisions]
    assert "adapter_switch" not in reasons[: at + 1]
    assert "below_threshold" in reasons[: at + 1]
    assert reasons[at + 1 : at + 4] == ["adapter_switch", "no_history", "below_threshold"]
    torch.testing.assert_close(run(pipe), expected(kind)[name], rtol=1e-3, atol=1e-3)


def one_of_each_transformer_that_takes_adapters() -> list[str]:
    first: dict[str, str] = {}
    for family in CATALOG.families:
        if family.refusal is None and hasattr(named_class(family.pipeline), "load_lora_weights"):
            first.setdefault(family.components["transformer"].kind, family.name)
    return list(first.values())


@pytest.mark.parametrize("name", one_of_each_transformer_that_takes_adapters())
def test_adapters_under_group_offloading_reuse_with_every_transformer(name: str) -> None:
    """Offloading, then EasyCache, then adapters: the order of diffusers' documentation."""
    family, config = FamilyRuns(name), EasyCacheConfig(threshold=float("inf"), warmup_steps=2)
    pipe = family.pipe
    offload_groups(pipe, offload_type="leaf_level")
    apply_easycache(pipe, config)
    results = [family.run()]
    for change in (CHANGES["load"], CHANGES["unload"]):
        before = easycache_report(pipe)
        change(pipe)
        with counted_forwards(pipe) as forwards:
            results.append(family.run())
        report = easycache_report(pipe)
        assert report is not before
        assert len(forwards) == report.num_computed_passes < report.num_passes
    assert not equal(results[0], results[1])
    assert equal(results[0], results[2])


class Passing(ModelHook):
    """A hook of anyone's that changes nothing."""


@pytest.mark.parametrize("places", list(permutations(("beneath", "beneath too", "above"))), ids="-".join)
def test_any_hook_may_be_removed_from_beneath_or_above(places: Sequence[str]) -> None:
    pipe = tiny_wan_t2v()
    registry = HookRegistry.check_if_exists_or_initialize(pipe.transformer)
    registry.register_hook(Passing(), "beneath")
    registry.register_hook(Passing(), "beneath too")
    apply_easycache(pipe, CONFIG)
    registry.register_hook(Passing(), "above")
    wanted = run(pipe)
    for place in places:
        registry.remove_hook(place)
        assert torch.equal(run(pipe), wanted)
    remove_easycache(pipe)
    assert "forward" not in vars(pipe.transformer)


def test_what_was_removed_beneath_does_not_come_back_when_easycache_is_removed() -> None:
    pipe, calls = tiny_wan_t2v(), []

    class Counting(ModelHook):
        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            return args, kwargs

    registry = HookRegistry.check_if_exists_or_initialize(pipe.transformer)
    registry.register_hook(Counting(), "counting")
    apply_easycache(pipe, CONFIG)
    registry.remove_hook("counting")
    remove_easycache(pipe)
    pipe(**call_arguments(pipe, num_inference_steps=2))
    assert calls == []
