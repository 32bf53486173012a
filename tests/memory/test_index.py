"""The index of the memory against slow twins that say what should be remembered, and its invariants."""

from __future__ import annotations

import json
import pickle
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from types import FrameType

import pytest

from vidaccel.errors import UserError
from vidaccel.memory import MemoryConfig, MemoryIndex

NUM_PASSES = 5  # four of denoising and the clean one


def random_config(generator: random.Random, mode: str) -> MemoryConfig:
    chunk_frames = generator.randint(1, 5)
    sink, slow = generator.randint(0, 7), generator.randint(0, 9)
    fast = generator.randint(chunk_frames, 3 * chunk_frames)
    if mode == "clean":
        fast += -(sink + slow + fast) % chunk_frames
    return MemoryConfig(
        sink_frames=sink,
        slow_frames=slow,
        fast_frames=fast,
        chunk_frames=chunk_frames,
        keyframe_rule=generator.choice(["similarity", "uniform", "none"]),
        keyframe_interval=generator.choice([1, 2, 3, 6]) * chunk_frames,
        mode=mode,
        prefill=generator.choice(["none", "linear"]),
        keyframe_frames=generator.randint(1, chunk_frames),
    )


def random_sizes(generator: random.Random, config: MemoryConfig, num_chunks: int) -> list[int]:
    """Chunk sizes: whole chunks, one short first chunk, or any."""
    kind = generator.choice(["whole", "whole", "image", "any"])
    sizes = [config.chunk_frames] * num_chunks
    if kind == "image":
        sizes[0] = 1
    if kind == "any":
        sizes = [generator.randint(1, config.chunk_frames) for _ in sizes]
    return sizes


def random_similarities(generator: random.Random) -> list[float]:
    return [generator.choice([0.5, 0.94, 0.95, 0.96, 0.99, 1.0]) for _ in range(NUM_PASSES)]


def rollouts(
    mode: str, *, num_rollouts: int, num_chunks: int
) -> Iterator[tuple[MemoryIndex, list[int], random.Random]]:
    for seed in range(num_rollouts):
        generator = random.Random(seed)
        config = random_config(generator, mode)
        yield MemoryIndex(config), random_sizes(generator, config, num_chunks), generator


def is_keyframe_by_rule(config: MemoryConfig, first: int, number: int, similarity: float) -> bool:
    if first < config.fast_frames or config.slow_frames == 0:
        return False
    if config.keyframe_rule == "uniform":
        return number * config.chunk_frames % config.keyframe_interval == 0
    return config.keyframe_rule == "similarity" and similarity < 0.95


# Clean mode


@dataclass
class CleanTwin:
    """Remembers the whole video and says from it, anew for each chunk, what the memory must hold."""

    config: MemoryConfig
    keyframes: set[int] = field(default_factory=set)
    oldest_fast: int = 0

    def begin(self, first: int, count: int) -> tuple[list[int], list[int]]:
        config = self.config
        self.oldest_fast = max(self.oldest_fast, first + count - config.fast_frames, config.sink_frames)
        passed = range(config.sink_frames, min(self.oldest_fast, first))
        ranks = {frame: self.behind(frame) for frame in passed}
        keyframes = [frame for frame in passed if ranks[frame] == 0]
        others = [frame for frame in passed if ranks[frame] is None] if config.prefill == "linear" else []
        following = sorted((rank, frame) for frame, rank in ranks.items() if rank)
        wanted = [*reversed(keyframes), *(frame for _, frame in following), *reversed(others)]
        return sorted(wanted[: config.slow_frames]), list(range(self.oldest_fast, first))

    def behind(self, frame: int) -> int | None:
        """How far a frame is behind a keyframe, if it is to be kept with it."""
        return next((rank for rank in range(self.config.keyframe_frames) if frame - rank in self.keyframes), None)

    def commit(self, first: int, count: int, is_keyframe: bool) -> None:
        if is_keyframe and first >= self.config.sink_frames:  # else the sink has it
            self.keyframes.add(first)


