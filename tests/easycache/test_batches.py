"""Batches: samples that decide for themselves, streams that decide together, branches in one batch, given schedules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.support.family_calls import call_inputs
from tests.support.tiny_models import call_arguments, tiny_transformer, tiny_wan_i2v, tiny_wan_t2v
from vidaccel import EasyCacheConfig, apply_easycache, easycache_report, remove_easycache
from vidaccel.catalog.traits import TRANSFORMERS
from vidaccel.easycache.batch import batch_of, select_rows
from vidaccel.random_models.build import build_random

NUM_STEPS = 12
CONFIG = EasyCacheConfig(threshold=0.5, warmup_steps=3)


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def run(pipe: Any, **changes: Any) -> Tensor:
    return pipe(**call_arguments(pipe, **({"num_inference_steps": NUM_STEPS} | changes))).frames


def lively(pipe: Any, seeds: tuple[int, ...], config: EasyCacheConfig) -> tuple[Tensor, list[str]]:
    """A batch in which later samples have other prompts, and the pattern of every sample."""
    text = (
        torch.randn(3, 6, 16, generator=torch.Generator().manual_seed(5)) * torch.tensor([1.0, 4.0, 0.2])[:, None, None]
    )
    apply_easycache(pipe, config)
    frames = run(
        pipe,
        batch=len(seeds),
        prompt_embeds=text[list(seeds)],
        negative_prompt_embeds=-text[list(seeds)],
        generator=generators(*seeds),
    )
    steps = easycache_report(pipe).decisions
    remove_easycache(pipe)
    patterns = [
        "".join("C" if (step.samples[index] if step.samples else step.computed) else "." for step in steps)
        for index in range(len(seeds))
    ]
    return frames, patterns


@pytest.mark.parametrize("predictor", ["transformation", "output", "extrapolation"])
def test_every_sample_of_a_batch_is_what_it_is_alone(predictor: str) -> None:
    config = EasyCacheConfig(threshold=0.25, warmup_steps=3, predictor=predictor)
    pipe = tiny_wan_t2v()
    alone = [lively(pipe, (seed,), config) for seed in range(3)]
    together, patterns = lively(pipe, (0, 1, 2), config)
    assert patterns == [pattern for _, (pattern,) in alone]
    assert len(set(patterns)) > 1, "a test of independence needs samples that decide differently"
    for index in range(3):
        torch.testing.assert_close(together[index : index + 1], alone[index][0], rtol=1e-4, atol=1e-4)


def test_the_whole_batch_decides_at_once_by_choice() -> None:
    config = EasyCacheConfig(threshold=0.25, warmup_steps=3, decisions="batch")
    pipe = tiny_wan_t2v()
    _, patterns = lively(pipe, (0, 1, 2), config)
    assert len(set(patterns)) == 1
    assert patterns[0] not in [lively(pipe, (seed,), config)[1][0] for seed in (1, 2)] or "." in patterns[0]
    _, (first, *_) = lively(pipe, (0, 0), config)
    assert first == lively(pipe, (0,), config)[1][0], "two equal samples decide as one"


def test_only_the_samples_that_need_it_are_computed_and_the_report_adds_up() -> None:
    pipe, rows = tiny_wan_t2v(), []
    pipe.transformer.patch_embedding.register_forward_pre_hook(lambda module, args: rows.append(args[0].shape[0]))
    _, patterns = lively(pipe, (0, 1, 2), EasyCacheConfig(threshold=0.25, warmup_steps=3))
    counts = [sum(pattern[step] == "C" for pattern in patterns) for step in range(NUM_STEPS)]
    assert rows == [count for count in counts for _ in range(2) if count]
    assert len(set(counts) - {0}) > 1, "some steps compute some of the samples"


def test_a_sample_keeps_its_batch_mates_condition_channels_apart() -> None:
    pipe = tiny_wan_i2v()
    apply_easycache(pipe, CONFIG)
    image = torch.rand(1, 3, 32, 32)
    frames = run(pipe, batch=2, image=image, generator=generators(3, 4))
    alone = run(pipe, batch=2, image=image, generator=generators(3, 7))
    torch.testing.assert_close(frames[0], alone[0], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(frames[1], alone[1])


def test_a_bare_transformer_whose_layout_is_unknown_decides_for_the_whole_batch() -> None:
    model = tiny_transformer()
    apply_easycache(model, EasyCacheConfig(threshold=0.5, warmup_steps=2, num_inference_steps=6))
    with torch.no_grad():
        for index in range(6):
            model(torch.full((2, 16, 3, 4, 4), 1.0 + index), torch.tensor([900 - index]), torch.ones(2, 6, 16))
    assert all(step.samples == () for step in easycache_report(model).decisions)


class TwoStreams(nn.Module):
    """Video that hardly changes and audio that changes as told."""

    def __init__(self, audio_rate: float) -> None:
        super().__init__()
        self.audio_rate = audio_rate
        self.calls = 0
        self.eval()

    def forward(
        self, hidden_states: Tensor, audio_hidden_states: Tensor, timestep: Tensor, return_dict: bool = True
    ) -> tuple[Tensor, Tensor]:
        self.calls += 1
        return 10 + 0.1 * hidden_states, 1 + self.audio_rate * (audio_hidden_states - 10)


LTX2VideoTransformer3DModel = type("LTX2VideoTransformer3DModel", (TwoStreams,), {})  # the row goes by the class's name


@pytest.mark.parametrize(("rate", "reused"), [(0.1, True), (50.0, False)])
def test_audio_and_video_decide_together(rate: float, reused: bool) -> None:
    model = LTX2VideoTransformer3DModel(rate)
    apply_easycache(model, EasyCacheConfig(threshold=0.2, warmup_steps=2, num_inference_steps=6))
    outputs = []
    with torch.no_grad():
        for index in range(6):
            video, audio = torch.full((1, 4, 2), 5.0 + 0.2 * index), torch.full((1, 3, 2), 10.0 + 0.1 * index)
            outputs.append(model(video, audio, torch.tensor([900.0 - index]), return_dict=False))
    report = easycache_report(model)
    assert (report.num_reused > 0) is reused
    assert model.calls == report.num_computed
    assert all(len(output) == 2 for output in outputs)
    if reused:
        first = next(step.step_index for step in report.decisions if not step.computed)
        last = first - 1
        for stream, pace in ((0, 0.2), (1, 0.1)):
            moved = outputs[last][stream] + pace * (first - last)
            torch.testing.assert_close(outputs[first][stream], moved)


def test_a_schedule_given_beforehand_takes_the_place_of_the_rule() -> None:
    pipe = tiny_wan_t2v()
    apply_easycache(pipe, CONFIG)
    expected = run(pipe)
    computed = [step.step_index for step in easycache_report(pipe).decisions if step.computed]
    remove_easycache(pipe)
    apply_easycache(pipe, schedule=computed)
    assert torch.equal(run(pipe), expected)
    assert [step.step_index for step in easycache_report(pipe).decisions if step.computed] == computed
    remove_easycache(pipe)
    apply_easycache(pipe, schedule=[0, 1, 4])
    run(pipe)
    steps = easycache_report(pipe).decisions
    assert [step.step_index for step in steps if step.computed] == [0, 1, 4]
    assert [steps[index].reason for index in (0, 4, 5)] == ["scheduled", "scheduled", "below_threshold"]


def test_rows_of_a_batch_are_blocks_of_branches() -> None:
    batch = batch_of(6, ("uncond", "cond"), per_sample=True)
    assert (batch.num_groups, batch.deciding_branch) == (3, 1)
    assert batch.rows([0, 2]) == [0, 2, 3, 5]
    rows = torch.arange(6.0)[:, None]
    assert batch.take(rows, 1).flatten().tolist() == [1.0, 4.0]
    parts = {group: batch.take(rows, group) for group in range(3)}
    assert torch.equal(batch.join(parts), rows)
    assert batch_of(5, ("uncond", "cond"), per_sample=True).num_groups == 5
    assert batch_of(6, ("cond", "uncond", "uncond_2"), per_sample=False).num_groups == 1


def test_rows_are_taken_from_batched_tensors_only() -> None:
    traits = TRANSFORMERS["WanVACETransformer3DModel"]
    arguments = {
        "hidden_states": torch.arange(3.0)[:, None],
        "control_hidden_states_scale": torch.ones(3),
        "timestep": torch.tensor(5.0),
        "rotary": (torch.arange(3.0),),
        "return_dict": False,
    }
    chosen = select_rows(arguments, [2], num_rows=3, traits=traits)
    assert chosen["hidden_states"].tolist() == [[2.0]]
    assert chosen["control_hidden_states_scale"].shape == (3,)
    assert chosen["rotary"][0].shape == (3,)
    assert chosen["timestep"] == 5.0


def test_rows_are_taken_from_folded_and_nested_arguments_too() -> None:
    images = torch.arange(6.0)[:, None]  # first and last frame of each of three videos
    chosen = select_rows(
        {"encoder_hidden_states_image": images}, [0, 2], num_rows=3, traits=TRANSFORMERS["WanTransformer3DModel"]
    )
    assert chosen["encoder_hidden_states_image"].flatten().tolist() == [0.0, 1.0, 4.0, 5.0]
    controls = [torch.arange(2.0), torch.arange(2.0) + 10]
    arguments = {"encoder_hidden_states": tuple(controls), "block_controlnet_hidden_states": controls}
    chosen = select_rows(arguments, [1], num_rows=2, traits=TRANSFORMERS["CosmosTransformer3DModel"])
    assert [part.tolist() for part in chosen["encoder_hidden_states"]] == [[1.0], [11.0]]
    assert [part.tolist() for part in chosen["block_controlnet_hidden_states"]] == [[1.0], [11.0]]
    scale = {"rope_interpolation_scale": torch.ones(3)}
    assert select_rows(scale, [0], num_rows=3, traits=TRANSFORMERS["LTXVideoTransformer3DModel"]) == scale


def test_first_and_last_frame_of_each_sample_stay_together() -> None:
    pipe = build_random("wan2.1-flf2v")
    pipe.set_progress_bar_config(disable=True)
    prompts = ["a red ball hops", "a blue cat sleeps on a green hill"]
    config = EasyCacheConfig(threshold=0.35, warmup_steps=3)
    inputs = call_inputs("wan2.1-flf2v", num_inference_steps=10, output_type="latent")
    apply_easycache(pipe, config)
    alone = [
        pipe(**inputs | {"prompt": prompt, "generator": generators(index)[0]}).frames
        for index, prompt in enumerate(prompts)
    ]
    together = pipe(**inputs | {"prompt": prompts, "generator": generators(0, 1)}).frames
    samples = [step.samples for step in easycache_report(pipe).decisions]
    assert any(len(set(computed)) == 2 for computed in samples), "no step computed one sample and reused the other"
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-3, atol=1e-3)


def test_compiled_blocks_run_for_the_whole_batch_and_samples_still_decide_for_themselves() -> None:
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    config = EasyCacheConfig(threshold=0.25, warmup_steps=3)
    expected, patterns = lively(tiny_wan_t2v(), (0, 1, 2), config)
    assert len(set(patterns)) > 1
    torch._dynamo.reset()
    pipe, rows = tiny_wan_t2v(), set()
    pipe.transformer.compile_repeated_blocks(fullgraph=True, backend=backend)
    pipe.transformer.patch_embedding.register_forward_pre_hook(lambda module, args: rows.add(args[0].shape[0]))
    frames, found = lively(pipe, (0, 1, 2), config)
    assert found == patterns
    torch.testing.assert_close(frames, expected, rtol=1e-4, atol=1e-4)
    assert (len(graphs), rows) == (1, {3}), "another number of samples would be compiled again"
