"""The tensors of the memory: what is remembered is what the clean pass wrote, in buffers that never grow."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.tiny_causal import CONFIG, HEIGHT, WIDTH, causal_model, memory_of, text, told_model, video
from vidaccel.errors import UserError
from vidaccel.memory import MemoryConfig
from vidaccel.memory.camera import Camera
from vidaccel.memory.keys_values import KeyValueMemory
from vidaccel.memory.rotary import rotate

SMALL = {"sink_frames": 3, "slow_frames": 3, "fast_frames": 6}


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def contents(memory: KeyValueMemory, sample: int = 0) -> dict[Any, tuple[Tensor, Tensor]]:
    """Keys before rotation and values by remembered frame (with a mark for copies), of all layers."""
    assert memory.indexes
    frames = [
        part.unflatten(2, (-1, memory.shape.tokens_per_frame))[:, sample]
        for part in (memory.buffers.raw, memory.buffers.values)
    ]
    slots = enumerate(memory.buffers.slots[sample])
    return {slot: tuple(part[:, place].clone() for part in frames) for place, slot in slots if slot is not None}


def run(memory: KeyValueMemory, chunks: int, *, passes: int = 1, seed: int = 1, on_pass: Any = None) -> None:
    """Chunks of a random video: noisy passes, then a clean one."""
    model = causal_model()
    batch, size = memory.shape.batch_size, memory.policy.chunk_frames
    frames = video(chunks * size, batch, seed)
    for index, chunk in enumerate(frames.split(size, dim=2)):
        memory.begin_chunk()
        for number in range(passes):
            noisy = chunk + torch.randn(chunk.shape, generator=torch.Generator().manual_seed(100 * index + number))
            model(noisy, torch.full((batch,), 900.0 - 100 * number), text(batch), memory=memory)
            if on_pass is not None:
                on_pass(memory, index, number)
            memory.observe()
        model(chunk, torch.zeros(batch), text(batch), memory=memory)
        if on_pass is not None:
            on_pass(memory, index, "clean")
        memory.commit()
        if on_pass is not None:
            on_pass(memory, index, "committed")


@pytest.mark.parametrize("passes", [2, 4, 7])
def test_the_number_of_denoising_passes_leaves_no_trace(passes: int):
    """Behaviour 7, invariant I5."""
    few, many = (memory_of(causal_model(), MemoryConfig(**SMALL, similarity_threshold=1.0)) for _ in range(2))
    run(few, 9)
    run(many, 9, passes=passes)
    assert few.indexes[0].slow
    assert contents(few).keys() == contents(many).keys()
    for slot, pair in contents(few).items():
        assert all(torch.equal(a, b) for a, b in zip(pair, contents(many)[slot], strict=True))


def test_remembered_frames_are_what_their_clean_pass_wrote():
    """Behaviours 8 (clean) and 9, invariants I2, I3, I8: bit for bit, for as long as they are remembered."""
    written: dict[Any, Any] = {}

    def note(memory: KeyValueMemory, index: int, number: Any) -> None:
        if number == "clean":
            raw, values = (
                part.unflatten(2, (-1, memory.shape.tokens_per_frame))[:, 0, list(memory.buffers.current)].clone()
                for part in (memory.buffers.raw, memory.buffers.values)
            )
            for offset in range(3):
                written[index * 3 + offset] = (raw[:, offset], values[:, offset])
        if number == "committed":
            for (frame, _), pair in contents(memory).items():
                assert all(torch.equal(a, b) for a, b in zip(pair, written[frame], strict=True)), frame

    memory = memory_of(causal_model(), MemoryConfig(**SMALL, similarity_threshold=1.0))
    run(memory, 30, passes=2, on_pass=note)
    assert memory.indexes[0].sink == (0, 1, 2)
    assert len(memory.indexes[0].slow) == 3


def test_the_official_mode_remembers_the_noisiest_pass_with_the_uniform_rule():
    """Behaviour 8 (official): finding A of the research, kept on purpose for students that were trained so."""
    noisiest: dict[int, Tensor] = {}

    def note(memory: KeyValueMemory, index: int, number: Any) -> None:
        if number == 0:
            raw = memory.buffers.raw.unflatten(2, (-1, memory.shape.tokens_per_frame))
            noisiest[index * 3] = raw[:, 0, memory.buffers.current.start].clone()

    memory = memory_of(causal_model(), MemoryConfig(mode="official", keyframe_rule="uniform"))
    run(memory, 30, passes=2, on_pass=note)
    copies = {slot: pair for slot, pair in contents(memory).items() if slot[1] is not None}
    assert sorted(frame for frame, _ in copies) == list(memory.indexes[0].slow)
    for (frame, source), (raw, _) in copies.items():
        assert source == 0
        assert torch.equal(raw, noisiest[frame])


def test_all_attended_keys_are_rotated_for_the_position_they_have_now():
    """Behaviour 10: positions stay under the size of the memory and are constant once it is full."""
    positions, most = [], 0

    def note(memory: KeyValueMemory, index: int, number: Any) -> None:
        nonlocal most
        if number != 0:
            return
        table, tokens = causal_model().rotary_table(4, 6), memory.shape.tokens_per_frame
        entries = memory.indexes[0].entries
        places = dict(zip([(entry.frame, None) for entry in entries], memory.indexes[0].positions, strict=True))
        for place, slot in enumerate(memory.buffers.slots[0][: memory.buffers.current.start]):
            span = slice(place * tokens, (place + 1) * tokens)
            turned = rotate(memory.buffers.raw[1, 0, span], *table.at(torch.tensor([places[slot]])))
            torch.testing.assert_close(memory.buffers.keys[1, 0, span], turned)
        positions.append(memory.indexes[0].positions)
        most = max(most, *positions[-1])

    config = MemoryConfig(**SMALL, similarity_threshold=1.0)
    run(memory_of(causal_model(), config), 20, on_pass=note)
    assert most == config.total_frames - 1
    assert len(set(positions[8:])) == 1
    assert all(row[-3:] == tuple(range(row[-1] - 2, row[-1] + 1)) for row in positions)


def test_the_buffers_never_grow_and_say_how_full_they_are():
    """Behaviour 14, invariant I10."""
    memory = memory_of(causal_model(), MemoryConfig(**SMALL, keyframe_rule="uniform"))
    places = [
        (buffer.data_ptr(), buffer.nbytes)
        for buffer in (memory.buffers.raw, memory.buffers.keys, memory.buffers.values)
    ]
    run(memory, 40)
    assert places == [
        (buffer.data_ptr(), buffer.nbytes)
        for buffer in (memory.buffers.raw, memory.buffers.keys, memory.buffers.values)
    ]
    used = memory.bytes_by_part()
    head = CONFIG["num_attention_heads"] * CONFIG["attention_head_dim"]
    per_frame = 3 * CONFIG["num_layers"] * 6 * head * 4  # three buffers, six tokens, float32
    assert used == {
        "sink": 3 * per_frame,
        "slow": 3 * per_frame,
        "fast": 6 * per_frame,
        "reserved": 12 * per_frame + memory.buffers._rotary.nbytes,
    }


def test_samples_of_a_batch_remember_what_each_would_alone():
    """Behaviour 15: similarities differ, so samples hold different numbers of frames; a mask tells them apart."""
    config = MemoryConfig(sink_frames=3, slow_frames=6, fast_frames=6, similarity_threshold=0.93)
    model, frames = causal_model(), video(45, batch_size=3, seed=4)
    frames[1] = frames[1, :, :3].repeat(1, 15, 1, 1)  # a still picture: no keyframes
    together = memory_of(model, config, batch_size=3)
    alone = [memory_of(model, config) for _ in range(3)]
    masks = 0
    for chunk in frames.split(3, dim=2):
        together.begin_chunk()
        output = model(chunk, torch.zeros(3), text().expand(3, -1, -1), memory=together).sample
        masks += together.attention_mask is not None
        together.commit()
        for sample, memory in enumerate(alone):
            memory.begin_chunk()
            expected = model(chunk[sample : sample + 1], torch.zeros(1), text(), memory=memory).sample
            torch.testing.assert_close(output[sample : sample + 1], expected, atol=1e-5, rtol=0)
            memory.commit()
    assert masks > 3
    indexes = [(index.slow, index.fast) for index in together.indexes]
    assert indexes == [(memory.indexes[0].slow, memory.indexes[0].fast) for memory in alone]
    assert len({len(slow) for slow, _ in indexes}) > 1


def test_state_goes_on_bit_for_bit():
    config = MemoryConfig(**SMALL, similarity_threshold=1.0)
    whole, first = (memory_of(causal_model(), config, batch_size=2) for _ in range(2))
    model, frames = causal_model(), video(36, batch_size=2)

    def go_on(memory: KeyValueMemory, chunks: tuple[Tensor, ...]) -> list[Tensor]:
        outputs = []
        for chunk in chunks:
            memory.begin_chunk()
            outputs.append(model(chunk, torch.zeros(2), text(2), memory=memory).sample)
            memory.commit()
        return outputs

    chunks = frames.split(3, dim=2)
    expected = go_on(whole, chunks)
    go_on(first, chunks[:7])
    tensors, values = first.save_state()
    second = memory_of(causal_model(), config, batch_size=2)
    go_on(second, chunks[5:8])  # whatever it held before is gone
    second.load_state({name: tensor.clone() for name, tensor in tensors.items()}, values)
    assert all(torch.equal(a, b) for a, b in zip(go_on(second, chunks[7:]), expected[7:], strict=True))


def test_state_of_another_memory_is_refused():
    tensors, values = memory_of(causal_model(), MemoryConfig(**SMALL)).save_state()
    with pytest.raises(UserError, match="resume with the model"):
        memory_of(causal_model(num_layers=2), MemoryConfig(**SMALL)).load_state(tensors, values)
    with pytest.raises(UserError, match="resume with the model"):
        memory_of(causal_model(), MemoryConfig(**SMALL), batch_size=2).load_state(tensors, values)


def test_a_window_is_the_memory_without_sink_and_slow_part():
    """Behaviour 31: the last frames, the chunk's own included; and with all frames in the sink the first ones stay."""
    window = memory_of(causal_model(), MemoryConfig.sliding_window(9))
    run(window, 12)
    assert [entry.frame for entry in window.indexes[0].entries] == list(range(27, 36))
    first = memory_of(causal_model(), MemoryConfig(sink_frames=6, slow_frames=0, fast_frames=3))
    run(first, 12)
    first.begin_chunk()
    assert [entry.frame for entry in first.indexes[0].entries] == [*range(6), 36, 37, 38]


