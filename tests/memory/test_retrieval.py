"""Which frames come back into the memory: the search against a slow twin, and what the memory makes of it."""

from __future__ import annotations

import json
import random
from collections.abc import Collection, Sequence

import pytest
import torch

from tests.support.slow_search import views_to_come
from tests.support.tiny_causal import causal_model, memory_of
from vidaccel.errors import UserError
from vidaccel.memory import MemoryConfig, MemoryIndex, parse_memory
from vidaccel.memory.retrieval import Retrieval
from vidaccel.memory.seen_frames import SeenFrames

WIDTH = 8  # columns of a screen


def seen_by(
    columns: Sequence[float], *, num_frames: int = 4, depth: int = 1, moving: Collection[int] = ()
) -> SeenFrames:
    """Chunks of three frames whose camera stood at `columns`."""
    seen = SeenFrames(Retrieval(by="view", num_frames=num_frames, depth=depth), WIDTH)
    for first in range(0, len(columns), 3):
        frames = range(first, min(first + 3, len(columns)))
        cameras = [(columns[frame], 2.0 * (frame in moving)) for frame in frames]
        seen.add(cameras, is_keyframe=False, mean=None)
    return seen


@pytest.mark.parametrize("seed", range(40))
def test_the_views_that_come_back_are_those_of_the_slow_twin(seed: int) -> None:
    draw = random.Random(seed)
    count, depth, most = draw.randrange(3, 60), draw.randint(1, 3), draw.randint(1, 6)
    columns = [draw.choice([0, 8, 16, draw.uniform(-20, 20)]) for _ in range(count)]
    moving = {frame for frame in range(count) if draw.random() < 0.3}
    present = set(draw.sample(range(count), draw.randint(0, count // 2)))
    coming = [draw.uniform(-24, 24)] * 3 if draw.random() < 0.5 else [draw.uniform(-24, 24) for _ in range(3)]
    seen = seen_by(columns, num_frames=most, depth=depth, moving=moving)
    expected = views_to_come(columns, moving, present=present, coming=coming, width=WIDTH, depth=depth, most=most)
    assert seen.wanted(present, coming) == expected


def test_nothing_comes_back_that_is_in_reach_or_was_never_seen() -> None:
    columns = [0.0] * 9 + [16.0] * 9
    seen = seen_by(columns, depth=3)
    assert seen.wanted([15, 16, 17], [16.0] * 3) == [], "the camera holds, and the last frames show what it sees"
    assert seen.wanted([15, 16, 17], [40.0] * 3) == []
    assert seen_by([]).wanted([], [0.0]) == []


def test_what_the_camera_goes_back_to_comes_back_the_latest_that_holds_foremost() -> None:
    columns = [0.0] * 6 + [4.0, 8.0, 12.0] + [16.0] * 6
    seen = seen_by(columns, depth=2, moving=(5, 6, 7, 8))
    present = [12, 13, 14]
    assert seen.wanted(present, [8.0, 4.0, 0.0])[:2] == [4, 3]
    assert seen_by(columns, depth=2).wanted(present, [8.0, 4.0, 0.0])[:2] == [7, 6]


def test_a_frame_that_shows_hardly_anything_new_does_not_come_back() -> None:
    seen = SeenFrames(Retrieval(by="view", num_frames=4), 32)
    for column in (0.0, 3.0, 4.0):
        seen.add([(column, 0.0)], is_keyframe=False, mean=None)
    assert seen.wanted([0], [3.0]) == [], "three of 32 columns are missing"
    assert seen.wanted([0], [4.0]) == [2]


def seen_keys(means: Sequence[float], keyframes: Collection[int], *, depth: int = 2) -> SeenFrames:
    """Chunks whose mean keys point in directions, angles in degrees."""
    seen = SeenFrames(Retrieval(by="keys", num_frames=4, depth=depth, threshold=0.95), WIDTH)
    for chunk, angle in enumerate(torch.tensor(means).deg2rad()):
        mean = torch.stack([angle.cos(), angle.sin()]).expand(2, -1)
        seen.add([(0.0, 0.0)] * 3, is_keyframe=chunk in keyframes, mean=mean)
    return seen


def test_chunks_that_the_present_resembles_come_back_from_before_the_last_keyframe() -> None:
    seen = seen_keys([0, 5, 90, 95, 2], keyframes=(2, 4))
    assert seen.wanted([12, 13, 14], []) == [0, 1], "chunk 0 is nearest to chunk 4"
    assert seen.wanted([0, 12, 13, 14], []) == [1], "one of two is in reach"
    assert seen.wanted([3, 4, 12], []) == [], "of chunk 1 there are two, which resembles it as well"
    assert seen_keys([0, 5, 90, 95, 88], keyframes=(2,)).wanted([12], []) == [], "before the keyframe it was another"
    assert seen_keys([0, 5, 3], keyframes=()).wanted([], []) == [], "no keyframe: all is the present"


def test_a_camera_that_jumps_out_of_the_world_is_searched_for_too() -> None:
    seen = seen_by([0.0, 1e30, 16.0, 0.0, -1e300, 1e9], num_frames=2)
    assert seen.wanted([5], [0.0, 1e9, 16.0]) == [2], "what it goes to"
    assert seen.wanted([2], [0.0, 8.0, 16.0]) == [3]
    assert seen.wanted([2], [1e30] * 3) == [5]


def test_what_is_known_of_frames_is_saved_and_loaded() -> None:
    known = seen_keys([0, 90, 1], keyframes=(1, 2))
    with pytest.raises(UserError, match="is damaged: what was seen before is not in it"):
        SeenFrames(known.retrieval, WIDTH).load({"cameras": known.state()[0]["cameras"]}, known.state()[1])
    for seen in (seen_by([0.0, 1.5, 3.25, 40.0]), known):
        tensors, values = seen.state()
        again = SeenFrames(seen.retrieval, WIDTH)
        again.load(tensors, json.loads(json.dumps(values)))
        assert (again.columns, again.motions, again.starts) == (seen.columns, seen.motions, seen.starts)
        assert again.wanted([], [0.0]) == seen.wanted([], [0.0]) != []


# What the index makes of it


def retrieving(**changes: object) -> MemoryConfig:
    sizes = {"sink_frames": 3, "slow_frames": 6, "fast_frames": 6, "retrieved_frames": 3, "retrieve_by": "view"}
    return MemoryConfig(**{**sizes, **changes})  # type: ignore[arg-type]


def checked(index: MemoryIndex) -> None:
    frames = [entry.frame for entry in index.entries]
    assert frames == sorted(set(frames)), "every frame once, in order of time"
    assert len(index.slow) <= index.policy.part_frames["slow"]
    assert index.positions == tuple(range(len(frames)))


def test_frames_that_come_back_take_places_of_slow_memory_until_others_do() -> None:
    index, draw = MemoryIndex(retrieving()), random.Random(0)
    back: list[int] = []
    for number in range(200):
        index.begin_chunk()
        present = {entry.frame for entry in index.entries}
        gone = [frame for frame in range(index.num_frames) if frame not in present]
        wanted = draw.sample(gone, min(len(gone), draw.randint(0, 4)))
        index.retrieve(wanted)
        back = [*back, *reversed(wanted[:3])][-3:]
        assert set(back) <= set(index.slow)
        checked(index)
        index.commit(0.9 if number % 2 else 0.99)
        assert set(back) <= set(index.slow)
        again = MemoryIndex.from_state(index.policy, json.loads(json.dumps(index.state())))
        assert again.entries == index.entries
    assert len(index.slow) == 6


def test_a_chunk_that_begins_again_has_nothing_left_of_what_came_back_for_it() -> None:
    def begun(*searches: list[int]) -> tuple[int, ...]:
        index = MemoryIndex(retrieving())
        for number in range(12):
            index.begin_chunk()
            index.commit(0.9 if number % 2 else 0.99)
        for wanted in searches:
            index.begin_chunk()
            index.retrieve(wanted)
        saved = MemoryIndex.from_state(index.policy, index.state())
        saved.begin_chunk()
        saved.retrieve(searches[-1])
        assert saved.entries == index.entries
        return index.slow

    assert begun([3, 4, 5], [7]) == begun([7]) != begun([3, 4, 5])


def test_without_retrieval_nothing_changes() -> None:
    index = MemoryIndex(MemoryConfig())
    for _ in range(6):
        index.begin_chunk()
        index.retrieve([3])
        index.commit(0.99)
    assert 3 not in index.slow
    assert "retrieve_by" not in index.state()["config"]
    assert index.state()["parts"].keys() == {"slow", "fast"}


@pytest.mark.parametrize("back", [[99], [3, 4, 5, 6], [3, 3], ["3"], [0]])
def test_a_damaged_state_is_refused(back: list[object]) -> None:
    index = MemoryIndex(retrieving())
    for _ in range(8):
        index.begin_chunk()
        index.commit(0.99)
    state = index.state()
    with pytest.raises(UserError, match="saved index of the memory is damaged"):
        MemoryIndex.from_state(index.policy, {**state, "parts": {**state["parts"], "back": back}})


def test_settings_that_cannot_be_are_refused_in_one_line() -> None:
    for changes, words in [
        ({"retrieve_by": "text"}, "`retrieve_by` must be one of none, view, keys; got 'text'"),
        ({"retrieved_frames": 7}, "`retrieved_frames` must be a whole number from 1 to 6"),
        ({"retrieved_frames": 0}, "`retrieved_frames` must be a whole number from 1 to 6"),
        ({"mode": "official"}, "in the clean mode only"),
        ({"retrieve_by": "keys", "keyframe_rule": "none"}, "and the `keyframe_rule` is 'none'"),
        ({"retrieve_by": "none"}, "`retrieved_frames` 3 are for what comes back"),
        ({"slow_frames": 0}, "and there are 0 `slow_frames`"),
    ]:
        with pytest.raises(ValueError, match=words):
            retrieving(**changes)
    with pytest.raises(ValueError, match="come back into slow memory"):
        parse_memory("view-retrieval:3+0+6")
    with pytest.raises(UserError, match="not told of a camera"):
        memory_of(causal_model(), retrieving())


def test_memories_with_retrieval_have_names() -> None:
    config = parse_memory("view-retrieval:3+12x3+6@0.98")
    assert isinstance(config, MemoryConfig)
    assert (config.retrieve_by, config.most_retrieved, config.similarity_threshold) == ("view", 6, 0.98)
    assert config.retrieval == Retrieval(by="view", num_frames=6, depth=3, threshold=0.98)
    assert parse_memory("key-retrieval").retrieval == Retrieval(by="keys", num_frames=6)
    assert MemoryConfig.from_dict(config.to_dict()) == config
