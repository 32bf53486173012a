"""Swap-in pipelines loaded in every way there is, and with LoRA switched between calls."""

from __future__ import annotations

import inspect
import json
import re
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from vidaccel.pipelines.easycache_wan import EasyCacheWanPipeline

from tests.support.family_calls import call_inputs
from tests.support.swap_in_cases import CASES, CONFIG, Case
from vidaccel import apply_easycache, easycache_report
from vidaccel.random_models.build import build_random, make_random

each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def file_of(kind: type[Any]) -> str:
    return str(sys.modules[kind.__module__].__file__)


@each_case
def test_a_saved_folder_loads_as_swap_in_as_custom_pipeline_and_as_the_plain_pipeline(
    case: Case, tmp_path: Path
) -> None:
    plain_kind = type(case.make())
    pipe = case.swapped_in()
    expected = pipe(**case.arguments(), easycache=CONFIG)
    pipe.save_pretrained(tmp_path)
    custom = {"custom_pipeline": file_of(case.kind), "trust_remote_code": True}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # of classes registered twice
        loaded = [
            case.kind.from_pretrained(tmp_path),
            DiffusionPipeline.from_pretrained(tmp_path, **custom),
            plain_kind.from_pretrained(tmp_path, **custom),
        ]
    for other in loaded:
        other.set_progress_bar_config(disable=True)
        assert type(other).__name__ == case.kind.__name__
        output = other(**case.arguments(), easycache=CONFIG)
        assert torch.equal(output.frames, expected.frames)
        assert output.report.num_reused == expected.report.num_reused > 0
    is_own = plain_kind.__module__.startswith("vidaccel.")  # which diffusers does not know by its name
    plain = (plain_kind if is_own else DiffusionPipeline).from_pretrained(tmp_path)
    assert type(plain) is plain_kind
    settings = [name for name in plain.config if not name.startswith("_") and name not in plain.components]
    assert {name: plain.config[name] for name in settings} == {name: pipe.config[name] for name in settings}


@each_case
def test_each_file_has_one_pipeline_and_little_else(case: Case) -> None:
    module = sys.modules[case.kind.__module__]
    pipelines = [
        kind
        for _, kind in inspect.getmembers(module, inspect.isclass)
        if issubclass(kind, DiffusionPipeline) and not kind.__module__.startswith("diffusers")
    ]
    assert pipelines == [case.kind]
    assert len(Path(file_of(case.kind)).read_text(encoding="utf-8").splitlines()) < 60
    assert f"from {module.__name__} import {case.kind.__name__}\n" in str(module.__doc__)


def test_saving_keeps_a_folder_that_names_the_class_of_diffusers(tiny_wan_folder: Path, tmp_path: Path) -> None:
    EasyCacheWanPipeline.from_pretrained(tiny_wan_folder).save_pretrained(tmp_path)
    index = [json.loads((folder / "model_index.json").read_text()) for folder in (tiny_wan_folder, tmp_path)]
    assert index[1].pop("_name_or_path") == str(tiny_wan_folder)
    assert index[0] == index[1]


def test_a_folder_of_another_family_is_refused_before_it_is_loaded(tmp_path: Path) -> None:
    folder = make_random("ltx-t2v", tmp_path / "ltx")
    with pytest.raises(ValueError, match=r"needs a WanTransformer3DModel.*LTXVideoTransformer3DModel"):
        EasyCacheWanPipeline.from_pretrained(folder)


