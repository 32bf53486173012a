"""The private names of other libraries that this package uses are there in the versions that are installed."""

from __future__ import annotations

import ast
import inspect
from importlib import import_module
from pathlib import Path

import pytest
import torch

from tests.support.family_calls import call_inputs
from vidaccel.machine import private_names
from vidaccel.machine.private_names import (
    PRIVATE_NAMES,
    accelerate_hook,
    chooses_attention,
    clean_caption,
    current_timestep,
    execution_device,
    forward_beneath_accelerate,
    hook_registry,
    is_compiled,
    kept_in_float32,
    num_timesteps,
    offload_device_of,
    progress_bar_config,
    resets_after_call,
    tensor_version,
)
from vidaccel.random_models.build import build_random


@pytest.mark.parametrize("name", PRIVATE_NAMES)
def test_the_library_still_sets_the_name_where_it_is_said_to(name: str) -> None:
    module = import_module(PRIVATE_NAMES[name])
    if PRIVATE_NAMES[name] == "torch._C":  # no source
        assert hasattr(torch.Tensor, name)
    else:
        assert name in inspect.getsource(module)


def test_every_private_name_that_the_module_reads_is_in_its_table() -> None:
    tree = ast.parse(Path(private_names.__file__).read_text(encoding="utf-8"))
    read = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    read |= {str(node.value) for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    used = {name for name in read if name.startswith("_") and name.isidentifier() and not name.startswith("__")}
    assert used == set(PRIVATE_NAMES)


def test_what_they_say_is_so() -> None:
    """On a pipeline before, in and after a call, and with the model offload of accelerate."""
    pipe = build_random("wan2.1-t2v")
    assert execution_device(pipe) == torch.device("cpu")
    assert offload_device_of(pipe) is None
    pipe.set_progress_bar_config(disable=True)
    assert progress_bar_config(pipe)["disable"] is True
    seen = []

    def look(pipe: object, step: int, timestep: object, kwargs: object) -> dict[str, object]:
        seen.append((current_timestep(pipe) is not None, num_timesteps(pipe, 0)))
        return {}

    pipe(**call_inputs("wan2.1-t2v", num_inference_steps=2, output_type="latent", callback_on_step_end=look))
    assert seen == [(True, 2)] * 2
    assert current_timestep(pipe) is None
    model = pipe.transformer
    assert resets_after_call(model)
    assert kept_in_float32(model)
    assert any(chooses_attention(getattr(part, "processor", None)) for part in model.modules())
    assert accelerate_hook(model) is None
    pipe.enable_model_cpu_offload(device="cpu")
    assert accelerate_hook(model) is not None
    assert forward_beneath_accelerate(model) is not None
    assert offload_device_of(pipe) is not None


def test_modules_and_tensors_tell_what_was_done_to_them() -> None:
    layer = torch.nn.Linear(2, 2)
    assert not is_compiled(layer)
    assert hook_registry(layer) is None
    layer.compile(backend="eager")
    assert is_compiled(layer)
    tensor = torch.zeros(2)
    before = tensor_version(tensor)
    tensor.add_(1)
    assert tensor_version(tensor) > before


def test_captions_are_cleaned_as_by_pixart() -> None:
    assert clean_caption("A  <b>red</b> ball") == "a red ball"


@pytest.mark.parametrize("name", ["BaseState", "CacheContext", "StateManager"])
def test_what_diffusers_keeps_to_itself_of_its_hooks_is_where_the_hook_imports_it_from(name: str) -> None:
    assert inspect.isclass(getattr(import_module("diffusers.hooks.hooks"), name))