def test_a_single_first_frame_is_remembered_like_any_other():
    """A rollout that starts from an image: one frame, then chunks."""
    config, model, frames = MemoryConfig(**SMALL, prefill="linear"), causal_model(), video(10)
    memory, outputs = memory_of(model, config), []
    for chunk in (frames[:, :, :1], *frames[:, :, 1:].split(3, dim=2)):
        memory.begin_chunk(chunk.shape[2])
        outputs.append(model(chunk, torch.zeros(1), text(), memory=memory).sample)
        memory.commit()
    group = torch.tensor([0, 1, 1, 1, 2, 2, 2, 3, 3, 3])
    twin = model(frames, torch.zeros(1), text(), visibility=group[:, None] >= group[None, :]).sample
    torch.testing.assert_close(torch.cat(outputs, dim=2), twin, atol=1e-5, rtol=0)


def test_the_worked_example_of_the_buffers_is_what_they_do() -> None:
    """Place by place, as the docstring of `vidaccel.memory.buffers` draws it."""
    memory = memory_of(causal_model(), MemoryConfig(**SMALL, keyframe_rule="uniform", keyframe_interval=9))
    moves: list[list[tuple[int, int]]] = []
    copy_frames = memory.buffers._copy_frames
    memory.buffers._copy_frames = lambda sample, these: (moves.append(list(these)), copy_frames(sample, these))

    def drawn() -> tuple[list[int], range]:
        return [slot[0] for slot in memory.buffers.slots[0] if slot is not None], memory.buffers.current

    for _ in range(4):
        memory.begin_chunk()
        memory.commit()
    memory.begin_chunk()
    assert drawn() == ([0, 1, 2, 9, 10, 11], range(6, 9))
    memory.commit()
    memory.begin_chunk()
    assert drawn() == ([0, 1, 2, 9, 13, 14, 12], range(7, 10))
    assert moves[-1] == [(7, 4), (8, 5)]
    assert memory.indexes[0].positions == tuple(range(10))
    assert memory.buffers._positions[0] == {(0, None): 0, (1, None): 1, (2, None): 2, (9, None): 3} | {
        (12, None): 4,
        (13, None): 5,
        (14, None): 6,
    }