def add_loras(case: Case, pipe: Any) -> None:
    """Two random adapters on the transformer."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    for name in ("one", "two"):
        config = peft.LoraConfig(r=2, target_modules=list(case.lora_targets), init_lora_weights=False)
        pipe.transformer.add_adapter(config, adapter_name=name)


@each_case
def test_lora_is_switched_between_calls_as_in_diffusers(case: Case) -> None:
    plain, pipe = case.make(), case.swapped_in()
    untouched = pipe(**case.arguments(), easycache=CONFIG).frames
    apply_easycache(plain, CONFIG)
    switches = [
        lambda pipe: pipe.set_adapters("one"),
        lambda pipe: pipe.set_adapters("two"),
        lambda pipe: pipe.set_adapters(["one", "two"], adapter_weights=[0.5, 2.0]),
        lambda pipe: pipe.disable_lora(),
        lambda pipe: pipe.enable_lora(),
        lambda pipe: pipe.unload_lora_weights(),
    ]
    results = []
    for each in (plain, pipe):
        add_loras(case, each)
    for switch in switches:
        for each in (plain, pipe):
            switch(each)
        expected = plain(**case.arguments()).frames
        output = pipe(**case.arguments(), easycache=CONFIG)
        assert torch.equal(output.frames, expected)
        assert output.report.num_reused == easycache_report(plain).num_reused
        results.append(output.frames)
    one, two, both, off, on, gone = results
    assert torch.equal(off, untouched)
    assert torch.equal(gone, untouched)
    assert torch.equal(on, both)
    distinct = [untouched, one, two, both]
    assert not any(torch.equal(a, b) for i, a in enumerate(distinct) for b in distinct[:i])


@each_case
def test_lora_comes_from_a_file_and_follows_its_scale(case: Case, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    source = case.make()
    add_loras(case, source)
    weights = peft.get_peft_model_state_dict(source.transformer, adapter_name="two")
    type(source).save_lora_weights(tmp_path, transformer_lora_layers=weights)
    plain, pipe = case.make(), case.swapped_in()
    untouched = pipe(**case.arguments(), easycache=CONFIG).frames
    apply_easycache(plain, CONFIG)
    for each in (plain, pipe):
        each.load_lora_weights(tmp_path, adapter_name="file")
    results = [untouched]
    in_call = "attention_kwargs" in inspect.signature(case.kind.__call__).parameters
    for scale in (1.0, 0.5):
        changes: dict[str, Any] = {"attention_kwargs": {"scale": scale}} if in_call else {}
        if not in_call:
            for each in (plain, pipe):
                each.set_adapters("file", adapter_weights=scale)
        expected = plain(**case.arguments(**changes)).frames
        results.append(pipe(**case.arguments(**changes), easycache=CONFIG).frames)
        assert torch.equal(results[-1], expected)
        assert not any(torch.equal(results[-1], earlier) for earlier in results[:-1])
    shared = case.kind.from_pipe(pipe)
    assert shared.get_active_adapters() == ["file"]
    pipe.unload_lora_weights()
    assert torch.equal(pipe(**case.arguments(), easycache=CONFIG).frames, untouched)


PAGE = (Path(__file__).resolve().parents[2] / "docs" / "how-to" / "swap-in.md").read_text(encoding="utf-8")


def test_the_page_lists_every_swap_in_with_its_module_and_its_twin() -> None:
    rows = re.findall(r"^\| `(EasyCache\w+)` \| `(\w+)` \| `(\w+)` \|$", PAGE, flags=re.MULTILINE)
    made = [(case.kind, type(case.make())) for case in CASES.values()]
    assert set(rows) == {(ours.__name__, ours.__module__.split(".")[-1], theirs.__name__) for ours, theirs in made}
    section = PAGE.split("## Arguments")[1].split("## Loading")[0]
    for ours, theirs in made:
        added = set(inspect.signature(ours.__call__).parameters) - set(inspect.signature(theirs.__call__).parameters)
        assert set(re.findall(r"^\| `(\w+)` \|", section, flags=re.MULTILINE)) == added


def test_the_examples_of_the_page_compile_and_the_recipe_makes_a_swap_in() -> None:
    examples = re.findall(r"^```python\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)
    for example in examples:
        compile(example, "swap-in.md", "exec")
    recipe: dict[str, Any] = {"__name__": "recipe"}
    (own,) = [example for example in examples if "class EasyCacheCogVideoXPipeline" in example]
    exec(compile(own, "swap-in.md", "exec", dont_inherit=True), recipe)
    pipe = recipe["EasyCacheCogVideoXPipeline"].from_pipe(build_random("cogvideox-t2v"))
    output = pipe(**call_inputs("cogvideox-t2v"), threshold=0.5, warmup_steps=2)
    assert output.report.num_reused > 0