def test_clean_memory_is_what_its_definition_says_for_many_sizes_rules_and_similarities() -> None:
    num_full = 0
    for index, sizes, generator in rollouts("clean", num_rollouts=300, num_chunks=40):
        config, twin = index.policy, CleanTwin(index.policy)
        for number, count in enumerate(sizes):
            first = index.num_frames
            index.begin_chunk(count)
            slow, fast = twin.begin(first, count)
            assert index.sink == tuple(range(min(first, config.sink_frames)))
            assert (list(index.slow), list(index.fast)) == (slow, fast)
            assert index.current == tuple(range(first, first + count))
            num_full += len(index.slow) == config.slow_frames > 0
            similarity = generator.choice([0.94, 0.95, 0.99])
            index.commit(similarity)
            assert index.is_keyframe == is_keyframe_by_rule(config, first, number, similarity)
            twin.commit(first, count, index.is_keyframe)
    assert num_full > 1000


def test_clean_parts_are_disjoint_in_order_of_time_and_never_too_large() -> None:
    for index, sizes, generator in rollouts("clean", num_rollouts=100, num_chunks=40):
        config = index.policy
        for count in sizes:
            index.begin_chunk(count)
            frames = [entry.frame for entry in index.entries]
            assert frames == [*index.sink, *index.slow, *index.fast, *index.current]
            assert frames == sorted(set(frames))
            assert len(index.slow) <= config.slow_frames
            assert len(index.fast) + count <= config.fast_frames
            assert index.positions == tuple(range(len(frames)))
            assert len(frames) <= config.total_frames
            assert all(entry.source == (None if entry.part == "current" else "clean") for entry in index.entries)
            index.commit(generator.choice([0.9, 0.99]))
            newest = [
                frame for frame in range(index.num_frames - count, index.num_frames) if frame >= config.sink_frames
            ]
            assert list(index.fast[len(index.fast) - len(newest) :]) == newest
            assert index.current == ()


@pytest.mark.parametrize("prefill", ["none", "linear"])
def test_the_position_of_a_keyframe_never_rises(prefill: str) -> None:
    generator = random.Random(1)
    index = MemoryIndex(MemoryConfig(prefill=prefill))
    before: dict[int, int] = {}
    for _ in range(200):
        index.begin_chunk()
        frames = [entry.frame for entry in index.entries]
        now = dict(zip(frames, index.positions, strict=True))
        assert all(now[frame] <= before[frame] for frame in now if frame in before)
        before = now
        index.commit(generator.choice([0.9, 0.99]))


def test_any_number_of_denoising_passes_leaves_the_same_memory() -> None:
    def remembered(num_passes: int) -> list[tuple[int, ...]]:
        generator = random.Random(2)
        index = MemoryIndex(MemoryConfig())
        history = []
        for _ in range(40):
            index.begin_chunk()
            during = index.entries
            for _ in range(num_passes):
                index.observe(0.1)
                assert index.entries == during
            index.commit(generator.choice([0.9, 0.99]))
            history += [index.sink, index.slow, index.fast]
        return history

    assert remembered(1) == remembered(2) == remembered(4) == remembered(7)


def test_linear_prefill_forgets_nothing_before_the_memory_is_full_and_then_no_keyframe_first() -> None:
    index = MemoryIndex(MemoryConfig(prefill="linear"))
    for first in range(0, 21, 3):
        index.begin_chunk()
        assert [entry.frame for entry in index.entries] == list(range(first + 3))
        index.commit(0.9 if first == 9 else 0.99)
    for _ in range(10):
        index.begin_chunk()
        index.commit(0.99)
    assert index.slow == (9, *range(34, 45)), "a keyframe, and the frames before the fast ones in the other places"
    assert index.fast == tuple(range(45, 51))


