"""A condition that is replaced within a call: the next step is computed, and conditions that stay never cost one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import WanVideoToVideoPipeline
from torch import Tensor, nn

from tests.support.device_reads import ReadsByVidaccel
from tests.support.family_runs import FamilyRuns
from tests.support.tiny_models import (
    call_arguments,
    tiny_transformer,
    tiny_wan_i2v,
    tiny_wan_t2v,
    tiny_wan_two_experts,
    tiny_wan_v2v,
)
from vidaccel import EasyCacheConfig, apply_easycache, easycache_report
from vidaccel.catalog.table import CATALOG
from vidaccel.easycache.conditions import conditions_among

NUM_STEPS, AT = 12, 6
LASTING = EasyCacheConfig(threshold=float("inf"), warmup_steps=3)
OTHER = torch.randn(1, 6, 16, generator=torch.Generator().manual_seed(9))


def run(pipe: Any, change: Callable[..., dict[str, Any]] | None = None, **changes: Any) -> Tensor:
    settings = {"num_inference_steps": NUM_STEPS} | changes
    if isinstance(pipe, WanVideoToVideoPipeline):
        settings["strength"] = 1.0
    if change is not None:
        names = ["latents", "prompt_embeds", "negative_prompt_embeds"]
        settings |= {"callback_on_step_end": change, "callback_on_step_end_tensor_inputs": names}
    return pipe(**call_arguments(pipe, **settings)).frames


def replacing(name: str, make: Callable[[Tensor], Tensor], *, at: int = AT) -> Callable[..., dict[str, Any]]:
    """A callback that replaces one tensor after step `at`."""

    def change(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        return {name: make(tensors[name])} if step == at else {}

    return change


def steps_of(target: Any) -> list[tuple[bool, str]]:
    return [(step.computed, step.reason) for step in easycache_report(target).decisions]


ONE_TRANSFORMER = (tiny_wan_t2v, tiny_wan_i2v, tiny_wan_v2v)
TARGETS = [*((make, bare) for make in ONE_TRANSFORMER for bare in (False, True)), (tiny_wan_two_experts, False)]


@pytest.mark.parametrize(("make", "bare"), TARGETS)
def test_a_prompt_replaced_within_a_call_is_followed_by_a_computed_step(make: Callable[[], Any], bare: bool) -> None:
    config = EasyCacheConfig(threshold=float("inf"), warmup_steps=3, num_inference_steps=NUM_STEPS)
    pipe, plain = make(), make()
    target = pipe.transformer if bare else pipe
    apply_easycache(target, config)
    apply_easycache(plain.transformer if bare else plain, config)
    made = run(pipe, replacing("prompt_embeds", lambda _: OTHER))
    steps = steps_of(target)
    assert steps[AT + 1 : AT + 4] == [
        (True, "condition_changed"),
        (True, "no_history"),
        (False, "below_threshold"),
    ]
    assert [reason for _, reason in steps].count("condition_changed") == 1
    assert not torch.equal(made, run(plain))
    assert torch.equal(run(pipe), run(plain)), "the next call is like any other"


def test_the_step_after_a_replaced_prompt_is_what_the_model_gives() -> None:
    """Against a twin that computes every step from there on, up to the step after."""
    changed, exact = tiny_wan_t2v(), tiny_wan_t2v()
    seen: dict[str, list[Tensor]] = {"changed": [], "exact": []}
    for name, pipe in (("changed", changed), ("exact", exact)):
        pipe.transformer.proj_out.register_forward_hook(lambda *parts, to=seen[name]: to.append(parts[2]))
    apply_easycache(changed, LASTING)
    apply_easycache(exact, schedule=[0, 1, 2, *range(AT + 1, NUM_STEPS)])
    for pipe in (changed, exact):
        run(pipe, replacing("prompt_embeds", lambda _: OTHER))
    for left, right in zip(seen["changed"][:8], seen["exact"][:8], strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize("warmup", [3, AT + 2])
def test_a_prompt_replaced_in_the_last_step_of_the_warm_up_gives_no_rate(warmup: int) -> None:
    pipe = tiny_wan_t2v()
    apply_easycache(pipe, EasyCacheConfig(threshold=float("inf"), warmup_steps=warmup))
    run(pipe, replacing("prompt_embeds", lambda _: OTHER, at=warmup - 2))
    assert steps_of(pipe)[warmup - 1 : warmup + 2] == [
        (True, "warmup"),
        (True, "no_history"),
        (False, "below_threshold"),
    ]


def test_a_replaced_negative_prompt_has_its_branch_computed_at_once_and_then_the_step() -> None:
    pipe = tiny_wan_t2v()
    apply_easycache(pipe, LASTING)
    run(pipe, replacing("negative_prompt_embeds", lambda _: OTHER))
    step, following = easycache_report(pipe).decisions[AT + 1 : AT + 3]
    assert (step.computed, step.num_passes, step.num_computed_passes) == (False, 2, 1)
    assert (following.computed, following.reason, following.num_computed_passes) == (True, "condition_changed", 2)


@pytest.mark.parametrize("name", ["prompt_embeds", "negative_prompt_embeds"])
def test_a_prompt_replaced_by_an_equal_one_costs_at_most_a_pass_and_a_read_nothing(name: str) -> None:
    pipe, plain = tiny_wan_t2v(), tiny_wan_t2v()
    reads: list[str] = []
    apply_easycache(pipe, LASTING)
    apply_easycache(plain, LASTING)
    run(plain)
    with ReadsByVidaccel(reads):
        run(pipe, replacing(name, lambda tensor: tensor.clone()))
    assert steps_of(pipe) == steps_of(plain)
    assert len(reads) <= NUM_STEPS


def test_a_prompt_written_over_in_place_is_another() -> None:
    pipe = tiny_wan_t2v()
    apply_easycache(pipe, LASTING)
    run(pipe, replacing("prompt_embeds", lambda tensor: tensor.copy_(OTHER)))
    assert steps_of(pipe)[AT + 1] == (True, "condition_changed")


class Conditioned(nn.Module):
    """Two more channels in than out, a control, an image, a strength in a list and a distilled guidance scale."""

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        control_hidden_states: list[Tensor] | None = None,
        guidance: Tensor | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> tuple[Tensor]:
        return (2 * hidden_states[:, :2],)


CHANGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "text": lambda given: given.update(encoder_hidden_states=given["encoder_hidden_states"] + 1),
    "one row of the text": lambda given: given["encoder_hidden_states"][0, 0].add_(1),
    "order of the text": lambda given: given.update(encoder_hidden_states=given["encoder_hidden_states"].flip(1)),
    "length of the text": lambda given: given.update(encoder_hidden_states=torch.ones(1, 5, 8)),
    "control": lambda given: given["control_hidden_states"].__setitem__(1, torch.zeros(1, 2, 3, 4, 4)),
    "one control less": lambda given: given["control_hidden_states"].pop(),
    "guidance": lambda given: given.update(guidance=torch.tensor([7.0])),
    "scale": lambda given: given.update(attention_kwargs={"scale": 0.5}),
    "channels behind the latents": lambda given: given["behind"].add_(0.1),
}


@pytest.mark.parametrize("anew", [False, True], ids=["same tensors", "new tensors in every step"])
@pytest.mark.parametrize("change", [None, *CHANGES])
def test_any_condition_of_any_model_counts(change: str | None, anew: bool) -> None:
    model, reads = Conditioned().eval(), []
    apply_easycache(model, EasyCacheConfig(threshold=float("inf"), warmup_steps=3, num_inference_steps=NUM_STEPS))
    given: dict[str, Any] = {
        "encoder_hidden_states": torch.arange(48.0).reshape(1, 6, 8).cos(),
        "control_hidden_states": [torch.ones(1, 2, 3, 4, 4), torch.full((1, 2, 3, 4, 4), 2.0)],
        "guidance": torch.tensor([6.0]),
        "attention_kwargs": {"scale": 1.0},
        "behind": torch.rand(1, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0)),
    }
    with torch.no_grad(), ReadsByVidaccel(reads):
        for index in range(NUM_STEPS):
            arguments = dict(given)
            x = torch.cat([torch.full((1, 2, 3, 4, 4), 5.0 + index), arguments.pop("behind")], dim=1)
            if anew:
                arguments |= {name: copies(value) for name, value in arguments.items()}
            model(x, torch.tensor([900.0 - index]), **arguments)
            if change is not None and index == AT:
                CHANGES[change](given)
    steps = steps_of(model)
    if change is None:
        assert steps == [(True, "warmup")] * 3 + [(False, "below_threshold")] * 8 + [(True, "tail")]
    else:
        assert steps[AT + 1 : AT + 4] == [
            (True, "condition_changed"),
            (True, "no_history"),
            (False, "below_threshold"),
        ]
    assert len(reads) <= NUM_STEPS + 1, "and one for the report"


def copies(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    return [copies(part) for part in value] if isinstance(value, list) else value


def test_what_changes_by_itself_tells_of_no_condition() -> None:
    moving = {name: traits.moving for name, traits in CATALOG.transformers.items() if traits.moving}
    assert moving.keys() == {"AnyFlowTransformer3DModel", "LTX2VideoTransformer3DModel"}
    arguments = {"sigma": torch.ones(1), "encoder_hidden_states": (torch.ones(1), None), "num_frames": 9}
    tensors, plain = conditions_among(arguments, moving=moving["LTX2VideoTransformer3DModel"])
    assert (list(tensors), plain) == (["encoder_hidden_states.0"], {"num_frames": 9})


@pytest.mark.parametrize("family", ["open-sora-1.2-i2v", "open-sora-2", "ltx-t2v-blocks", "ltx2-t2v", "anyflow"])
def test_pipelines_that_make_their_conditions_anew_in_every_step_reuse_as_ever(family: str) -> None:
    """Of every kind that the family matrix has one: masks, prompts, timesteps of more than one name."""
    runs = FamilyRuns(family)
    reads: list[str] = []
    apply_easycache(runs.pipe, EasyCacheConfig(threshold=float("inf"), warmup_steps=2))
    with ReadsByVidaccel(reads):
        runs.run()
    report = easycache_report(runs.pipe)
    assert report.num_computed == 3
    assert len(reads) <= report.num_steps


def test_a_branch_made_anew_in_every_step_is_compared_with_the_next_read() -> None:
    """Wan's transformer in a loop that copies its tensors: the unconditional prompt changes after step 6."""
    model = tiny_transformer()
    apply_easycache(model, EasyCacheConfig(threshold=float("inf"), warmup_steps=3, num_inference_steps=NUM_STEPS))
    x, prompts = torch.randn(1, 16, 3, 4, 4), {"cond": torch.randn(1, 6, 16), "uncond": torch.randn(1, 6, 16)}
    with torch.no_grad():
        for index in range(NUM_STEPS):
            for name, prompt in prompts.items():
                with model.cache_context(name):
                    model(x + index / 10, torch.tensor([900.0 - index]), prompt.clone(), return_dict=False)
            if index == AT:
                prompts["uncond"] = OTHER
    reasons = [reason for _, reason in steps_of(model)]
    assert reasons[AT + 1 : AT + 5] == ["below_threshold", "condition_changed", "condition_changed", "below_threshold"]
