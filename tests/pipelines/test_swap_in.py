"""Swap-in pipelines: the diffusers call with EasyCache in it, and nothing of it before or after."""

from __future__ import annotations

import inspect
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor
from vidaccel.pipelines.easycache_wan import EasyCacheWanPipeline
from vidaccel.pipelines.easycache_wan_i2v import EasyCacheWanImageToVideoPipeline
from vidaccel.pipelines.easycache_wan_vace import EasyCacheWanVACEPipeline

from tests.support.swap_in_cases import CASES, CONFIG, MORE_CASES, Case
from vidaccel import EasyCacheConfig, apply_easycache, easycache_report, remove_easycache
from vidaccel.catalog.presets import Preset

WAN, TWO_EXPERTS, HUNYUAN = CASES["wan2.1-t2v"], CASES["wan2.2-t2v"], CASES["hunyuan-video-t2v"]
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


MEDIA_AND_TEXT = ("prompt", "negative_prompt", "image", "video")


class InterruptionError(Exception):
    pass


@cache
def applied_by_hand(case: Case, **changes: Any) -> tuple[Tensor, Any]:
    """Frames and report of the plain pipeline with EasyCache applied to it; not to be changed."""
    pipe = case.make()
    apply_easycache(pipe, CONFIG)
    frames = pipe(**case.arguments(**changes)).frames
    return frames, easycache_report(pipe)


def traces(pipe: Any) -> list[Any]:
    """Where a hook would show on the transformers."""
    found = []
    for name in ("transformer", "transformer_2"):
        if (transformer := getattr(pipe, name, None)) is not None:
            hooks = getattr(transformer, "_diffusers_hook", None)
            if getattr(transformer.forward, "__func__", None) is not type(transformer).forward:
                found.append(transformer.forward)
            found += [*(hooks.hooks if hooks else ()), *transformer._forward_pre_hooks]
    return found


@pytest.mark.parametrize("case", MORE_CASES.values(), ids=MORE_CASES.keys())
def test_it_equals_the_plain_pipeline_with_easycache_applied(case: Case) -> None:
    expected, report = applied_by_hand(case)
    pipe = case.swapped_in()
    output = pipe(**case.arguments(), threshold=0.5, warmup_steps=3)
    assert torch.equal(output.frames, expected)
    assert output.report.num_reused == report.num_reused > 0
    frames, again = pipe(**case.arguments(), easycache=CONFIG, return_dict=False)
    assert torch.equal(frames, expected)
    assert [step.computed for step in again.decisions] == [step.computed for step in report.decisions]
    assert not traces(pipe)


@each_case
def test_threshold_zero_equals_the_plain_pipeline_which_may_be_called_in_between(case: Case) -> None:
    plain = case.make()
    expected = plain(**case.arguments()).frames
    pipe = case.kind.from_pipe(plain)
    assert not torch.equal(pipe(**case.arguments(), easycache=CONFIG).frames, expected)
    assert torch.equal(plain(**case.arguments()).frames, expected)
    output = pipe(**case.arguments(), threshold=0)
    assert torch.equal(output.frames, expected)
    assert output.report.num_computed == output.report.num_steps


@each_case
def test_the_result_is_the_output_type_of_diffusers_with_the_report_at_its_end(case: Case) -> None:
    plain = case.make()
    kind = type(plain(**case.arguments(num_inference_steps=2)))
    pipe = case.kind.from_pipe(plain)
    output = pipe(**case.arguments(), easycache=CONFIG)
    assert isinstance(output, kind)
    assert output[0] is output.frames
    assert output[-1] is output.report
    assert list(output.keys()) == ["frames", "report"]


@each_case
def test_the_call_shows_the_parameters_of_diffusers_and_three_more(case: Case) -> None:
    theirs = inspect.signature(type(case.make()).__call__).parameters
    ours = inspect.signature(case.kind.__call__).parameters
    assert {name: ours[name] for name in theirs} == dict(theirs)
    added = [name for name in ours if name not in theirs]
    assert added == ["threshold", "warmup_steps", "easycache"]
    assert all(ours[name].default is None and ours[name].kind is ours[name].KEYWORD_ONLY for name in added)
    assert all(f"{name}:" in inspect.getdoc(case.kind.__call__) for name in added)


@each_case
def test_settings_that_are_not_given_are_the_published_ones(case: Case) -> None:
    pipe = case.swapped_in()
    preset = Preset.for_pipeline(pipe)
    known = EasyCacheConfig.published(preset)
    for given in ({}, {"threshold": 0.3}, {"warmup_steps": 2}, {"threshold": 0.0, "warmup_steps": 0}):
        report = pipe(**case.arguments(num_inference_steps=2), **given).report
        assert report.config == replace(known, **given).to_dict()


