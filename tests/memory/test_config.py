"""Settings of the memory: what they mean, what is refused and how."""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import replace
from typing import Any

import pytest

from tests.support.sliding_window import SlidingWindow, read_sliding_window
from vidaccel.memory import POLICIES, MemoryConfig, PolicyRow, parse_memory, parse_slow_fast


def test_the_usual_sizes_are_the_papers() -> None:
    config = MemoryConfig()
    assert (config.sink_frames, config.slow_frames, config.fast_frames, config.chunk_frames) == (3, 12, 6, 3)
    assert config.total_frames == 21
    assert (config.keyframe_rule, config.similarity_threshold, config.keyframe_interval) == ("similarity", 0.95, 6)
    assert (config.mode, config.prefill, config.keyframe_frames, config.max_frames) == ("clean", "none", 1, None)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sink_frames": -1}, "`sink_frames` must be a whole number of at least 0; got -1."),
        ({"slow_frames": -3}, "`slow_frames` must be a whole number of at least 0; got -3."),
        ({"fast_frames": -3}, "`fast_frames` must be a whole number of at least 0; got -3."),
        ({"slow_frames": 12.0}, "`slow_frames` must be a whole number of at least 0; got 12.0."),
        ({"slow_frames": "12"}, "`slow_frames` must be a whole number of at least 0; got '12'."),
        ({"sink_frames": True}, "`sink_frames` must be a whole number of at least 0; got True."),
        ({"chunk_frames": 0}, "`chunk_frames` must be a whole number of at least 1; got 0."),
        ({"chunk_frames": None}, "`chunk_frames` must be a whole number of at least 1; got None."),
        ({"fast_frames": 2}, "`fast_frames` must be at least `chunk_frames` (3), because it holds the chunk"),
        ({"fast_frames": 0}, "`fast_frames` must be at least `chunk_frames` (3), because it holds the chunk"),
        ({"sink_frames": 0, "slow_frames": 0, "fast_frames": 0}, "`fast_frames` must be at least `chunk_frames` (3)"),
        ({"sink_frames": 2, "slow_frames": 0, "fast_frames": 0}, "`fast_frames` must be at least `chunk_frames` (3)"),
        ({"slow_frames": 11}, "must be divisible by `chunk_frames` (3); got 3 + 11 + 6 = 20."),
        ({"chunk_frames": 4}, "must be divisible by `chunk_frames` (4); got 3 + 12 + 6 = 21."),
        (
            {"keyframe_rule": "uniform", "keyframe_interval": 0},
            "`keyframe_interval` must be a whole number of at least 1",
        ),
        ({"keyframe_interval": -6}, "`keyframe_interval` must be a whole number of at least 0; got -6."),
        ({"similarity_threshold": -1}, "`similarity_threshold` must be a number above -1"),
        ({"similarity_threshold": 1.01}, "`similarity_threshold` must be a number above -1"),
        ({"similarity_threshold": float("nan")}, "`similarity_threshold` must be a number above -1"),
        ({"similarity_threshold": "0.9"}, "`similarity_threshold` must be a number above -1"),
        ({"keyframe_rule": "sim"}, "`keyframe_rule` must be one of similarity, uniform, none; got 'sim'."),
        ({"keyframe_rule": None}, "`keyframe_rule` must be one of similarity, uniform, none; got None."),
        ({"mode": "released"}, "`mode` must be one of clean, official; got 'released'."),
        ({"prefill": []}, "`prefill` must be one of none, linear; got []."),
        ({"keyframe_frames": 0}, "`keyframe_frames` must be a whole number from 1 to 3 (`chunk_frames`); got 0."),
        ({"keyframe_frames": 4}, "`keyframe_frames` must be a whole number from 1 to 3 (`chunk_frames`); got 4."),
        ({"depth_every": 0}, "`depth_every` must be a whole number of at least 1; got 0."),
        ({"depth_every": 2.0}, "`depth_every` must be a whole number of at least 1; got 2.0."),
        ({"max_frames": 0}, "`max_frames` must be a whole number of at least 1 or None; got 0."),
    ],
)
def test_nonsense_is_refused_with_the_value_and_what_is_accepted(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        MemoryConfig(**values)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "values",
    [
        {"similarity_threshold": 1},
        {"similarity_threshold": -0.999},
        {"keyframe_frames": 3},
        {"keyframe_interval": 0},
        {"fast_frames": 3},
        {"slow_frames": 0},
        {"depth_every": 40},
        {"sink_frames": 0, "slow_frames": 0, "fast_frames": 1, "chunk_frames": 1},
    ],
)
def test_the_borders_are_accepted_as_they_are(values: dict[str, Any]) -> None:
    config = MemoryConfig(**values)
    assert {name: getattr(config, name) for name in values} == values
    assert MemoryConfig.from_dict(config.to_dict()) == config


