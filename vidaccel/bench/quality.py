"""What a model of the storybook world can do: does the video show what an unseen prompt asks for, is the VAE faithful?

The oracle reads colour, shape, motion and background from pixels. It also reads rendered clips and their VAE
reconstructions, so that what the oracle or the VAE loses is not put down to the transformer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vidaccel.bench.progress import BenchProgress
from vidaccel.bench.records import ResultFile, easycache_settings
from vidaccel.bench.statistics import share_interval, summarise
from vidaccel.bench.tables import quality_markdown
from vidaccel.catalog.registry import EMBEDDED_MODEL, spec_of
from vidaccel.easycache.config import EasyCacheConfig
from vidaccel.errors import UserError
from vidaccel.files.text import json_number, write_text
from vidaccel.generation.generate import GenerationRequest, generate, request_for
from vidaccel.generation.loading import load_pipeline
from vidaccel.machine.environment import describe_environment, without_folders
from vidaccel.video.files import write_video
from vidaccel.video.metrics import psnr
from vidaccel.world import FRAME_SIZE, Prompt, make_clip, read_clip, unseen_prompts

ATTRIBUTES = ("colour", "background", "shape", "motion")
GENERATED, RENDERED, RECONSTRUCTED = "generated", "rendered (the oracle alone)", "reconstructed by the VAE"
_CLIP_SEED = 500_000_000  # test scenes of their own, apart from those of the prompts


@dataclass(frozen=True, kw_only=True)
class QualityBenchConfig:
    """The protocol. A setting that is None is the model's own default.

    output: folder for quality.json and quality.md, and with `keep_videos` for the videos.
    num_prompts: unseen prompts of the world; prompt i is made with noise seed i + 1000 x seed.
    num_clips: unseen clips that the VAE reconstructs; 0 leaves the VAE out.
    easycache: reuse during generation; None for the plain model.
    """

    output: Path
    model: str = EMBEDDED_MODEL
    num_prompts: int = 64
    seed: int = 0
    num_clips: int = 16
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    num_frames: int | None = None
    easycache: EasyCacheConfig | None = None
    keep_videos: bool = False
    weights: str | None = None
    device: str = "auto"
    dtype: str = "auto"

    def __post_init__(self) -> None:
        if self.num_prompts < 1 or self.num_clips < 0:
            raise UserError(f"`num_prompts` must be at least 1 and `num_clips` at least 0; got {self.num_prompts}.")


def run_quality_bench(
    config: QualityBenchConfig,
    *,
    pipe: Any = None,
    on_progress: Callable[[BenchProgress], None] | None = None,
) -> dict[str, Any]:
    """Measure, write quality.json and quality.md into `config.output`, and return the summary.

    pipe: a loaded pipeline to use instead of loading `config.model`. An interrupted run continues.
    """
    spec = spec_of(config.model)
    pipe = load_pipeline(config.model, device=config.device, dtype=config.dtype) if pipe is None else pipe
    device = torch.device(pipe._execution_device)
    weights = spec.weights if config.weights is None else config.weights
    environment = describe_environment(device=device, weights=weights, model=config.model)
    request = _request(config, "a prompt", 0)
    results = ResultFile(config.output / "quality.json", protocol=_protocol(config, request), environment=environment)
    prompts = unseen_prompts(config.num_prompts, seed=config.seed)
    parts = [f"prompt {index}" for index in range(len(prompts))] + [f"clip {i}" for i in range(config.num_clips)]
    for done, name in enumerate(parts):
        if results.find(part=name) is not None:
            continue
        if on_progress is not None:
            on_progress(BenchProgress(done=done, total=len(parts), label=name))
        if done < len(prompts):
            record = _generated(config, pipe, prompts[done], done)
        else:
            record = _reconstructed(pipe, done - len(prompts), request.num_frames)
        results.add({"part": name, **record})
    results.summary = summarise_quality(results.records)
    results.write()
    content = {"protocol": results.protocol, "environments": results.environments, "summary": results.summary}
    write_text(config.output / "quality.md", quality_markdown(content))
    return results.summary


def summarise_quality(records: list[dict[str, Any]]) -> dict[str, Any]:
    """`accuracy`: for each kind of video and attribute the share read right; `vae_psnr`: over clips, or None."""
    accuracy: dict[str, dict[str, Any]] = {}
    for kind in (GENERATED, RENDERED, RECONSTRUCTED):
        readings = [reading for record in records if (reading := record["readings"].get(kind)) is not None]
        asked = [record["asked"] for record in records if kind in record["readings"]]
        if readings:
            accuracy[kind] = {
                name: _share([reading[name] == wanted[name] for reading, wanted in zip(readings, asked, strict=True)])
                for name in ATTRIBUTES
            }
    psnrs = [[float(record["psnr"])] for record in records if "psnr" in record]
    return {"accuracy": accuracy, "vae_psnr": summarise(psnrs).to_dict() if psnrs else None}


def reconstruct(pipe: Any, video: Tensor) -> Tensor:
    """Encode and decode frames (F, 3, H, W) in [0, 1] with the pipeline's VAE; the mode of the latents, no noise."""
    vae = pipe.vae
    with torch.no_grad():
        clip = (2 * video - 1).permute(1, 0, 2, 3)[None].to(device=pipe._execution_device, dtype=vae.dtype)
        decoded = vae.decode(vae.encode(clip).latent_dist.mode()).sample
    return ((decoded[0].float() + 1) / 2).clamp(0, 1).permute(1, 0, 2, 3).cpu()


