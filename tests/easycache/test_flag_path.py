"""The way of a setting from the command line to the equation it is for passes few files."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import is_dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import vidaccel
from tests.support.tiny_models import save_tiny_wan
from vidaccel.cli import run

THRESHOLD = 0.0123456789  # found nowhere by accident
PACKAGE = Path(vidaccel.__file__).parent
FLAGS = ("--num-frames", "9", "--height", "32", "--width", "32", "--num-inference-steps", "8", "--warmup-steps", "3")


def holds(value: Any, *, depth: int = 2) -> bool:
    """Whether a value is the threshold, or settings that it stands in."""
    if isinstance(value, float):
        return value == THRESHOLD
    if depth == 0:
        return False
    if isinstance(value, Mapping):
        return any(holds(part, depth=depth - 1) for part in value.values())
    return is_dataclass(value) and any(holds(part, depth=depth - 1) for part in vars(value).values())


@contextmanager
def followed(files: list[str]) -> Iterator[None]:
    """Note every file of the package with a function that is handed the threshold, until the rule has it.

    A method of the settings themselves is not handed them. The rule keeps them and compares, equation 6.
    """
    arrived = False

    def watch(frame: FrameType, event: str, _: Any) -> None:
        nonlocal arrived
        code = frame.f_code
        if event != "call" or arrived or not code.co_filename.startswith(str(PACKAGE)):
            return
        count = code.co_argcount + code.co_kwonlyargcount
        names = [name for name in code.co_varnames[:count] if name != "self"]
        if any(holds(frame.f_locals.get(name)) for name in names):
            files.append(str(Path(code.co_filename).relative_to(PACKAGE)))
        arrived = code.co_qualname == "EasyCacheRule.__init__"

    sys.setprofile(watch)
    try:
        yield
    finally:
        sys.setprofile(None)
    assert arrived


def test_the_threshold_passes_five_files_from_its_flag_to_its_comparison(tmp_path: Path) -> None:
    folder, files = str(save_tiny_wan(tmp_path / "model")), []
    command = ["generate", "a red circle", "--model", folder, "--output", str(tmp_path / "video.mp4"), *FLAGS]
    assert run([*command, "--threshold", "0.5", "--overwrite"]) == 0  # what is loaded once is not in the way
    with followed(files):
        assert run([*command, "--threshold", str(THRESHOLD), "--overwrite"]) == 0
    way = list(dict.fromkeys(files))
    assert len(way) <= 5, way
    assert (way[0], way[-1]) == ("cli/generate.py", "easycache/rule.py")
