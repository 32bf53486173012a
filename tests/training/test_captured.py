"""Passes that are captured: what a graph is given and gives back, and when there is a new one.

Graphs need a GPU; here a pass is "captured" as a function of the tensors that a graph would be given.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.training.test_depth_routing import Task, config_of, task_of  # noqa: F401
from vidaccel.errors import UserError
from vidaccel.training.captured import CapturedStudent, InTurn, Run, check_capture
from vidaccel.training.causal_task import CausalTask
from vidaccel.training.causal_trainer import train_causal
from vidaccel.training.context_forcing_config import ContextForcingConfig
from vidaccel.training.context_forcing_trainer import train_context_forcing


class Captures:
    """Keeps what was captured; every pass is run on the values that its graph would be given."""

    def __init__(self) -> None:
        self.given: list[Sequence[Tensor]] = []

    def __call__(self, work: nn.Module, inputs: Sequence[Tensor]) -> Run:
        self.given.append(inputs)
        return work


def gradients(task: CausalTask) -> list[Tensor]:
    return [parameter.grad.clone() for parameter in task.parameters if parameter.grad is not None]


@pytest.mark.parametrize("changes", [{}, {"begin_batch": 0}, {"kv_routing": 0.5}])
def test_a_step_with_captured_passes_is_the_step(task_of: Task, changes: dict[str, float]) -> None:  # noqa: F811
    plain, captured = task_of(**changes), task_of(**changes)
    captures = Captures()
    captured._learning = CapturedStudent(captured.student, captures)
    losses = []
    for task in (plain, captured):
        loss, _ = task.loss(0.0)
        loss.backward()
        losses.append(loss.detach())
    torch.testing.assert_close(*losses, rtol=0, atol=0)
    assert captures.given
    for wanted, found in zip(gradients(plain), gradients(captured), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)


def test_a_pass_is_captured_once_for_every_form_of_what_it_is_given(task_of: Task) -> None:  # noqa: F811
    task, captures = task_of(own_share=0.0), Captures()
    task._learning = CapturedStudent(task.student, captures)
    counts = []
    for _ in range(3):
        task.loss(0.0)[0].backward()
        counts.append(len(captures.given))
    assert counts == [3, 3, 3]  # what is remembered, chunks that remember, first chunks
    with torch.no_grad():
        task.loss(0.0)
    assert len(captures.given) == 6


def test_the_tensors_of_a_graph_are_its_own(task_of: Task) -> None:  # noqa: F811
    task, captures = task_of(own_share=0.0, begin_batch=0), Captures()
    task._learning = CapturedStudent(task.student, captures)
    task.loss(0.0)
    remembered, seen = captures.given
    assert all(tensor.is_leaf for tensor in (*remembered, *seen))
    assert any(tensor.requires_grad for tensor in seen), "gradients reach what is remembered through them"


def test_a_graph_with_gradients_goes_backward_before_it_goes_forward_again() -> None:
    weight = nn.Parameter(torch.ones(2))
    run = InTurn(lambda values: (weight * values,))
    output = run(torch.ones(2))[0]
    with pytest.raises(RuntimeError, match="forward twice"):
        run(torch.ones(2))
    output.sum().backward()
    run(torch.ones(2))[0].sum().backward()
    torch.testing.assert_close(weight.grad, torch.full((2,), 2.0))


def test_graphs_are_for_a_gpu_and_keep_all(donor_folder: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="runs on cpu; leave out --cuda-graphs"):
        next(train_causal(config_of(donor_folder, cuda_graphs=True), tmp_path / "causal"))
    config = ContextForcingConfig(init=donor_folder, updates=1, device="cpu", cuda_graphs=True)
    with pytest.raises(UserError, match="runs on cpu; leave out --cuda-graphs"):
        next(train_context_forcing(config, tmp_path / "forcing"))
    with pytest.raises(UserError, match="--checkpointing"):
        check_capture(torch.device("cuda"), checkpointing=True)
    assert not any(tmp_path.iterdir())


def test_gradients_of_a_graph_reach_the_weights_of_the_student(
    task_of: Task,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    captured_over: list[Sequence[Tensor]] = []

    def graphed(run: Run, inputs: Sequence[Tensor], *, allow_unused_input: bool) -> Run:
        assert allow_unused_input
        captured_over.append(inputs)
        return run

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", graphed)
    plain, captured = task_of(own_share=0.0), task_of(own_share=0.0)
    captured._learning = CapturedStudent(captured.student)
    for task in (plain, captured):
        task.loss(0.0)[0].backward()
    for wanted, found in zip(gradients(plain), gradients(captured), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    weights = {parameter.data_ptr() for parameter in captured.parameters}
    for inputs in captured_over:
        assert weights <= {one.data_ptr() for one in inputs}, "a graph reads the weights where they lie"
        assert not {id(one) for one in captured.parameters} & {id(one) for one in inputs}