def _generated(config: QualityBenchConfig, pipe: Any, prompt: Prompt, index: int) -> dict[str, Any]:
    made = generate(pipe, _request(config, prompt.text, 1000 * config.seed + index), easycache=config.easycache)
    if config.keep_videos:
        write_video(config.output / "videos" / f"{index:03d}.mp4", made.frames, fps=spec_of(config.model).defaults.fps)
    return {
        "prompt": prompt.text,
        "asked": _attributes(prompt),
        "readings": {GENERATED: _attributes(read_clip(made.frames))},
        "num_forwards": made.num_forwards,
        "denoising_seconds": made.denoising_seconds,
    }


def _reconstructed(pipe: Any, index: int, num_frames: int) -> dict[str, Any]:
    clip = make_clip(_CLIP_SEED + index, num_frames=num_frames, split="test")
    decoded = reconstruct(pipe, clip.video)
    subject = clip.scene.subject
    asked = {
        "colour": subject.colour,
        "shape": subject.shape,
        "motion": subject.motion,
        "background": clip.scene.background,
    }
    readings = {RENDERED: _attributes(read_clip(clip.video)), RECONSTRUCTED: _attributes(read_clip(decoded))}
    return {"asked": asked, "readings": readings, "psnr": json_number(psnr(clip.video, decoded))}


def _attributes(shown: Any) -> dict[str, str | None]:
    return {name: getattr(shown, name) for name in ATTRIBUTES}


def _share(correct: list[bool]) -> dict[str, float]:
    low, high = share_interval(sum(correct), len(correct))
    return {
        "correct": sum(correct),
        "count": len(correct),
        "share": sum(correct) / len(correct),
        "low": low,
        "high": high,
    }


def _request(config: QualityBenchConfig, prompt: str, seed: int) -> GenerationRequest:
    return request_for(
        spec_of(config.model).defaults,
        prompt,
        seed=seed,
        num_inference_steps=config.num_inference_steps,
        guidance_scale=config.guidance_scale,
        num_frames=config.num_frames,
        height=FRAME_SIZE,  # what the oracle reads
        width=FRAME_SIZE,
    )


def _protocol(config: QualityBenchConfig, request: GenerationRequest) -> dict[str, Any]:
    return {
        "benchmark": "quality",
        "model": without_folders(config.model),
        "num_prompts": config.num_prompts,
        "seed": config.seed,
        "num_clips": config.num_clips,
        "num_inference_steps": request.num_inference_steps,
        "guidance_scale": request.guidance_scale,
        "num_frames": request.num_frames,
        "easycache": None if config.easycache is None else easycache_settings(config.easycache),
        "dtype": config.dtype,
    }
