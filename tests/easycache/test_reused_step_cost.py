"""What a reused step costs: how many kernels it launches, and what is done once and not again in every call."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.tiny_models import call_arguments, tiny_wan_t2v, tiny_wan_v2v
from vidaccel import EasyCacheConfig, apply_easycache
from vidaccel.easycache.hook import EasyCacheHook

NUM_STEPS, WARMUP = 8, 3
REUSED = slice(
    2 * WARMUP + 2, 2 * NUM_STEPS - 2
)  # calls after the first reused step, two in each; the last is the tail
VIEWS = {"view", "detach", "slice", "unsqueeze", "alias"}  # they launch nothing
PREDICTED = ["sub", "add"]
DECIDED = ["sub", "abs", "mean", "mul", "div", "add", "lt", "gt", "bitwise_and", "_to_copy", "cat"]


class Kernels(TorchDispatchMode):
    """Notes every operation that launches work on a device."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name not in VIEWS:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def kernels_of_reused_calls(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Of every call of the transformer within a reused step."""
    calls: list[list[str]] = []
    original = EasyCacheHook.new_forward

    def counted(self: EasyCacheHook, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with Kernels() as kernels:
            result = original(self, module, *args, **kwargs)
        calls.append(kernels.names)
        return result

    monkeypatch.setattr(EasyCacheHook, "new_forward", counted)
    apply_easycache(pipe, EasyCacheConfig(threshold=float("inf"), warmup_steps=WARMUP))
    strength = {"strength": 1.0} if "VideoToVideo" in type(pipe).__name__ else {}
    settings: dict[str, Any] = {"num_inference_steps": NUM_STEPS} | strength
    pipe(**call_arguments(pipe, **settings))
    assert len(calls) == 2 * NUM_STEPS
    return calls[REUSED]


def test_a_reused_step_launches_fourteen_kernels_and_its_second_branch_two(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = kernels_of_reused_calls(tiny_wan_t2v(), monkeypatch)
    assert calls[::2] == [[*DECIDED, *PREDICTED, "clone"]] * len(calls[::2])
    assert calls[1::2] == [PREDICTED] * len(calls[1::2])


def test_a_model_in_half_precision_is_widened_once_for_each_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe: Any = tiny_wan_t2v()
    pipe.transformer.to(torch.bfloat16)
    calls = kernels_of_reused_calls(pipe, monkeypatch)
    assert {len(names) for names in calls[::2]} == {len(DECIDED) + len(PREDICTED) + 1 + 3}
    assert {tuple(names) for names in calls[1::2]} == {("_to_copy", "sub", "add", "_to_copy")}


def test_conditions_that_stay_are_summed_once_in_a_pipeline_without_step_numbers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Only the latents, which change, are summed in every step."""
    calls = kernels_of_reused_calls(tiny_wan_v2v(), monkeypatch)
    assert {names.count("linspace") for names in calls[::2]} == {1}
    assert {tuple(names) for names in calls[1::2]} == {tuple(PREDICTED)}


def test_a_reused_call_reads_no_signature_and_walks_no_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe: Any = tiny_wan_t2v()
    noted: list[list[str]] = []  # of every call
    original = EasyCacheHook.new_forward

    def watched(self: EasyCacheHook, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        noted.append([])
        with monkeypatch.context() as patch:
            for owner, name in ((inspect, "signature"), (inspect.Signature, "bind"), (nn.Module, "named_modules")):
                patch.setattr(owner, name, noting(name, getattr(owner, name)))
            return original(self, module, *args, **kwargs)

    def noting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def note(*args: Any, **kwargs: Any) -> Any:
            noted[-1].append(name)
            return function(*args, **kwargs)

        return note

    monkeypatch.setattr(EasyCacheHook, "new_forward", watched)
    apply_easycache(pipe, EasyCacheConfig(threshold=float("inf"), warmup_steps=WARMUP))
    pipe(**call_arguments(pipe, num_inference_steps=NUM_STEPS))
    assert noted[REUSED] == [[]] * (REUSED.stop - REUSED.start)