def test_a_keyframe_keeps_its_chunk_while_there_is_room_and_no_keyframe_is_lost_for_that() -> None:
    config = MemoryConfig(sink_frames=3, slow_frames=6, fast_frames=6, keyframe_frames=3)
    index, slow = MemoryIndex(config), []
    for number in range(14):
        index.begin_chunk()
        slow.append(index.slow)
        index.commit(0.9 if number in (3, 5, 6, 8, 9, 10) else 0.99)
    assert slow[:5] == [()] * 5
    assert slow[5:7] == [(9, 10, 11)] * 2
    assert slow[7] == (9, 10, 11, 15, 16, 17)
    assert slow[8:10] == [(9, 10, 15, 16, 18, 19)] * 2
    assert slow[10] == (9, 10, 15, 16, 18, 24)
    assert slow[11] == (9, 10, 15, 18, 24, 27)
    assert slow[12:] == [(9, 15, 18, 24, 27, 30)] * 2


def test_without_keyframes_linear_prefill_is_a_sink_and_a_window() -> None:
    linear = MemoryIndex(MemoryConfig(prefill="linear", keyframe_rule="none"))
    window = MemoryIndex(MemoryConfig.sink_and_window(3, 18))
    for _ in range(50):
        linear.begin_chunk()
        window.begin_chunk()
        assert [entry.frame for entry in linear.entries] == [entry.frame for entry in window.entries]
        assert linear.positions == window.positions
        linear.commit(0.1)
        window.commit(0.1)


# Official mode


@dataclass
class OfficialTwin:
    """One pass after the other over numbered slots, in the order of the released code; -1 is an empty slot."""

    config: MemoryConfig
    num_slow: int = 0
    end_frame: int = 0
    end: int = 0

    def __post_init__(self) -> None:
        self.frames = [-1] * self.config.total_frames
        self.sources: list[int | str] = [-1] * self.config.total_frames

    def put(self, slot: int, first: int, count: int, source: int | str) -> None:
        self.frames[slot : slot + count] = range(first, first + count)
        self.sources[slot : slot + count] = [source] * count

    def move(self, target: int, start: int, count: int) -> None:
        for held in (self.frames, self.sources):
            held[target : target + count] = held[start : start + count]

    def run(self, first: int, count: int, is_keyframe: bool, source: int | str) -> None:
        config, size = self.config, self.config.total_frames
        num_sink, num_fast, num_new = config.sink_frames, config.fast_frames, min(config.keyframe_frames, count)
        is_known = self.num_slow > 0 and self.frames[num_sink + self.num_slow - 1] == first
        if is_keyframe and not is_known:
            if num_sink + self.num_slow + num_new + num_fast <= size:
                self.put(num_sink + self.num_slow, first, num_new, source)
                self.num_slow += num_new
            elif size - num_fast - num_sink - num_new > 0:
                self.move(num_sink, num_sink + num_new, size - num_fast - num_sink - num_new)
                self.put(size - num_fast - num_new, first, num_new, source)
        is_first = first + count > self.end_frame
        if is_first and self.end + count > size:
            self.move(size - num_fast, size - num_fast + count, num_fast - count)
        elif is_first:
            self.end += count
        self.put(self.end - count, first, count, source)
        self.end_frame = first + count

    def attended(self) -> list[tuple[int, int | str]]:
        slots = zip(self.frames[: self.end], self.sources, strict=False)
        return [(frame, source) for frame, source in slots if frame >= 0]

    def positions(self) -> list[int]:
        anchor = min(self.end_frame, self.config.total_frames) - 1
        num_sink = min(self.config.sink_frames, self.end)
        others = self.end - num_sink
        positions = [*range(num_sink), *range(anchor - others + 1, anchor + 1)]
        return [position for position, frame in zip(positions, self.frames, strict=False) if frame >= 0]


