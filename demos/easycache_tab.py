"""The tab of EasyCache: a prompt, a threshold, and the video beside its twin without reuse."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from inputs import MOST_SEED, checked_count, checked_number, checked_prompt

from vidaccel.catalog.presets import Preset
from vidaccel.catalog.spec import GenerationDefaults
from vidaccel.easycache.config import EasyCacheConfig
from vidaccel.generation.generate import Generation, generate, unknown_words
from vidaccel.generation.request import request_for
from vidaccel.video.files import write_video
from vidaccel.video.frames import side_by_side
from vidaccel.video.metrics import compare_videos

EXAMPLES = ("a red star hops up and down in the cold snow, near a house", "a blue ball flies in circles at the seaside")
MOST_STEPS = 100
MOST_THRESHOLD = 0.5


def make(
    pipe: Any,
    defaults: GenerationDefaults,
    folder: Path,
    *,
    prompt: str,
    threshold: float,
    num_inference_steps: int,
    seed: int,
) -> tuple[str, str, str]:
    """Generate with and without reuse; paths of the side-by-side video and of the picture, and the figures as text."""
    request = request_for(defaults, prompt, num_inference_steps=num_inference_steps, seed=seed)
    plain = generate(pipe, request)
    config = replace(EasyCacheConfig.published(Preset.for_pipeline(pipe)), threshold=threshold)
    cached = generate(pipe, request, easycache=config)
    assert cached.report is not None  # EasyCache was asked for
    video = write_video(
        folder / "video.mp4", side_by_side(plain.frames, cached.frames, ("all steps", "EasyCache")), fps=defaults.fps
    )
    picture = cached.report.save_picture(folder / "decisions.png")
    return str(video), str(picture), _figures(plain, cached, words=unknown_words(pipe, prompt))


def _figures(plain: Generation, cached: Generation, *, words: tuple[str, ...]) -> str:
    comparison = compare_videos(plain.frames, cached.frames, metrics=("psnr", "ssim"))
    rows = [
        "| | all steps | EasyCache |",
        "|---|---|---|",
        f"| transformer forwards | {plain.num_forwards} | {cached.num_forwards} |",
        f"| denoising | {plain.denoising_seconds:.1f} s | {cached.denoising_seconds:.1f} s |",
        f"| PSNR | | {comparison.psnr:.1f} dB |",
        f"| SSIM | | {comparison.ssim:.4f} |",
    ]
    if words:
        rows += ["", f"The model does not know: {', '.join(words)}."]
    return "\n".join(rows)


def add_easycache_tab(pipe: Any, defaults: GenerationDefaults, folder: Path) -> None:
    """Put the tab into the `gradio.Blocks` that is being built. folder: where files are, until they are sent."""
    import gradio

    def on_click(prompt: str, threshold: float, steps: float, seed: float) -> Iterator[tuple[str, str, str]]:
        try:
            values: dict[str, Any] = {
                "prompt": checked_prompt(prompt),
                "threshold": checked_number("The threshold", threshold, least=0, most=MOST_THRESHOLD),
                "num_inference_steps": checked_count("The number of steps", steps, least=1, most=MOST_STEPS),
                "seed": checked_count("The seed", seed, least=0, most=MOST_SEED),
            }
            with tempfile.TemporaryDirectory(dir=folder) as private:
                yield make(pipe, defaults, Path(private), **values)  # gradio copies the files before it asks for more
        except ValueError as error:
            raise gradio.Error(str(error), print_exception=False) from error

    with gradio.Row():
        prompt = gradio.Textbox(EXAMPLES[0], label="Prompt", scale=3)
        seed = gradio.Number(0, label="Seed", precision=0, minimum=0)
    with gradio.Row():
        threshold = gradio.Slider(0, MOST_THRESHOLD, 0.05, step=0.005, label="Threshold (0 computes every step)")
        steps = gradio.Slider(1, MOST_STEPS, defaults.num_inference_steps, step=1, label="Steps")
    button = gradio.Button("Generate", variant="primary")
    with gradio.Row():
        video = gradio.Video(label="All steps | EasyCache", autoplay=True, loop=True)
        picture = gradio.Image(label="Decisions")
    figures = gradio.Markdown()
    gradio.Examples([[example] for example in EXAMPLES], inputs=[prompt])
    button.click(on_click, [prompt, threshold, steps, seed], [video, picture, figures], api_name="easycache")
