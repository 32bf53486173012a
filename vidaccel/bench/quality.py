"""What a model of the storybook world can do: does the video show what an unseen prompt asks for, is the VAE faithful?

The oracle reads colour, shape, motion and background from pixels. It also reads rendered clips and their VAE
reconstructions, so that what the oracle or the VAE loses is not put down to the transformer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vidaccel.bench.shared.benchmark import BenchProgress, ModelBenchmark, Tell, option
from vidaccel.bench.shared.markdown import Content, captions, markdown_table
from vidaccel.bench.shared.records import easycache_settings
from vidaccel.bench.shared.statistics import share_of, summarise
from vidaccel.catalog.registry import spec_of
from vidaccel.easycache.config import EasyCacheConfig
from vidaccel.errors import UserError
from vidaccel.files.text import json_number
from vidaccel.generation.generate import generate
from vidaccel.generation.request import GenerationRequest, request_for
from vidaccel.machine.private_names import execution_device
from vidaccel.video.files import write_video
from vidaccel.video.metrics import psnr
from vidaccel.world import FRAME_SIZE, Prompt, make_clip, read_clip, unseen_prompts

ATTRIBUTES = ("colour", "background", "shape", "motion")
GENERATED, RENDERED, RECONSTRUCTED = "generated", "rendered (the oracle alone)", "reconstructed by the VAE"
_CLIP_SEED = 500_000_000  # test scenes of their own, apart from those of the prompts


@dataclass(frozen=True, kw_only=True)
class QualityBench(ModelBenchmark):
    """Prompt i is made with noise seed i + 1000 x seed; the videos have the size that the oracle reads."""

    name = "quality"

    num_prompts: int = option("Unseen prompts of the world.", 64)
    num_clips: int = option("Unseen clips the VAE reconstructs; 0 leaves it out.", 16)
    seed: int = option("Draws the prompts and the noise.", 0)
    num_inference_steps: int | None = option("Denoising steps. (default: the model's)", None)
    guidance_scale: float | None = option("Weight of the prompt. (default: the model's)", None)
    num_frames: int | None = option("Frames, 4k + 1. (default: the model's)", None)
    threshold: float | None = option("With EasyCache. (default: every step computed)", None, recorded=False)
    warmup_steps: int = option(
        "EasyCache: first steps always computed.", EasyCacheConfig().warmup_steps, recorded=False
    )
    keep_videos: bool = option("Keep the videos beside the results.", False, recorded=False)

    def __post_init__(self) -> None:
        if self.num_prompts < 1 or self.num_clips < 0:
            raise UserError(f"`num_prompts` must be at least 1 and `num_clips` at least 0; got {self.num_prompts}.")
        try:
            _ = self.easycache
        except ValueError as error:
            raise UserError(str(error)) from error

    @property
    def easycache(self) -> EasyCacheConfig | None:
        """Reuse during generation; None for the plain model."""
        if self.threshold is None:
            return None
        return EasyCacheConfig(threshold=self.threshold, warmup_steps=self.warmup_steps)

    def run(self, *, pipe: Any = None, on_progress: Tell = None) -> dict[str, Any]:
        pipe, request = self.loaded(pipe), _request(self, "a prompt", 0)
        settled = {
            **{name: getattr(request, name) for name in ("num_inference_steps", "guidance_scale", "num_frames")},
            "easycache": None if self.easycache is None else easycache_settings(self.easycache),
        }
        results = self.results(self.protocol(settled), self.environment(pipe))
        prompts = unseen_prompts(self.num_prompts, seed=self.seed)
        parts = [f"prompt {index}" for index in range(len(prompts))] + [f"clip {i}" for i in range(self.num_clips)]
        for done, name in enumerate(parts):
            if results.find(part=name) is not None:
                continue
            if on_progress is not None:
                on_progress(BenchProgress(done=done, total=len(parts), label=name))
            if done < len(prompts):
                record = _generated(self, pipe, prompts[done], done)
            else:
                record = _reconstructed(pipe, done - len(prompts), request.num_frames)
            results.add({"part": name, **record})
        summary = results.finish(summarise_quality(results.records))
        self.write_table(quality_markdown(results.content))
        return summary


def summarise_quality(records: list[dict[str, Any]]) -> dict[str, Any]:
    """`accuracy`: for each kind of video and attribute the share read right; `vae_psnr`: over clips, or None."""
    accuracy: dict[str, dict[str, Any]] = {}
    for kind in (GENERATED, RENDERED, RECONSTRUCTED):
        readings = [reading for record in records if (reading := record["readings"].get(kind)) is not None]
        asked = [record["asked"] for record in records if kind in record["readings"]]
        if readings:
            accuracy[kind] = {
                name: share_of([reading[name] == wanted[name] for reading, wanted in zip(readings, asked, strict=True)])
                for name in ATTRIBUTES
            }
    psnrs = [[float(record["psnr"])] for record in records if "psnr" in record]
    return {"accuracy": accuracy, "vae_psnr": summarise(psnrs).to_dict() if psnrs else None}


def reconstruct(pipe: Any, video: Tensor) -> Tensor:
    """Encode and decode frames (F, 3, H, W) in [0, 1] with the pipeline's VAE; the mode of the latents, no noise."""
    vae = pipe.vae
    with torch.no_grad():
        clip = (2 * video - 1).permute(1, 0, 2, 3)[None].to(device=execution_device(pipe), dtype=vae.dtype)
        decoded = vae.decode(vae.encode(clip).latent_dist.mode()).sample
    return ((decoded[0].float() + 1) / 2).clamp(0, 1).permute(1, 0, 2, 3).cpu()


def _generated(config: QualityBench, pipe: Any, prompt: Prompt, index: int) -> dict[str, Any]:
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


def _request(config: QualityBench, prompt: str, seed: int) -> GenerationRequest:
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


def quality_markdown(content: Content) -> str:
    """Accuracy of the generated videos by the oracle, beside the oracle's own accuracy, and the VAE's fidelity."""
    summary, protocol = content["summary"], content["protocol"]
    rows = [
        [kind, name, f"{share['correct']} of {share['count']}", _percent(share["share"]), _interval_text(share)]
        for kind, shares in summary["accuracy"].items()
        for name, share in shares.items()
    ]
    vae = summary["vae_psnr"]
    lines = [
        "# Quality of the model on unseen prompts",
        "",
        captions(content),
        "",
        f"{protocol['num_inference_steps']} steps, guidance {protocol['guidance_scale']:g}, {protocol['num_frames']} "
        "frames. An attribute is correct where the oracle reads from the pixels what the prompt asks for. "
        "The rows of rendered and reconstructed clips show what the oracle and the VAE alone lose.",
        "",
        *markdown_table(["videos", "attribute", "correct", "share", "95 % interval"], rows),
    ]
    if vae is not None:
        lines += [
            "",
            f"VAE reconstruction of {vae['count']} unseen clips: PSNR {vae['mean']:.2f} dB mean "
            f"[{vae['low']:.2f}, {vae['high']:.2f}], median {vae['median']:.2f}, 5th percentile "
            f"{vae['percentile_5']:.2f}, worst {vae['minimum']:.2f}.",
        ]
    return "\n".join(lines) + "\n"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _interval_text(share: Content) -> str:
    return f"{_percent(share['low'])} to {_percent(share['high'])}"