def test_official_memory_is_what_the_released_order_of_steps_leaves_after_every_pass() -> None:
    num_copies = num_rolled = 0
    for index, sizes, generator in rollouts("official", num_rollouts=200, num_chunks=30):
        config, twin = index.policy, OfficialTwin(index.policy)
        for number, count in enumerate(sizes):
            first = index.num_frames
            index.begin_chunk(count)
            for place, similarity in enumerate(random_similarities(generator)):
                source: int | str = place if place < NUM_PASSES - 1 else "clean"
                twin.run(first, count, is_keyframe_by_rule(config, first, number, similarity), source)
                if source == "clean":
                    index.commit(similarity)
                else:
                    index.observe(similarity)
                    assert [entry.frame for entry in index.entries[-count:]] == list(index.current)
                assert [(entry.frame, entry.source) for entry in index.entries] == twin.attended()
                assert list(index.positions) == twin.positions()
            num_copies += index.is_keyframe
            num_rolled += first + count > config.total_frames
    assert num_copies > 200
    assert num_rolled > 1000


def test_official_slow_memory_changes_at_most_once_per_chunk() -> None:
    generator = random.Random(3)
    index = MemoryIndex(MemoryConfig(mode="official"))
    num_changes = 0
    for _ in range(100):
        index.begin_chunk()
        changes, before = 0, index.slow
        for _ in range(7):
            index.observe(generator.choice([0.5, 0.99]))
            changes += index.slow != before
            before = index.slow
        index.commit(0.5)
        assert changes <= 1
        num_changes += changes
    assert num_changes > 50


def test_official_uniform_copies_are_from_the_noisiest_pass() -> None:
    index = MemoryIndex(MemoryConfig(mode="official", keyframe_rule="uniform"))
    for _ in range(100):
        index.begin_chunk()
        index.commit([None] * NUM_PASSES)
    assert [entry.source for entry in index.entries if entry.part == "slow"] == [0] * 12


def test_a_sequence_of_similarities_is_the_same_as_one_call_per_pass() -> None:
    generator = random.Random(4)
    at_once, one_by_one = (MemoryIndex(MemoryConfig(mode="official")) for _ in range(2))
    for _ in range(60):
        similarities = random_similarities(generator)
        at_once.begin_chunk()
        at_once.commit(similarities)
        one_by_one.begin_chunk()
        for similarity in similarities[:-1]:
            one_by_one.observe(similarity)
        one_by_one.commit(similarities[-1])
        assert at_once.entries == one_by_one.entries


# Both modes

both_modes = pytest.mark.parametrize("mode", ["clean", "official"])


@both_modes
def test_positions_are_in_the_trained_range_and_the_query_has_the_last_ones(mode: str) -> None:
    for index, sizes, generator in rollouts(mode, num_rollouts=150, num_chunks=30):
        for count in sizes:
            index.begin_chunk(count)
            index.observe(generator.choice([0.9, 0.99]))
            positions = index.positions
            assert len(positions) == len(index.entries) <= index.policy.total_frames
            assert list(positions) == sorted(set(positions))
            assert set(positions) <= set(range(index.policy.total_frames))
            index.commit(0.99)


@both_modes
def test_the_sink_keeps_the_first_frames_for_good(mode: str) -> None:
    generator = random.Random(5)
    index = MemoryIndex(MemoryConfig(mode=mode))
    for _ in range(100):
        index.begin_chunk()
        index.commit(random_similarities(generator))
        assert index.sink == (0, 1, 2)


@pytest.mark.parametrize(
    "config",
    [
        MemoryConfig(mode="official"),
        MemoryConfig(prefill="linear"),
        MemoryConfig.sliding_window(21),
        MemoryConfig.sink_and_window(),
    ],
    ids=["official", "linear", "window", "sink+window"],
)
def test_a_full_memory_has_constant_positions(config: MemoryConfig) -> None:
    generator = random.Random(6)
    index = MemoryIndex(config)
    for _ in range(60):
        index.begin_chunk()
        if index.num_frames + 3 >= config.total_frames:
            assert index.positions == tuple(range(config.total_frames))
        index.commit(random_similarities(generator))


@both_modes
def test_a_similarity_equal_to_the_threshold_makes_no_keyframe(mode: str) -> None:
    for similarity, expected in ((0.95, False), (0.9499999, True), (None, False)):
        index = MemoryIndex(MemoryConfig(mode=mode))
        for _ in range(3):
            index.begin_chunk()
            index.commit(0.99)
        index.begin_chunk()
        index.commit(similarity)
        assert index.is_keyframe is expected


