"""What must hold of EasyCache, on every family with a tiny random model; `untested` of a row says what does not."""

from __future__ import annotations

import copy
import inspect
import threading
from typing import Any

import pytest
import torch
from diffusers.hooks import apply_group_offloading
from family_runs import (
    EVERY_THIRD,
    NAMES,
    NUM_STEPS,
    WARMUP,
    InterruptionError,
    arguments,
    build,
    counted_forwards,
    easycached,
    equal,
    first_layer,
    fresh,
    mixed,
    pattern,
    plain,
    plain_pipe,
    report,
    run,
    takes,
    tensors,
    transformers,
)

from vidaccel import EasyCacheConfig, apply_easycache, remove_easycache
from vidaccel.families.table import FAMILIES, family_named

each_family = pytest.mark.parametrize("name", NAMES)


def needs(name: str, check: str) -> None:
    """Skip a check that the family's row says does not apply."""
    if reason := family_named(name).untested.get(check):
        pytest.skip(reason)


@each_family
def test_threshold_zero_and_removal_equal_the_plain_pipeline_bit_for_bit(name: str) -> None:
    pipe = plain_pipe(name)
    before = [set(model.__dict__) - {"_diffusers_hook"} for model in transformers(pipe)]
    with easycached(name, EasyCacheConfig(threshold=0, warmup_steps=2)):
        assert equal(run(name, pipe), plain(name))
        assert report(pipe).num_reused == 0
    with easycached(name, EVERY_THIRD):
        assert not equal(run(name, pipe), plain(name))
    assert equal(run(name, pipe), plain(name))
    assert [set(model.__dict__) - {"_diffusers_hook"} for model in transformers(pipe)] == before
    assert not any(model._forward_pre_hooks for model in transformers(pipe))


@each_family
def test_reused_steps_run_no_part_of_the_transformer_and_all_branches_agree(name: str) -> None:
    with easycached(name, EVERY_THIRD) as pipe, counted_forwards(pipe) as calls:
        run(name, pipe)
        steps = report(pipe).decisions
        assert len(calls) == report(pipe).num_computed_passes < report(pipe).num_passes
        assert all(step.num_computed_passes == (step.num_passes if step.computed else 0) for step in steps)
        for section in range(steps[-1].section + 1):
            part = [step for step in steps if step.section == section]
            assert [step.step_index for step in part] == list(range(len(part)))
            assert all(step.computed for step in part[:WARMUP])
            assert any(not step.computed for step in part[WARMUP:])
        assert steps[-1].computed or "tail" in family_named(name).untested


@each_family
def test_the_threshold_decides_and_the_same_seed_twice_is_equal(name: str) -> None:
    with easycached(name) as pipe:
        first = run(name, pipe)
        decided, reasons = pattern(pipe), {step.reason for step in report(pipe).decisions}
        assert {"above_threshold", "below_threshold"} <= reasons
        assert equal(run(name, pipe), first)
        assert pattern(pipe) == decided
        assert not equal(run(name, pipe, seed=1), first)


FRAMES = ("num_frames", "frames", "video_length")
GUIDANCE = ("true_cfg_scale", "guidance_scale")
OTHER_CALLS = ("steps", "size", "frames", "batch", "guidance")


def other_call(name: str, kind: str) -> dict[str, Any]:
    """Arguments that differ from the usual call in one respect."""
    settings = family_named(name).defaults
    if kind == "steps":
        return {"num_inference_steps": NUM_STEPS - 2}
    if kind == "size":
        return {"height": settings["height"] + 32}
    if kind == "frames":
        return {"num_frames": 2 * settings["num_frames"] - 1}
    if kind == "batch":
        return {"prompt": ["a red ball hops"] * 2, "generator": generators(0, 1)}
    argument = next(word for word in GUIDANCE if takes(name, word))
    usual = inspect.signature(type(plain_pipe(name)).__call__).parameters[argument].default
    return {argument: 1.0 if settings.get(argument, usual) > 1 else 5.0}


@each_family
def test_calls_of_other_kinds_equal_those_of_a_fresh_pipeline(name: str) -> None:
    kinds = [kind for kind in OTHER_CALLS if kind not in family_named(name).untested]
    with easycached(name) as pipe:
        run(name, pipe)
        others = [run(name, pipe, **other_call(name, kind)) for kind in kinds]
        again = run(name, pipe)
    assert equal(again, fresh(name))
    for kind, other in zip(kinds, others, strict=True):
        assert not equal(other, fresh(name)), kind
        with easycached(name) as pipe:
            assert equal(other, run(name, pipe, **other_call(name, kind))), kind


