"""Offloading, compiling, copying, other caches, threads, memory, reads from the device, and refusals."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook as AccelerateHook
from accelerate.hooks import add_hook_to_module, remove_hook_from_module
from diffusers import FirstBlockCacheConfig
from diffusers.hooks import HookRegistry, ModelHook, apply_first_block_cache
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from tests.support.tiny_models import call_arguments, tiny_wan_i2v, tiny_wan_t2v, tiny_wan_two_experts
from vidaccel import EasyCacheConfig, apply_easycache, easycache_report, remove_easycache

NUM_STEPS = 12
CONFIG = EasyCacheConfig(threshold=0.5, warmup_steps=3)


def run(pipe: Any, **changes: Any) -> Tensor:
    return pipe(**call_arguments(pipe, **({"num_inference_steps": NUM_STEPS} | changes))).frames


def num_reused(pipe: Any) -> int:
    return easycache_report(pipe).num_reused


def reference(make: Callable[[], Any] = tiny_wan_t2v) -> Tensor:
    pipe = make()
    apply_easycache(pipe, CONFIG)
    return run(pipe)


@pytest.mark.parametrize("make", [tiny_wan_t2v, tiny_wan_two_experts])
@pytest.mark.parametrize("offload_first", [True, False])
def test_cpu_offload_before_or_after_keeps_reusing_in_every_call(make: Callable[[], Any], offload_first: bool) -> None:
    pipe, expected = make(), reference(make)
    if offload_first:
        pipe.enable_model_cpu_offload(device="cpu")
        apply_easycache(pipe, CONFIG)
    else:
        apply_easycache(pipe, CONFIG)
        pipe.enable_model_cpu_offload(device="cpu")
    for _ in range(3):
        assert torch.equal(run(pipe), expected)
        assert num_reused(pipe) > 0
    remove_easycache(pipe)
    assert pipe.transformer._hf_hook is not None, "offloading stays when EasyCache goes"
    touched = count_calls(pipe.transformer._hf_hook, "pre_forward")
    plain = run(pipe)
    assert touched
    assert torch.equal(plain, run(make()))
    pipe.remove_all_hooks()
    assert torch.equal(run(pipe), plain)


def count_calls(owner: Any, name: str) -> list[int]:
    calls: list[int] = []
    plain = getattr(owner, name)

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return plain(*args, **kwargs)

    setattr(owner, name, counted)
    return calls


@pytest.mark.parametrize("apply_first", [True, False])
def test_a_bare_transformer_under_an_accelerate_hook_works_in_both_orders(apply_first: bool) -> None:
    pipe, expected = tiny_wan_t2v(), reference()
    steps: list[Callable[[], Any]] = [
        lambda: apply_easycache(pipe.transformer, CONFIG),
        lambda: add_hook_to_module(pipe.transformer, AccelerateHook()),
    ]
    for step in steps if apply_first else reversed(steps):
        step()
    assert torch.equal(run(pipe), expected)
    remove_hook_from_module(pipe.transformer)
    assert torch.equal(run(pipe), expected)
    remove_easycache(pipe.transformer)
    assert "forward" not in pipe.transformer.__dict__


def test_a_hook_on_top_of_the_offloading_is_refused() -> None:
    pipe = tiny_wan_t2v()
    pipe.enable_model_cpu_offload(device="cpu")
    HookRegistry.check_if_exists_or_initialize(pipe.transformer).register_hook(ModelHook(), "other")
    with pytest.raises(ValueError, match="another hook on top of its offloading"):
        apply_easycache(pipe, CONFIG)


def test_a_lost_hook_is_an_error_and_not_a_slow_video() -> None:
    pipe = tiny_wan_t2v()
    apply_easycache(pipe, CONFIG)
    run(pipe)
    del pipe.transformer.__dict__["forward"]
    with pytest.raises(RuntimeError, match="lost"):
        run(pipe)
    with pytest.raises(RuntimeError, match="apply_easycache again"):
        easycache_report(pipe)
    remove_easycache(pipe)
    apply_easycache(pipe, CONFIG)
    assert torch.equal(run(pipe), reference())


@pytest.mark.parametrize("offload_first", [True, False])
@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
def test_group_offload_works_in_both_orders(kind: str, offload_first: bool) -> None:
    pipe, expected = tiny_wan_t2v(), reference()
    steps: list[Callable[[], Any]] = [
        lambda: apply_easycache(pipe, CONFIG),
        lambda: pipe.transformer.enable_group_offload(
            onload_device=torch.device("cpu"), offload_type=kind, num_blocks_per_group=1
        ),
    ]
    for step in reversed(steps) if offload_first else steps:
        step()
    for _ in range(2):
        assert torch.equal(run(pipe), expected)
        assert num_reused(pipe) > 0
    remove_easycache(pipe)
    assert torch.equal(run(pipe), run(tiny_wan_t2v()))


@pytest.mark.parametrize("compile_first", [True, False])
def test_compiled_blocks_stay_whole_graphs(compile_first: bool) -> None:
    pipe, expected = tiny_wan_t2v(), reference()
    graphs: list[int] = []

    def counting_backend(graph: Any, inputs: Any) -> Any:
        graphs.append(1)
        return graph.forward

    torch._dynamo.reset()
    steps: list[Callable[[], Any]] = [
        lambda: pipe.transformer.compile_repeated_blocks(fullgraph=True, backend=counting_backend),
        lambda: apply_easycache(pipe, CONFIG),
    ]
    for step in steps if compile_first else reversed(steps):
        step()
    torch.testing.assert_close(run(pipe), expected)
    assert num_reused(pipe) > 0
    assert len(graphs) == 1, "one graph for all blocks, no break (fullgraph raises on one), no recompilation"
    run(pipe)
    assert len(graphs) == 1
    torch._dynamo.reset()


def test_a_transformer_compiled_as_a_whole_is_refused() -> None:
    pipe = tiny_wan_t2v()
    with pytest.raises(ValueError, match="compile_repeated_blocks"):
        apply_easycache(torch.compile(pipe.transformer), CONFIG)
    pipe.transformer.compile()
    with pytest.raises(ValueError, match="compile_repeated_blocks"):
        apply_easycache(pipe, CONFIG)


def test_a_transformer_compiled_as_a_whole_afterwards_is_refused_when_called() -> None:
    pipe = tiny_wan_t2v()
    apply_easycache(pipe, CONFIG)
    pipe.transformer.compile(backend="eager")
    with pytest.raises(RuntimeError, match="compile_repeated_blocks"):
        run(pipe)
    torch._dynamo.reset()


def test_copies_of_a_hooked_model_are_refused_and_right_after_removal() -> None:
    pipe = tiny_wan_t2v()
    apply_easycache(pipe, CONFIG)
    for duplicate in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="remove_easycache first"):
            duplicate(pipe.transformer)
    run(pipe)
    remove_easycache(pipe)
    twin = copy.deepcopy(pipe.transformer)
    with torch.no_grad():
        for parameter in pipe.transformer.parameters():
            parameter.zero_()
    pipe.transformer = twin
    assert torch.equal(run(pipe), run(tiny_wan_t2v()))


def test_saving_a_hooked_pipeline_still_works(tmp_path: Any) -> None:
    pipe = tiny_wan_t2v()
    apply_easycache(pipe, CONFIG)
    pipe.transformer.save_pretrained(tmp_path)
    loaded = type(pipe.transformer).from_pretrained(tmp_path)
    for left, right in zip(loaded.parameters(), pipe.transformer.parameters(), strict=True):
        assert torch.equal(left, right)


def test_one_cache_at_a_time() -> None:
    pipe = tiny_wan_t2v()
    pipe.transformer.enable_cache(FirstBlockCacheConfig())
    with pytest.raises(ValueError, match=r"disable_cache\(\)"):
        apply_easycache(pipe, CONFIG)
    pipe.transformer.disable_cache()
    apply_easycache(pipe, CONFIG)
    with pytest.raises(ValueError, match="already applied"):
        apply_easycache(pipe, CONFIG)
    pipe.transformer.enable_cache(FirstBlockCacheConfig())
    with pytest.raises(RuntimeError, match="one cache at a time"):
        run(pipe)


def test_a_cache_put_on_by_its_function_is_seen_too() -> None:
    pipe = tiny_wan_t2v()
    apply_first_block_cache(pipe.transformer, FirstBlockCacheConfig())
    with pytest.raises(ValueError, match="one cache at a time"):
        apply_easycache(pipe, CONFIG)


def test_one_transformer_in_the_place_of_both_experts_is_hooked_once() -> None:
    pipe, plain = tiny_wan_two_experts(), tiny_wan_two_experts()
    for each in (pipe, plain):
        each.transformer_2 = each.transformer
    expected = run(plain)
    apply_easycache(pipe, EasyCacheConfig(threshold=0))
    assert torch.equal(run(pipe), expected)
    assert [step.computed for step in easycache_report(pipe).decisions] == [True] * NUM_STEPS
    remove_easycache(pipe)
    assert torch.equal(run(pipe), expected)


def test_applying_is_all_or_nothing() -> None:
    pipe = tiny_wan_two_experts()
    pipe.transformer_2.enable_cache(FirstBlockCacheConfig())
    with pytest.raises(ValueError, match="transformer_2"):
        apply_easycache(pipe, CONFIG)
    with pytest.raises(ValueError, match="not applied"):
        easycache_report(pipe)


def test_a_second_transformer_that_cannot_be_hooked_leaves_the_first_as_it_was() -> None:
    pipe = tiny_wan_two_experts()
    pipe.enable_model_cpu_offload(device="cpu")
    HookRegistry.check_if_exists_or_initialize(pipe.transformer_2).register_hook(ModelHook(), "another")
    for _ in range(2):
        with pytest.raises(ValueError, match="on top of its offloading"):
            apply_easycache(pipe, CONFIG)
    with pytest.raises(ValueError, match="not applied"):
        easycache_report(pipe)


class Denoiser(nn.Module):
    """The least a transformer must be; `result` makes what it returns of its input."""

    def __init__(self, result: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.result = result
        self.eval()

    def forward(self, hidden_states: Tensor, timestep: Tensor, return_dict: bool = True) -> Any:
        return self.result(hidden_states)


class Rollout(Denoiser):
    def forward(self, hidden_states: Tensor, timestep: Tensor, kv_cache: Any = None) -> Any:  # type: ignore[override]
        return self.result(hidden_states)


class Recurrent(Denoiser):
    def forward(self, hidden_states: Tensor, timestep: Tensor, past_key_value: Any = None) -> Any:  # type: ignore[override]
        return self.result(hidden_states)


class Renamed(Denoiser):
    def forward(self, sample: Tensor, timestep: Tensor) -> Any:  # type: ignore[override]
        return self.result(sample)


def test_a_model_that_cannot_be_reused_safely_is_refused_when_applied() -> None:
    with pytest.raises(ValueError, match="kv_cache"):
        apply_easycache(Rollout(lambda x: (x,)), CONFIG)
    with pytest.raises(ValueError, match="past_key_value"):
        apply_easycache(Recurrent(lambda x: (x,)), CONFIG)
    with pytest.raises(ValueError, match="hidden_states"):
        apply_easycache(Renamed(lambda x: (x,)), CONFIG)
    with pytest.raises(ValueError, match="pipeline or a transformer"):
        apply_easycache(None, CONFIG)  # type: ignore[arg-type]


def test_a_model_sharded_by_fsdp_is_refused() -> None:
    from torch.distributed.fsdp import FSDPModule

    model = Denoiser(lambda x: (x,))
    model.__class__ = type("FSDPDenoiser", (FSDPModule, Denoiser), {})  # what fully_shard does to a module
    with pytest.raises(ValueError, match="FSDP"):
        apply_easycache(model, CONFIG)


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (lambda x: (x, x), "one tensor.* of 2 values"),
        (lambda x: x, "one tensor"),
        (lambda x: (x.repeat(1, 2, 1, 1, 1),), "leading channels"),
        (lambda x: (x[..., :1],), "leading channels"),
        (lambda x: (x.flatten(),), "leading channels"),
    ],
)
def test_an_output_that_cannot_be_matched_with_the_input_is_refused(result: Any, message: str) -> None:
    model = Denoiser(result)
    apply_easycache(model, CONFIG)
    with torch.no_grad(), pytest.raises(ValueError, match=message):
        model(torch.ones(1, 2, 3, 4, 4), torch.tensor([999.0]))


def test_both_forms_of_output_come_back_in_the_form_asked_for() -> None:
    model = Denoiser(lambda x: (2 * x,))
    apply_easycache(model, EasyCacheConfig(threshold=float("inf"), warmup_steps=2, num_inference_steps=9))
    with torch.no_grad():
        for index in range(4):
            x, timestep = torch.full((1, 1, 1, 2, 2), index + 1.0), torch.tensor([900.0 - index])
            as_tuple = model(x, timestep, return_dict=False)
        as_object = model(x + 1, timestep - 1)
    assert isinstance(as_tuple, tuple)
    assert isinstance(as_object, Transformer2DModelOutput)
    assert as_object.sample[0, 0, 0, 0, 0] == 5 + (4 - 2)


def test_with_gradients_or_in_training_the_model_computes_as_ever() -> None:
    pipe = tiny_wan_t2v()
    state = apply_easycache(pipe, CONFIG)
    arguments = {
        "hidden_states": torch.randn(1, 16, 3, 4, 4),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 6, 16),
    }
    for _ in range(6):
        output = pipe.transformer(**arguments).sample
    output.sum().backward()
    assert pipe.transformer.proj_out.weight.grad is not None
    assert state.tensors() == []
    assert torch.equal(run(pipe), reference())


def test_two_pipelines_in_two_threads_do_not_see_each_other() -> None:
    makes = [tiny_wan_t2v, tiny_wan_i2v]
    expected = [reference(make) for make in makes]
    pipes = [make() for make in makes]
    for pipe in pipes:
        apply_easycache(pipe, CONFIG)
    results: dict[int, list[Tensor]] = {0: [], 1: []}
    start = threading.Barrier(2)

    def work(index: int) -> None:
        start.wait()
        results[index] += [run(pipes[index]) for _ in range(2)]

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index in range(2):
        assert len(results[index]) == 2
        assert all(torch.equal(result, expected[index]) for result in results[index])


def test_two_pipelines_interleaved_step_by_step_do_not_see_each_other() -> None:
    inner, outer = tiny_wan_t2v(seed=5), tiny_wan_t2v()
    for pipe in (inner, outer):
        apply_easycache(pipe, CONFIG)
    expected = run(inner), run(outer)
    nested: list[Tensor] = []

    def run_the_other(pipe: Any, step: int, timestep: Any, kwargs: Any) -> dict[str, Any]:
        if step in (1, 6):
            nested.append(run(inner))
        return kwargs

    assert torch.equal(run(outer, callback_on_step_end=run_the_other), expected[1])
    assert all(torch.equal(result, expected[0]) for result in nested)
    assert len(nested) == 2
