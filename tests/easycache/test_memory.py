"""What a hooked pipeline keeps: four latents, nobody else's tensors, nothing after the call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.hooks.hooks import CacheContext
from torch import Tensor, nn

from tests.easycache.test_safety import CONFIG, NUM_STEPS, Denoiser, num_reused, run
from tests.support.tiny_models import tiny_wan_t2v, tiny_wan_two_experts, tiny_wan_v2v
from vidaccel import EasyCacheConfig, apply_easycache, easycache_report


@pytest.mark.parametrize("make", [tiny_wan_t2v, tiny_wan_two_experts, tiny_wan_v2v])
def test_at_most_four_latents_are_kept_and_none_after_the_call(make: Callable[[], Any]) -> None:
    pipe = make()
    state = apply_easycache(pipe, CONFIG)
    counts: list[int] = []
    run(pipe, callback_on_step_end=lambda *_: counts.append(len(state.tensors())) or {})
    assert max(counts) == 4, "two inputs and one output for each of two branches"
    assert min(counts[:-1]) >= 3
    assert counts[-1] == 0, "nothing needs them after the last step"
    assert state.tensors() == []


def test_a_video_of_wan_at_480p_keeps_17_megabytes_in_bfloat16() -> None:
    model = Denoiser(lambda x: (x * 1.5,))
    state = apply_easycache(model, EasyCacheConfig(threshold=float("inf"), warmup_steps=2, num_inference_steps=5))
    latents = torch.randn(1, 16, 21, 60, 104).bfloat16()
    kept: list[int] = []
    with torch.no_grad():
        for index in range(5):
            x, timestep = latents * (1 - index / 10), torch.tensor([1000.0 - index])
            for name in ("cond", "uncond"):
                state_of(model).set_context(CacheContext(name))
                assert model(x, timestep, return_dict=False)[0].dtype == torch.bfloat16
            kept.append(sum(tensor.untyped_storage().nbytes() for tensor in state.tensors()))
    assert [step.computed for step in easycache_report(model).decisions] == [True, True, False, False, True]
    assert max(kept) == 4 * 2 * latents.numel() < 17e6
    assert state.tensors() == []


def state_of(model: nn.Module) -> Any:
    return model._diffusers_hook.hooks["vidaccel_easycache"].contexts


def test_a_bfloat16_transformer_under_float32_latents_reuses_in_its_own_type() -> None:
    pipe = tiny_wan_t2v()
    plain = tiny_wan_t2v()
    for each in (pipe, plain):
        each.transformer.to(torch.bfloat16)
    apply_easycache(pipe, CONFIG)
    types: set[torch.dtype] = set()
    pipe.transformer.register_forward_hook(lambda module, args, output: types.add(output[0].dtype))
    first = run(pipe)
    assert num_reused(pipe) > 0
    assert types == {torch.bfloat16}
    assert torch.equal(run(pipe), first)
    assert (first - run(plain)).abs().mean() < 0.2 * first.abs().mean()


def test_writing_into_a_returned_output_changes_nothing_that_is_kept() -> None:
    """One pipeline halves every output in place, its twin halves a copy."""
    pipe, twin = tiny_wan_t2v(), tiny_wan_t2v()
    state = apply_easycache(pipe, CONFIG)
    apply_easycache(twin, CONFIG)

    def halve_in_place(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        kept = {tensor.untyped_storage().data_ptr() for tensor in state.tensors()}
        assert kwargs["hidden_states"].untyped_storage().data_ptr() not in kept
        assert output[0].untyped_storage().data_ptr() not in kept
        output[0].mul_(0.5)

    pipe.transformer.register_forward_hook(halve_in_place, with_kwargs=True)
    twin.transformer.register_forward_hook(lambda module, args, output: (output[0] * 0.5,))
    assert torch.equal(run(pipe), run(twin))
    assert num_reused(pipe) > 0


def test_a_call_does_not_change_its_input() -> None:
    pipe = tiny_wan_t2v()
    apply_easycache(pipe, CONFIG)
    seen: list[tuple[Tensor, Tensor]] = []
    pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((kwargs["hidden_states"], kwargs["hidden_states"].clone())),
        with_kwargs=True,
    )
    run(pipe)
    assert len(seen) == 2 * NUM_STEPS
    assert all(torch.equal(given, before) for given, before in seen)