@both_modes
@pytest.mark.parametrize("rule", ["similarity", "uniform", "none"])
def test_chunks_that_begin_before_fast_memory_is_full_are_no_keyframes(mode: str, rule: str) -> None:
    config = MemoryConfig(mode=mode, keyframe_rule=rule, fast_frames=12, slow_frames=6, keyframe_interval=3)
    index = MemoryIndex(config)
    keyframes = []
    for first in range(0, 30, 3):
        index.begin_chunk()
        index.commit([0.1] * NUM_PASSES)
        keyframes += [first] if index.is_keyframe else []
    assert keyframes == ([] if rule == "none" else [12, 15, 18, 21, 24, 27])


@both_modes
def test_a_short_first_chunk_does_not_silence_the_uniform_rule(mode: str) -> None:
    index = MemoryIndex(MemoryConfig(mode=mode, keyframe_rule="uniform"))
    keyframes = []
    for number in range(10):
        index.begin_chunk(1 if number == 0 else None)
        index.commit()
        keyframes += [number] if index.is_keyframe else []
    assert keyframes == [4, 6, 8], "chunk 2 begins at frame 4, before fast memory is full"


@both_modes
def test_a_chunk_that_is_begun_again_is_the_same_chunk(mode: str) -> None:
    once, twice = (MemoryIndex(MemoryConfig(mode=mode, keyframe_rule="uniform")) for _ in range(2))
    for _ in range(40):
        once.begin_chunk()
        twice.begin_chunk()
        twice.observe()
        twice.begin_chunk()
        assert [entry.frame for entry in twice.entries if entry.part == "current"] == list(once.current)
        once.observe()
        twice.observe()
        assert once.entries[-3:] == twice.entries[-3:], "passes are counted anew"
        once.commit()
        twice.commit()
        assert (once.entries, once.positions) == (twice.entries, twice.positions)


def test_calls_out_of_order_and_wrong_values_are_refused_and_change_nothing() -> None:
    index = MemoryIndex(MemoryConfig())
    for call in (index.commit, index.observe):
        with pytest.raises(RuntimeError, match="begin_chunk"):
            call()
    for count in (0, 4, -1, 2.0, True, "3"):
        with pytest.raises(UserError, match="1 to 3 frames"):
            index.begin_chunk(count)
    index.begin_chunk(2)
    before = index.state()
    with pytest.raises(UserError, match="begun with 2 frames; got 3"):
        index.begin_chunk()
    for similarity in (float("nan"), float("inf"), [0.9, float("nan")]):
        with pytest.raises(UserError, match=r"finite number; got (nan|inf)"):
            index.commit(similarity)
    assert index.state() == before


# Other policies


def test_a_sliding_window_holds_the_last_frames_whatever_the_similarities() -> None:
    for mode in ("clean", "official"):
        config = MemoryConfig(sink_frames=0, slow_frames=0, fast_frames=21, mode=mode)
        index = MemoryIndex(config)
        for first in range(0, 150, 3):
            index.begin_chunk()
            assert [entry.frame for entry in index.entries] == list(range(max(0, first + 3 - 21), first + 3))
            index.commit(0.1)
            assert not index.is_keyframe
    assert MemoryConfig.sliding_window(21).total_frames == 21


def test_a_memory_that_is_all_sink_keeps_the_first_frames_only() -> None:
    for mode in ("clean", "official"):
        index = MemoryIndex(MemoryConfig(sink_frames=18, slow_frames=0, fast_frames=3, mode=mode))
        assert index.policy.total_frames == 21
        for first in range(0, 150, 3):
            index.begin_chunk()
            attended = [entry.frame for entry in index.entries]
            assert attended == [*range(min(first, 18)), *range(first, first + 3)]
            assert index.positions == tuple(range(len(attended)))
            index.commit([0.1] * NUM_PASSES)


