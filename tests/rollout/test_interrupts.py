"""A rollout that is disturbed: errors at every point, interrupts, several at once, networks that move or change."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import accelerate
import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from tests.rollout.test_loop import PixelCounter, same
from tests.support.tiny_causal import HEIGHT, WIDTH, causal_model, chunks_of, shot, state_of, student, video
from tests.support.tiny_models import tiny_vae
from vidaccel.errors import UserError
from vidaccel.memory import MemoryConfig
from vidaccel.rollout.chunk import Chunk, Student
from vidaccel.rollout.decode import StreamingDecoder
from vidaccel.rollout.loop import ingest, replay, rollout
from vidaccel.rollout.state import RolloutState, new_state

SMALL = MemoryConfig(sink_frames=3, slow_frames=3, fast_frames=6, similarity_threshold=0.999)
SHOTS = [shot("a"), shot("b", 3), shot("c", 5, cut="hard")]
NUM_CHUNKS = 7


class DisturbedError(Exception):
    pass


class Disturbance:
    """Raises at the call number `at` of anything it is asked about, once."""

    def __init__(self, at: int) -> None:
        self.at, self.calls = at, 0

    def count(self) -> None:
        self.calls += 1
        if self.calls == self.at:
            raise DisturbedError

    def student(self, guidance_scale: float = 1.0) -> Student:
        model = causal_model(num_layers=1)

        def run(latents: Tensor, timestep: Tensor, prompt: Any, memory: Any) -> Tensor:
            velocity: Tensor = model(latents, timestep, prompt, memory=memory).sample
            self.count()  # when the pass has written its keys
            return velocity

        return student(model, run=run, num_inference_steps=2, guidance_scale=guidance_scale)


class DisturbedCounter(PixelCounter):
    """Fails when it has taken the latents in."""

    def __init__(self, disturbance: Disturbance) -> None:
        super().__init__()
        self.disturbance = disturbance

    def decode(self, latents: Tensor) -> Tensor:
        frames = super().decode(latents)
        self.disturbance.count()
        return frames


def in_full(made: Student, state: RolloutState, shots: list[Any] = SHOTS) -> list[Chunk]:
    return list(rollout(made, state, shots, num_chunks=NUM_CHUNKS))


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_an_error_in_any_pass_or_in_the_decoder_leaves_no_trace(guidance_scale: float) -> None:
    quiet = Disturbance(0)
    made = quiet.student(guidance_scale)
    state = state_of(made, SMALL, decoder=DisturbedCounter(quiet))
    expected = in_full(made, state)
    saved = state.save_state()
    for at in range(1, quiet.calls + 1, int(guidance_scale) ** 2):
        disturbance = Disturbance(at)
        made = disturbance.student(guidance_scale)
        state = state_of(made, SMALL, decoder=DisturbedCounter(disturbance))
        found: list[Chunk] = []
        with pytest.raises(DisturbedError):
            found.extend(rollout(made, state, SHOTS, num_chunks=NUM_CHUNKS))
        found = [*expected[: state.num_chunks], *in_full(made, state)]
        assert same(found, expected), at
        assert all(torch.equal(a.frames, b.frames) for a, b in zip(found, expected, strict=True)), at
        tensors, values = state.save_state()
        assert values == saved[1]
        assert all(torch.equal(tensor, saved[0][name]) for name, tensor in tensors.items())


def test_an_interrupt_while_the_host_waits_for_pixels_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a rollout on a GPU spends its time, so where Ctrl-C finds it; the true decoder goes back too."""
    made, vae = student(causal_model(num_layers=1), num_inference_steps=1), tiny_vae(z_dim=4)
    expected = chunks_of(made, state_of(made, SMALL, decoder=StreamingDecoder(vae)), 4)
    state = state_of(made, SMALL, decoder=StreamingDecoder(vae))
    begin = chunks_of(made, state, 2)
    with monkeypatch.context() as patch:
        patch.setattr("vidaccel.rollout.loop._on_host", _interrupted)
        with pytest.raises(KeyboardInterrupt):
            chunks_of(made, state, 4)
    found = begin + chunks_of(made, state, 4)
    assert same(found, expected)
    assert all(torch.equal(a.frames, b.frames) for a, b in zip(found, expected, strict=True))


def _interrupted(*_: Any) -> Any:
    raise KeyboardInterrupt


def test_an_interrupt_while_a_chunk_is_counted_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    made = student(num_inference_steps=1)
    state = state_of(made, SMALL)
    with monkeypatch.context() as patch:
        patch.setattr(RolloutState, "remember", _interrupted)
        with pytest.raises(KeyboardInterrupt):
            chunks_of(made, state, 1)
    with pytest.raises(UserError, match="go on from a saved state"):
        chunks_of(made, state, 2)


def test_memory_that_was_being_written_anew_is_written_anew_whatever_comes_next() -> None:
    disturbance = Disturbance(3 * 3 + 2)  # in the second pass of the second shot's recache
    made = disturbance.student()
    state = state_of(made, SMALL)
    with pytest.raises(DisturbedError):
        in_full(made, state, [shot("a"), shot("b", 3)])
    assert state.num_chunks == 3
    back = in_full(made, state, [shot("a")])
    clean = Disturbance(0).student()
    other = state_of(clean, SMALL)
    chunks_of(clean, other, 3)
    other.shot = None  # the same rollout, its memory written anew under the old prompt
    assert same(back, in_full(clean, other, [shot("a")]))


