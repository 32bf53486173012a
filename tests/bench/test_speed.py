"""The speed benchmark: every family at toy size, its statements from made-up times, and the published sizes."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import WanTransformer3DModel

from vidaccel.bench.shared.clock import LoopClock
from vidaccel.bench.shared.random_model import call_tensors, random_pipeline, random_transformer
from vidaccel.bench.speed import SpeedBench, summarise_runs
from vidaccel.catalog.families.family import Component
from vidaccel.catalog.speed_shapes import SHAPES

CPU = torch.device("cpu")
TOYS = [name for name in SHAPES if name.startswith("toy")]
PASSES = {
    "toy": 2,
    "toy-hunyuan-video": 1,
    "toy-hunyuan-video-1.5": 2,
    "toy-ltx": 1,
    "toy-open-sora-1.2": 1,
}  # calls of a step
BILLIONS = {
    "wan2.1-1.3b": 1.42,
    "wan2.1-14b": 14.29,
    "hunyuan-video": 12.82,
    "hunyuan-video-1.5": 8.33,
    "ltx": 1.92,
    "open-sora-1.2": 1.21,
}


@pytest.mark.parametrize("shape", TOYS)
def test_it_counts_real_forwards_and_times_every_step(tmp_path: Path, shape: str) -> None:
    passes = PASSES[shape]
    config = SpeedBench(output=tmp_path, shape=shape, num_inference_steps=8, device="cpu", repeats=1)
    result = config.run()
    plain, reusing = result["records"]
    assert plain["num_forwards"] == 8 * passes
    assert reusing["computed"] == [True, True, True, False, False, True, False, True]
    assert reusing["num_forwards"] == 5 * passes
    for run in (plain, reusing):
        assert len(run["step_ms"]) == len(run["call_ms"]) == len(run["computed"]) == 8
        assert all(len(calls) == passes for calls in run["call_ms"])
        assert run["denoising_ms"] == pytest.approx(sum(run["step_ms"]), rel=1e-3)
        assert all(sum(calls) <= step for calls, step in zip(run["call_ms"], run["step_ms"], strict=True))
    summary = result["summary"]
    assert summary["forwards_ratio"] == 5 / 8
    assert summary["reads_per_reused_step"] == 1
    assert summary["finite"]
    assert result["environments"][0]["weights"] == "random"
    assert json.loads((tmp_path / "speed.json").read_text()) == result
    text = (tmp_path / "speed.md").read_text()
    assert "a reused step costs under 1 ms" in text
    assert "reads of the device's memory in a reused step | 1" in text


def test_its_two_statements_follow_from_its_times() -> None:
    def run(times: list[float], computed: list[bool], *, peak: int | None = None) -> dict[str, Any]:
        calls = [[time / 2, time / 2] for time in times]
        figures = {"denoising_ms": sum(times) + 1, "num_forwards": 2 * sum(computed), "peak_bytes": peak}
        figures |= {"reuse": not all(computed), "computed": computed, "step_ms": times, "call_ms": calls}
        return figures | {"finite": True}

    plain = run([100.0] * 10, [True] * 10, peak=1000)
    pattern = [True, True, False, True, False, False, True, False, False, True]
    good = summarise_runs([plain, run([100.0 if computed else 0.5 for computed in pattern], pattern, peak=1017)])
    assert good["forwards_ratio"] == 0.5
    assert good["time_follows_forwards_within_1_percent"]
    assert good["reused_step_ms"] == 0.5
    assert good["reused_step_under_1_ms"]
    assert good["reused_steps"] == 5
    assert (good["peak_bytes"], good["extra_peak_bytes"]) == (1000, 17)
    bad = summarise_runs([plain, run([100.0 if computed else 4.0 for computed in pattern], pattern, peak=0)])
    assert not bad["time_follows_forwards_within_1_percent"]
    assert not bad["reused_step_under_1_ms"]
    none = summarise_runs([plain, run([100.0] * 10, [True] * 10, peak=0) | {"reuse": True, "finite": False}])
    assert none["reused_step_under_1_ms"] is None
    assert not none["finite"]


@pytest.mark.parametrize(
    "changes",
    [
        {"shape": "wan9"},
        {"repeats": 0},
        {"rehearsal_steps": 1},
        {"num_inference_steps": 2},
        {"num_frames": 80},
        {"num_frames": -3},
        {"height": 100},
        {"width": 0},
    ],
)
def test_what_cannot_run_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"`{next(iter(changes))}`"):
        SpeedBench(output=tmp_path, **changes)


def test_sizes_and_guidance_are_the_rows_unless_given(tmp_path: Path) -> None:
    config = SpeedBench(output=tmp_path, shape="hunyuan-video", num_frames=61)
    assert config.size == {"num_frames": 61, "height": 720, "width": 1280}
    assert config.guidance == 6.0
    assert SpeedBench(output=tmp_path, guidance_scale=1.0).guidance == 1.0


@pytest.mark.parametrize("shape", BILLIONS)
def test_the_rows_have_the_size_of_the_published_models(shape: str) -> None:
    module, _, name = SHAPES[shape].transformer.kind.partition(":")
    kind = getattr(import_module(module), name)
    with init_empty_weights():
        model = kind(**SHAPES[shape].transformer.config)
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e9 == pytest.approx(BILLIONS[shape], abs=0.005)
    assert model.get_submodule(SHAPES[shape].counted) is not None


def test_random_weights_are_repeatable_and_in_the_formats_a_checkpoint_is_loaded_in(tmp_path: Path) -> None:
    component = SHAPES["toy"].transformer
    first, second = (random_transformer(component, device=CPU, dtype=torch.bfloat16) for _ in range(2))
    weights = first.state_dict()
    assert all(torch.equal(weight, weights[name]) for name, weight in second.state_dict().items())
    assert len({weight.float().sum().item() for weight in weights.values() if weight.ndim > 1}) > 10
    WanTransformer3DModel(**component.config).save_pretrained(tmp_path)
    loaded = WanTransformer3DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert {name: weight.dtype for name, weight in loaded.state_dict().items()} == {
        name: weight.dtype for name, weight in weights.items()
    }
    for name, buffer in loaded.named_buffers():
        assert torch.equal(first.get_buffer(name), buffer)


@pytest.mark.parametrize("shape", TOYS)
def test_activations_stay_small_through_many_layers_in_bfloat16(shape: str) -> None:
    row = SHAPES[shape]
    length = "depth" if "open-sora" in shape else "num_layers"
    deep = Component(kind=row.transformer.kind, config={**row.transformer.config, length: 24})
    pipe: Any = random_pipeline(replace(row, transformer=deep), device=CPU, dtype=torch.bfloat16, guidance_scale=1.0)
    sizes: list[float] = []
    lists = ("blocks", "transformer_blocks", "spatial_blocks")
    for block in next(getattr(pipe.transformer, name) for name in lists if hasattr(pipe.transformer, name)):
        block.register_forward_hook(lambda module, inputs, output: sizes.append(_largest(output)))
    size = {"num_frames": row.num_frames, "height": row.height, "width": row.width}
    tensors = call_tensors(row.embeddings, device=CPU, dtype=torch.bfloat16)
    latents = pipe(**tensors, **size, num_inference_steps=3, output_type="latent", return_dict=False)[0]
    assert torch.isfinite(latents).all()
    assert len(sizes) >= 3 * 24
    assert all(0 < size < 1e3 for size in sizes)


def _largest(output: Any) -> float:
    return float((output[0] if isinstance(output, tuple) else output).abs().max())


def test_the_clock_leaves_no_trace_on_the_pipeline() -> None:
    pipe: Any = random_pipeline(SHAPES["toy-ltx"], device=CPU, dtype=torch.float32, guidance_scale=1.0)
    with suppress(KeyboardInterrupt), LoopClock(pipe, CPU, counted="proj_in").watch():
        assert "step" in vars(pipe.scheduler)
        raise KeyboardInterrupt
    assert "step" not in vars(pipe.scheduler)
    assert not pipe.transformer._forward_hooks
    assert not pipe.transformer.proj_in._forward_pre_hooks
