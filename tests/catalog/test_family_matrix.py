"""What must hold of EasyCache, on every family with a tiny random model; `untested` of a row says what does not."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from diffusers import HunyuanVideo15ModularPipeline, ModularPipeline
from diffusers.hooks import apply_group_offloading

from tests.support.family_runs import (
    AMONG_OTHERS,
    EVERY_THIRD,
    FEW_STEPS,
    NAMES,
    OTHER_FRAMES,
    PROMPTS,
    WARMUP,
    FamilyRuns,
    InterruptionError,
    counted_forwards,
    default_of,
    equal,
    failing,
    generator,
    transformers,
)
from vidaccel import EasyCacheConfig, apply_easycache, easycache_report
from vidaccel.catalog.families.checks import CHECKS
from vidaccel.catalog.families.family import Family
from vidaccel.catalog.table import CATALOG, family_named, transformer_traits
from vidaccel.machine.components import strides
from vidaccel.random_models.build import build_random


@pytest.fixture(scope="module", params=NAMES)
def runs_of_family(request: pytest.FixtureRequest) -> Iterator[FamilyRuns]:
    with pytest.MonkeyPatch.context() as patch:
        for name, length in SHORT_TEXTS.items():
            patch.setattr(HunyuanVideo15ModularPipeline, name, length)
        yield FamilyRuns.with_usual_runs(request.param)


@pytest.fixture
def family(runs_of_family: FamilyRuns, request: pytest.FixtureRequest) -> Iterator[FamilyRuns]:
    """One family after the other, if its row does not say that the test's check does not apply.

    The next test gets the pipeline without EasyCache, even if this one fails.
    """
    skip_untested(runs_of_family.row, request)
    yield runs_of_family
    runs_of_family.take_off()


def skip_untested(row: Family, request: pytest.FixtureRequest) -> None:
    marker = request.node.get_closest_marker("check")
    if marker is not None and (reason := row.untested.get(marker.args[0])):
        pytest.skip(reason)


def reused(pipe: Any) -> int:
    return easycache_report(pipe).num_reused


@pytest.mark.check("equality")
def test_threshold_zero_and_removal_equal_the_plain_pipeline_bit_for_bit(family: FamilyRuns) -> None:
    before = [set(model.__dict__) - {"_diffusers_hook"} for model in transformers(family.pipe)]
    with family.easycached(EasyCacheConfig(threshold=0, warmup_steps=2)) as pipe:
        assert equal(family.run(), family.plain)
        assert reused(pipe) == 0
    assert not equal(family.every_third.outputs, family.plain)
    assert equal(family.run(), family.plain)
    assert [set(model.__dict__) - {"_diffusers_hook"} for model in transformers(family.pipe)] == before
    assert not any(model._forward_pre_hooks for model in transformers(family.pipe))


@pytest.mark.check("reuse")
def test_reused_steps_run_no_part_of_the_transformer_and_all_branches_agree(family: FamilyRuns) -> None:
    watched = family.every_third
    steps = watched.report.decisions
    assert watched.report.num_computed_passes < watched.report.num_passes
    if "sections" not in family.row.untested:
        assert watched.num_forwards == watched.report.num_computed_passes
    assert all(step.num_computed_passes == (step.num_passes if step.computed else 0) for step in steps)
    for section in range(steps[-1].section + 1):
        part = [step for step in steps if step.section == section]
        assert [step.step_index for step in part] == list(range(len(part)))
        assert all(step.computed for step in part[:WARMUP])
        assert any(not step.computed for step in part[WARMUP:])
        assert part[-1].reason == "tail"


@pytest.mark.check("sections")
def test_the_report_has_the_steps_of_all_loops_of_a_call(family: FamilyRuns) -> None:
    assert family.fresh.report.num_steps == len(family.fresh.decisions)


@pytest.mark.check("rule")
def test_the_threshold_decides(family: FamilyRuns) -> None:
    reasons = [step.reason for step in family.fresh.report.decisions]
    assert {"warmup", "above_threshold", "below_threshold", "tail"} <= set(reasons)
    assert not equal(family.fresh.outputs, family.plain)


@pytest.mark.check("host reads")
def test_at_most_one_read_of_the_device_a_step(family: FamilyRuns) -> None:
    assert 0 < family.fresh.num_reads <= len(family.fresh.decisions)


@pytest.mark.check("memory")
def test_nothing_is_kept_after_a_call_and_only_latents_during_one(family: FamilyRuns) -> None:
    branches = max(step.num_passes for step in family.every_third.report.decisions)
    streams = len(transformer_traits(transformers(family.pipe)[0]).streams)
    assert 2 <= family.every_third.num_held <= streams * (2 + 2 * branches)
    assert family.every_third.num_held_afterwards == 0


@pytest.mark.check("copy")
def test_a_copy_of_a_hooked_model_is_refused(family: FamilyRuns) -> None:
    with family.easycached() as pipe, pytest.raises(TypeError, match="remove_easycache first"):
        copy.deepcopy(transformers(pipe)[0])


# Of pipelines that cannot do a thing.
PLAIN_ERRORS = (AssertionError, IndexError, RuntimeError, TypeError, ValueError)
# Tokens that these blocks take whatever the text and the image are; 2000 otherwise.
SHORT_TEXTS = {"tokenizer_max_length": 64, "tokenizer_2_max_length": 16, "vision_num_semantic_tokens": 4}
OTHER_CALLS = ("steps", "size", "frames", "guidance")


@contextmanager
def other_call(family: FamilyRuns, kind: str) -> Iterator[dict[str, Any]]:
    """Arguments of a call with fewer steps, which differs in one more respect; guiders are other while it lasts."""
    settings = family.row.defaults
    fewer = {"num_inference_steps": family.num_steps - 2}
    if kind == "steps":
        yield fewer
    elif kind == "size":
        yield fewer | {"height": 2 * settings["height"]}
    elif kind == "frames":
        usual = settings["num_frames"]
        yield fewer | {"num_frames": OTHER_FRAMES.get(family.name, usual - (strides(family.pipe)[0] or 1))}
    elif family.guidance is None:
        with guided_between(family, 0.0, 0.5):
            yield fewer
    else:
        usual = settings.get(family.guidance, default_of(type(family.pipe), family.guidance))
        yield fewer | {"negative_prompt": "blurred", family.guidance: 1.0 if usual > 1 else 5.0}


@contextmanager
def guided_between(family: FamilyRuns, start: float, stop: float) -> Iterator[None]:
    """Guidance from one share of the steps to another, by new guiders: a used one remembers its last step."""
    guiders = family.guiders
    put(family.pipe, {name: guider.new(start=start, stop=stop) for name, guider in guiders.items()})
    try:
        yield
    finally:
        put(family.pipe, guiders)


def put(pipe: Any, parts: dict[str, Any]) -> None:
    if isinstance(pipe, ModularPipeline):
        pipe.update_components(**parts)
    else:
        pipe.register_modules(**parts)


def test_calls_of_other_kinds_equal_those_of_a_fresh_pipeline(family: FamilyRuns) -> None:
    kinds = [kind for kind in OTHER_CALLS if kind not in family.row.untested]
    used = {}
    with family.easycached():
        family.run()
        for kind in kinds:
            with other_call(family, kind) as changes:
                used[kind] = family.run(**changes)
        assert equal(family.run(), family.fresh.outputs)
    for kind in kinds:
        usual = family.fresh.outputs if kind == "steps" else used["steps"]
        assert not equal(used[kind], usual), f"{kind} makes no difference"
        with family.easycached(), other_call(family, kind) as changes:
            assert equal(family.run(**changes), used[kind]), kind


@pytest.mark.check("errors")
def test_an_exception_in_any_pass_leaves_nothing_behind(family: FamilyRuns) -> None:
    """Every failing call decides as a fresh one does, as far as it gets, and the last call ends like one."""
    decisions: list[Any] = []
    with family.easycached(on_step=decisions.append) as pipe:
        for at, inside in [(0, True), (1, False), (2, True), (5, False), (0, False)]:
            decisions.clear()
            with failing(pipe, at, inside=inside), pytest.raises(InterruptionError):
                family.run()
            assert decisions == family.fresh.decisions[: len(decisions)]
        assert equal(family.run(), family.fresh.outputs)


@pytest.mark.check("callback")
def test_an_exception_in_the_callback_leaves_nothing_behind(family: FamilyRuns) -> None:

    def fail(pipe: Any, step: int, timestep: Any, kwargs: Any) -> dict[str, Any]:
        if step == 4:
            raise InterruptionError
        return {}

    with family.easycached() as pipe:
        family.run(num_inference_steps=FEW_STEPS)
        finished = easycache_report(pipe)
        with pytest.raises(InterruptionError):
            family.run(callback_on_step_end=fail)
        assert easycache_report(pipe) == finished, "an aborted call does not replace the report"
        assert equal(family.run(), family.fresh.outputs)


def stop_at_once(pipe: Any, step: int, timestep: Any, kwargs: Any) -> dict[str, Any]:
    pipe._interrupt = True
    return {}


@pytest.mark.check("interrupt")
def test_an_interrupt_ends_the_call_and_the_next_is_fresh(family: FamilyRuns) -> None:
    decisions: list[Any] = []
    with family.easycached(on_step=decisions.append):
        family.run(callback_on_step_end=stop_at_once)
        assert len(decisions) < len(family.fresh.decisions)
        assert equal(family.run(), family.fresh.outputs)


@pytest.mark.check("threads")
def test_two_pipelines_in_two_threads_do_not_see_each_other(family: FamilyRuns) -> None:
    pipes, results, start = [family.pipe, build_random(family.name)], {}, threading.Barrier(2)
    for pipe in pipes:
        apply_easycache(pipe, family.config)

    def work(index: int) -> None:
        start.wait()
        results[index] = family.run(pipes[index])

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(equal(results[index], family.fresh.outputs) for index in range(2))


@pytest.mark.check("batch")
def test_a_sample_does_not_depend_on_its_batch_mates(family: FamilyRuns) -> None:
    with family.easycached():
        together = family.batch(*PROMPTS[:2])
        if family.name in AMONG_OTHERS:
            same = {0: [part[:1] for part in family.batch(PROMPTS[0], PROMPTS[2])]}
        else:
            same = {index: family.run(prompt=PROMPTS[index], generator=generator(index)) for index in range(2)}
    for index, parts in same.items():
        for whole, part in zip(together, parts, strict=True):
            torch.testing.assert_close(whole[index : index + 1], part, rtol=1e-3, atol=1e-3)


@contextmanager
def switched(family: FamilyRuns, off: int, on: int) -> Iterator[dict[str, Any]]:
    """Arguments of a call without guidance from step `off` on and with it from step `on` on.

    A guider has it from step `on` on only.
    """
    if family.guidance is None:
        with guided_between(family, (on + 0.1) / family.num_steps, 1.0):
            yield {}
        return

    def switch(pipe: Any, step: int, timestep: Any, kwargs: Any) -> dict[str, Any]:
        setattr(pipe, f"_{family.guidance}", 1.0 if off <= step + 1 < on else 5.0)
        return {}

    yield {"callback_on_step_end": switch}


@pytest.mark.check("switch")
def test_guidance_switched_on_in_a_reused_step_never_uses_an_old_vector(family: FamilyRuns) -> None:
    steps = family.every_third.report.decisions
    if steps[0].num_passes == 1:
        pytest.skip("there is no guidance, or it is in the batch of the one pass")
    on = next(step.step_index for before, step in pairwise(steps[WARMUP:]) if before.computed and not step.computed)
    with (
        family.easycached(EVERY_THIRD) as pipe,
        switched(family, WARMUP, on) as changes,
        counted_forwards(pipe) as calls,
    ):
        family.run(**changes)
        report = easycache_report(pipe)
    assert {step.num_passes for step in report.decisions[WARMUP:on]} == {1}
    step = report.decisions[on]
    assert not step.computed
    assert step.num_passes == steps[on].num_passes
    assert step.num_computed_passes == step.num_passes - 1, "only the deciding branch has a vector recent enough"
    assert len(calls) == report.num_computed_passes


@pytest.mark.check("model offload")
def test_model_offloading_before_or_after_keeps_reusing_in_every_call(family: FamilyRuns) -> None:
    """In every call but the first accelerate has been around the model before: it goes off and on after each."""
    pipe = build_random(family.name)
    pipe.enable_model_cpu_offload(device="cpu")
    apply_easycache(pipe, family.config)
    family.run(pipe, num_inference_steps=FEW_STEPS)
    assert equal(family.run(pipe), family.fresh.outputs)
    assert easycache_report(pipe).num_reused > 0
    pipe.remove_all_hooks()
    pipe.enable_model_cpu_offload(device="cpu")
    family.run(pipe, num_inference_steps=FEW_STEPS)
    assert equal(family.run(pipe), family.fresh.outputs)


@pytest.mark.check("group offload")
def test_group_offloading_keeps_reusing(family: FamilyRuns) -> None:
    pipe, here = build_random(family.name), torch.device("cpu")
    for model in transformers(pipe):
        apply_group_offloading(model, onload_device=here, offload_device=here, offload_type="leaf_level")
    apply_easycache(pipe, family.config)
    assert equal(family.run(pipe), family.fresh.outputs)
    assert easycache_report(pipe).num_reused > 0


def one_of_each_transformer() -> list[str]:
    """A family for every class of transformer."""
    first: dict[str, str] = {}
    for name in NAMES:
        first.setdefault(family_named(name).components["transformer"].kind, name)
    return list(first.values())


@pytest.mark.check("compile")
@pytest.mark.parametrize("name", one_of_each_transformer())
def test_compiled_blocks_stay_whole_graphs(name: str, request: pytest.FixtureRequest) -> None:
    skip_untested(family_named(name), request)
    family = FamilyRuns.with_usual_runs(name)
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    family.pipe.transformer.compile_repeated_blocks(fullgraph=True, backend=backend)
    with family.easycached() as pipe:
        made = family.run()
        assert easycache_report(pipe).num_reused > 0
    assert graphs, "nothing was compiled"
    assert torch._dynamo.utils.counters["graph_break"] == {}
    for left, right in zip(made, family.fresh.outputs, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "family", [family for family in CATALOG.families if family.refusal], ids=lambda family: family.name
)
def test_what_cannot_work_is_refused_with_its_reason(family: Any) -> None:
    with pytest.raises(ValueError, match="transformer") as error:
        apply_easycache(build_random(family))
    assert str(error.value).endswith(".")


def calls_of_transformers(family: FamilyRuns, **changes: Any) -> int:
    with counted_forwards(family.pipe) as calls:
        family.run(**changes)
    return len(calls)


def ignores_the_switch(family: FamilyRuns) -> bool:
    with switched(family, WARMUP, 5) as changes:
        return calls_of_transformers(family, **changes) == calls_of_transformers(family)


def makes_no_difference(family: FamilyRuns, kind: str) -> bool:
    with other_call(family, kind) as changes:
        return equal(family.run(**changes), family.run(num_inference_steps=changes["num_inference_steps"]))


def makes_no_batch(family: FamilyRuns) -> bool:
    """One video of two prompts, or a video of a prompt that is another one beside another prompt."""
    first, second = (family.batch(PROMPTS[0], other)[0] for other in PROMPTS[1:])
    return len(first) == 1 or not torch.allclose(first[0], second[0], rtol=1e-3, atol=1e-3)


DOES_NOT_APPLY: dict[str, Callable[[FamilyRuns], bool]] = {
    "sections": lambda family: family.fresh.report.num_steps < len(family.fresh.decisions),
    "host reads": lambda family: family.fresh.num_reads > len(family.fresh.decisions),
    **{kind: partial(makes_no_difference, kind=kind) for kind in OTHER_CALLS},
    "switch": ignores_the_switch,
    "callback": lambda family: not family.takes("callback_on_step_end"),
    "interrupt": lambda family: (
        not family.takes("callback_on_step_end")
        or calls_of_transformers(family, callback_on_step_end=stop_at_once) == calls_of_transformers(family)
    ),
    "batch": makes_no_batch,
    "model offload": lambda family: not hasattr(family.pipe, "enable_model_cpu_offload"),
    "compile": lambda family: not any(getattr(model, "_repeated_blocks", None) for model in transformers(family.pipe)),
    "command": lambda family: isinstance(family.pipe, ModularPipeline),
}
UNTESTED = [
    (family.name, check) for family in CATALOG.families if family.refusal is None for check in sorted(family.untested)
]


@pytest.mark.parametrize(("name", "check"), UNTESTED)
def test_what_a_row_says_is_not_tested_really_fails_or_makes_no_difference(name: str, check: str) -> None:
    """Without EasyCache, unless it is about what EasyCache reads or reports."""
    family = FamilyRuns(name)
    try:
        applies = not DOES_NOT_APPLY[check](family)
    except PLAIN_ERRORS:
        applies = False
    assert not applies


def test_the_checks_that_are_listed_are_those_made_here() -> None:
    marks = [mark for value in globals().values() for mark in getattr(value, "pytestmark", [])]
    made = {mark.args[0] for mark in marks if mark.name == "check"}
    assert made | {*OTHER_CALLS, "command"} == CHECKS.keys()
