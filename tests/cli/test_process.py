"""The command as a process of its own: exit codes, and Ctrl-C at an unknown moment."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

COMMAND = [sys.executable, "-m", "vidaccel", "generate", "a red circle"]
SIZES = ["--height", "32", "--width", "32", "--num-frames", "5", "--device", "cpu"]

pytestmark = pytest.mark.slow


def test_a_finished_command_returns_0_and_an_error_2(tiny_wan_folder: Path, tmp_path: Path) -> None:
    command = [*COMMAND, *SIZES, "--model", str(tiny_wan_folder), "--num-inference-steps", "2", "--no-cache"]
    made = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    assert made.stderr == ""
    assert (tmp_path / "outputs" / "a-red-circle-seed0.mp4").is_file()
    refused = subprocess.run([*command, "--seed", "x"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert len(refused.stderr.splitlines()) == 1


def test_letters_the_output_lacks_are_replaced(tiny_wan_folder: Path, tmp_path: Path) -> None:
    command = [*COMMAND[:-1], "a réd 漢字", *SIZES, "--model", str(tiny_wan_folder), "--num-inference-steps", "2"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    made = subprocess.run([*command, "--no-cache"], cwd=tmp_path, capture_output=True, env=environment, check=False)
    assert made.returncode == 0, made.stderr
    assert b"a-r?d" in made.stdout


def stopped_by(stop: signal.Signals, command: list[str], *, folder: Path, seconds: float) -> tuple[int, str]:
    """Exit code and messages of a command that gets a signal some seconds after it made its output folder."""
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        while not (folder / "outputs").exists() and process.poll() is None:
            time.sleep(0.05)
        time.sleep(seconds)
        process.send_signal(stop)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    return process.returncode, errors


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT for one child")
@pytest.mark.parametrize(
    ("stop", "seconds", "code"), [(signal.SIGINT, 0.2, 130), (signal.SIGINT, 4.0, 130), (signal.SIGTERM, 4.0, 143)]
)
def test_a_signal_ends_the_command_in_order_and_leaves_nothing(
    tiny_wan_folder: Path, tmp_path: Path, stop: signal.Signals, seconds: float, code: int
) -> None:
    command = [*COMMAND, *SIZES, "--model", str(tiny_wan_folder), "--num-inference-steps", "100000"]
    returned, errors = stopped_by(stop, command, folder=tmp_path, seconds=seconds)
    assert returned == code, errors
    assert "Traceback" not in errors
    if stop == signal.SIGINT:
        assert errors.strip().splitlines()[-1].startswith("vidaccel: interrupted")
    assert list((tmp_path / "outputs").iterdir()) == []