OFFICIAL = MemoryConfig(**SMALL, keyframe_rule="uniform", mode="official")
UNIFORM = MemoryConfig(**SMALL, keyframe_rule="uniform")


def path(num_frames: int, seed: int = 5) -> Camera:
    """Two cameras, one for each sample, that stand somewhere else in every frame."""
    draw = torch.Generator().manual_seed(seed)
    return Camera(*(4 * torch.randn(2, num_frames, generator=draw) for _ in range(2)))


def of_chunk(whole: Camera, index: int) -> Camera:
    return Camera(*(side[:, 3 * index : 3 * index + 3] for side in whole))


def assert_rotated_for_own_camera(memory: KeyValueMemory, whole: Camera) -> None:
    """All remembered keys that the next pass attends to, as they are read and as they should be."""
    table, tokens = told_model().rotary_table(HEIGHT, WIDTH), memory.shape.tokens_per_frame
    for sample, index in enumerate(memory.indexes):
        entries, stop = index.entries, memory.buffers.current.start
        slots = [(entry.frame, entry.source if entry.is_copy else None) for entry in entries]
        places = dict(zip(slots, index.positions, strict=True))
        for place, slot in enumerate(memory.buffers.slots[sample][:stop]):
            span, column = slice(place * tokens, (place + 1) * tokens), whole.columns[sample, slot[0], None]
            turns = table.at(torch.tensor([places[slot]]), column)
            for raw, keys in zip(
                memory.buffers.raw[:, sample, span], memory.buffers.keys[:, sample, span], strict=True
            ):
                torch.testing.assert_close(keys, rotate(raw, *turns), rtol=0, atol=1e-5)