def failing(pipe: Any, at: int, *, inside: bool) -> None:
    """Make the `at`-th transformer call raise once: in its first layer, or after the whole call."""
    seen: list[int] = []
    handles: list[Any] = []

    def fail(*_: Any) -> None:
        seen.append(1)
        if len(seen) == at + 1:
            for handle in handles:
                handle.remove()
            raise InterruptionError

    for model in transformers(pipe):
        place = first_layer(model).register_forward_pre_hook if inside else model.register_forward_hook
        handles.append(place(fail))


@each_family
@pytest.mark.parametrize("inside", [True, False])
def test_an_exception_in_any_pass_leaves_nothing_behind(name: str, inside: bool) -> None:
    with easycached(name) as pipe:
        for at in (0, 1, 4):
            failing(pipe, at, inside=inside)
            with pytest.raises(InterruptionError):
                run(name, pipe)
            assert equal(run(name, pipe), fresh(name)), at


@each_family
def test_an_exception_in_the_callback_leaves_nothing_behind(name: str) -> None:
    if not takes(name, "callback_on_step_end"):
        pytest.skip("the pipeline has no callback")

    def fail(pipe: Any, step: int, timestep: Any, kwargs: Any) -> dict[str, Any]:
        if step == 5:
            raise InterruptionError
        return kwargs

    with easycached(name) as pipe:
        run(name, pipe)
        finished = report(pipe)
        with pytest.raises(InterruptionError):
            run(name, pipe, callback_on_step_end=fail)
        assert report(pipe) == finished, "an aborted call does not replace the report"
        assert equal(run(name, pipe), fresh(name))


@each_family
def test_an_interrupt_ends_the_call_and_the_next_is_fresh(name: str) -> None:
    if not takes(name, "callback_on_step_end"):
        pytest.skip("the pipeline has no callback")
    needs(name, "interrupt")

    def stop(pipe: Any, step: int, timestep: Any, kwargs: Any) -> dict[str, Any]:
        pipe._interrupt = True
        return kwargs

    with easycached(name) as pipe:
        run(name, pipe, callback_on_step_end=stop)
        assert equal(run(name, pipe), fresh(name))


@each_family
def test_two_pipelines_in_two_threads_do_not_see_each_other(name: str) -> None:
    expected = fresh(name)
    pipes, results, start = [plain_pipe(name), build(name)], {}, threading.Barrier(2)
    for pipe in pipes:
        apply_easycache(pipe, mixed(name))

    def work(index: int) -> None:
        start.wait()
        results[index] = run(name, pipes[index])

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for pipe in pipes:
        remove_easycache(pipe)
    assert all(equal(results[index], expected) for index in range(2))