@each_case
def test_callbacks_take_part_as_they_do_in_diffusers(case: Case) -> None:
    seen = []

    def halve(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        seen.append((type(pipe), step))
        return {"latents": kwargs["latents"] * 0.5} if step == 4 else {}

    expected, report = applied_by_hand(case, callback_on_step_end=halve)
    seen.clear()
    pipe = case.swapped_in()
    output = pipe(**case.arguments(callback_on_step_end=halve), easycache=CONFIG)
    assert torch.equal(output.frames, expected)
    assert not torch.equal(output.frames, pipe(**case.arguments(), easycache=CONFIG).frames)
    assert seen == [(case.kind, step) for step in range(report.num_steps)]


@each_case
def test_an_interrupted_call_ends_early_and_the_next_one_is_whole(case: Case) -> None:
    def stop(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = step == 5
        return {}

    pipe = case.swapped_in()
    output = pipe(**case.arguments(callback_on_step_end=stop), easycache=CONFIG)
    assert output.report.num_steps == 6
    assert torch.equal(pipe(**case.arguments(), easycache=CONFIG).frames, applied_by_hand(case)[0])


@each_case
def test_a_list_of_generators_gives_each_video_its_noise(case: Case) -> None:
    if case.kind is EasyCacheWanVACEPipeline:
        pytest.skip("diffusers' VACE pipeline makes one video at a time")
    two: dict[str, Any] = {name: [value] * 2 for name, value in case.arguments().items() if name in MEDIA_AND_TEXT}
    if case.kind is EasyCacheWanImageToVideoPipeline:
        two["image"] = case.arguments()["image"]  # diffusers' pipeline takes one for all
    plain, pipe = case.make(), case.swapped_in()
    run = apply_easycache(plain, CONFIG)
    generators = [[torch.Generator().manual_seed(seed) for seed in (3, 4)] for _ in range(2)]
    expected = plain(**case.arguments(**two, generator=generators[0])).frames
    output = pipe(**case.arguments(**two, generator=generators[1]), easycache=CONFIG)
    assert torch.equal(output.frames, expected)
    assert len(output.frames) == 2
    assert not torch.equal(*output.frames)
    assert run.report is not None
    assert output.report.num_reused == run.report.num_reused > 0


def fail(*_: Any) -> dict[str, Any]:
    raise InterruptionError


MISTAKES: tuple[tuple[dict[str, Any], type[Exception], str], ...] = (
    ({"height": 7}, ValueError, "height"),
    ({"threshold": -1}, ValueError, "threshold"),
    ({"easycache": 0.05}, ValueError, "EasyCacheConfig, got 0.05"),
    ({"easycache": CONFIG, "threshold": 0.1}, ValueError, "put threshold into it"),
    ({"unknown": 1}, TypeError, "unknown"),
    ({"callback_on_step_end": fail}, InterruptionError, "^$"),
)


@each_case
def test_nothing_is_left_after_an_error(case: Case) -> None:
    pipe = case.swapped_in()
    for changes, error, message in MISTAKES:
        with pytest.raises(error, match=message):
            pipe(**case.arguments() | changes)
        assert not traces(pipe)
    assert torch.equal(pipe(**case.arguments(), easycache=CONFIG).frames, applied_by_hand(case)[0])


def test_a_call_within_a_call_is_refused_if_both_share_the_transformer_and_disturbs_nothing() -> None:
    case = WAN
    expected, _ = applied_by_hand(case)
    pipe = case.swapped_in()
    other, apart = case.kind.from_pipe(pipe, scheduler=case.make().scheduler), case.swapped_in()
    results = []

    def call_others(_: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if step == 6:
            with pytest.raises(ValueError, match="already applied"):
                other(**case.arguments(), easycache=CONFIG)
            results.append(apart(**case.arguments(), easycache=CONFIG).frames)
        return {}

    frames = pipe(**case.arguments(callback_on_step_end=call_others), easycache=CONFIG).frames
    assert torch.equal(frames, expected)
    assert torch.equal(results[0], expected)
    assert torch.equal(other(**case.arguments(), easycache=CONFIG).frames, expected)


def test_pipelines_around_the_same_transformer_take_turns() -> None:
    plain = TWO_EXPERTS.make()
    first, second = EasyCacheWanPipeline.from_pipe(plain), EasyCacheWanPipeline.from_pipe(plain, boundary_ratio=0.5)
    results = [[pipe(**WAN.arguments(), easycache=CONFIG) for pipe in (first, second)] for _ in range(2)]
    for one, again in zip(*results, strict=True):
        assert torch.equal(one.frames, again.frames)
        assert one.report.num_reused == again.report.num_reused > 0
    switches = [
        [step.step_index for step in output.report.decisions if step.reason == "transformer_switch"]
        for output in results[0]
    ]
    assert switches[0] != switches[1]


def test_easycache_applied_by_hand_is_not_doubled_and_stays() -> None:
    case = WAN
    pipe = case.swapped_in()
    apply_easycache(pipe, CONFIG)
    with pytest.raises(ValueError, match="already applied"):
        pipe(**case.arguments())
    remove_easycache(pipe)
    assert pipe(**case.arguments(), easycache=CONFIG).report.num_reused > 0


def test_a_callback_may_take_easycache_off() -> None:
    case = WAN
    pipe = case.swapped_in()

    def take_off(pipe: Any, step: int, *_: Any) -> dict[str, Any]:
        if step == 5:
            pipe.transformer = exchanged
        return {}

    before = pipe.transformer
    exchanged = case.make().transformer
    pipe(**case.arguments(callback_on_step_end=take_off), easycache=CONFIG)
    assert pipe.transformer is exchanged
    pipe.transformer = before
    assert not traces(pipe)


def test_a_model_in_training_mode_still_gives_its_frames() -> None:
    plain = WAN.make()
    expected = plain(**WAN.arguments()).frames
    pipe = EasyCacheWanPipeline.from_pipe(plain)
    pipe.transformer.train()
    output = pipe(**WAN.arguments(), easycache=CONFIG)
    assert torch.equal(output.frames, expected)
    assert output.report is None


@each_case
def test_from_pipe_shares_the_components_and_keeps_formats_and_settings(case: Case) -> None:
    plain = case.make()
    plain.transformer.to(torch.bfloat16)
    plain.register_to_config(_name_or_path="somewhere/model")
    before = {name: parameter.dtype for name, parameter in plain.transformer.named_parameters()}
    pipe = case.kind.from_pipe(plain)
    assert all(pipe.components[name] is part for name, part in plain.components.items())
    assert {name: parameter.dtype for name, parameter in pipe.transformer.named_parameters()} == before
    settings = [name for name in plain.config if not name.startswith("_") and name not in plain.components]
    assert {name: pipe.config[name] for name in settings} == {name: plain.config[name] for name in settings}
    assert pipe.name_or_path == "somewhere/model"
    assert pipe.progress_bar(range(1)).disable
    cast = case.kind.from_pipe(plain, dtype=torch.float32)
    assert {parameter.dtype for parameter in cast.transformer.parameters()} == {torch.float32}
    assert cast.progress_bar(range(1)).disable


def test_from_pipe_keeps_the_boundary_between_experts_and_takes_another() -> None:
    plain = EasyCacheWanPipeline.from_pipe(TWO_EXPERTS.make(), boundary_ratio=0.8)
    assert EasyCacheWanPipeline.from_pipe(plain).config.boundary_ratio == 0.8
    assert EasyCacheWanPipeline.from_pipe(plain, boundary_ratio=0.5).config.boundary_ratio == 0.5
    image_to_video = EasyCacheWanImageToVideoPipeline.from_pipe(plain)
    assert image_to_video.config.boundary_ratio == 0.8
    assert image_to_video.image_encoder is None


def test_from_pipe_says_what_does_not_fit() -> None:
    plain = WAN.make()
    with pytest.raises(ValueError, match=r"needs a WanVACETransformer3DModel as its `transformer`.*has a Wan"):
        EasyCacheWanVACEPipeline.from_pipe(plain)
    with pytest.raises(ValueError, match=r"takes .*transformer_2.*got custom_pipeline"):
        EasyCacheWanPipeline.from_pipe(plain, custom_pipeline="somewhere")
    with pytest.raises(ValueError, match="also needs text_encoder_2, tokenizer_2"):
        HUNYUAN.kind.from_pipe(plain, transformer=HUNYUAN.make().transformer)
    vae = WAN.make().vae
    assert EasyCacheWanPipeline.from_pipe(plain, vae=vae).vae is vae


def offload(pipe: DiffusionPipeline) -> DiffusionPipeline:
    """Everything `enable_model_cpu_offload` does, with the CPU in the place of the GPU."""
    pipe.enable_model_cpu_offload(device="cpu")
    return pipe


@each_case
def test_offloading_before_or_after_changes_nothing(case: Case) -> None:
    expected, report = applied_by_hand(case)
    before, after = case.kind.from_pipe(offload(case.make())), offload(case.swapped_in())
    for pipe in (before, after):
        for _ in range(2):  # diffusers takes its hooks off and puts them on again after each call
            output = pipe(**case.arguments(), easycache=CONFIG)
            assert torch.equal(output.frames, expected)
            assert output.report.num_reused == report.num_reused
            assert pipe._all_hooks
            assert "_old_forward" in vars(pipe.transformer)
        pipe.remove_all_hooks()
        assert not traces(pipe)


@pytest.mark.parametrize("name", ["wan2.1-t2v", "hunyuan-video-t2v"])
def test_group_offloading_changes_nothing(name: str) -> None:
    case = CASES[name]
    expected, _ = applied_by_hand(case)
    plain = case.make()
    plain.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")
    pipe = case.kind.from_pipe(plain)
    for _ in range(2):
        assert torch.equal(pipe(**case.arguments(), easycache=CONFIG).frames, expected)