@pytest.mark.parametrize("config", [UNIFORM, OFFICIAL], ids=["clean", "official"])
def test_keys_are_rotated_for_the_camera_of_their_own_frame_wherever_they_go(config: MemoryConfig):
    """After moves and copies, after being written anew and after being saved, for two videos with two cameras."""
    model, memory, frames, whole = told_model(), memory_of(told_model(), config, batch_size=2), video(30, 2), path(30)
    first: list[Tensor] = []
    for number, chunk in enumerate(frames.split(3, dim=2)):
        memory.begin_chunk(camera=of_chunk(whole, number))
        assert_rotated_for_own_camera(memory, whole)
        assert torch.equal(memory.motions, of_chunk(whole, number).motions)
        first = first or [memory.motions]
        assert memory.motions.data_ptr() == first[0].data_ptr()  # passes are captured with the place where they lie
        for time in (900.0, 0.0):
            model(chunk, torch.full((2,), time), text(2), memory=memory, alone=time == 0)
            if time:
                memory.observe()
        memory.commit()
        if number == 6 and config is UNIFORM:
            for group, _ in zip(memory.rebuild(), range(9), strict=False):
                for sample, row in enumerate(group):
                    assert torch.equal(memory.motions[sample], whole.motions[sample, list(row)])
                latents = torch.stack([frames[sample, :, list(row)] for sample, row in enumerate(group)])
                model(latents, torch.zeros(2), text(2, seed=9), memory=memory, alone=True)
        if number == 8:
            tensors, values = memory.save_state()
            saved = {name: part.clone() for name, part in tensors.items()}
            memory = memory_of(told_model(), config, batch_size=2)
            memory.load_state(saved, values)
            first = []
    remembered = {slot[0] for row in memory.buffers.slots for slot in row if slot}
    assert all(set(cameras) == remembered for cameras in memory.buffers._cameras)


