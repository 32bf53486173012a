"""`vidaccel bench` and `vidaccel train` pass their flags on and say what is wrong in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from vidaccel.cli import run

SIZES = ("--height", "32", "--width", "32", "--num-frames", "5")


def test_the_easycache_bench_writes_json_table_and_plot(tiny_wan_folder: Path, tmp_path: Path) -> None:
    flags = ("--num-prompts", "1", "--thresholds", "0.5", "--predictors", "output", "--metrics", "psnr,ssim")
    baselines = ("--uniform-intervals", "2", "--fewer-steps", "10", "--num-inference-steps", "14")
    arguments = [
        "bench",
        "easycache",
        "--model",
        str(tiny_wan_folder),
        "--output",
        str(tmp_path),
        "--weights",
        "random",
    ]
    assert run([*arguments, *SIZES, *flags, *baselines]) == 0
    result = json.loads((tmp_path / "easycache.json").read_text())
    assert result["environments"][0]["weights"] == "random"
    assert {path.name for path in tmp_path.iterdir()} == {"easycache.json", "easycache.md", "easycache.png"}


def test_the_speed_bench_runs_at_toy_size(tmp_path: Path) -> None:
    flags = ("--shape", "toy", "--num-inference-steps", "6", "--repeats", "1", "--device", "cpu")
    assert run(["bench", "speed", "--output", str(tmp_path), *SIZES, *flags]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"speed.json", "speed.md"}


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("full"), RuntimeError("[x] can't allocate memory: you ...")])
def test_too_little_memory_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, error: Exception
) -> None:
    def full(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("vidaccel.bench.speed._call_arguments", full)
    assert run(["bench", "speed", "--output", str(tmp_path), "--shape", "toy", "--device", "cpu"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "Too little memory on cpu" in line


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("easycache", "--thresholds", "small"), "thresholds"),
        (("teachers", "--merge", ","), "`merge` must be values with commas between them, got ','"),
        (("teachers", "--seeds", "0,18446744073709551616"), "`seed` must be from 0 to 2**63 - 1"),
        (("easycache", "--metrics", "beauty"), "beauty"),
        (("easycache", "--seeds", "1,2,1"), "seeds"),
        (("speed", "--attention", "magic", "--device", "cpu"), "magic"),
        (("easycache", "--model", "no-such-model"), "no-such-model"),
        (("easycache", "--prompt-file", "no such file"), "no such file"),
        (("quality", "--num-prompts", "0"), "num_prompts"),
        (("quality", "--threshold", "-1"), "threshold"),
        (("speed", "--shape", "huge"), "huge"),
        (("speed", "--num-frames", "6"), "4k + 1"),
        (("cooking",), "cooking"),
    ],
)
def test_a_wrong_value_is_one_line(
    arguments: tuple[str, ...],
    word: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["bench", *arguments]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("vidaccel: ")
    assert word in line


def test_training_is_mounted_and_refuses_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert run(["train", "vae", "--output", str(tmp_path / "vae")]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "seconds" in line
    assert not (tmp_path / "vae").exists()


@pytest.mark.parametrize("group", [(), ("bench",), ("train",)])
def test_a_group_without_command_shows_its_help(group: tuple[str, ...], capsys: pytest.CaptureFixture) -> None:
    run(list(group))
    captured = capsys.readouterr()
    assert "Usage" in captured.out + captured.err
    assert "vidaccel: " not in captured.err
