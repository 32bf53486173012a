"""A page to try EasyCache: a prompt, a threshold, and the video beside its twin without reuse.

    pip install "vidaccel[demo]"
    python demos/app.py            # then open the address it prints; only this machine can reach it

The embedded model runs on a CPU; `--model`, `--host` and `--port` change model and address.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

from vidaccel.errors import UserError
from vidaccel.generation import Generation, easycache_settings, generate, request_for, unknown_words
from vidaccel.loading import load_pipeline
from vidaccel.metrics import compare_videos
from vidaccel.registry import EMBEDDED_MODEL, GenerationDefaults, spec_of
from vidaccel.video import side_by_side, write_video

EXAMPLES = ("a red star hops up and down in the cold snow, near a house", "a blue ball flies in circles at the seaside")


def make(
    pipe: Any, defaults: GenerationDefaults, *, prompt: str, threshold: float, num_inference_steps: int, seed: int
) -> tuple[str, str, str]:
    """Generate with and without reuse; paths of the side-by-side video and of the picture, and the figures as text."""
    request = request_for(defaults, prompt, num_inference_steps=num_inference_steps, seed=seed)
    plain = generate(pipe, request)
    config, _ = easycache_settings(pipe, threshold=threshold)
    cached = generate(pipe, request, easycache=config)
    assert cached.report is not None  # EasyCache was asked for
    folder = Path(tempfile.mkdtemp(prefix="vidaccel-"))
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


def build_app(pipe: Any, defaults: GenerationDefaults) -> Any:
    """The page as a `gradio.Blocks`. Raises `UserError` where gradio is not installed."""
    try:
        import gradio
    except ImportError as error:
        raise UserError('The demo needs gradio: pip install -c constraints.txt ".[demo]"') from error

    def on_click(prompt: str, threshold: float, steps: float, seed: float) -> tuple[str, str, str]:
        try:
            return make(
                pipe, defaults, prompt=prompt, threshold=threshold, num_inference_steps=int(steps), seed=int(seed)
            )
        except ValueError as error:
            raise gradio.Error(str(error)) from error

    with gradio.Blocks(title="vidaccel") as app:
        gradio.Markdown("# vidaccel\nOne prompt, with every step computed and with EasyCache.")
        with gradio.Row():
            prompt = gradio.Textbox(EXAMPLES[0], label="Prompt", scale=3)
            seed = gradio.Number(0, label="Seed", precision=0, minimum=0)
        with gradio.Row():
            threshold = gradio.Slider(0, 0.5, 0.05, step=0.005, label="Threshold (0 computes every step)")
            steps = gradio.Slider(1, 100, defaults.num_inference_steps, step=1, label="Steps")
        button = gradio.Button("Generate", variant="primary")
        with gradio.Row():
            video = gradio.Video(label="All steps | EasyCache", autoplay=True, loop=True)
            picture = gradio.Image(label="Decisions")
        figures = gradio.Markdown()
        gradio.Examples([[example] for example in EXAMPLES], inputs=[prompt])
        button.click(on_click, [prompt, threshold, steps, seed], [video, picture, figures])
    return app


def main() -> None:
    """Load the model and serve the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default=EMBEDDED_MODEL)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; the default is this machine only")
    parser.add_argument("--port", type=int, default=7860)
    arguments = parser.parse_args()
    try:
        pipe = load_pipeline(arguments.model)
        app = build_app(pipe, spec_of(arguments.model).defaults)
    except UserError as error:
        raise SystemExit(f"demo: {error}") from error
    app.queue(default_concurrency_limit=1).launch(server_name=arguments.host, server_port=arguments.port)


if __name__ == "__main__":
    main()
