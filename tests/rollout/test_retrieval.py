"""Rollouts in which frames come back into the memory: against a slow twin, and exact whatever happens on the way."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.rollout.test_camera_rollout import copy_of, entries_of, made, same
from tests.support.slow_frames import SlowFrames
from tests.support.slow_rollout import Sampling
from tests.support.tiny_causal import HEIGHT, WIDTH, causal_model, shot, state_of, student, told_model
from vidaccel.errors import UserError
from vidaccel.memory import MemoryConfig
from vidaccel.rollout.archive import LatentArchive
from vidaccel.rollout.chunk import Chunk, Shot, Student, shot_at
from vidaccel.rollout.loop import ingest, replay, rollout
from vidaccel.rollout.production import Production
from vidaccel.rollout.resume import past_shots, restore, save_chunk
from vidaccel.sessions.session import Session

VIEW = MemoryConfig(
    sink_frames=3,
    slow_frames=3,
    fast_frames=6,
    keyframe_rule="uniform",
    keyframe_interval=9,
    retrieve_by="view",
    retrieved_frames=2,
)
KEYS = replace(VIEW, keyframe_rule="similarity", similarity_threshold=0.9, retrieve_by="keys", keyframe_frames=2)
ONLY_BACK = replace(VIEW, keyframe_rule="none")
SHOTS = [shot("a"), shot("b", 6), shot("c", 14, cut="hard"), shot("d", 17)]
CHUNKS = 30


def returns(chunks: Sequence[Chunk]) -> int:
    """How many frames came back: into slow memory, but not from the chunk before."""
    return sum(
        len(set(later.slow) - {*earlier.slow, *earlier.fast, *earlier.sink}) for earlier, later in pairwise(chunks)
    )


def told(**changes: Any) -> Student:
    return student(told_model(), num_inference_steps=2, **changes)


@dataclass(frozen=True)
class Way:
    """A camera that stands at one of many places in every chunk, and jumps between them."""

    seed: int = 0

    def __call__(self, chunk: int, first: int, count: int) -> tuple[list[float], list[float]]:
        here, before = self._place(chunk), self._place(max(chunk - 1, 0))
        return [here] * count, [here - before, *[0.0] * (count - 1)]

    def _place(self, chunk: int) -> float:
        return 1.5 * random.Random(f"{self.seed} {chunk}").randrange(7)

    def begun_with(self, chunk: int) -> None:
        """It has no moves that a session could note."""


class ThereAndBack(Way):
    """Nine frames at each of three places, then at the second one again."""

    def _place(self, chunk: int) -> float:
        return 1.5 * (0, 1, 2, 1)[min(chunk // 3, 3)]


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
@pytest.mark.parametrize("depth", [1, 3])
def test_a_rollout_is_the_slow_one_that_encodes_every_remembered_frame_anew(guidance_scale: float, depth: int) -> None:
    """Two videos, soft and hard cuts, and frames that come back one by one and in groups."""
    policy, model = replace(VIEW, keyframe_frames=depth), told(guidance_scale=guidance_scale)
    shots = [shot(one.prompt, one.start_chunk, 2, cut=one.cut) for one in SHOTS]
    chunks = made(model, state_of(model, policy, (3, 4)), shots, until=CHUNKS, camera=Way())
    assert returns(chunks) > 5
    for sample, seed in enumerate((3, 4)):
        sampling = Sampling(guidance_scale=guidance_scale)
        slow = SlowFrames(model.transformer, policy, sampling, seed, (HEIGHT, WIDTH), Way())
        expected = slow.make([(one, sample) for one in shots], CHUNKS)
        found = torch.cat([chunk.latents for chunk in chunks], dim=2)[sample]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_keys_of_a_frame_that_came_back_are_those_that_it_had() -> None:
    model, state = told(), state_of(told(), ONLY_BACK)
    chunks = list(rollout(model, state, [shot()], num_chunks=10, camera=ThereAndBack()))
    assert (chunks[-2].slow, chunks[-1].slow) == ((), (17,)), "the camera came back in the last chunk"
    kept = state_of(model, MemoryConfig.full(30))
    latents = torch.cat([chunk.latents for chunk in chunks], dim=2)
    list(ingest(model, kept, shot(), latents, camera=ThereAndBack()))
    found, wanted = entries_of(state), entries_of(kept)
    for frame in chunks[-1].slow:
        for one, other in zip(found[frame], wanted[frame], strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def test_samples_of_a_batch_for_which_other_frames_come_back_are_those_made_alone() -> None:
    """By keys every video has a search of its own."""
    model, seeds = told(), (3, 4, 5)
    together = made(model, state_of(model, KEYS, seeds), [shot("a", batch_size=3)], until=12, camera=Way())
    slow = set()
    for sample, seed in enumerate(seeds):
        alone = made(
            model, state_of(model, KEYS, (seed,)), [_only(shot("a", batch_size=3), sample)], until=12, camera=Way()
        )
        slow.add(tuple(chunk.slow for chunk in alone))
        for one, other in zip(together, alone, strict=True):
            torch.testing.assert_close(one.latents[sample : sample + 1], other.latents, rtol=1e-4, atol=1e-4)
    assert len(slow) == 3


def _only(one: Shot, sample: int) -> Shot:
    return replace(one, embeddings=tuple(part[sample : sample + 1] for part in one.embeddings))


def test_chunks_that_the_present_resembles_come_back_without_a_camera() -> None:
    """The video is given: two scenes in turn. When the first one is back, its frames are in reach again."""
    draw = torch.Generator().manual_seed(5)
    scenes = [torch.randn(1, 4, 1, HEIGHT, WIDTH, generator=draw) for _ in range(2)]
    order = [0] * 3 + [1] * 4 + [0] * 3
    latents = torch.cat([scenes[scene].expand(-1, -1, 3, -1, -1) for scene in order], dim=2)
    model = student(causal_model(), num_inference_steps=1)
    policy = replace(KEYS, sink_frames=0, slow_frames=6, fast_frames=6, similarity_threshold=0.99, keyframe_frames=3)
    state = state_of(model, policy)
    chunks = list(ingest(model, state, shot(), latents))
    assert chunks[6].slow == (9, 10, 11), "the first scene is forgotten; of the second its keyframe is kept"
    assert set(chunks[-1].slow) & set(range(9)), "and it is in reach again"
    assert not set(chunks[7].slow) & set(range(9)), "one chunk late: it was made before anything resembled it"


@pytest.mark.parametrize("way", ["load", "replay"])
@pytest.mark.parametrize("policy", [VIEW, KEYS], ids=["view", "keys"])
@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_a_rollout_goes_on_bit_for_bit(way: str, policy: MemoryConfig, guidance_scale: float) -> None:
    model = told(guidance_scale=guidance_scale)
    whole = made(model, state_of(model, policy), SHOTS, until=CHUNKS, camera=Way())
    assert returns(whole) > 2
    for begun in (5, 12, 19):
        state = state_of(model, policy)
        made(model, state, SHOTS, until=begun, camera=Way())
        if way == "load":
            again = copy_of(state, model, policy)
        else:
            again = state_of(model, policy)
            replay(model, again, SHOTS, iter([chunk.latents for chunk in whole[:begun]]), camera=Way())
        assert same(made(model, again, SHOTS, until=CHUNKS, camera=Way()), whole[begun:])


@pytest.mark.parametrize("snapshot_every", [0, 1, 5])
def test_with_a_session_latents_come_back_from_its_disk_and_it_goes_on_bit_for_bit(
    tmp_path: Path, snapshot_every: int
) -> None:
    model, camera = told(), Way()
    whole = made(model, state_of(model, VIEW), SHOTS, until=CHUNKS, camera=camera)
    with Session.create(tmp_path / "session", {"seed": 0}) as session:
        for until in (9, CHUNKS):
            state, branch = state_of(model, VIEW), session.branch()
            production = Production(
                student=model,
                state=state,
                shots=SHOTS,
                num_chunks=until,
                branch=branch,
                snapshot_every=snapshot_every,
            )
            production.camera = camera  # type: ignore[assignment]
            begun = branch.num_chunks
            assert same(list(production.chunks()), whole[begun:until])
            assert len(state.archive.frames) <= 15, "the last five chunks"


def test_a_branch_of_a_session_goes_on_from_any_chunk(tmp_path: Path) -> None:
    model, other = told(), [shot("a"), shot("z", 8)]
    expected = made(model, state_of(model, VIEW), other, until=CHUNKS, camera=Way())
    with Session.create(tmp_path / "session", {"seed": 0}) as session:
        branch, state = session.branch(), state_of(model, VIEW)
        for chunk in rollout(model, state, [shot("a")], num_chunks=14, camera=Way()):
            save_chunk(branch, chunk, shot_at([shot("a")], chunk.index), state, exact=chunk.index == 4)
        branch, state = session.new_branch("other", num_chunks=8), state_of(model, VIEW)
        restore(model, state, branch, past_shots(branch, 8, lambda prompt: shot(prompt).embeddings), camera=Way())
        rest = []
        for chunk in rollout(model, state, other, num_chunks=CHUNKS, camera=Way()):
            save_chunk(branch, chunk, shot_at(other, chunk.index), state, exact=False)
            rest.append(chunk)
    assert same(rest, expected[8:])
    assert returns(rest) > 2


class _Disturbed(Exception):  # noqa: N818 - it is no error of the product
    pass


def test_an_error_in_any_pass_leaves_no_trace_and_neither_does_a_camera_that_was_changed() -> None:
    model = told_model(num_layers=1)
    calls = [0, 0]  # so far, and the one that fails

    def run(latents: Tensor, timestep: Tensor, prompt: Any, memory: Any, *, alone: bool = False) -> Tensor:
        velocity: Tensor = model(latents, timestep, prompt, memory=memory, alone=alone).sample
        calls[0] += 1
        if calls[0] == calls[1]:
            raise _Disturbed
        return velocity

    disturbed, shots = student(model, run=run, num_inference_steps=1), [shot("a"), shot("b", 9)]
    whole = made(disturbed, state_of(disturbed, ONLY_BACK), shots, until=12, camera=Way(5))
    num_calls = calls[0]
    assert returns(whole) > 2
    for at in range(1, num_calls + 1):
        calls[:] = 0, at
        state = state_of(disturbed, ONLY_BACK)
        found: list[Chunk] = []
        with pytest.raises(_Disturbed):
            found.extend(rollout(disturbed, state, shots, num_chunks=12, camera=Way(5)))
        calls[:] = 0, 2
        with pytest.raises(_Disturbed):  # somebody looks elsewhere, and that fails too
            made(disturbed, state, shots, until=12, camera=Way(1))
        calls[1] = 0
        rest = made(disturbed, state, shots, until=12, camera=Way(5))
        assert same(rest, whole[12 - len(rest) :]), at


@pytest.mark.parametrize("by", ["view", "keys"])
@pytest.mark.parametrize("clean_pass", ["frame", "chunk"])
@pytest.mark.parametrize(
    "changes",
    [
        {"sink_frames": 0, "slow_frames": 6, "fast_frames": 3},
        {"slow_frames": 3, "retrieved_frames": 3},
        {"slow_frames": 6, "prefill": "linear", "retrieved_frames": 1},
        {"depth_every": 2},
        {"keyframe_frames": 3, "slow_frames": 6, "retrieved_frames": None},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_any_sizes_and_a_short_last_chunk_are_gone_on_with_bit_for_bit(
    by: str, clean_pass: str, changes: dict[str, Any]
) -> None:
    """Given frames, of which there is one too many for whole chunks; then chunks are made."""
    base = {"keyframe_interval": 6, "retrieve_by": by, **changes}
    policy = replace(VIEW if by == "view" else KEYS, **{"retrieved_frames": 2, **base})
    model, camera = student(told_model(clean_pass=clean_pass), num_inference_steps=1), Way(5)
    draw = torch.Generator().manual_seed(1)
    given = torch.randn(2, 4, 37, HEIGHT, WIDTH, generator=draw)
    whole = state_of(model, policy, (0, 1))
    shots = [shot("a", batch_size=2), shot("b", 16, batch_size=2)]
    chunks = [*ingest(model, whole, shots[0], given, camera=camera)]
    chunks += rollout(model, whole, shots, num_chunks=18, camera=camera)
    assert len(chunks) == 18
    again = state_of(model, policy, (0, 1))
    list(ingest(model, again, shots[0], given, camera=camera))
    loaded = copy_of(again, model, policy)
    assert same(list(rollout(model, loaded, shots, num_chunks=18, camera=camera)), chunks[13:])


def test_values_of_a_state_are_kept_while_the_rollout_goes_on() -> None:
    model, state = told(), state_of(told(), KEYS)
    whole = made(model, state_of(model, KEYS), [shot()], until=16, camera=Way())
    made(model, state, [shot()], until=8, camera=Way())
    tensors, values = state.save_state()
    tensors = {name: part.clone() for name, part in tensors.items()}
    made(model, state, [shot()], until=16, camera=Way())
    again = state_of(model, KEYS)
    again.load_state(tensors, values)
    assert same(made(model, again, [shot()], until=16, camera=Way()), whole[8:])
    short = {**tensors, "memory0.seen0.cameras": tensors["memory0.seen0.cameras"][:, :5]}
    with pytest.raises(UserError, match="is damaged: it saw 5 frames of 24"):
        again.load_state(short, values)
    values["memories"][0].pop("seen")
    with pytest.raises(UserError, match="does not say what was seen before"):
        again.load_state(tensors, values)


def test_a_hard_cut_leaves_nothing_that_could_come_back() -> None:
    model, camera = told(), ThereAndBack()
    state = state_of(model, VIEW)
    made(model, state, [shot("a"), shot("b", 10, cut="hard")], until=13, camera=camera)
    assert sorted(state.archive.frames) == list(range(9))
    assert all(frame < 9 for frame in (*state.memory.indexes[0].slow, *state.memory.indexes[0].sink))


def test_latents_that_are_nowhere_are_missed_in_one_line() -> None:
    model, state = told(), state_of(told(), ONLY_BACK)
    made(model, state, [shot()], until=9, camera=ThereAndBack())
    state.archive = LatentArchive()
    with pytest.raises(UserError, match=r"^The latents of frame \d+ are not at hand"):
        made(model, state, [shot()], until=12, camera=ThereAndBack())
