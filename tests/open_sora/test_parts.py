"""What stands around Open-Sora 1.2's networks: sizes, prompts, noise levels and conditioning frames."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.open_sora_fixtures import FOLDER, largest_difference, tensors, values
from vidaccel.errors import UserError
from vidaccel.open_sora.conditioning import (
    FrameMask,
    MaskStrategy,
    apply_mask_strategies,
    continuation,
    kept_apart,
    parse_mask_strategies,
    usual_strategies,
)
from vidaccel.open_sora.prompts import cleaned, clip_texts, loop_prompts, with_scores
from vidaccel.open_sora.schedule import shift_of, sigmas_of
from vidaccel.open_sora.sizes import ASPECT_RATIOS, FRAME_NAMES, TABLES, num_frames_of, size_of, video_size

# Sizes.


def test_what_the_repository_has_recorded_is_where_it_is_looked_for() -> None:
    assert {"aspect.json", "mask_io.safetensors", "text.json"} <= {path.name for path in FOLDER.iterdir()}


def test_all_sizes_are_the_original_ones() -> None:
    recorded = values("aspect")
    assert dict(ASPECT_RATIOS) == recorded["map"]
    assert dict(FRAME_NAMES) == recorded["frames"]
    assert set(TABLES) == set(recorded["ratios"])
    for resolution, table in recorded["ratios"].items():
        written = dict(entry.split(":") for entry in TABLES[resolution].split())
        assert written == {ratio: f"{height}x{width}" for ratio, (height, width) in table["table"].items()}
        for aspect_ratio, key in recorded["map"].items():
            if key in table["table"]:
                assert size_of(resolution, aspect_ratio) == tuple(table["table"][key])


def test_names_give_sizes_and_the_usual_ones_are_those_of_the_papers() -> None:
    assert size_of("480p", "9:16") == (480, 854)
    assert size_of("512", "9:16") == (384, 672), "the nearest ratio, 0.57"
    size = video_size("2s")
    assert (size.num_frames, size.height, size.width, size.fps) == (51, 480, 854, 24)
    assert video_size(1).fps == 120
    assert video_size(1, 64, 48, fps=8) == video_size(1, height=64, width=48, fps=8.0)
    assert (num_frames_of("16x"), num_frames_of(7)) == (816, 7)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: size_of("490p", "9:16"), "`resolution` must be one of 144p, .*'490p'"),
        (lambda: size_of("480p", "16x9"), "`aspect_ratio` .*'16x9'"),
        (lambda: num_frames_of("3s"), "`num_frames` must be .*'3s'"),
        (lambda: num_frames_of(0), "`num_frames` must be"),
        (lambda: num_frames_of(True), "`num_frames` must be"),
        (lambda: video_size(1, 64), "Give `height` and `width`"),
        (lambda: video_size(1, 64, 64, resolution="480p"), "Give `height` and `width`"),
    ],
)
def test_a_wrong_size_is_named(wrong: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        wrong()


# Prompts.


@pytest.mark.parametrize("recorded", values("text")["prompts"], ids=lambda recorded: recorded["raw"][:20])
def test_scores_and_cleaning_are_those_of_the_original(recorded: dict[str, str]) -> None:
    raw = recorded["raw"]
    assert with_scores(raw) == recorded["scored"]
    assert with_scores(raw, motion_score=5, camera_motion="pan left") == recorded["all"]
    assert cleaned(with_scores(raw)) == recorded["cleaned"]
    assert with_scores(raw, aesthetic_score=None) == raw


def test_one_cleaning_is_not_enough() -> None:
    from diffusers import PixArtAlphaPipeline

    once = [PixArtAlphaPipeline._clean_caption(PixArtAlphaPipeline, one["scored"]) for one in values("text")["prompts"]]
    assert once != [one["cleaned"] for one in values("text")["prompts"]]


def test_cleaning_says_which_package_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "bs4" else object())
    with pytest.raises(UserError, match="pip install beautifulsoup4"):
        cleaned("a cat")


def test_a_prompt_in_segments_is_that_of_the_original() -> None:
    recorded = values("text")["loop"]
    assert loop_prompts(recorded["raw"], 4) == recorded["per_loop"]
    assert loop_prompts("a |1| b", 2) == ["a |1| b"] * 2
    with pytest.raises(UserError, match=r"must rise; got \[0, 2, 1\]"):
        loop_prompts("|0|a|2|b|1|c", 3)


def test_every_clip_gets_its_scored_and_cleaned_texts() -> None:
    texts = clip_texts(["|0|A sea|1|A Storm", "Sky"], 2, clean=True, motion_score=4.0)
    ending = " aesthetic score: 6.5. motion score: 4.0."
    assert texts == [[f"a sea{ending}", f"sky{ending}"], [f"a storm{ending}", f"sky{ending}"]]
    assert clip_texts("A sea", 1, clean=False, aesthetic_score=None) == [["A sea"]]
    assert clip_texts(None, 2, clean=True) == [[], []]


# Noise levels.


@pytest.mark.parametrize("name", values("rflow_timesteps"))
def test_timesteps_are_those_of_the_original(name: str) -> None:
    size, steps, dtype = name.split("_")
    height, width, num_frames = map(int, size.split("x"))
    shift = shift_of(height=height, width=width, num_frames=num_frames, dtype=getattr(torch, dtype))
    found = torch.tensor(sigmas_of(int(steps), shift)) * 1000
    assert largest_difference(found, torch.tensor(values("rflow_timesteps")[name])) <= 1e-3


def test_the_first_noise_level_is_never_above_one() -> None:
    for shift in (0.2, 0.37291, 1.0, 4.84375, 11.3):
        sigmas = sigmas_of(30, shift)
        assert 1 - 1e-12 < sigmas[0] <= 1
        assert all(earlier > later > 0 for earlier, later in pairwise(sigmas))


def test_few_frames_count_as_one() -> None:
    image = shift_of(height=512, width=512, num_frames=1)
    assert image == 1.0
    assert shift_of(height=512, width=512, num_frames=9) == image
    assert shift_of(height=512, width=512, num_frames=34) == shift_of(height=512, width=512, num_frames=50)


# Conditioning.

# What was recorded, read off its masks: which latent frames lie where.
RECORDED = (
    ("0", None),
    ("0,0,0,0,1,0", 5),
    ("0,0,-5,0,5,0.3", 5),
    ("0,0,0,10,1;0,0,6,11,3,0.25", None),
    ("0,0,7,8,4,0.25", None),
    ("1,0,0,0,5", 5),
)


@pytest.mark.parametrize("case", range(len(RECORDED)))
def test_strategies_place_frames_as_the_original(case: int) -> None:
    recorded = tensors("mask_io")
    text, align = RECORDED[case]
    strategies = parse_mask_strategies(text)
    start = torch.zeros(1, 4, 15, 2, 2)
    latents, mask = apply_mask_strategies(start, [recorded["ref"][None]], strategies, align=align)
    assert torch.equal(latents, recorded[f"{case}.z"])
    assert torch.equal(mask, recorded[f"{case}.mask"])
    assert not start.any(), "the latents given stay as they are"


@pytest.mark.parametrize(
    ("start", "expected"), [(2, 0), (3, 5), (7, 5), (8, 10), (9, 10), (14, 10), (-1, 10), (-15, 0)]
)
def test_starts_move_to_the_nearest_chunk_that_is_whole(start: int, expected: int) -> None:
    strategy = MaskStrategy(target_start=start)
    _, mask = apply_mask_strategies(torch.zeros(1, 4, 15, 1, 1), [torch.ones(1, 4, 1, 1, 1)], [strategy], align=5)
    assert mask[0].tolist().index(0) == expected


def test_lengths_are_cut_and_one_reference_serves_the_batch() -> None:
    reference = torch.arange(3.0).view(1, 1, 3, 1, 1).expand(1, 4, 3, 1, 1)
    latents, mask = apply_mask_strategies(
        torch.full((2, 4, 4, 1, 1), 9.0), [reference], [MaskStrategy(target_start=2, reference_start=1, length=9)]
    )
    assert latents[:, 0, :, 0, 0].tolist() == [[9, 9, 1, 2]] * 2
    assert mask.tolist() == [[1, 1, 0, 0]] * 2


@pytest.mark.parametrize("text", ["a", "0,0,0,0,1,2", "0,0,0,0,1,-0.1", "0,0,0,0,1,0,0", "0.5", ",", "0,0,0,0,1,nan"])
def test_a_wrong_strategy_is_named(text: str) -> None:
    with pytest.raises(UserError, match="`mask_strategy` must be groups"):
        parse_mask_strategies(text)


def test_a_strategy_without_its_reference_is_named() -> None:
    latents, references = torch.zeros(1, 4, 5, 1, 1), [torch.zeros(1, 4, 1, 1, 1)]
    with pytest.raises(UserError, match="reference 1 of 1"):
        apply_mask_strategies(latents, references, parse_mask_strategies("0,1"))
    with pytest.raises(UserError, match="latent frame 7 of 5"):
        apply_mask_strategies(latents, references, parse_mask_strategies("0,0,0,7"))
    with pytest.raises(UserError, match="latent frame -2 of 1"):
        apply_mask_strategies(latents, references, parse_mask_strategies("0,0,-2"))


def test_references_without_strategies_mean_the_usual() -> None:
    video = torch.zeros(1, 4, 3, 1, 1)
    assert usual_strategies(0, [], length=5) == []
    assert usual_strategies(1, [], length=5) == parse_mask_strategies("0")
    assert usual_strategies(2, [], length=5) == parse_mask_strategies("0;0,1,0,-1,1")
    assert usual_strategies(0, [video], length=5) == parse_mask_strategies("0,0,-3,0,3")
    assert continuation(2, 4, length=5, edit_ratio=0.5) == MaskStrategy(
        loop=2, reference=4, reference_start=-5, length=5, edit_ratio=0.5
    )
    for num_images, videos in ((3, []), (1, [video])):
        with pytest.raises(UserError, match="need a `mask_strategy`"):
            usual_strategies(num_images, videos, length=5)


def test_frames_join_with_noise_once_at_their_edit_ratio() -> None:
    frames, latents = FrameMask(torch.tensor([[0.0, 0.3, 1.0]])), torch.full((1, 1, 3, 1, 1), 8.0)
    drawn = []

    def noise() -> Tensor:
        drawn.append(1)
        return torch.ones_like(latents)

    seen = []
    for timestep in (1000, 500, 300, 100):
        entered, active = frames.enter(latents, timestep, noise)
        seen.append((entered.flatten().tolist(), active[0].tolist()))
    assert seen[:2] == [([8, 8, 8], [False, False, True])] * 2
    assert seen[2][0] == pytest.approx([8, 0.7 * 8 + 0.3, 8])
    assert [active for _, active in seen[2:]] == [[False, True, True]] * 2
    assert seen[3][0] == [8, 8, 8]
    assert len(drawn) == 1
    active = torch.tensor([[False, True, True]])
    assert kept_apart(latents + 1, latents, active).flatten().tolist() == [8, 9, 9]
