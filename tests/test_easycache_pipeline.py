"""`EasyCacheWanPipeline`: WanPipeline's call, loadable in the three ways a custom pipeline is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import vidaccel.pipelines.easycache_wan as module
from diffusers import DiffusionPipeline, WanPipeline
from tiny_models import call_arguments, tiny_wan_t2v, tiny_wan_two_experts
from vidaccel.pipelines.easycache_wan import EasyCacheWanPipeline

from vidaccel import EasyCacheConfig, apply_easycache, easycache_report

CONFIG = EasyCacheConfig(threshold=0.5, warmup_steps=3)


def arguments(pipe: Any) -> dict[str, Any]:
    return call_arguments(pipe, num_inference_steps=12)


@pytest.mark.parametrize("make", [tiny_wan_t2v, tiny_wan_two_experts])
def test_it_equals_wan_pipeline_with_easycache_applied(make: Any) -> None:
    applied = make()
    apply_easycache(applied, CONFIG)
    expected = applied(**arguments(applied)).frames
    plain = make()
    pipe = EasyCacheWanPipeline.from_pipe(plain)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.transformer is plain.transformer
    output = pipe(**arguments(pipe), threshold=0.5, warmup_steps=3)
    assert torch.equal(output.frames, expected)
    assert output.report.num_reused == easycache_report(applied).num_reused > 0
    frames, report = pipe(**arguments(pipe), easycache=CONFIG, return_dict=False)
    assert torch.equal(frames, expected)
    assert report.num_reused == output.report.num_reused


def test_nothing_is_left_on_the_transformer_after_a_call_or_an_error() -> None:
    plain = tiny_wan_t2v()
    expected = plain(**arguments(plain)).frames
    pipe = EasyCacheWanPipeline.from_pipe(plain)
    pipe.set_progress_bar_config(disable=True)
    pipe(**arguments(pipe), threshold=0.5, warmup_steps=3)
    with pytest.raises(ValueError, match="height"):
        pipe(**(arguments(pipe) | {"height": 33}))
    with pytest.raises(ValueError, match="threshold"):
        pipe(**arguments(pipe), threshold=-1)
    assert torch.equal(plain(**arguments(plain)).frames, expected)
    assert torch.equal(pipe(**arguments(pipe), threshold=0).frames, expected)


def test_a_model_in_training_mode_still_gives_its_frames() -> None:
    plain = tiny_wan_t2v()
    expected = plain(**arguments(plain)).frames
    pipe = EasyCacheWanPipeline.from_pipe(plain)
    pipe.set_progress_bar_config(disable=True)
    pipe.transformer.train()
    output = pipe(**arguments(pipe), easycache=CONFIG)
    assert torch.equal(output.frames, expected)
    assert output.report is None


def test_the_file_works_as_custom_pipeline_and_so_does_the_class(tiny_wan_folder: Path) -> None:
    installed = EasyCacheWanPipeline.from_pretrained(tiny_wan_folder)
    loaded = DiffusionPipeline.from_pretrained(
        tiny_wan_folder, custom_pipeline=str(module.__file__), trust_remote_code=True
    )
    assert type(loaded).__name__ == "EasyCacheWanPipeline"
    results = []
    for pipe in (installed, loaded):
        assert isinstance(pipe, WanPipeline)
        pipe.set_progress_bar_config(disable=True)
        output = pipe(
            "a red circle moves left",
            threshold=0.5,
            warmup_steps=3,
            num_inference_steps=12,
            height=32,
            width=32,
            num_frames=5,
            max_sequence_length=16,
            generator=torch.Generator().manual_seed(0),
            output_type="pt",
        )
        assert output.report.num_reused > 0
        results.append(output.frames)
    assert torch.equal(*results)


def test_from_pipe_keeps_number_formats_and_settings() -> None:
    plain = tiny_wan_two_experts()
    plain.transformer.to(torch.bfloat16)
    before = {name: parameter.dtype for name, parameter in plain.transformer.named_parameters()}
    pipe = EasyCacheWanPipeline.from_pipe(plain)
    assert {name: parameter.dtype for name, parameter in pipe.transformer.named_parameters()} == before
    assert pipe.config.boundary_ratio == plain.config.boundary_ratio is not None
    cast = EasyCacheWanPipeline.from_pipe(plain, dtype=torch.float32)
    assert {parameter.dtype for parameter in cast.transformer.parameters()} == {torch.float32}
