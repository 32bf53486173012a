"""Rollouts whose layers share a memory: who is warned, what is refused, and that the rest goes on as ever."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.support.tiny_causal import chunks_of, state_of, student, told_model
from vidaccel.errors import UserError
from vidaccel.memory import MemoryConfig
from vidaccel.rollout.depth import warn_about_depth
from vidaccel.sessions.session import Session

WHOLE, HALF = MemoryConfig(keyframe_rule="uniform"), MemoryConfig(keyframe_rule="uniform", depth_every=2)


@pytest.mark.parametrize(
    ("kv_routing", "depth_every", "memory", "complaint"),
    [
        (0.0, 1, WHOLE, None),
        (0.5, 1, HALF, None),
        (0.5, 1, WHOLE, None),
        (0.0, 2, HALF, None),
        (0.0, 1, HALF, "not trained for layers that share a memory"),
        (0.0, 2, WHOLE, "set `depth_every` to 2"),
    ],
)
def test_a_student_that_was_not_trained_so_is_warned_about(
    kv_routing: float, depth_every: int, memory: MemoryConfig, complaint: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    settings = SimpleNamespace(num_layers=4, kv_routing=kv_routing, depth_every=depth_every)
    with caplog.at_level(logging.WARNING):
        warn_about_depth(SimpleNamespace(config=settings), memory)
    assert (complaint is None) == (not caplog.text)
    assert complaint is None or complaint in caplog.text


def test_with_any_depth_the_same_frames_are_remembered_and_only_what_layers_see_differs() -> None:
    model = student(told_model(num_layers=4), num_inference_steps=1)
    whole, half = (chunks_of(model, state_of(model, memory), 9) for memory in (WHOLE, HALF))
    for one, other in zip(whole, half, strict=True):
        assert (one.sink, one.slow, one.fast, one.is_keyframe) == (
            other.sink,
            other.slow,
            other.fast,
            other.is_keyframe,
        )
    assert whole[0].latents.equal(half[0].latents)  # nothing is remembered yet
    assert not whole[-1].latents.equal(half[-1].latents)


def test_a_session_of_another_depth_is_refused_also_one_from_before_there_was_any(tmp_path: Path) -> None:
    assert "depth_every" not in WHOLE.to_dict()
    with Session.create(tmp_path / "run", {"memory": WHOLE.to_dict()}):
        pass
    with Session.open(tmp_path / "run", {"memory": replace(HALF, depth_every=1).to_dict()}):
        pass
    with pytest.raises(UserError, match="depth_every is not set there, asked for 2"):
        Session.open(tmp_path / "run", {"memory": HALF.to_dict()})
