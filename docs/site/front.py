"""Makes docs/images/front.webp, the moving picture at the top of the README, from the embedded models.

`python docs/site/front.py` takes about two minutes on one CPU core. Left, one prompt with every step computed and with
EasyCache; right, a rollout in which the camera leaves, comes home and leaves again, with slow-fast memory and with a
sliding window. What was asked and counted is written to front.json beside it, and a test reads the picture with the
world's oracles.
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import torch
from matplotlib import font_manager
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from vidaccel import EasyCacheConfig
from vidaccel.generation.generate import generate
from vidaccel.generation.loading import load_pipeline
from vidaccel.generation.request import GenerationRequest
from vidaccel.rollout.camera import CameraPath

FOLDER = Path(__file__).resolve().parents[1] / "images"
PROMPT = "a red ball hops up and down on a grassy meadow"
CAMERA = CameraPath.parse("2-2.75 right 1, 4.25-5 left 1, 9.5-10.25 right 1")
PARTS = ("home", "first visit", "home again", "second visit")  # the holds of the camera between its moves
WINDOW = "window:21"  # of as many frames as the student's own slow-fast memory
SEED, ROLLOUT_SEED = 0, 8
SECONDS, FPS = 12, 16
SIDE, GAP, TOP, BOTTOM = 256, 14, 28, 44  # pixels of a panel, between panels, and of the lines of text
LEFTS = (0, SIDE + GAP, 2 * (SIDE + GAP) + GAP, 3 * (SIDE + GAP) + GAP)  # of the panels; a wider gap in the middle
PAPER, INK, GREY = "#ffffff", "#1d1d1f", "#6e6e73"


def main() -> None:
    """Make the four videos, put them side by side, and write the picture and its numbers."""
    plain, cached, numbers = halves()
    (remembered, holds), (forgotten, _) = rollout(), rollout(WINDOW)
    captions = (
        (f"every step: {numbers['plain_forwards']} forwards", PROMPT),
        (f"EasyCache: {numbers['easycache_forwards']} forwards", f"same prompt and seed, {numbers['psnr']:.0f} dB"),
    )
    pages = []
    for frame in range(len(remembered)):
        below = f"{part_of(frame, holds)}, {frame / FPS:.1f} s"
        rows = (*captions, ("rollout, slow-fast memory", below), ("same seed, sliding window", below))
        clips = (plain[frame % len(plain)], cached[frame % len(cached)], remembered[frame], forgotten[frame])
        pages.append(draw(clips, rows))
    save(pages, FOLDER / "front.webp")
    numbers |= {"rollout_seed": ROLLOUT_SEED, "camera": str(CAMERA)}
    numbers |= {"window": WINDOW, "holds": holds, "seconds": SECONDS, "fps": FPS}
    numbers |= {"frames": len(remembered), "lefts": LEFTS, "top": TOP, "side": SIDE}
    (FOLDER / "front.json").write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")


def part_of(frame: int, holds: dict[str, list[int]]) -> str:
    """What is written below a frame: where the camera is, or where it goes."""
    for part, following in pairwise((*holds, "")):
        start, stop = holds[part]
        if start <= frame < stop:
            return part
        if following and stop <= frame < holds[following][0]:
            return f"to the {following}" if "visit" in following else "back home"
    raise ValueError(f"frame {frame} is after the last part of {holds}.")


def halves() -> tuple[Tensor, Tensor, dict[str, object]]:
    """One prompt without and with EasyCache, as (F, 3, H, W) uint8, and what it took."""
    from vidaccel.video.metrics import psnr

    pipe = load_pipeline("wan-tiny", device="cpu")
    request = GenerationRequest(PROMPT, seed=SEED, num_frames=49, max_sequence_length=64)
    plain = generate(pipe, request)
    cached = generate(pipe, request, easycache=EasyCacheConfig())
    numbers: dict[str, object] = {
        "prompt": PROMPT,
        "seed": SEED,
        "plain_forwards": plain.num_forwards,
        "easycache_forwards": cached.num_forwards,
        "psnr": round(float(psnr(plain.frames, cached.frames)), 1),
    }
    return as_bytes(plain.frames), as_bytes(cached.frames), numbers


def rollout(memory: str | None = None) -> tuple[Tensor, dict[str, list[int]]]:
    """The rollout as (F, 3, H, W) uint8, and for each part, while the camera holds, its first frame and its end."""
    pipe = load_pipeline("wan-tiny-causal", device="cpu")
    grid, num_frames = pipe.grid(fps=FPS), SECONDS * FPS
    options = {"seeds": (ROLLOUT_SEED,), "memory": memory, "height": 128, "width": 128, "max_sequence_length": 64}
    chunks = pipe.stream(PROMPT, num_frames=num_frames, camera=CAMERA, **options)
    video = torch.cat([chunk.frames[0] for chunk in chunks])[:num_frames]
    moves = [(grid.first_pixel_frame(move.chunk), grid.first_pixel_frame(move.end)) for move in CAMERA.on(grid).moves]
    starts, stops = (0, *(stop for _, stop in moves)), (*(start for start, _ in moves), num_frames)
    return video, {part: [start, stop] for part, start, stop in zip(PARTS, starts, stops, strict=True)}


def as_bytes(frames: Tensor) -> Tensor:
    """Frames in [0, 1] as uint8."""
    return (frames * 255).round().clamp(0, 255).byte()


def draw(clips: tuple[Tensor, ...], rows: tuple[tuple[str, str], ...]) -> Image.Image:
    """One frame of the picture: the panels with a line above and a line below each."""
    page = Image.new("RGB", (LEFTS[-1] + SIDE, TOP + SIDE + BOTTOM), PAPER)
    pen = ImageDraw.Draw(page)
    for left, clip, (above, below) in zip(LEFTS, clips, rows, strict=True):
        panel = Image.fromarray(clip.permute(1, 2, 0).numpy()).resize((SIDE, SIDE), Image.Resampling.LANCZOS)
        page.paste(panel, (left, TOP))
        pen.text((left, TOP - 8), above, INK, font(15, bold=True), anchor="ls")
        pen.multiline_text((left, TOP + SIDE + 7), wrapped(below), GREY, font(13), spacing=3)
    return page


def font(size: int, *, bold: bool = False) -> ImageFont.FreeTypeFont:
    """The sans font that comes with matplotlib, so that every machine draws the same."""
    weight = "bold" if bold else "normal"
    return ImageFont.truetype(
        font_manager.findfont(font_manager.FontProperties(family="DejaVu Sans", weight=weight)), size
    )


def wrapped(text: str) -> str:
    """A line for below a panel, broken in two where it is too long for one."""
    words = text.split()
    fits = [count for count in range(len(words), 0, -1) if font(13).getlength(" ".join(words[:count])) <= SIDE]
    return "\n".join(filter(None, (" ".join(words[: fits[0]]), " ".join(words[fits[0] :]))))


def save(pages: list[Image.Image], path: Path) -> None:
    """Write an animated WebP that plays for ever."""
    pages[0].save(path, save_all=True, append_images=pages[1:], duration=1000 // FPS, loop=0, quality=55, method=4)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
