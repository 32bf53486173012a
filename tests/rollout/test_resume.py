"""A rollout that goes on from its session: exactly, from a kept state or from latents alone, and in branches."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.support.tiny_causal import CONFIG, causal_model, chunks_of, shot, state_of, student
from vidaccel.errors import UserError
from vidaccel.memory import MemoryConfig
from vidaccel.rollout.chunk import Shot, shot_at
from vidaccel.rollout.loop import rollout
from vidaccel.rollout.resume import past_shots, restore, save_chunk, shots_to_come
from vidaccel.sessions.session import Session

SMALL = MemoryConfig(sink_frames=3, slow_frames=3, fast_frames=6, similarity_threshold=0.999)
SHOTS = [shot("a"), shot("b", 4), shot("c", 7, cut="hard")]


# What version 0.3.0 wrote beside the tensors after 9 chunks of the shots "a", "b" (hard cut at 2) and "c" (at 4).
STATE_0_3_0 = """{"num_chunks": 9, "num_frames": 27, "scene_start": 6, "scene": [4, "c"], "seeds": [0], "memories":
[{"indexes": [{"config": {"sink_frames": 3, "slow_frames": 3, "fast_frames": 6, "chunk_frames": 3, "keyframe_rule":
"uniform", "similarity_threshold": 0.95, "keyframe_interval": 6, "mode": "clean", "prefill": "none",
"keyframe_frames": 1, "max_frames": null}, "num_frames": 21, "num_chunks": 7, "num_current": 0, "num_passes": 0,
"is_keyframe": true, "is_marked": true, "parts": {"slow": [[6, true], [12, true]], "fast": [[15, false], [16, false],
[17, false], [18, true], [19, false], [20, false]]}}], "slots": [[[0, null], [1, null], [2, null], [6, null],
[12, null], [16, null], [17, null], [15, null], [18, null], [19, null], [20, null], null]]}]}"""
NAMES_0_3_0 = {f"latents.{frame}" for frame in (0, 1, 2, 6, 12, *range(15, 21))} | {"memory0.keys", "memory0.values"}


def test_a_state_of_version_0_3_0_goes_on_bit_for_bit() -> None:
    uniform = replace(SMALL, keyframe_rule="uniform", similarity_threshold=0.95)
    shots = [shot("a"), shot("b", 2, cut="hard"), shot("c", 4)]
    made = student(num_inference_steps=1)
    expected = chunks_of(made, state_of(made, uniform), 12, shots)
    state = state_of(made, uniform)
    chunks_of(made, state, 9, shots)
    tensors, values = state.save_state()
    assert json.loads(json.dumps(values)) == json.loads(STATE_0_3_0)
    assert tensors.keys() == NAMES_0_3_0
    resumed = state_of(made, uniform)
    resumed.load_state({name: part.clone() for name, part in tensors.items()}, json.loads(STATE_0_3_0))
    rest = chunks_of(made, resumed, 12, shots)
    assert all(torch.equal(a.latents, b.latents) for a, b in zip(rest, expected[9:], strict=True))


def embeddings(prompt: str) -> tuple[Tensor, ...]:
    return shot(prompt).embeddings


def record(folder: Path, num_chunks: int, *, exact: bool, shots: list[Shot] = SHOTS) -> list[Tensor]:
    made, made_chunks = student(), []
    state = state_of(made, SMALL)
    with Session.create(folder, {"seed": 0}) as session:
        branch = session.branch()
        for chunk in rollout(made, state, shots, num_chunks=num_chunks):
            save_chunk(branch, chunk, shot_at(shots, chunk.index), state, exact=exact)
            made_chunks.append(chunk.latents)
    return made_chunks


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("num_chunks", [1, 5, 8])
def test_it_ends_as_the_uninterrupted_one(tmp_path: Path, exact: bool, num_chunks: int):
    expected = chunks_of(student(), state_of(student(), SMALL), 10, SHOTS)
    record(tmp_path / "session", num_chunks, exact=exact)
    passes: list[int] = []
    with Session.open(tmp_path / "session", {"seed": 0}) as session:
        branch, state, made = session.branch(), state_of(student(), SMALL), student()
        past = past_shots(branch, branch.num_chunks, embeddings)
        restore(made, state, branch, past, on_chunk=passes.append)
        rest = chunks_of(made, state, 10, shots_to_come(past, SHOTS, num_chunks))
    assert passes == ([] if exact else list(range(num_chunks)))
    assert [chunk.index for chunk in rest] == list(range(num_chunks, 10))
    assert all(torch.equal(a.latents, b.latents) for a, b in zip(rest, expected[num_chunks:], strict=True))


@pytest.mark.parametrize("exact", [True, False])
def test_a_branch_goes_on_from_any_chunk_under_another_prompt(tmp_path: Path, exact: bool):
    record(tmp_path / "session", 8, exact=exact, shots=[shot("a")])
    other = [shot("a"), shot("z", 3)]
    expected = chunks_of(student(), state_of(student(), SMALL), 6, other)
    with Session.open(tmp_path / "session") as session:
        branch = session.new_branch("other", num_chunks=3)
        made, state = student(), state_of(student(), SMALL)
        past = past_shots(branch, 3, embeddings)
        restore(made, state, branch, past)
        shots = shots_to_come(past, [shot("z")], 3)
        rest = chunks_of(made, state, 6, shots)
        assert [one.start_chunk for one in shots] == [0, 3]
        assert all(torch.equal(a.latents, b.latents) for a, b in zip(rest, expected[3:], strict=True))
        with pytest.raises(UserError, match="8 finished chunks"):
            restore(made, state_of(made, SMALL), session.branch(), past, num_chunks=9)


def test_a_plan_with_the_same_prompt_starts_no_new_shot():
    past = [shot("a"), shot("b", 4)]
    assert [(one.start_chunk, one.prompt) for one in shots_to_come(past, past, 6)] == [(0, "a"), (4, "b")]
    assert [(one.start_chunk, one.prompt) for one in shots_to_come(past, past, 2)] == [(0, "a"), (4, "b")]
    assert [(one.start_chunk, one.prompt) for one in shots_to_come([], past, 0)] == [(0, "a"), (4, "b")]
    cut = shots_to_come(past[:1], [shot("a"), shot("a", 3, cut="hard")], 3)
    assert [(one.start_chunk, one.cut) for one in cut] == [(0, "soft"), (3, "hard")]


def test_a_state_of_another_model_is_refused(tmp_path: Path):
    record(tmp_path / "session", 2, exact=True)
    wider = student(causal_model(num_attention_heads=CONFIG["num_attention_heads"] * 2))
    with Session.open(tmp_path / "session") as session, pytest.raises(UserError, match="resume with the model"):
        restore(wider, state_of(wider, SMALL), session.branch(), SHOTS)
