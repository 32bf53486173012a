"""EasyCache on Wan pipelines beyond what holds of every family: an independent twin, two experts, shared parts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import WanVideoToVideoPipeline
from torch import Tensor

from tests.support.tiny_models import (
    TINY_PIPELINES,
    call_arguments,
    tiny_wan_5b,
    tiny_wan_i2v,
    tiny_wan_t2v,
    tiny_wan_two_experts,
)
from vidaccel import EasyCacheConfig, apply_easycache, easycache_report

NUM_STEPS = 12
CONFIG = EasyCacheConfig(threshold=0.5, warmup_steps=3)


class InterruptionError(Exception):
    pass


def run(pipe: Any, **changes: Any) -> Tensor:
    return pipe(**call_arguments(pipe, **({"num_inference_steps": NUM_STEPS} | changes))).frames


def cached(name: str, config: EasyCacheConfig = CONFIG) -> Any:
    pipe = TINY_PIPELINES[name]()
    apply_easycache(pipe, config)
    return pipe


def pattern(pipe: Any) -> str:
    return "".join("C" if decision.computed else "." for decision in easycache_report(pipe).decisions)


def count_forwards(pipe: Any) -> list[str]:
    """Names of the transformers whose first layer ran, in order."""
    calls: list[str] = []
    for name in ("transformer", "transformer_2"):
        module = getattr(pipe, name, None)
        if module is not None:
            module.patch_embedding.register_forward_pre_hook(lambda *_, name=name: calls.append(name))
    return calls


def interrupted(pipe: Any, **arguments: Any) -> None:
    with pytest.raises(InterruptionError):
        run(pipe, **arguments)


def test_the_hook_equals_an_independent_plain_loop() -> None:
    """The twin keeps everything, counts steps itself and follows the formulas word for word."""
    pipe = tiny_wan_t2v()
    twin = SlowTwin(pipe.transformer, threshold=0.5, warmup=3, total=NUM_STEPS)
    pipe.transformer.forward = twin
    expected = run(pipe)
    del pipe.transformer.forward
    apply_easycache(pipe, CONFIG)
    assert torch.equal(run(pipe), expected)
    assert [
        decision.step_index for decision in easycache_report(pipe).decisions if not decision.computed
    ] == twin.reused


class SlowTwin:
    def __init__(self, module: Any, *, threshold: float, warmup: int, total: int) -> None:
        self.plain = module.forward
        self.threshold, self.warmup, self.total = threshold, warmup, total
        self.calls = 0
        self.inputs: list[Tensor] = []
        self.computed: dict[int, dict[str, Tensor]] = {}
        self.error: Any = 0.0
        self.reused: list[int] = []

    def __call__(self, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor]:
        index, branch = divmod(self.calls, 2)
        self.calls += 1
        if branch == 0:
            self.inputs.append(hidden_states.clone())
            if self.should_reuse(index):
                self.reused.append(index)
        if index in self.reused:
            last = max(self.computed)
            vector = self.computed[last][f"v{branch}"] - self.computed[last]["x"]
            return (hidden_states + vector,)
        output = self.plain(hidden_states, **kwargs)[0]
        if branch == 0:
            self.error = 0.0
            self.computed[index] = {"x": hidden_states.clone()}
        self.computed[index][f"v{branch}"] = output.clone()
        return (output,)

    def should_reuse(self, index: int) -> bool:
        if index < self.warmup or index == self.total - 1:
            return False
        before, last = sorted(self.computed)[-2:]
        a, b = self.computed[before], self.computed[last]
        rate = (b["v0"] - a["v0"]).abs().mean() / (b["x"] - a["x"]).abs().mean()
        moved = (self.inputs[index] - self.inputs[index - 1]).abs().mean()
        self.error = self.error + rate * moved / b["v0"].abs().mean()
        return bool(self.error < self.threshold)


def test_the_first_sixteen_of_thirty_six_channels_decide_in_image_to_video() -> None:
    pipe = tiny_wan_i2v()
    seen: list[tuple[int, ...]] = []
    run_of_pipe = apply_easycache(pipe, CONFIG)
    run(pipe, callback_on_step_end=lambda *_: seen.extend(t.shape for t in run_of_pipe.tensors()) or {})
    assert {shape[1] for shape in seen} == {16}


def test_two_experts_share_one_report_and_the_second_starts_without_history() -> None:
    pipe = tiny_wan_two_experts()
    calls = count_forwards(pipe)
    apply_easycache(pipe, EasyCacheConfig(threshold=float("inf"), warmup_steps=3))
    run(pipe)
    report = easycache_report(pipe)
    experts = [decision.transformer for decision in report.decisions]
    switch = experts.index("transformer_2")
    assert 3 < switch < 9
    assert experts == ["transformer"] * switch + ["transformer_2"] * (NUM_STEPS - switch)
    expected = "CCC" + "." * (switch - 3) + "CC" + "." * (NUM_STEPS - 3 - switch) + "C"
    assert pattern(pipe) == expected
    assert [decision.reason for decision in report.decisions[switch : switch + 2]] == [
        "transformer_switch",
        "no_history",
    ]
    assert calls == ["transformer"] * 6 + ["transformer_2"] * 6


def test_an_aborted_second_expert_leaves_nothing_when_the_boundary_moves() -> None:
    def fail(pipe: Any, step: int, timestep: Any, kwargs: Any) -> dict[str, Any]:
        if step == 8:
            raise InterruptionError
        return kwargs

    pipe = cached("two_experts")
    interrupted(pipe, callback_on_step_end=fail)
    other = cached("two_experts")
    for each in (pipe, other):
        each.register_to_config(boundary_ratio=0.7)
    assert torch.equal(run(pipe), run(other))


def test_timesteps_for_every_token_are_no_obstacle() -> None:
    pipe = tiny_wan_5b()
    shapes: list[tuple[int, ...]] = []
    pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["timestep"].shape)), with_kwargs=True
    )
    apply_easycache(pipe, CONFIG)
    run(pipe)
    assert {len(shape) for shape in shapes} == {2}
    assert easycache_report(pipe).num_reused >= 3


def test_a_pipeline_that_shares_transformer_and_scheduler_knows_its_own_length() -> None:
    """`from_pipe` gives a second pipeline the hook of the first; its strength cuts the steps from 12 to 9."""
    pipe = cached("t2v", EasyCacheConfig(threshold=float("inf"), warmup_steps=4))
    run(pipe)
    other = WanVideoToVideoPipeline.from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    first = run(other)
    assert pattern(other) == "CCCC" + "." * 4 + "C"
    assert torch.equal(run(other), first)
    run(pipe)
    assert pattern(pipe) == "CCCC" + "." * 7 + "C"


def test_guidance_off_warms_up_the_same_number_of_steps() -> None:
    pipe = cached("t2v", EasyCacheConfig(threshold=float("inf"), warmup_steps=4))
    run(pipe, guidance_scale=1.0)
    assert pattern(pipe) == "CCCC" + "." * 7 + "C"
    assert easycache_report(pipe).num_passes == NUM_STEPS