def test_official_mode_takes_sizes_that_chunks_do_not_divide() -> None:
    sizes = {"sink_frames": 1, "slow_frames": 4, "fast_frames": 4, "chunk_frames": 2}
    assert MemoryConfig(**sizes, mode="official").total_frames == 9
    with pytest.raises(ValueError, match="divisible"):
        MemoryConfig(**sizes)


def test_a_config_is_what_was_asked_for_or_refused() -> None:
    """No field is rewritten: first frames only are written with the places of the chunk being made."""
    for first_only in ({"sink_frames": 21}, {"sink_frames": 3}):
        with pytest.raises(ValueError, match=re.escape("`fast_frames` must be at least `chunk_frames` (3)")):
            MemoryConfig(**first_only, slow_frames=0, fast_frames=0)
    given = {"sink_frames": 18, "slow_frames": 0, "fast_frames": 3}
    assert {name: getattr(MemoryConfig(**given), name) for name in given} == given


def test_settings_are_frozen_and_given_by_name() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        MemoryConfig().sink_frames = 4
    with pytest.raises(TypeError):
        MemoryConfig(3, 12, 6)


@pytest.mark.parametrize(
    ("word", "config"),
    [
        ("slow-fast", MemoryConfig()),
        ("slow-fast:3+12+6", MemoryConfig()),
        ("slow-fast:3+12+6@0.997", MemoryConfig(similarity_threshold=0.997)),
        ("slow-fast:3+12x3+6", MemoryConfig(keyframe_frames=3)),
        (
            "slow-fast:0+3x2+9@0.5",
            MemoryConfig(sink_frames=0, slow_frames=3, fast_frames=9, keyframe_frames=2, similarity_threshold=0.5),
        ),
        ("slow-fast@1", MemoryConfig(similarity_threshold=1.0)),
        ("slow-fast:0+3+9", MemoryConfig(sink_frames=0, slow_frames=3, fast_frames=9)),
        ("sink+window", MemoryConfig.sink_and_window()),
        ("sink+window:6+12", MemoryConfig.sink_and_window(sink_frames=6, window_frames=12)),
        ("window:21", MemoryConfig.sliding_window(21)),
        ("full:240", MemoryConfig.full(240)),
        ("slow-fast:3+12+6%2", MemoryConfig(depth_every=2)),
        ("slow-fast@0.9%4", MemoryConfig(similarity_threshold=0.9, depth_every=4)),
        ("window:21%2", replace(MemoryConfig.sliding_window(21), depth_every=2)),
    ],
)
def test_a_word_of_the_command_line_names_a_memory(word: str, config: MemoryConfig) -> None:
    assert parse_memory(word) == config


def test_a_word_is_read_for_the_chunks_of_the_student() -> None:
    assert parse_memory("window:20", chunk_frames=4) == MemoryConfig.sliding_window(20, chunk_frames=4)
    with pytest.raises(ValueError, match="divisible by `chunk_frames` \\(4\\)"):
        parse_memory("slow-fast", chunk_frames=4)