@each_family
def test_at_most_one_read_of_the_device_a_step(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """EasyCache reads with `tolist`; what pipelines and schedulers read themselves is counted without it."""
    reads: list[str] = []
    original = torch.Tensor.tolist

    def tolist(tensor: torch.Tensor) -> Any:
        reads.append("tolist")
        return original(tensor)

    monkeypatch.setattr(torch.Tensor, "tolist", tolist)
    pipe = plain_pipe(name)
    run(name, pipe)
    own = len(reads)
    with easycached(name):
        run(name, pipe)
        steps, sections = report(pipe).num_steps, report(pipe).decisions[-1].section + 1
        passes = report(pipe).num_passes
        reads_of_calls = len(reads) - 2 * own
    allowed = passes if "host reads" in family_named(name).untested else steps
    assert reads_of_calls <= allowed - (0 if allowed == passes else sections)


@each_family
def test_nothing_is_kept_after_a_call_and_only_latents_during_one(name: str) -> None:
    pipe, held = plain_pipe(name), []
    handle = apply_easycache(pipe, EVERY_THIRD)
    watch = transformers(pipe)[0].register_forward_pre_hook(lambda *_: held.append(len(handle.tensors())))
    run(name, pipe)
    report(pipe)
    watch.remove()
    remove_easycache(pipe)
    branches = max(step.num_passes for step in handle.report.decisions)
    streams = 2 if name.startswith("ltx2") else 1
    assert 2 <= max(held) <= streams * (2 + 2 * branches)
    assert handle.tensors() == []


@each_family
def test_a_copy_of_a_hooked_model_is_refused(name: str) -> None:
    with easycached(name) as pipe, pytest.raises(TypeError, match="remove_easycache first"):
        copy.deepcopy(transformers(pipe)[0])


@each_family
def test_a_schedule_too_short_to_reuse_says_so(name: str, caplog: pytest.LogCaptureFixture) -> None:
    needs(name, "steps")
    with easycached(name, EasyCacheConfig(warmup_steps=3)) as pipe:
        run(name, pipe, num_inference_steps=4)
    assert any("next to nothing to reuse" in record.message for record in caplog.records)


@each_family
def test_a_run_that_reused_nothing_says_why(name: str, caplog: pytest.LogCaptureFixture) -> None:
    with easycached(name, EasyCacheConfig(threshold=1e-12, warmup_steps=2)) as pipe:
        run(name, pipe)
        report(pipe)
    assert any("reused none of" in record.message for record in caplog.records)


@each_family
def test_a_sample_does_not_depend_on_its_batch_mates(name: str) -> None:
    needs(name, "batch")
    prompts = ["a red ball hops", "a blue cat sleeps on a green hill"]
    inputs = arguments(name)
    alone, decisions = [], []
    with easycached(name) as pipe:
        for index, prompt in enumerate(prompts):
            alone.append(tensors(pipe(**inputs | {"prompt": prompt, "generator": generators(index)[0]})))
            decisions.append(pattern(pipe))
        together = tensors(pipe(**inputs | {"prompt": prompts, "generator": generators(0, 1)}))
        samples = [step.samples or (step.computed,) * 2 for step in report(pipe).decisions]
    found = ["".join("C" if computed[index] else "." for computed in samples) for index in range(2)]
    assert found == decisions
    for index in range(2):
        for whole, part in zip(together, alone[index], strict=True):
            torch.testing.assert_close(whole[index : index + 1], part, rtol=1e-3, atol=1e-3)


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@each_family
def test_guidance_switched_off_and_on_in_a_call_never_uses_an_old_vector(name: str) -> None:
    needs(name, "guidance")
    if not takes(name, "callback_on_step_end"):
        pytest.skip("the pipeline has no callback")
    argument = next(word for word in GUIDANCE if takes(name, word))
    if not hasattr(plain_pipe(name), f"_{argument}") or passes_in_a_step(name) < 2:
        pytest.skip("its guidance cannot change during a call")

    def switch(pipe: Any, step: int, timestep: Any, kwargs: Any) -> dict[str, Any]:
        setattr(pipe, f"_{argument}", 1.0 if 2 <= step < 5 else 5.0)
        return kwargs

    with easycached(name, EVERY_THIRD) as pipe, counted_forwards(pipe) as calls:
        first = run(name, pipe, callback_on_step_end=switch)
        steps = report(pipe).decisions
        assert [step.num_passes for step in steps[3:6]] == [1, 1, 1]
        assert steps[6].num_computed_passes >= 1, "the other branch's vector is older than the deciding one's"
        assert len(calls) == report(pipe).num_computed_passes
        assert equal(run(name, pipe, callback_on_step_end=switch), first)


def passes_in_a_step(name: str) -> int:
    with easycached(name, EVERY_THIRD) as pipe:
        run(name, pipe)
        return report(pipe).decisions[0].num_passes


@each_family
@pytest.mark.parametrize("offload_first", [True, False])
def test_offloading_before_or_after_keeps_reusing_in_every_call(name: str, offload_first: bool) -> None:
    needs(name, "offload")
    pipe = build(name)
    if offload_first:
        pipe.enable_model_cpu_offload(device="cpu")
    apply_easycache(pipe, mixed(name))
    if not offload_first:
        pipe.enable_model_cpu_offload(device="cpu")
    for _ in range(2):
        assert equal(run(name, pipe), fresh(name))
        assert report(pipe).num_reused > 0


@each_family
def test_group_offloading_keeps_reusing(name: str) -> None:
    pipe = build(name)
    for model in transformers(pipe):
        if not getattr(model, "_supports_group_offloading", False):
            pytest.skip("diffusers does not offload this model in groups")
        apply_group_offloading(
            model, onload_device=torch.device("cpu"), offload_device=torch.device("cpu"), offload_type="leaf_level"
        )
    apply_easycache(pipe, mixed(name))
    assert equal(run(name, pipe), fresh(name))
    assert report(pipe).num_reused > 0


def one_of_each_transformer() -> list[str]:
    """A family for every class of transformer that has blocks to compile."""
    first: dict[str, str] = {}
    for name in NAMES:
        kind = family_named(name).components["transformer"].kind
        first.setdefault(kind, name)
    return list(first.values())


@pytest.mark.parametrize("name", one_of_each_transformer())
def test_compiled_blocks_stay_whole_graphs(name: str) -> None:
    needs(name, "compile")
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    pipe = build(name)
    if not getattr(pipe.transformer, "_repeated_blocks", None):
        pytest.skip("diffusers names no blocks of this model to compile")
    torch._dynamo.reset()
    pipe.transformer.compile_repeated_blocks(fullgraph=True, backend=backend)
    apply_easycache(pipe, mixed(name))
    made = run(name, pipe)
    assert graphs, "nothing was compiled"
    assert torch._dynamo.utils.counters["graph_break"] == {}
    assert report(pipe).num_reused > 0
    for left, right in zip(made, fresh(name), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family.refusal], ids=lambda family: family.name)
def test_what_cannot_work_is_refused_with_its_reason(family: Any) -> None:
    with pytest.raises(ValueError, match="transformer") as error:
        apply_easycache(build(family.name))
    assert str(error.value).endswith(".")
