"""Makes docs/images/retrieval.png and rollout-retrieval.png: a place that slow-fast memory forgets, and brings back.

`python docs/site/retrieval.py` takes about two minutes on one CPU core. The camera of the embedded student sees a
landmark, comes home, goes eight times to the other side and back, which fills slow memory, and returns; once with the
student's own memory and once with frames that come back by what the camera saw. What was asked is written to
retrieval.json beside the pictures, and a test reads the same rollouts with the world's oracle.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from vidaccel.bench.student.readings import STILL_FRAMES
from vidaccel.generation.loading import load_pipeline
from vidaccel.memory import MemoryPolicy, parse_memory
from vidaccel.rollout.camera import CameraPath
from vidaccel.rollout.report import RolloutReport

FOLDER = Path(__file__).resolve().parents[1] / "images"
PROMPT, SEED, FPS = "a red ball hops up and down on a grassy meadow", 8, 16
DETOURS, MOVE, REST = 8, 0.75, 1.5  # times, and seconds


def main() -> None:
    """Make both rollouts, then the pictures and the numbers."""
    pipe = load_pipeline("wan-tiny-causal", device="cpu")
    text, first, length = way()
    words = pipe.config.memory.replace("slow-fast", "view-retrieval")
    own, _ = made(pipe, text, pipe.memory_config(), length)
    back, report = made(pipe, text, parse_memory(words), length)
    save(
        {
            f"first visit, {first:.1f} s": still(own, round(first * FPS)),
            f"return after {length - first:.0f} s and {DETOURS} other trips,\nslow-fast memory": still(own, len(own)),
            "the same, with frames\nthat come back": still(back, len(back)),
        },
        FOLDER / "retrieval.png",
    )
    report.save_picture(FOLDER / "rollout-retrieval.png")
    numbers: dict[str, Any] = {"prompt": PROMPT, "seed": SEED, "fps": FPS, "camera": text, "memory": words}
    numbers |= {"first_visit": round(first * FPS), "frames": len(own)}
    (FOLDER / "retrieval.json").write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")


def way() -> tuple[str, float, float]:
    """The camera's moves as a command takes them, when the first visit ends, and how long all of it is."""
    moves, now = [], REST
    for side, back in (("right", "left"), *[("left", "right")] * DETOURS, ("right", "")):
        for direction in filter(None, (side, back)):
            moves.append(f"{now:g}-{now + MOVE:g} {direction} 1")
            now += MOVE + REST
    return ", ".join(moves), 2 * REST + MOVE, now


def made(pipe: Any, camera: str, memory: MemoryPolicy, seconds: float) -> tuple[Tensor, RolloutReport]:
    """The video (F, 3, H, W) uint8, and what was remembered when."""
    report = RolloutReport(memory, pipe.grid(fps=FPS), passes_per_chunk=pipe.student().passes_per_chunk)
    frames, count = [], round(seconds * FPS)
    path = CameraPath.parse(camera)
    for chunk in pipe.stream(PROMPT, num_frames=count, camera=path, memory=memory, seeds=(SEED,)):
        report.add(chunk)
        frames.append(chunk.frames[0])
    return torch.cat(frames)[:count], report


def still(video: Tensor, end: int) -> Tensor:
    """The last frames before `end` without what moves."""
    return video[end - STILL_FRAMES : end].median(dim=0).values


def save(pictures: dict[str, Tensor], path: Path) -> None:
    """The pictures beside each other, each with its words below."""
    figure = Figure(figsize=(7.2, 2.9), layout="constrained")
    for axes, (words, picture) in zip(figure.subplots(1, len(pictures)), pictures.items(), strict=True):
        axes.imshow(picture.permute(1, 2, 0).numpy(), interpolation="nearest")
        axes.set_xlabel(words, fontsize=9)
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
