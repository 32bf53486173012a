"""Makes docs/images/front.webp, the moving picture at the top of the README, from the embedded models.

`python docs/site/front.py` takes about a minute and a half on one CPU core. Left, one prompt with every step computed
and with EasyCache; right, a rollout whose prompt changes twice. What was asked and counted is written to front.json
beside it, and a test reads the picture with the world's oracle.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from matplotlib import font_manager
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from vidaccel import EasyCacheConfig
from vidaccel.generation.generate import generate
from vidaccel.generation.loading import load_pipeline
from vidaccel.generation.request import GenerationRequest
from vidaccel.rollout.timeline import PromptSpan, PromptTimeline

FOLDER = Path(__file__).resolve().parents[1] / "images"
PROMPT = "a red ball hops up and down on a grassy meadow"
TIMELINE = PromptTimeline(
    (
        PromptSpan(0, PROMPT),
        PromptSpan(5, "a red ball flies in circles on a grassy meadow"),
        PromptSpan(10, "a blue star flies in circles at night under the stars", "hard"),
    )
)
SEED, SECONDS, FPS = 0, 15, 16
SIDE, GAP, TOP, BOTTOM = 256, 14, 28, 44  # pixels of a panel, between panels, and of the lines of text
LEFTS = (0, SIDE + GAP, 2 * (SIDE + GAP) + GAP)  # of the panels; a wider gap before the rollout
PAPER, INK, GREY = "#ffffff", "#1d1d1f", "#6e6e73"


def main() -> None:
    """Make the three videos, put them side by side, and write the picture and its numbers."""
    plain, cached, numbers = halves()
    video, changes = rollout()
    captions = (
        (f"every step: {numbers['plain_forwards']} forwards", PROMPT),
        (f"EasyCache: {numbers['easycache_forwards']} forwards", f"same prompt and seed, {numbers['psnr']:.0f} dB"),
    )
    pages = []
    for frame in range(len(video)):
        page, text = [number for number, (start, _) in enumerate(changes) if start <= frame][-1], "rollout, in chunks"
        rows = (*captions, (f"{text}: {frame / FPS:4.1f} s", changes[page][1]))
        clips = (plain[frame % len(plain)], cached[frame % len(cached)], video[frame])
        pages.append(draw(clips, rows))
    save(pages, FOLDER / "front.webp")
    numbers |= {"timeline": TIMELINE.to_dict()["spans"], "starts": [start for start, _ in changes], "fps": FPS}
    numbers |= {"frames": len(video), "lefts": LEFTS, "top": TOP, "side": SIDE}
    (FOLDER / "front.json").write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")


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


def rollout() -> tuple[Tensor, list[tuple[int, str]]]:
    """The rollout as (F, 3, H, W) uint8, and for each prompt the frame it starts with."""
    pipe = load_pipeline("wan-tiny-causal", device="cpu")
    frames: list[Tensor] = []
    changes: list[tuple[int, str]] = []
    for chunk in pipe.stream(TIMELINE, seeds=(SEED,), height=128, width=128, max_sequence_length=64):
        done = sum(len(part) for part in frames)
        if done >= SECONDS * FPS:
            break
        if not changes or changes[-1][1] != chunk.prompt:
            changes.append((done, chunk.prompt))
        frames.append(chunk.frames[0])
    return torch.cat(frames)[: SECONDS * FPS], changes


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
