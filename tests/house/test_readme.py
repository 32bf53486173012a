"""The README: its commands are the ones CI runs, its examples run, its tree, figures and moving picture are true."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from vidaccel.video.files import read_video
from vidaccel.video.metrics import psnr
from vidaccel.world import read_clip, vocabulary

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
    assert len(rows) == 9
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
def test_the_second_example_writes_the_video_of_its_prompt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(blocks("python")[1], "README.md", "exec"), {})
    assert len(capsys.readouterr().out.splitlines()) == 8
    assert shown(read_video(tmp_path / "star.mp4")[0]) == ("blue", "star", "loop", "night")


@pytest.fixture(scope="module")
def panels() -> tuple[Tensor, ...]:
    """The three videos of the picture, (F, 3, 128, 128) each."""
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
def test_the_videos_of_the_picture_show_what_their_prompts_say(panels: tuple[Tensor, ...]) -> None:
    plain, cached, rollout = panels
    assert shown(plain[:49]) == shown(cached[:49]) == ("red", "ball", "hop", "meadow")
    starts = [*NUMBERS["starts"], NUMBERS["frames"]]
    parts = [shown(rollout[start:stop]) for start, stop in pairwise(starts)]
    assert parts == [
        ("red", "ball", "hop", "meadow"),
        ("red", "ball", "loop", "meadow"),
        ("blue", "star", "loop", "night"),
    ]


def test_both_halves_of_the_picture_s_pair_are_one_video(panels: tuple[Tensor, ...]) -> None:
    assert psnr(panels[0][:49], panels[1][:49]) > 25


def test_the_words_beside_the_picture_are_its_numbers() -> None:
    plain, cached, distance = (NUMBERS[name] for name in ("plain_forwards", "easycache_forwards", "psnr"))
    assert f"with {plain} and with {cached} forwards of the transformer, {distance:g} dB apart" in README
    seconds = [span["start_seconds"] for span in NUMBERS["timeline"][1:]]
    assert f"changes after {seconds[0]} and after {seconds[1]} seconds" in README
    lines = (ROOT / "docs" / "how-to" / "timeline.md").read_text(encoding="utf-8")
    assert all(span["prompt"] in lines for span in NUMBERS["timeline"])
