"""Fast passes against the plain one: compiled blocks, recorded passes, keys in parts, joined layers."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from tests.rollout.test_retrieval import Way
from tests.support.sliding_window import SlidingWindow
from tests.support.tiny_causal import walk
from vidaccel.errors import UserError
from vidaccel.memory import MemoryConfig, MemoryPolicy
from vidaccel.models.causal_wan import CausalWanTransformer3DModel
from vidaccel.models.fused_layers import FusedGELU, fuse_layers, unfuse_layers
from vidaccel.models.split_attention import (
    KeySplit,
    attention_with_log_sums,
    in_parts,
    split_attention,
    use_split_attention,
)
from vidaccel.models.taehv import StreamingTinyDecoder, TinyWanDecoder
from vidaccel.rollout import PassMode
from vidaccel.rollout.camera import ChunkCamera
from vidaccel.rollout.chunk import Chunk, Shot, Student
from vidaccel.rollout.loop import rollout
from vidaccel.rollout.passes import CapturedPass, captured, compiled, eager, make_pass, speed_up
from vidaccel.rollout.state import new_state

MEMORY = MemoryConfig(sink_frames=3, slow_frames=3, fast_frames=6, keyframe_rule="uniform")
NUM_CHUNKS = 12  # full after 10: 3, 6, 9, 9, 10, 10, 11, 11, 12, ... attended frames
STEPS = 2


@pytest.fixture(autouse=True)
def _nothing_compiled_before() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def tiny_student(*, guidance: float = 1.0, seed: int = 0, **changes: Any) -> Student:
    torch.manual_seed(seed)
    transformer = CausalWanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=8,
        freq_dim=16,
        ffn_dim=24,
        num_layers=2,
        **changes,
    ).eval()
    scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0, stochastic_sampling=True)
    return Student(transformer=transformer, scheduler=scheduler, num_inference_steps=STEPS, guidance_scale=guidance)


@dataclass
class Made:
    chunks: list[Chunk]
    attended: list[int]


def made(
    student: Student,
    *,
    seeds: tuple[int, ...] = (0,),
    num_prompts: int = 1,
    compile_memory: bool = False,
    policy: MemoryPolicy = MEMORY,
    camera: ChunkCamera | None = None,
) -> Made:
    """A rollout with a cut to the next prompt after every 6 chunks."""
    generator = torch.Generator().manual_seed(1)
    texts = torch.randn(num_prompts, 2, len(seeds), 5, 8, generator=generator)
    shots = [
        Shot(start_chunk=6 * number, prompt=str(number), embeddings=tuple(text.unbind(0)))
        for number, text in enumerate(texts.unbind(0))
    ]
    state = new_state(student, policy, height=4, width=4, seeds=seeds)
    for memory in state.memories if compile_memory else ():
        memory.compile()
    result = Made([], [])
    for chunk in rollout(student, state, shots, num_chunks=NUM_CHUNKS, camera=camera):
        result.chunks.append(chunk)
        result.attended.append(state.memory.attended_frames)
    return result


def with_run(student: Student, run: Callable[..., Tensor]) -> Student:
    return Student(
        transformer=student.transformer,
        scheduler=student.scheduler,
        num_inference_steps=STEPS,
        guidance_scale=student.guidance_scale,
        run=run,
    )


def assert_same(first: Made, second: Made, *, within: float = 0.0) -> None:
    for a, b in zip(first.chunks, second.chunks, strict=True):
        torch.testing.assert_close(a.latents, b.latents, rtol=0, atol=within)


@dataclass
class FakeRecording:
    """Stands for a CUDA graph: it repeats work on the tensors it was recorded with, into one output."""

    work: Callable[[], Tensor]
    output: Tensor
    num_replays: int = 0
    is_closed: bool = False

    def replay(self) -> None:
        assert not self.is_closed
        self.num_replays += 1
        self.output.copy_(self.work())

    def close(self) -> None:
        self.is_closed = True


@dataclass
class DeadRecording:
    """Stands for a CUDA graph in what it holds on to: its output, and nothing of the work."""

    output: Tensor

    def replay(self) -> None:
        pass

    def close(self) -> None:
        pass


@dataclass
class FakeRecorder:
    recordings: list[FakeRecording] = field(default_factory=list)

    def __call__(self, work: Callable[[], Tensor]) -> FakeRecording:
        self.recordings.append(FakeRecording(work, work().clone()))
        return self.recordings[-1]


def test_compiled_blocks_make_the_same_video_with_two_compilations_for_all_sizes_of_the_memory() -> None:
    student, counter = tiny_student(), CompileCounterWithBackend("aot_eager")
    expected = made(student)
    got = made(with_run(student, compiled(student.transformer, backend=counter)))
    assert_same(expected, got, within=1e-5)
    assert counter.frame_count == 2
    made(with_run(student, compiled(student.transformer, backend=counter)))
    assert counter.frame_count == 2  # a second rollout, and a second call, compile nothing


def test_a_compiled_memory_rotates_as_the_plain_one() -> None:
    student, counter = tiny_student(), CompileCounterWithBackend("aot_eager")
    expected = made(student)
    with torch.compiler.set_stance("default", force_backend=counter):
        got = made(student, compile_memory=True)
    assert_same(expected, got, within=1e-5)
    assert counter.frame_count == 1  # for any number of frames that move


def test_all_that_is_sped_up_makes_the_same_video() -> None:
    student, plain = tiny_student(guidance=3.0), tiny_student(guidance=3.0)
    small = TinyWanDecoder(latent_channels=4, channels=(4, 4, 4, 4)).eval()
    texts = torch.randn(2, 1, 5, 8, generator=torch.Generator().manual_seed(1))
    shot = Shot(start_chunk=0, prompt="a", embeddings=tuple(texts.unbind(0)))

    def chunks(student: Student, mode: PassMode) -> list[Chunk]:
        state = new_state(student, MEMORY, height=4, width=4)
        state.decoder = StreamingTinyDecoder(small)
        return list(rollout(speed_up(student, state, mode), state, [shot], num_chunks=6))

    expected = chunks(plain, "eager")
    assert not any(isinstance(block.ffn.net[0], FusedGELU) for block in plain.transformer.blocks)
    counter = CompileCounterWithBackend("aot_eager")
    with torch.compiler.set_stance("default", force_backend=counter):
        found = chunks(student, "compiled")
    assert all(isinstance(block.ffn.net[0], FusedGELU) for block in student.transformer.blocks)
    assert small.memory_format == torch.channels_last
    assert counter.frame_count == 2 + 1 + 1  # blocks, rotation, decoder
    for before, after in zip(expected, found, strict=True):
        torch.testing.assert_close(before.latents, after.latents, rtol=0, atol=1e-4)
        assert before.frames is not None
        assert after.frames is not None
        assert (before.frames.int() - after.frames.int()).abs().max() <= 1
    bare = tiny_student()
    speed_up(bare, new_state(bare, MEMORY, height=4, width=4), "compiled", fuse=False)
    assert not any(isinstance(block.ffn.net[0], FusedGELU) for block in bare.transformer.blocks)


@pytest.mark.parametrize(("guidance", "num_prompts"), [(1.0, 1), (3.0, 1), (1.0, 2), (3.0, 2)])
def test_recorded_passes_make_the_same_video_bit_for_bit(guidance: float, num_prompts: int) -> None:
    student, recorder = tiny_student(guidance=guidance), FakeRecorder()
    expected = made(student, num_prompts=num_prompts)
    run = CapturedPass(eager(student.transformer), recorder)
    assert_same(expected, made(with_run(student, run), num_prompts=num_prompts))
    # Once for each size of the memory, branch of guidance and prompt; the first pass of each is as it is.
    if num_prompts == 1:
        assert len(recorder.recordings) == student.num_branches * len({3, 6, 9, 10, 11, 12})
        passes = NUM_CHUNKS * student.passes_per_chunk
        assert sum(one.num_replays for one in recorder.recordings) == passes - len(recorder.recordings)
    live = [one for one in recorder.recordings if not one.is_closed]
    assert len(live) == student.num_branches
    assert all(one.num_replays for one in recorder.recordings)


def test_passes_over_frames_alone_are_recorded_beside_those_over_chunks() -> None:
    """With a camera, whose motions lie where the recordings read them."""
    student, recorder = tiny_student(camera_dim=8, clean_pass="frame"), FakeRecorder()
    run = CapturedPass(eager(student.transformer), recorder)

    def noted(*inputs: Any, alone: bool = False) -> Tensor:
        kinds.append(alone)
        return run(*inputs, alone=alone)

    kinds: list[bool] = []
    expected, found = made(student, camera=walk()), made(with_run(student, noted), camera=walk())
    assert_same(expected, found)
    assert kinds == [False] * STEPS + [True] + kinds[STEPS + 1 :]
    assert kinds.count(True) == NUM_CHUNKS
    twice = {9, 10, 11, 12}  # frames that the passes of two chunks attend to; a chunk has one pass over frames alone
    assert len(recorder.recordings) == len({3, 6, *twice}) + len(twice)
    assert sum(not one.is_closed for one in recorder.recordings) == 2
    made(with_run(student, compiled(student.transformer, backend=(counter := CompileCounterWithBackend("aot_eager")))))
    assert counter.frame_count == 4  # two for chunks, two for frames alone


def test_frames_that_come_back_are_passed_unrecorded_and_no_recording_is_lost_for_them() -> None:
    policy = MemoryConfig(
        sink_frames=3, slow_frames=3, fast_frames=6, keyframe_rule="none", retrieve_by="view", retrieved_frames=2
    )
    student, recorder = tiny_student(camera_dim=8, clean_pass="frame"), FakeRecorder()
    run = CapturedPass(eager(student.transformer), recorder)
    sizes: dict[bool | None, list[int]] = {True: [], False: [], None: []}  # by `alone`; None: what came back

    def noted(latents: Tensor, timestep: Tensor, prompt: Any, memory: Any, *, alone: bool = False) -> Tensor:
        sizes[None if memory.is_rewritten else alone].append(memory.attended_frames)
        return run(latents, timestep, prompt, memory, alone=alone)

    expected = made(student, policy=policy, camera=Way(5))
    assert_same(expected, made(with_run(student, noted), policy=policy, camera=Way(5)))
    assert len(sizes[None]) == 3
    assert (len(sizes[False]), len(sizes[True])) == (NUM_CHUNKS * STEPS, NUM_CHUNKS)
    lengths = [len(list(run)) for kind in (False, True) for _, run in itertools.groupby(sizes[kind])]
    assert len(recorder.recordings) == sum(length > 1 for length in lengths)


def test_passes_over_a_memory_of_another_policy_are_recorded_like_any_other() -> None:
    student, recorder = tiny_student(), FakeRecorder()
    window = SlidingWindow(window_frames=9)
    run = CapturedPass(eager(student.transformer), recorder)
    assert_same(made(student, policy=window), made(with_run(student, run), policy=window))
    assert len(recorder.recordings) == len({3, 6, 9})


def test_what_a_recorded_pass_returns_is_not_overwritten_by_the_next() -> None:
    student = tiny_student()
    run = CapturedPass(eager(student.transformer), FakeRecorder())
    state = new_state(student, MEMORY, height=4, width=4)
    with torch.no_grad():
        prompt = student.transformer.cache_prompt(torch.randn(1, 5, 8))
        state.memory.begin_chunk()
        latents, time = torch.randn(1, 4, 3, 4, 4), torch.full((1,), 500.0)
        first = run(latents, time, prompt, state.memory)
        second, other = run(latents, time, prompt, state.memory), run(latents + 1, time, prompt, state.memory)
    assert torch.equal(first, second)
    assert not torch.equal(second, other)


def test_samples_that_remember_differently_are_passed_unrecorded() -> None:
    student, recorder = tiny_student(), FakeRecorder()
    run = CapturedPass(eager(student.transformer), recorder)
    state = new_state(student, MEMORY, height=4, width=4, seeds=(0, 1))
    mask = torch.ones(2, 1, 1, 12, dtype=torch.bool)
    with torch.no_grad():
        prompt = student.transformer.cache_prompt(torch.randn(2, 5, 8))
        state.memory.begin_chunk()
        state.memory.buffers.mask = mask
        for _ in range(3):
            run(torch.randn(2, 4, 3, 4, 4), torch.full((2,), 500.0), prompt, state.memory)
    assert not recorder.recordings


def test_recordings_go_with_their_memory() -> None:
    student = tiny_student()
    run = CapturedPass(eager(student.transformer), lambda work: DeadRecording(work()))
    state = new_state(student, MEMORY, height=4, width=4)
    with torch.no_grad():
        prompt = student.transformer.cache_prompt(torch.randn(1, 5, 8))
        state.memory.begin_chunk()
        for _ in range(2):
            run(torch.randn(1, 4, 3, 4, 4), torch.full((1,), 500.0), prompt, state.memory)
    assert len(run._shelves) == 1
    del state
    gc.collect()
    assert not run._shelves


@pytest.mark.skipif(torch.cuda.is_available(), reason="what is said where there is no CUDA")
def test_capturing_without_cuda_is_refused_in_a_sentence() -> None:
    student = tiny_student()
    with pytest.raises(UserError, match="on CUDA only, and this model is on cpu"):
        captured(student.transformer)
    with pytest.raises(UserError, match="eager, compiled, captured; got 'fast'"):
        make_pass(student.transformer, "fast")  # type: ignore[arg-type]
    assert not any(block._compiled_call_impl for block in student.transformer.blocks)


@pytest.mark.parametrize("num_parts", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keys_in_parts_give_the_attention_of_all(num_parts: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    query, keys, values = (torch.randn(1, length, 2, 16, generator=generator).to(dtype) for length in (12, 60, 60))
    keys, values = keys[:, :36], values[:, :36]  # the front of a buffer, as the memory gives it
    keys[:, :9] *= 4  # one part outweighs the others
    got = split_attention(query, keys, values, KeySplit(kernel="cpu", num_parts=num_parts))
    logits = torch.einsum("blnd,bsnd->bnls", query.double(), keys.double()) / 4
    expected = torch.einsum("bnls,bsnd->blnd", logits.softmax(-1), values.double())
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=1e-6 if dtype == torch.float32 else 0.02)
    torch.library.opcheck(attention_with_log_sums, (*in_parts(query, keys, values, num_parts), "cpu"))


def test_keys_that_cannot_be_divided_stay_together() -> None:
    one, many = torch.zeros(1, 7, 2, 4), torch.zeros(2, 6, 2, 4)
    assert in_parts(one, one, one, 2)[1] is one
    assert in_parts(many, many, many, 2)[1] is many
    with pytest.raises(ValueError, match="at least 1 part; got 'cpu' and 0"):
        KeySplit(kernel="cpu", num_parts=0)
    with pytest.raises(ValueError, match="cudnn, flash, cpu"):
        KeySplit(kernel="sage")  # type: ignore[arg-type]


def test_a_rollout_with_keys_in_parts_is_the_plain_one_up_to_rounding() -> None:
    student = tiny_student()
    expected = made(student)
    use_split_attention(student.transformer, KeySplit(kernel="cpu", num_parts=3))
    assert_same(expected, made(student), within=1e-4)
    use_split_attention(student.transformer, None)
    assert_same(expected, made(student))


def test_joined_layers_make_the_same_video_and_can_be_taken_apart() -> None:
    student = tiny_student()
    transformer = student.transformer
    names, expected = list(transformer.state_dict()), made(student)
    fuse_layers(transformer)
    assert all(isinstance(block.ffn.net[0], FusedGELU) for block in transformer.blocks)
    assert {name for name in transformer.state_dict() if "to_qkv" not in name and "to_kv" not in name} == set(names)
    assert_same(expected, made(student), within=1e-4)
    unfuse_layers(transformer)
    assert list(transformer.state_dict()) == names
    assert_same(expected, made(student))


def test_layers_that_are_no_plain_products_are_not_joined() -> None:
    transformer = tiny_student().transformer

    class Adapted(nn.Linear):
        pass

    transformer.blocks[1].ffn.net[0].proj = Adapted(24, 24)
    with pytest.raises(UserError, match="A Adapted cannot be joined"):
        fuse_layers(transformer)
    assert not any(getattr(block.attn1, "fused_projections", False) for block in transformer.blocks)


@pytest.mark.parametrize("place", [("attn1", "to_v"), ("attn2", "to_k")])
def test_projections_that_are_no_plain_products_are_not_joined(place: tuple[str, str]) -> None:
    transformer = tiny_student().transformer

    class Adapted(nn.Linear):
        pass

    setattr(getattr(transformer.blocks[1], place[0]), place[1], Adapted(24, 24))
    with pytest.raises(UserError, match="A Adapted cannot be joined"):
        fuse_layers(transformer)
