"""A minute with one prompt and a camera that holds: does the subject keep its colour and shape, and does the place?"""

from __future__ import annotations

from itertools import count as numbers
from typing import Any

from vidaccel.bench.student.readings import read_part
from vidaccel.bench.student.rollouts import CHUNK_PIXELS, STRIDE, Filming, Script
from vidaccel.bench.student.sheet import Measured, Row
from vidaccel.world import FPS, Prompt, unseen_prompts

WINDOW_SECONDS = 5
PART = 2 * FPS  # the last frames of a window, which are read
MOTIONS = ("still", "hop", "loop")  # that stay in view
_SHOWN = (0, 2, 5, 8, 11)  # windows in the contact sheet


def measure_subjects(filming: Filming, *, count: int, seed: int, seconds: int) -> Measured:
    """`count` videos of `seconds`, read at the end of every five seconds."""
    prompts = staying_prompts(count, seed=seed)
    chunks = -(-(seconds * FPS + STRIDE - 1) // CHUNK_PIXELS)
    latents = filming.film([Script(seed=one.seed, prompts=((0, one.text),)) for one in prompts], chunks)
    tries: list[dict[str, Any]] = [{"prompt": one.text, "asked": _asked(one), "shown": []} for one in prompts]
    rows = []
    for window in range(seconds // WINDOW_SECONDS):
        end = (window + 1) * WINDOW_SECONDS * FPS
        frames = filming.decode(latents, end - PART, end)
        for number, clip in enumerate(frames):
            tries[number]["shown"].append(read_part(clip).to_dict())
        if window in _SHOWN:
            rows.append(Row(label=f"one prompt, {end // FPS} s", pictures=frames[:, -1]))
    return Measured(tries=tries, rows=rows)


def staying_prompts(count: int, *, seed: int = 0) -> list[Prompt]:
    """Prompts that training never sees, of subjects that stay and a camera that holds."""
    found: list[Prompt] = []
    for size in (4 * count * 2**times for times in numbers()):
        found = [one for one in unseen_prompts(size, seed=seed) if one.motion in MOTIONS and one.camera == "hold"]
        if len(found) >= count:
            break
    return found[:count]


def _asked(prompt: Prompt) -> dict[str, str]:
    return {name: getattr(prompt, name) for name in ("colour", "shape", "motion", "background")}