def test_sink_and_window_attends_to_twelve_frames() -> None:
    index = MemoryIndex(MemoryConfig.sink_and_window())
    for _ in range(30):
        index.begin_chunk()
        index.commit()
    index.begin_chunk()
    assert [entry.frame for entry in index.entries] == [0, 1, 2, *range(84, 93)]


@pytest.mark.parametrize("num_frames", [12, 13])
def test_a_full_memory_keeps_everything_and_refuses_what_is_longer(num_frames: int) -> None:
    index = MemoryIndex(MemoryConfig.full(num_frames))
    sizes = [3, 3, 3, 3] if num_frames == 12 else [1, 3, 3, 3, 3]
    for count in sizes:
        index.begin_chunk(count)
        index.commit()
    assert index.fast == tuple(range(num_frames))
    with pytest.raises(UserError, match=rf"for {num_frames} frames at most.*end at frame {num_frames + 1}"):
        index.begin_chunk(1)
    assert index.current == ()


# Save and resume


@both_modes
def test_a_saved_index_goes_on_like_the_one_that_was_not_interrupted(mode: str) -> None:
    for index, sizes, generator in rollouts(mode, num_rollouts=60, num_chunks=25):
        saved_at = generator.randrange(len(sizes))
        num_passes = generator.randrange(NUM_PASSES)
        resumed = None
        for number, count in enumerate(sizes):
            pair = [index] if resumed is None else [index, resumed]
            similarities = random_similarities(generator)
            for one in pair:
                one.begin_chunk(count)
                for similarity in similarities[:num_passes]:
                    one.observe(similarity)
            if number == saved_at:
                resumed = MemoryIndex.from_state(index.policy, json.loads(json.dumps(index.state())))
                pair = [index, resumed]
            for one in pair:
                one.commit(similarities[num_passes:])
            if resumed is not None:
                assert resumed.state() == index.state()
                assert (resumed.entries, resumed.positions) == (index.entries, index.positions)
                assert resumed.is_keyframe == index.is_keyframe


def saved_state(mode: str, num_chunks: int = 20) -> dict[str, object]:
    index = MemoryIndex(MemoryConfig(mode=mode, keyframe_rule="uniform"))
    for _ in range(num_chunks):
        index.begin_chunk()
        index.commit()
    return json.loads(json.dumps(index.state()))


@both_modes
def test_a_state_of_other_settings_is_refused_by_name(mode: str) -> None:
    other = MemoryConfig(mode=mode, keyframe_rule="uniform", slow_frames=9)
    with pytest.raises(UserError, match="saved with `slow_frames` 12; now it is 9"):
        MemoryIndex.from_state(other, saved_state(mode))


DAMAGES = {
    "num_frames": [-1, 61, 4, True, "60", None, 60.0],
    "num_chunks": [19, 61, None],
    "num_current": [4, -1],
    "num_passes": [1, -2],
    "is_keyframe": [1, None],
    "is_marked": ["no"],
    "parts": [None, [], {}, {"slow": []}, {"slow": [], "fast": [], "more": []}],
    "config": [None, [], {"sizes": 3}, {"sink_frames": -1}],
}


