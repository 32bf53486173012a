"""Layers that share what is remembered: only the leaders' is stored, and passes are those of a memory of all layers."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.tiny_causal import causal_model, memory_of, text, told_model, video
from vidaccel.errors import UserError
from vidaccel.memory import DepthMap, MemoryConfig
from vidaccel.memory.keys_values import KeyValueMemory
from vidaccel.models.causal_blocks import History, LayerView
from vidaccel.models.causal_wan import CausalWanTransformer3DModel

SIZES = {"sink_frames": 3, "slow_frames": 3, "fast_frames": 6, "keyframe_rule": "uniform", "keyframe_interval": 3}
LAYERS = 4


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def test_every_second_layer_leads_itself_and_the_next() -> None:
    assert DepthMap.every(2, 5).leaders == (0, 0, 2, 2, 4)
    assert DepthMap.every(2, 5).kept == (0, 2, 4)
    assert DepthMap.every(3, 4).followers(0) == (1, 2)
    assert DepthMap.every(3, 3).kept == (0,)
    assert DepthMap.every(1, 3).is_own
    assert not DepthMap.every(2, 3).is_own


@pytest.mark.parametrize(
    ("leaders", "message"),
    [
        ((), "`leaders` must be a tuple with a leader for every layer; got ()."),
        ([0, 1], "`leaders` must be a tuple with a leader for every layer; got [0, 1]."),
        ((0, 2, 2), "Layer 1 can read what is remembered of layers 0 to 1 only; got leader 2."),
        ((0, -1), "Layer 1 can read what is remembered of layers 0 to 1 only; got leader -1."),
        ((0, 0.0), "Layer 1 can read what is remembered of layers 0 to 1 only; got leader 0.0."),
    ],
)
def test_a_map_that_cannot_be_is_refused(leaders: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        DepthMap(leaders)
    with pytest.raises(
        UserError, match="`depth_every` must be a whole number from 1 to 4, the number of layers; got 0"
    ):
        DepthMap.every(0, 4)
    with pytest.raises(UserError, match="from 1 to 4, the number of layers; got 5"):
        DepthMap.every(5, 4)


def test_a_drawn_layer_reads_any_earlier_one_with_the_probability() -> None:
    draw = random.Random(0)
    maps = [DepthMap.drawn(0.5, 3, draw) for _ in range(4000)]
    assert all(one.leaders[0] == 0 for one in maps)
    last = Counter(one.leaders[2] for one in maps)
    assert last[2] / 4000 == pytest.approx(0.5, abs=0.03)
    assert last[0] / 4000 == pytest.approx(0.25, abs=0.03)
    assert DepthMap.drawn(0, 5, draw).is_own
    assert DepthMap.drawn(1, 5, draw).leaders[1] == 0


def test_a_memory_refuses_a_map_whose_kept_layers_read_others() -> None:
    with pytest.raises(ValueError, match=re.escape("layer 1 is read by [2] but reads layer 0; use `DepthMap.every`")):
        DepthMap((0, 0, 1)).check_stored()
    DepthMap((0, 1, 0, 1)).check_stored()


def test_a_history_is_read_at_the_leaders_and_a_map_of_own_layers_changes_nothing() -> None:
    layers = tuple((torch.randn(1, 4, 2, 12), torch.randn(1, 4, 2, 12)) for _ in range(LAYERS))
    history = History(layers, torch.ones(1, 4, dtype=torch.bool))
    read = history.read_by(DepthMap.every(2, LAYERS))
    assert all(read.layers[layer] is layers[leader] for layer, leader in enumerate((0, 0, 2, 2)))
    assert read.mask is history.mask
    assert history.read_by(DepthMap.every(1, LAYERS)) == history
    with pytest.raises(ValueError, match="The map is of 3 layers, and the history of 4"):
        history.read_by(DepthMap.every(1, 3))


class SlowSharing:
    """A memory of all layers, whose layers are shown copies of what their leader remembers: the slow, obvious way."""

    def __init__(self, memory: KeyValueMemory, depth: DepthMap) -> None:
        self.memory, self._depth = memory, depth

    def __getattr__(self, name: str) -> Any:
        return getattr(self.memory, name)

    def view(self, block_index: int) -> LayerView:
        raw, _, _ = self.memory.view(block_index)
        _, keys, values = (side.clone() for side in self.memory.view(self._depth.leaders[block_index]))
        own = (keys, values) if self._depth.leaders[block_index] != block_index else self.memory.view(block_index)[1:]
        return raw, *own


def passes(model: CausalWanTransformer3DModel, memory: Any, *, chunks: int = 11) -> list[Tensor]:
    """The velocities of all passes of a rollout over a random video, in whose middle the prompt changes softly."""
    alone, batch = model.clean_pass == "frame", memory.shape.batch_size
    latents, found, prompt = video(3 * chunks, batch), [], text(batch)
    for number, chunk in enumerate(latents.split(3, dim=2)):
        if number == 7:
            prompt = text(batch, seed=1)
            for frames in memory.rebuild():
                rows = [latents[sample, :, list(group)] for sample, group in enumerate(frames)]
                model(torch.stack(rows), torch.zeros(batch), prompt, memory=memory, alone=alone)
        memory.begin_chunk()
        for time in (900.0, 500.0):
            found.append(model(chunk + 1, torch.full((batch,), time), prompt, memory=memory).sample)
            memory.observe()
        found.append(model(chunk, torch.zeros(batch), prompt, memory=memory, alone=alone).sample)
        memory.commit()
    return found


@pytest.mark.parametrize("every", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", ["chunk", "frame", "official"])
def test_passes_are_those_of_a_memory_of_all_layers_that_shows_each_its_leaders(kind: str, every: int) -> None:
    mode = "official" if kind == "official" else "clean"
    model = told_model(num_layers=LAYERS, clean_pass="frame" if kind == "frame" else "chunk")
    config = MemoryConfig(**SIZES, mode=mode)
    slow = SlowSharing(memory_of(model, config, 2), DepthMap.every(every, LAYERS))
    fast = memory_of(model, replace(config, depth_every=every), 2)
    expected, found = passes(model, slow), passes(model, fast)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    kept = torch.tensor(DepthMap.every(every, LAYERS).kept)
    for name in ("raw", "values"):
        ours, theirs = getattr(fast.buffers, name), getattr(slow.memory.buffers, name)[kept]
        used = [place for place, slot in enumerate(fast.buffers.slots[0]) if slot is not None]
        frames = (side.unflatten(2, (-1, fast.shape.tokens_per_frame))[:, :, used] for side in (ours, theirs))
        assert torch.equal(*frames), name


def test_keys_and_values_of_the_leaders_only_are_stored_and_saved() -> None:
    model = causal_model(num_layers=LAYERS)
    config = MemoryConfig(**SIZES)
    whole, half, one = (memory_of(model, replace(config, depth_every=every)) for every in (1, 2, 4))
    for memory in (whole, half, one):
        passes(model, memory)
    parts = [memory.bytes_by_part() for memory in (whole, half, one)]
    for part in ("sink", "slow", "fast"):
        assert parts[0][part] == 2 * parts[1][part] == 4 * parts[2][part] > 0
    chunk = half.buffers.frame_bytes // 2  # rotated keys and values of a chunk, of one layer of three sides: 3 * 2 / 6
    rest = whole.buffers.nbytes - 3 * whole.buffers.raw.nbytes
    assert half.buffers.nbytes == 3 * half.buffers.raw.nbytes + rest + 2 * 2 * chunk + chunk
    assert half.save_state()[0]["keys"].shape[0] == 2


def test_a_state_goes_on_bit_for_bit_and_one_of_another_depth_is_refused() -> None:
    model, config = causal_model(num_layers=LAYERS), MemoryConfig(**SIZES, depth_every=2)
    first, second = memory_of(model, config), memory_of(model, config)
    passes(model, first)
    saved = first.save_state()
    second.load_state({name: tensor.clone() for name, tensor in saved[0].items()}, saved[1])
    after = [
        (memory.begin_chunk(), model(video(3), torch.full((1,), 500.0), text(), memory=memory).sample)[1]
        for memory in (first, second)
    ]
    assert torch.equal(*after)
    for every in (1, 4):
        with pytest.raises(UserError, match=f"was saved with `depth_every` 2; now it is {every}"):
            memory_of(model, replace(config, depth_every=every)).load_state(*saved)
    whole = memory_of(model, replace(config, depth_every=1))
    with pytest.raises(UserError, match="was saved with `depth_every` 1; now it is 2"):
        first.load_state(*whole.save_state())


def test_similarity_is_that_of_the_kept_layers() -> None:
    model = causal_model(num_layers=LAYERS)
    config = replace(MemoryConfig(**SIZES), keyframe_rule="similarity", depth_every=2)
    memory = memory_of(model, config)
    passes(model, memory, chunks=2)
    keys = memory.buffers.raw.unflatten(2, (-1, memory.shape.tokens_per_frame))[:, 0]
    means = [keys[:, start : start + 3].mean((1, 2)).flatten(1) for start in (0, 3)]
    expected = torch.nn.functional.cosine_similarity(*means, dim=-1).mean()
    assert memory.similarity is not None
    assert float(memory.similarity[0]) == pytest.approx(float(expected), abs=1e-6)
    assert memory.buffers.mean_keys_of(0, range(3, 6)).shape[0] == 2