@pytest.mark.parametrize(
    ("word", "complaint"),
    [
        ("window:20", "divisible by `chunk_frames` (3), those of a chunk; got 20, and 18 or 21 would do."),
        ("slow-fast:3+11+6%2", "got 3+11+6 = 20, and 18 or 21 would do."),
        ("slow-fast:3+12x4+6@0.9", "Of a keyframe's chunk a memory holds 1 to 3 latent frames; got 3+12x4+6."),
        ("slow-fast:3+12x0+6", "got 3+12x0+6."),
        ("sink+window:6+2", "must have at least its 3 latent frames; got 6+2."),
    ],
)
def test_sizes_that_cannot_be_are_refused_in_words_of_how_they_are_written(word: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=re.escape(complaint)) as caught:
        parse_memory(word)
    assert "fast_frames" not in str(caught.value)
    assert "keyframe_frames" not in str(caught.value)


SIZELESS = ("", "slow", "window", "window:", "full", "slow-fast:", "Full:240")
WRONG_SIZES = (
    "window:x",
    "window:21x3",
    "slow-fast:3x2+12+6",
    "window:-3",
    "window:²",
    "window: 21",
    "full:3.5",
    "slow-fast:3,12,6",
)
WRONG_COUNTS = (
    "window:21@0.9",
    "slow-fast@",
    "slow-fast@x",
    "slow-fast@2",
    "window:3+6",
    "slow-fast:3+12",
    "slow-fast:3+12+6+1",
    "sink+window:3",
    "slow-fast%",
    "slow-fast%0",
    "slow-fast%2%2",
    "%2",
)


@pytest.mark.parametrize("word", [*SIZELESS, *WRONG_SIZES, *WRONG_COUNTS])
def test_another_word_is_refused_with_all_that_are_accepted(word: str) -> None:
    accepted = (
        "slow-fast, slow-fast:3+12+6 (sink, slow, fast), slow-fast:3+12x3+6 (up to 3 frames of a keyframe), "
        "slow-fast:3+12+6@0.99 (with the similarity threshold), "
        "slow-fast:3+12+6%2 (of every 2nd layer), view-retrieval:3+12x3+6 (what the camera saw comes back), "
        "key-retrieval:3+12x3+6 (what resembles the present does), sink+window:3+9, window:21 or full:240 "
        "(latent frames)"
    )
    with pytest.raises(ValueError, match=re.escape(f"A memory must be {accepted}; got {word!r}.")):
        parse_memory(word)


def test_sizes_of_named_memories_are_checked_like_all_others() -> None:
    with pytest.raises(ValueError, match="must have at least its 3 latent frames; got 2"):
        parse_memory("window:2")
    with pytest.raises(ValueError, match="`chunk_frames` must be a whole number of at least 1; got 0"):
        parse_memory("window:21", chunk_frames=0)
    with pytest.raises(ValueError, match="`num_frames` must be a whole number of at least 1; got 0"):
        MemoryConfig.full(0)
    with pytest.raises(ValueError, match="`chunk_frames` must be a whole number of at least 1; got 0"):
        MemoryConfig.full(12, chunk_frames=0)


def test_a_full_memory_has_whole_chunks_of_places_and_the_exact_limit() -> None:
    config = MemoryConfig.full(241)
    assert (config.total_frames, config.max_frames) == (243, 241)


def test_settings_survive_json() -> None:
    config = MemoryConfig(keyframe_rule="uniform", keyframe_interval=9, mode="official", max_frames=99)
    assert MemoryConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert MemoryConfig.from_dict({}) == MemoryConfig()


def test_settings_of_something_else_are_refused() -> None:
    with pytest.raises(ValueError, match="no setting 'local_attn_size'; it has sink_frames, slow_frames"):
        MemoryConfig.from_dict({"sink_frames": 3, "local_attn_size": 6})
    with pytest.raises(ValueError, match="must be names with values; got 21"):
        MemoryConfig.from_dict(21)


def test_what_needs_slow_memory_says_so_for_another_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(POLICIES, "last", PolicyRow("last:9", read_sliding_window))
    assert parse_memory("last:9") == SlidingWindow(window_frames=9, chunk_frames=3)
    with pytest.raises(ValueError, match=r"needs a memory of sink, slow and fast frames .*got 'last:9'"):
        parse_slow_fast("last:9")
    with pytest.raises(ValueError, match=r"window:21, full:240 or last:9 \(latent frames\); got 'first:9'"):
        parse_memory("first:9")