@both_modes
@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in DAMAGES.items() for value in values])
def test_a_damaged_state_is_refused_in_one_line(mode: str, name: str, value: object) -> None:
    state = saved_state(mode)
    with pytest.raises(UserError) as error:
        MemoryIndex.from_state(MemoryConfig(mode=mode, keyframe_rule="uniform"), {**state, name: value})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("mode", "part", "value"),
    [
        ("clean", "slow", [[9, True], [6, True]]),
        ("clean", "slow", [[6, True], [6, True]]),
        ("clean", "slow", [[2, True]]),
        ("clean", "slow", [[6, False]]),
        ("clean", "slow", [[6]]),
        ("clean", "slow", [["6", True]]),
        ("clean", "slow", [[-6, True]]),
        ("clean", "slow", [[frame, True] for frame in range(6, 19)]),
        ("clean", "slow", None),
        ("clean", "fast", [[frame, False] for frame in range(53, 59)]),
        ("clean", "fast", [[frame, False] for frame in range(53, 60)]),
        ("official", "slots", [[0, "clean", False]] * 20),
        ("official", "slots", [None] * 21),
        ("official", "slots", [[60, "clean", False]] * 21),
        ("official", "slots", [[0, "dirty", False]] * 21),
        ("official", "slots", [[0, True, False]] * 21),
        ("official", "slots", 3),
        ("official", "num_copied", 13),
        ("official", "num_copied", None),
        ("official", "end", 22),
        ("official", "end", "21"),
    ],
)
def test_damaged_parts_are_refused_in_one_line(mode: str, part: str, value: object) -> None:
    state = saved_state(mode)
    parts = state["parts"]
    assert isinstance(parts, dict)
    with pytest.raises(UserError, match=r"^The saved index of the memory is damaged: .*\.$") as error:
        MemoryIndex.from_state(
            MemoryConfig(mode=mode, keyframe_rule="uniform"), {**state, "parts": {**parts, part: value}}
        )
    assert "\n" not in str(error.value)


@both_modes
def test_a_state_from_before_a_setting_existed_is_read_with_its_usual_value(mode: str) -> None:
    state = saved_state(mode)
    config = state["config"]
    assert isinstance(config, dict)
    del config["max_frames"]
    index = MemoryIndex.from_state(MemoryConfig(mode=mode, keyframe_rule="uniform"), state)
    assert index.state() == saved_state(mode)


def test_an_official_index_with_an_empty_place_among_the_used_ones_leaves_it_out_and_is_saved() -> None:
    sizes = {"sink_frames": 3, "slow_frames": 5, "fast_frames": 2, "chunk_frames": 2, "keyframe_frames": 2}
    config = MemoryConfig(**sizes, keyframe_rule="uniform", keyframe_interval=2, mode="official")
    index = MemoryIndex(config)
    for _ in range(3):
        index.begin_chunk()
        index.commit([None] * NUM_PASSES)
    assert [entry.frame for entry in index.entries] == [0, 1, 2, 4, 5]
    assert index.positions == (0, 1, 2, 4, 5)
    assert MemoryIndex.from_state(config, index.state()).entries == index.entries


def test_a_chunk_needs_its_slots() -> None:
    state = saved_state("official")
    parts = state["parts"]
    assert isinstance(parts, dict)
    with pytest.raises(UserError, match="has not 21 slots"):
        MemoryIndex.from_state(
            MemoryConfig(mode="official", keyframe_rule="uniform"),
            {**state, "num_current": 3, "parts": {**parts, "end": 2}},
        )


def test_something_else_is_not_taken_for_a_saved_index() -> None:
    for foreign in (None, [], {}, {"num_frames": 3}, "state"):
        with pytest.raises(UserError, match="not the saved index"):
            MemoryIndex.from_state(MemoryConfig(), foreign)


# Length


def num_calls(function: Callable[[], object]) -> int:
    """Python calls that a call of `function` makes: its work, however busy the machine is."""
    calls = 0

    def count(frame: FrameType, event: str, argument: object) -> None:
        nonlocal calls
        calls += event == "call"

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        function()
    finally:
        sys.setprofile(before)
    return calls


@both_modes
def test_hours_of_rollout_take_no_more_memory_and_work_than_its_first_minutes(mode: str) -> None:
    index = MemoryIndex(MemoryConfig(mode=mode, prefill="linear"))
    sizes, calls = {}, {}

    def make_chunk(number: int) -> None:
        index.begin_chunk()
        index.commit(0.9 if number % 3 else 0.99)

    for number in range(1, 20_001):
        if number in (100, 19_999):
            calls[number] = num_calls(partial(make_chunk, number))
        else:
            make_chunk(number)
        if number in (100, 20_000):
            sizes[number] = len(pickle.dumps(index))
    assert index.num_frames == 60_000
    assert sizes[20_000] <= sizes[100] + 256, "only its numbers get longer"
    assert 0 < calls[19_999] == calls[100]
