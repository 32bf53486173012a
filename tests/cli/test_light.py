"""What a wrong command line and a page of help cost: no large library is loaded for them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

LARGE = ("torch", "diffusers", "transformers", "matplotlib", "cv2")
PAGES = (
    *("", "generate", "rollout", "compare", "models", "bench"),
    *("session", "session show", "session branch", "session rewind", "session clean"),
    *("convert", "convert open-sora", "convert causal-wan"),
    *("train", "train vae", "train transformer", "train causal", "train offline", "train export"),
    "train export-causal",
)
HELP = [[*page.split(), "--help"] for page in PAGES]
WRONG = [
    ["no-such-command"],
    ["generate"],
    ["generate", ""],
    ["generate", "a red circle", "--no-such-flag"],
    ["generate", "a red circle", "--num-frames", "many"],
    ["generate", "a red circle", "--num-frames", "0"],
    ["generate", "a red circle", "--num-frames", "0", "--model", "{folder}"],
    ["generate", "a red circle", "--fps", "0"],
    ["generate", "a red circle", "--guidance-scale", "-1"],
    ["generate", "a red circle", "--threshold", "nan"],
    ["generate", "a red circle", "--predictor", "guess"],
    ["generate", "a red circle", "--argument", "no value"],
    ["generate", "a red circle", "--device", "toaster"],
    ["generate", "a red circle", "--dtype", "int8"],
    ["generate", "a red circle", "--offload", "cellar"],
    ["generate", "a red circle", "--model", "no such model"],
    ["generate", "a red circle", "--image", "no such file"],
    ["generate", "a red circle", "--video", "no such file"],
    ["generate", "--prompt-file", "no such file"],
    ["generate", "a red circle", "--output", "video.avi"],
    ["generate", "a red circle", "a blue square", "--output", "video.mp4"],
    ["generate", "a red circle", "--lora", "no such file:0.5"],
    ["generate", "a red circle", "--transformer", "no such file.gguf"],
    ["rollout"],
    ["rollout", ""],
    ["rollout", "a red circle", "--no-such-flag"],
    ["rollout", "a red circle", "--seconds", "0"],
    ["rollout", "a red circle", "--height", "0"],
    ["rollout", "a red circle", "--passes", "fast"],
    ["rollout", "a red circle", "--device", "toaster"],
    ["rollout", "a red circle", "--image", "no such file"],
    ["rollout", "a red circle", "--lora", "no such file"],
    ["rollout", "--timeline", "no such file"],
    ["rollout", "a red circle", "--resume"],
    ["rollout", "a red circle", "--branch", "other", "--checkpoint", "folder"],
    ["rollout", "a red circle", "--decoder", "no such file"],
    ["compare", "no such file", "nor this"],
    ["session", "show", "no such folder"],
    ["convert", "causal-wan", "--checkpoint", "x", "--output", "y", "--dtype", "int8"],
    ["models", "--no-such-flag"],
]
# Runs commands one after the other and prints the exit code of each, and which large libraries are there after it.
CODE = """
import json, sys
from vidaccel.cli import run
for arguments in json.loads(sys.argv[1]):
    code = run(arguments)
    print(json.dumps([arguments, code, sorted(set(json.loads(sys.argv[2])) & set(sys.modules))]), file=sys.stderr)
"""


def outcomes(commands: list[list[str]], folder: Path) -> list[tuple[list[str], int, list[str]]]:
    result = subprocess.run(
        [sys.executable, "-c", CODE, json.dumps(commands), json.dumps(LARGE)],
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
    )
    return [tuple(json.loads(line)) for line in result.stderr.splitlines() if line.startswith("[[")]


@pytest.mark.slow
def test_help_and_a_wrong_command_line_load_no_large_library(tiny_wan_folder: Path, tmp_path: Path) -> None:
    wrong = [[word.format(folder=tiny_wan_folder) for word in command] for command in WRONG]
    found = outcomes([*HELP, *wrong], tmp_path)
    assert [arguments for arguments, _, _ in found] == [*HELP, *wrong]
    assert [code for _, code, _ in found] == [0] * len(HELP) + [2] * len(WRONG)
    assert [(arguments, loaded) for arguments, _, loaded in found if loaded] == []


@pytest.mark.slow
def test_the_check_sees_a_library_that_is_loaded(tmp_path: Path) -> None:
    (_, code, loaded), *_ = outcomes([["session", "show", str(tmp_path)]], tmp_path)
    assert (code, "torch" in loaded) == (2, True)
