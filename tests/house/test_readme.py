"""The README: its commands are the ones CI runs, its examples run, its tree, figures and moving picture are true."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from vidaccel.bench.student.readings import STILL_FRAMES, SeenLandmark, seen_landmarks
from vidaccel.video.files import read_video
from vidaccel.video.metrics import psnr
from vidaccel.world import asked_by, read_clip, vocabulary

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PICTURE = ROOT / "docs" / "images" / "front.webp"
NUMBERS = json.loads(PICTURE.with_suffix(".json").read_text(encoding="utf-8"))


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def shown(clip: Tensor) -> tuple[str | None, ...]:
    """Colour, shape, motion and place that the oracle reads in (F, 3, H, W)."""
    reading = read_clip(clip)
    return reading.colour, reading.shape, reading.motion, reading.background


def landmark_of(clip: Tensor) -> SeenLandmark:
    """What stands there in the last frames of (F, 3, H, W) in which the camera holds."""
    return seen_landmarks(clip[-STILL_FRAMES:].median(dim=0).values[None])[0]


def is_same(one: SeenLandmark, other: SeenLandmark) -> bool:
    return (one.kind, one.colour) == (other.kind, other.colour) and abs(one.x - other.x) <= 4


def test_it_is_about_a_hundred_lines() -> None:
    assert len(README.splitlines()) <= 130


def test_the_two_marked_commands_make_a_video_and_pass_the_tests() -> None:
    commands = re.findall(r"^<!-- ci: run -->\n```bash\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
    assert len(commands) == 2
    install, test = commands
    assert install.startswith("pip install -c constraints.txt . && vidaccel generate ")
    assert "[test]" in test
    assert test.strip().endswith("pytest")


def test_the_first_prompt_uses_only_words_the_embedded_model_knows() -> None:
    prompt = re.search(r'vidaccel generate "([^"]+)"', README)
    assert prompt is not None
    assert set(prompt[1].replace(",", "").split()) <= set(vocabulary())


def test_the_number_of_words_is_the_real_one() -> None:
    for page in (README, *((ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("start.md",))):
        assert f"its {len(vocabulary())} words" in page


def test_the_tree_names_what_exists_and_every_package() -> None:
    tree = README.split("## What is where\n\n```\n")[1].split("```")[0]
    listed = set()
    for line in tree.splitlines():
        names, _ = re.split(r"\s{2,}|(?<=/) (?=[a-z]+ [a-z])", line.strip(), maxsplit=1)
        listed |= {("vidaccel/" if line.startswith(" ") else "") + name for name in names.split(", ")}
    missing = [name for name in listed if not (ROOT / name).exists()]
    assert not missing
    folders = {f"vidaccel/{path.parent.name}/" for path in (ROOT / "vidaccel").glob("*/__init__.py")}
    assert folders | {"vidaccel/errors.py"} <= listed


def test_each_figure_stands_in_the_result_that_it_links_to() -> None:
    rows = re.findall(r"^\| \[[^]]+\]\(([^)]+)\) \| (\w+) \| ([^|]+) \| ([^|]+) \|$", README, flags=re.MULTILINE)
    assert len(rows) == 10
    for path, weights, figure, _ in rows:
        text = (ROOT / path).read_text(encoding="utf-8")
        assert f"weights: {weights}" in text
        assert not [number for number in re.findall(r"\d+\.\d+", figure) if number not in text], (path, figure)


def test_each_half_has_an_example_of_at_most_ten_lines() -> None:
    examples = blocks("python")
    assert len(examples) == 2
    assert all(len([line for line in example.splitlines() if line.strip()]) <= 10 for example in examples)


@pytest.mark.shipped
def test_the_first_example_writes_the_video_of_its_prompt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)  # takes half a minute on a busy core: it is the example as it stands, 49 frames in 50 steps
    exec(compile(blocks("python")[0], "README.md", "exec"), {})
    assert "of 50 steps computed" in capsys.readouterr().out
    assert shown(read_video(tmp_path / "ball.mp4")[0]) == ("red", "ball", "hop", "meadow")


@pytest.mark.shipped
def test_the_second_example_shows_the_landmark_of_its_comment_at_both_visits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(blocks("python")[1], "README.md", "exec"), {})
    assert len(capsys.readouterr().out.splitlines()) == 16
    video = read_video(tmp_path / "trip.mp4")[0]
    (home, first, again, second) = (video[start:stop] for start, stop in NUMBERS["holds"].values())
    assert shown(home) == shown(again) == ("red", "ball", "hop", "meadow")
    assert landmark_of(first).is_valid
    assert landmark_of(first).kind == "windmill"
    assert is_same(landmark_of(first), landmark_of(second))


@pytest.fixture(scope="module")
def panels() -> tuple[Tensor, ...]:
    """The four videos of the picture, (F, 3, 128, 128) each."""
    top, side = NUMBERS["top"], NUMBERS["side"]
    clips: list[list[Tensor]] = [[] for _ in NUMBERS["lefts"]]
    with Image.open(PICTURE) as picture:
        for number in range(NUMBERS["frames"]):
            picture.seek(number)
            page = picture.convert("RGB")
            for clip, left in zip(clips, NUMBERS["lefts"], strict=True):
                panel = page.crop((left, top, left + side, top + side)).resize((128, 128), Image.Resampling.BOX)
                clip.append(torch.from_numpy(np.array(panel)).permute(2, 0, 1) / 255)
    return tuple(torch.stack(clip) for clip in clips)


def test_the_picture_is_small_enough_to_be_loaded_with_a_page() -> None:
    assert PICTURE.stat().st_size < 3_000_000


@pytest.mark.shipped
def test_the_videos_of_the_picture_show_what_their_prompt_says(panels: tuple[Tensor, ...]) -> None:
    plain, cached, *rollouts = panels
    assert shown(plain[:49]) == shown(cached[:49]) == ("red", "ball", "hop", "meadow")
    homes = [NUMBERS["holds"][name] for name in ("home", "home again")]
    for rollout in rollouts:
        assert [shown(rollout[start:stop]) for start, stop in homes] == [("red", "ball", "hop", "meadow")] * 2


@pytest.mark.shipped
def test_the_picture_shows_the_landmark_of_the_first_visit_again_only_with_slow_fast_memory(
    panels: tuple[Tensor, ...],
) -> None:
    visits = [slice(*NUMBERS["holds"][name]) for name in ("first visit", "second visit")]
    (first, second), (as_first, forgotten) = ([landmark_of(panel[visit]) for visit in visits] for panel in panels[2:])
    assert first.is_valid
    assert first.kind == "windmill" != asked_by(NUMBERS["prompt"]).landmark
    assert second.is_valid
    assert is_same(first, second)
    assert is_same(first, as_first)
    assert not is_same(first, forgotten)


def test_the_rollouts_of_the_picture_part_only_after_the_camera_came_home(panels: tuple[Tensor, ...]) -> None:
    start, stop = NUMBERS["holds"]["first visit"]
    assert psnr(panels[2][:stop], panels[3][:stop]) > 25
    assert psnr(panels[2][-stop + start :], panels[3][-stop + start :]) < 25


def test_both_halves_of_the_picture_s_pair_are_one_video(panels: tuple[Tensor, ...]) -> None:
    assert psnr(panels[0][:49], panels[1][:49]) > 25


def test_the_words_beside_the_picture_are_its_numbers() -> None:
    plain, cached, distance = (NUMBERS[name] for name in ("plain_forwards", "easycache_forwards", "psnr"))
    assert f"with {plain} and with {cached} forwards of the transformer, {distance:g} dB apart" in README
    assert blocks("bash")[0].count(f'vidaccel rollout "{NUMBERS["prompt"]}" --camera "{NUMBERS["camera"]}"') == 1
    assert f'camera = "{NUMBERS["camera"]}"' in blocks("python")[1]
    assert f"`--memory {NUMBERS['window']}`" in README
    assert NUMBERS["seed"] == 0  # the default of what is generated
    assert f"--seed {NUMBERS['rollout_seed']} --output windmill.mp4" in blocks("bash")[0]
    assert f"seeds=({NUMBERS['rollout_seed']},)" in blocks("python")[1]
