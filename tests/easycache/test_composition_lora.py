"""EasyCache while LoRA adapters are switched: every call equals one of a fresh pipeline in the same state."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.easycache.test_composition import CONFIG, each_family, num_reused, pipeline, run
from vidaccel import EasyCacheConfig, apply_easycache, easycache_report, remove_easycache

peft = pytest.importorskip("peft")

TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
STATES: dict[str, Callable[[Any], Any]] = {
    "first": lambda pipe: pipe.set_adapters("first"),
    "second": lambda pipe: pipe.set_adapters("second"),
    "both, weighted": lambda pipe: pipe.set_adapters(["first", "second"], [0.5, 2.0]),
    "none": lambda pipe: pipe.disable_lora(),
    "fused": lambda pipe: (pipe.set_adapters("first"), pipe.fuse_lora(adapter_names=["first"])),
}


def add_adapters(pipe: Any) -> None:
    for seed, name in enumerate(("first", "second")):
        torch.manual_seed(seed)
        config = peft.LoraConfig(r=4, lora_alpha=4, target_modules=TARGETS, init_lora_weights=False)
        pipe.transformer.add_adapter(config, adapter_name=name)


@cache
def fresh(family: str, state: str, config: EasyCacheConfig | None = CONFIG) -> torch.Tensor:
    pipe = pipeline(family)
    add_adapters(pipe)
    STATES[state](pipe)
    if config is not None:
        apply_easycache(pipe, config)
    return run(pipe, family)


@each_family
@pytest.mark.parametrize("cache_first", [True, False], ids=["cache first", "cache last"])
def test_every_call_after_a_switch_equals_a_fresh_pipeline(family: str, cache_first: bool) -> None:
    pipe = pipeline(family)
    if cache_first:
        apply_easycache(pipe, CONFIG)
        run(pipe, family)
    add_adapters(pipe)
    if not cache_first:
        apply_easycache(pipe, CONFIG)
    results = []
    for state in ("first", "second", "both, weighted", "none", "second", "first"):
        pipe.enable_lora()
        STATES[state](pipe)
        results.append(run(pipe, family))
        assert torch.equal(results[-1], fresh(family, state))
        assert num_reused(pipe) >= 3
    assert len({float(result.sum()) for result in results[:4]}) == 4, "each state gives another video"


@each_family
def test_fused_adapters_and_their_separation(family: str) -> None:
    pipe = pipeline(family)
    add_adapters(pipe)
    apply_easycache(pipe, CONFIG)
    STATES["first"](pipe)
    apart = run(pipe, family)
    STATES["fused"](pipe)
    fused = run(pipe, family)
    assert torch.equal(fused, fresh(family, "fused"))
    torch.testing.assert_close(fused, apart, rtol=1e-3, atol=1e-3)
    pipe.unfuse_lora()
    torch.testing.assert_close(run(pipe, family), apart, rtol=1e-3, atol=1e-3)
    pipe.delete_adapters(["first", "second"])
    plain = pipeline(family)
    apply_easycache(plain, CONFIG)
    torch.testing.assert_close(run(pipe, family), run(plain, family), rtol=1e-3, atol=1e-3)


@each_family
def test_adapters_from_a_file_come_and_go_while_the_cache_stays(family: str, tmp_path: Path) -> None:
    source = pipeline(family)
    add_adapters(source)
    source.transformer.save_lora_adapter(tmp_path, adapter_name="second")
    pipe = pipeline(family)
    apply_easycache(pipe, CONFIG)
    before = run(pipe, family)
    pipe.transformer.load_lora_adapter(
        tmp_path, weight_name="pytorch_lora_weights.safetensors", prefix=None, adapter_name="loaded"
    )
    loaded = run(pipe, family)
    torch.testing.assert_close(loaded, fresh(family, "second"))
    assert not torch.equal(loaded, before)
    assert num_reused(pipe) >= 3
    pipe.unload_lora_weights()
    assert torch.equal(run(pipe, family), before)
    remove_easycache(pipe)
    assert torch.equal(run(pipe, family), run(pipeline(family), family))


@each_family
def test_the_cache_at_threshold_zero_changes_nothing_under_an_adapter(family: str) -> None:
    exact = fresh(family, "both, weighted", EasyCacheConfig(threshold=0))
    assert torch.equal(exact, fresh(family, "both, weighted", None))


SWITCHES = {
    "other adapter": ("first", lambda pipe: pipe.set_adapters("second")),
    "other weight": ("first", lambda pipe: pipe.set_adapters("first", 0.5)),
    "disabled": ("first", lambda pipe: pipe.disable_lora()),
    "merged": ("first", lambda pipe: pipe.fuse_lora(adapter_names=["second"])),
    "deleted": ("both, weighted", lambda pipe: pipe.delete_adapters("second")),
}


@pytest.mark.parametrize("switch", SWITCHES)
def test_a_switch_inside_of_a_call_is_noticed_by_the_next_step(switch: str) -> None:
    before, change = SWITCHES[switch]
    family, at = "wan2.1-t2v", 5
    latents = []

    def steps(config: EasyCacheConfig, callback: Callable[..., Any] | None) -> list[Any]:
        pipe = pipeline(family)
        add_adapters(pipe)
        STATES[before](pipe)
        apply_easycache(pipe, config)
        latents.append(run(pipe, family, callback_on_step_end=callback))
        return list(easycache_report(pipe).decisions)

    def switch_it(pipe: Any, index: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if index == at:
            change(pipe)
        return kwargs

    lasting = EasyCacheConfig(threshold=float("inf"), warmup_steps=3)
    assert not any(step.computed for step in steps(lasting, None)[3:9])
    switched = steps(lasting, switch_it)
    assert [(step.computed, step.reason) for step in switched[at : at + 4]] == [
        (False, "below_threshold"),
        (True, "adapter_switch"),
        (True, "no_history"),
        (False, "below_threshold"),
    ]
    assert switched[at + 1].num_computed_passes == switched[at + 1].num_passes == 2
    assert not torch.equal(*latents)
