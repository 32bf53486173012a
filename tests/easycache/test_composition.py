"""EasyCache beside what users already have: offloading, attention backends, compiled blocks, 8-bit storage.

Whole tiny pipelines, text encoders included, of Wan and of HunyuanVideo (whose attention takes a mask). On a machine
with a GPU the offloading tests use it; streams can be tested only there.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from diffusers import CogVideoXTransformer3DModel
from diffusers.models import attention_dispatch
from torch import Tensor

from tests.support.family_calls import call_inputs
from vidaccel import EasyCacheConfig, apply_easycache, easycache_report, remove_easycache
from vidaccel.errors import UserError
from vidaccel.generation.loading import load_pipeline
from vidaccel.machine.attention import (
    AttentionCall,
    attention_call,
    check_attention_backend,
    set_attention_backend,
    usable_attention_backends,
    use_attention_backend,
)
from vidaccel.random_models.build import build_random, make_random

CPU = torch.device("cpu")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FAMILIES = ("wan2.1-t2v", "hunyuan-video-t2v")
ONE_OF_EACH_ATTENTION = (
    "wan2.1-t2v",
    "skyreels-v2-t2v",
    "hunyuan-video-t2v",
    "framepack",
    "hunyuan-video-1.5-t2v",
    "ltx-t2v",
    "ltx2-t2v",
    "sana-video-t2v",
    "kandinsky5-t2v",
    "motif-video-t2v",
    "helios",
    "chronoedit",
)
CONFIG = EasyCacheConfig(threshold=0.3, warmup_steps=3)
each_family = pytest.mark.parametrize("family", FAMILIES)
in_both_orders = pytest.mark.parametrize("cache_first", [True, False], ids=["cache first", "cache last"])


def pipeline(family: str) -> Any:
    pipe = build_random(family)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe: Any, family: str, **changes: Any) -> Tensor:
    return pipe(**call_inputs(family, **({"output_type": "latent", "num_inference_steps": 10} | changes)))[0]


def with_cache(pipe: Any, change: Callable[[Any], Any], *, cache_first: bool) -> None:
    steps = [lambda: apply_easycache(pipe, CONFIG), lambda: change(pipe)]
    for step in steps if cache_first else reversed(steps):
        step()


def num_reused(pipe: Any) -> int:
    return easycache_report(pipe).num_reused


@cache
def reference(family: str) -> Tensor:
    pipe = pipeline(family)
    apply_easycache(pipe, CONFIG)
    latents = run(pipe, family)
    assert num_reused(pipe) >= 3
    return latents


def _group(kind: str, **options: Any) -> Callable[[Any], None]:
    blocks = {"num_blocks_per_group": 1} if kind == "block_level" else {}
    return lambda pipe: pipe.enable_group_offload(onload_device=DEVICE, offload_type=kind, **blocks, **options)


def _to_disk(pipe: Any) -> None:
    # Not the text encoder: its tied weights come back wrong from diffusers' disk offloading, with or without a cache.
    for part in (pipe.transformer, pipe.vae):
        part.enable_group_offload(
            onload_device=CPU, offload_type="leaf_level", offload_to_disk_path=tempfile.mkdtemp(prefix="vidaccel-")
        )


OFFLOADING: dict[str, Callable[[Any], Any]] = {
    "model": lambda pipe: pipe.enable_model_cpu_offload(device=DEVICE),
    # What enable_sequential_cpu_offload does with each part; itself it needs a GPU.
    "sequential": lambda pipe: cpu_offload(pipe.transformer, CPU),
    "blocks": _group("block_level"),
    "leaves": _group("leaf_level"),
    "disk": _to_disk,
}


@each_family
@in_both_orders
@pytest.mark.parametrize("way", OFFLOADING)
def test_offloading_changes_nothing_and_reuses_in_every_call(family: str, way: str, cache_first: bool) -> None:
    expected = reference(family)
    pipe = pipeline(family)
    with_cache(pipe, OFFLOADING[way], cache_first=cache_first)
    for _ in range(2):
        torch.testing.assert_close(run(pipe, family).to(CPU), expected, rtol=0, atol=0 if DEVICE == CPU else 1e-3)
        assert num_reused(pipe) >= 3
    remove_easycache(pipe)
    assert pipe.transformer._diffusers_hook.hooks.keys() <= {"group_offloading", "layer_execution_tracker"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="streams and sequential offloading need a GPU")
@each_family
@pytest.mark.parametrize("way", ["sequential", "stream", "stream blocks"])
def test_offloading_that_needs_a_gpu(family: str, way: str) -> None:
    expected = reference(family)
    pipe = pipeline(family)
    ways = {
        "sequential": lambda pipe: pipe.enable_sequential_cpu_offload(device=DEVICE),
        "stream": _group("leaf_level", use_stream=True),
        "stream blocks": _group("block_level", use_stream=True),
    }
    with_cache(pipe, ways[way], cache_first=True)
    for _ in range(2):
        torch.testing.assert_close(run(pipe, family).to(CPU), expected, rtol=0, atol=1e-3)
        assert num_reused(pipe) >= 3


@each_family
@in_both_orders
def test_weights_stored_in_eight_bits_layer_by_layer(family: str, cache_first: bool) -> None:
    def in_eight_bits(pipe: Any) -> None:
        pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)

    plain = pipeline(family)
    in_eight_bits(plain)
    expected = run(plain, family)
    pipe = pipeline(family)
    with_cache(pipe, in_eight_bits, cache_first=cache_first)
    reused = run(pipe, family)
    assert num_reused(pipe) >= 3
    assert torch.equal(run(pipe, family), reused)
    assert torch.float8_e4m3fn in {parameter.dtype for parameter in pipe.transformer.parameters()}
    remove_easycache(pipe)
    assert torch.equal(run(pipe, family), expected)
    apply_easycache(pipe, EasyCacheConfig(threshold=0))
    assert torch.equal(run(pipe, family), expected)


@pytest.mark.parametrize(("family", "classes"), [("wan2.1-t2v", 1), ("hunyuan-video-t2v", 4)])
@in_both_orders
def test_compiled_blocks_are_one_whole_graph_for_each_class(family: str, classes: int, cache_first: bool) -> None:
    torch._dynamo.reset()
    expected = reference(family)
    graphs = 0

    def counting_backend(graph: Any, inputs: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph.forward

    pipe = pipeline(family)
    with_cache(
        pipe,
        lambda pipe: pipe.transformer.compile_repeated_blocks(fullgraph=True, backend=counting_backend),
        cache_first=cache_first,
    )
    for _ in range(2):
        torch.testing.assert_close(run(pipe, family), expected)
        assert num_reused(pipe) >= 3
    assert graphs == classes
    torch._dynamo.reset()


@each_family
@pytest.mark.parametrize("name", ["native", "_native_math", "flex"])
def test_an_attention_backend_is_chosen_by_one_argument(family: str, name: str) -> None:
    expected = reference(family)
    pipe = pipeline(family)
    apply_easycache(pipe, CONFIG)
    use_attention_backend(pipe, name)
    torch.testing.assert_close(run(pipe, family), expected, rtol=1e-3, atol=1e-3)
    assert num_reused(pipe) >= 3
    chosen = {getattr(part.processor, "_attention_backend", None) for part in attention_parts(pipe.transformer)}
    assert name in chosen
    assert attention_dispatch._AttentionBackendRegistry.get_active_backend()[0].value == "native"


def attention_parts(model: Any) -> list[Any]:
    return [part for part in model.modules() if getattr(part, "processor", None) is not None]


@pytest.mark.parametrize("name", ["flash", "sage", "xformers", "_native_cudnn"])
def test_a_backend_that_cannot_run_is_refused_before_anything_changes(name: str) -> None:
    pipe = pipeline("wan2.1-t2v")
    if name in usable_attention_backends(device=DEVICE, dtype=torch.float32):
        pytest.skip("this machine has it")
    with pytest.raises(UserError, match=f"'{name}' cannot run here"):
        use_attention_backend(pipe, name)
    assert {part.processor._attention_backend for part in attention_parts(pipe.transformer)} == {None}


def test_flash_without_masks_is_refused_for_the_masks_of_hunyuan_video_and_not_for_wan(tmp_path: Path) -> None:
    use_attention_backend(pipeline("wan2.1-t2v"), "_native_flash")
    with pytest.raises(UserError, match=r"mask: keys.*not supported"):
        use_attention_backend(pipeline("hunyuan-video-t2v"), "_native_flash")
    folder = make_random("hunyuan-video-t2v", tmp_path / "model")
    with pytest.raises(UserError, match=r"mask: keys.*not supported"):
        load_pipeline(str(folder), device="cpu", attention="_native_flash")
    pipe = load_pipeline(str(folder), device="cpu", attention="_native_math")
    assert run(pipe, "hunyuan-video-t2v").isfinite().all()


@pytest.mark.parametrize("mask", ["keys", "pairs", "bias"])
def test_a_backend_that_leaves_a_mask_out_is_found(mask: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    call = AttentionCall(head_dim=128, mask=mask)
    check_attention_backend("_native_math", device=CPU, dtype=torch.bfloat16, call=call)
    dispatch = attention_dispatch.dispatch_attention_fn
    monkeypatch.setattr(
        "vidaccel.machine.attention.dispatch_attention_fn", lambda *tensors, attn_mask: dispatch(*tensors)
    )
    with pytest.raises(UserError, match="wrong values"):
        check_attention_backend("_native_math", device=CPU, dtype=torch.bfloat16, call=call)


@pytest.mark.parametrize("family", ONE_OF_EACH_ATTENTION)
def test_the_check_runs_the_head_size_and_mask_that_the_model_runs(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = pipeline(family)
    seen: set[tuple[int, str]] = set()

    def kind_of(mask: Tensor | None) -> str:
        if mask is None:
            return "none"
        if mask.dtype != torch.bool:
            return "bias"
        return "keys" if mask.shape[2] == 1 else "pairs"

    def spy(query: Tensor, *tensors: Tensor, attn_mask: Tensor | None = None, **options: Any) -> Tensor:
        seen.add((query.shape[-1], kind_of(attn_mask)))
        return attention_dispatch.dispatch_attention_fn(query, *tensors, attn_mask=attn_mask, **options)

    kinds = {type(pipe.transformer), *(type(part.processor) for part in attention_parts(pipe.transformer))}
    for module in {import_module(kind.__module__) for kind in kinds}:
        if hasattr(module, "dispatch_attention_fn"):
            monkeypatch.setattr(module, "dispatch_attention_fn", spy)
    run(pipe, family, num_inference_steps=2)
    call = attention_call(type(pipe.transformer).__name__, pipe.transformer.config)
    assert (call.head_dim, call.mask) in seen
    assert {mask for _, mask in seen} <= {"none", call.mask}


@pytest.mark.parametrize("config", [{}, {"hidden_size": 16}, {"num_heads": 2}, {"head_dim": None, "axes_dims": ()}])
def test_the_attention_of_a_model_that_does_not_say_its_head_size_is_tried_with_64(config: dict[str, Any]) -> None:
    assert attention_call("Unknown", config).head_dim == 64


def test_a_model_whose_attention_diffusers_does_not_choose_is_refused() -> None:
    model = CogVideoXTransformer3DModel(num_attention_heads=2, attention_head_dim=16, num_layers=1, text_embed_dim=8)
    with pytest.raises(UserError, match="would change nothing"):
        set_attention_backend(model, "_native_math")