def test_chunks_with_a_camera_are_those_of_one_full_pass():
    """Of a student whose chunks are remembered as they saw the past."""
    model, frames, whole = told_model(clean_pass="chunk"), video(12, 2), path(12)
    memory, outputs = memory_of(model, MemoryConfig.full(12), batch_size=2), []
    for number, chunk in enumerate(frames.split(3, dim=2)):
        memory.begin_chunk(camera=of_chunk(whole, number))
        outputs.append(model(chunk, torch.zeros(2), text(2), memory=memory).sample)
        memory.commit()
    expected = model(frames, torch.zeros(2), text(2), chunk_frames=3, camera=whole).sample
    torch.testing.assert_close(torch.cat(outputs, dim=2), expected, rtol=0, atol=1e-5)


def test_a_chunk_that_begins_again_has_its_new_camera():
    memory, whole = memory_of(told_model(), UNIFORM, batch_size=2), path(6)
    memory.begin_chunk(camera=of_chunk(whole, 0))
    other = [part.clone() for part in memory.rotary]
    memory.begin_chunk()
    plain = told_model().rotary_table(HEIGHT, WIDTH).at(torch.arange(3))
    assert all(torch.equal(part[0], wanted) for part, wanted in zip(memory.rotary, plain, strict=True))
    assert not memory.motions.any()
    memory.begin_chunk(camera=of_chunk(whole, 0))
    assert all(torch.equal(part, before) for part, before in zip(memory.rotary, other, strict=True))


def test_a_camera_that_is_of_another_size_or_that_nobody_is_told_of_is_refused():
    told, plain = memory_of(told_model(), UNIFORM, batch_size=2), memory_of(causal_model(), UNIFORM, batch_size=2)
    with pytest.raises(ValueError, match="not told of a camera"):
        plain.begin_chunk(camera=path(3))
    for camera in (path(2), Camera(path(3).columns, path(2).motions), Camera(*(side[:1] for side in path(3)))):
        with pytest.raises(ValueError, match=r"columns and motions \(2, 3\)"):
            told.begin_chunk(camera=camera)
    told.begin_chunk(2, camera=path(2))
    assert told.motions.shape == (2, 2)
    assert plain.motions is None


def test_where_the_camera_stands_is_never_read_back_from_the_device():
    """On the device without contents a read is an error; on a GPU it would be a wait."""
    model = told_model()
    table = model.rotary_table(HEIGHT, WIDTH)
    memory = KeyValueMemory(UNIFORM, model.memory_shape(HEIGHT, WIDTH, batch_size=2), table, device="meta")
    for number in range(8):
        memory.begin_chunk(camera=of_chunk(path(24), number))
        memory.commit()
    assert memory.indexes[0].slow


def test_a_student_that_is_told_of_no_camera_keeps_nothing_of_it():
    plain, told = memory_of(causal_model(), UNIFORM), memory_of(told_model(), UNIFORM)
    for memory in (plain, told):
        memory.begin_chunk()
        memory.commit()
    assert told.bytes_by_part()["reserved"] - plain.bytes_by_part()["reserved"] == 3 * 4  # a motion a frame, float32
    assert plain.buffers._cameras == [{}]
    assert set(told.save_state()[1]) - set(plain.save_state()[1]) == {"cameras"}