def test_a_chunk_of_the_official_mode_is_not_made_again() -> None:
    disturbance = Disturbance(7 * 3 + 3)
    made = disturbance.student()
    state = state_of(made, replace(SMALL, mode="official"))
    with pytest.raises(DisturbedError):
        chunks_of(made, state, 9)
    with pytest.raises(UserError, match="saved state"):
        chunks_of(made, state, 9)


def test_rollouts_that_take_turns_do_not_mix() -> None:
    model, vae = causal_model(num_layers=1), tiny_vae(z_dim=4)
    made = [student(model, num_inference_steps=2), student(model, num_inference_steps=1, guidance_scale=2.0)]
    states = [state_of(one, SMALL, (seed,), StreamingDecoder(vae)) for seed, one in enumerate(made)]
    alone = [in_full(one, state_of(one, SMALL, (seed,), StreamingDecoder(vae))) for seed, one in enumerate(made)]
    turns = zip(*[rollout(made[n], states[n], SHOTS, num_chunks=NUM_CHUNKS) for n in (0, 1)], strict=True)
    for first, second in zip(list(zip(*turns, strict=True)), alone, strict=True):
        assert same(list(first), second)
        assert all(torch.equal(a.frames, b.frames) for a, b in zip(first, second, strict=True))


def test_threads_share_the_networks() -> None:
    made, vae = student(causal_model(num_layers=1), num_inference_steps=2), tiny_vae(z_dim=4)

    def run(seed: int) -> list[Chunk]:
        return in_full(made, state_of(made, SMALL, (seed,), StreamingDecoder(vae)))

    alone = [run(seed) for seed in range(3)]
    with ThreadPoolExecutor(3, initializer=torch.set_num_threads, initargs=(1,)) as pool:  # as in the main thread
        together = list(pool.map(run, range(3)))
    for one, other in zip(alone, together, strict=True):
        assert same(one, other)
        assert all(torch.equal(a.frames, b.frames) for a, b in zip(one, other, strict=True))


def test_a_state_goes_on_when_its_generator_was_dropped_and_other_sizes_come_between() -> None:
    made = student(num_inference_steps=2)
    expected = in_full(made, state_of(made, SMALL))
    state = state_of(made, SMALL)
    dropped = rollout(made, state, SHOTS, num_chunks=NUM_CHUNKS)
    begin = [next(dropped) for _ in range(4)]
    del dropped
    list(rollout(made, new_state(made, SMALL, height=8, width=2), [shot()], num_chunks=2))
    assert same(begin + in_full(made, state), expected)


def test_what_is_done_to_the_latents_of_a_chunk_changes_nothing_later() -> None:
    made = student(num_inference_steps=2)
    expected = in_full(made, state_of(made, SMALL))
    for chunk, wanted in zip(rollout(made, state_of(made, SMALL), SHOTS, num_chunks=NUM_CHUNKS), expected, strict=True):
        assert torch.equal(chunk.latents, wanted.latents)
        chunk.latents.mul_(0)  # the recache at chunk 3 needs those of the memory
    given = video(6)
    state = state_of(made, SMALL)
    list(ingest(made, state, shot(), given))
    given.mul_(0)
    assert all(part.abs().max() > 0 for part in state.remembered.values())


CALLS = (
    lambda made, state, one, given: rollout(made, state, [one], num_chunks=1),
    lambda made, state, one, given: ingest(made, state, one, given),
    lambda made, state, one, given: replay(made, state, [one], iter([given])),
)


@pytest.mark.parametrize("call", CALLS, ids=["rollout", "ingest", "replay"])
def test_arguments_are_refused_by_the_call_and_not_by_its_first_chunk(call: Any) -> None:
    made = student()
    guided = student(guidance_scale=2.0)
    with pytest.raises(UserError, match="with guidance"):
        call(guided, state_of(made, SMALL), shot(), video(3))
    with pytest.raises(UserError, match="prompts"):
        call(made, state_of(made, SMALL, (1, 2)), shot(batch_size=3), video(3, batch_size=2))
    with pytest.raises(ValueError, match="begin at chunk 0"):
        rollout(made, state_of(made, SMALL), [shot(start=1)], num_chunks=2)
    with pytest.raises(ValueError, match="begin at chunk 0"):
        rollout(made, state_of(made, SMALL), [], num_chunks=2)
    with pytest.raises(UserError, match="to begin with"):
        ingest(made, state_of(made, SMALL), shot(), video(3)[:, :, :, :2])
    for given in (ingest, lambda *args: replay(*args[:2], [args[2]], iter([args[3]]))):
        with pytest.raises(UserError, match="official mode"):
            given(made, state_of(made, replace(SMALL, mode="official")), shot(), video(3))


def test_a_state_and_prompts_that_do_not_fit_are_refused_before_anything_is_made() -> None:
    made, guided = student(), student(guidance_scale=2.0)
    for one, state in ((guided, state_of(made, SMALL)), (made, state_of(guided, SMALL))):
        with pytest.raises(UserError, match="with guidance"):
            chunks_of(one, state, 1)
    with pytest.raises(UserError, match="prompts"):
        chunks_of(made, state_of(made, SMALL, (1, 2)), 1, [shot(batch_size=3)])
    alone = replace(shot(), embeddings=shot().embeddings[:1])
    with pytest.raises(UserError, match="also a negative one"):
        chunks_of(guided, state_of(guided, SMALL), 1, [alone])
    state = state_of(made, SMALL)
    made.transformer.to(torch.bfloat16)
    for call in CALLS:
        with pytest.raises(UserError, match="bfloat16"):
            call(made, state, shot(), video(3))
    with pytest.raises(ValueError, match="seeds"):
        state_of(made, SMALL, ())
    with pytest.raises(ValueError, match="official mode"):
        state_of(made, MemoryConfig(mode="official", keyframe_frames=2))
    with pytest.raises(ValueError, match="rope_max_seq_len"):
        new_state(student(), SMALL, height=300, width=2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_students_go_on_bit_for_bit(dtype: torch.dtype) -> None:
    made = student(causal_model().to(dtype), num_inference_steps=2)
    expected = in_full(made, state_of(made, SMALL))
    assert all(chunk.latents.dtype == torch.float32 for chunk in expected)
    state = state_of(made, SMALL)
    begin = chunks_of(made, state, 4, SHOTS[:2])
    tensors, values = state.save_state()
    resumed = state_of(made, SMALL)
    resumed.load_state({name: part.clone() for name, part in tensors.items()}, values)
    assert same(begin + in_full(made, resumed), expected)


def test_latents_of_a_saved_state_are_where_the_rollout_calculates() -> None:
    """Those made later are there, and a new prompt puts both together."""
    made = student(num_inference_steps=1)
    state = state_of(made, SMALL)
    chunks_of(made, state, 4)
    tensors, values = state.save_state()
    elsewhere = new_state(made, SMALL, height=HEIGHT, width=WIDTH, device=torch.device("meta"))
    elsewhere.load_state(tensors, values)
    assert elsewhere.remembered.keys() == state.remembered.keys()
    assert {part.device.type for part in elsewhere.remembered.values()} == {"meta"}


@pytest.mark.parametrize("kind", ["layer by layer", "as a whole"])
def test_offloaded_transformers_make_the_same_video(kind: str) -> None:
    expected = in_full(student(), state_of(student(), SMALL))
    model, here = causal_model(), torch.device("cpu")
    if kind == "layer by layer":
        accelerate.cpu_offload(model, here)  # weights wait on the device "meta"
        assert model.patch_embedding.weight.is_meta
    else:
        accelerate.cpu_offload_with_hook(model, here)
        brought = []
        before = model._hf_hook.pre_forward
        model._hf_hook.pre_forward = lambda *args, **kwargs: brought.append(1) or before(*args, **kwargs)
        model.cache_prompt = _after(brought, model.cache_prompt)
    made = student(model)
    assert same(in_full(made, new_state(made, SMALL, height=HEIGHT, width=WIDTH, device=here)), expected)


def _after(brought: list[int], call: Any) -> Any:
    def checked(*args: Any) -> Any:
        assert brought, "the prompt is cached before the transformer is brought in"
        return call(*args)

    return checked


def test_prompts_are_projected_once_a_chunk_and_not_once_a_pass() -> None:
    """Behaviour 25 in the whole rollout: passes share what a chunk's first one needed."""
    model = causal_model()
    calls: list[int] = []
    for block in model.blocks:
        block.attn2.to_v.register_forward_hook(lambda *_: calls.append(1))
    made = student(model, guidance_scale=2.0)
    in_full(made, state_of(made, SMALL))
    assert len(calls) == len(model.blocks) * NUM_CHUNKS * made.num_branches


class PeakBytes(TorchDispatchMode):
    """The most bytes that tensors made under it took at once, since `restart`."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        new = False
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.alive or self.alive[storage._cdata][0].expired():
                    self.alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
                    new = True
        if new:
            self.alive = {key: entry for key, entry in self.alive.items() if not entry[0].expired()}
            self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return result

    def restart(self) -> int:
        peak, self.peak = self.peak, 0
        return peak


def _peaks(num_chunks: int) -> Iterator[int]:
    made = student(causal_model(num_layers=1), num_inference_steps=1)
    with PeakBytes() as bytes_used:
        state = state_of(made, replace(SMALL, keyframe_rule="uniform"), decoder=PixelCounter())
        for _ in rollout(made, state, [shot()], num_chunks=num_chunks):
            yield bytes_used.restart()


def test_the_most_memory_at_once_is_that_of_a_short_rollout() -> None:
    """Behaviour 14: rollouts of 63 and 252 frames reach the same peak, to the byte."""
    short, long = list(_peaks(21)), list(_peaks(84))
    assert max(short) == max(long) > 0
    assert set(long[12:]) == set(short[12:]) - {0}  # two, for a keyframe comes every second chunk
