"""Open-Sora 1.2: text to video, image to video, continuing a video, and videos of several clips.

from vidaccel.pipelines.open_sora import OpenSoraPipeline
pipe = OpenSoraPipeline.from_pretrained("folder made by vidaccel convert open-sora")
frames = pipe("a calm sea at dawn", resolution="480p", aspect_ratio="9:16", num_frames="2s").frames
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.loaders import Mochi1LoraLoaderMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from diffusers.video_processor import VideoProcessor
from torch import Tensor
from transformers import PreTrainedTokenizerBase, T5EncoderModel

from vidaccel.errors import UserError
from vidaccel.models.open_sora_vae import AutoencoderKLOpenSora
from vidaccel.models.stdit3 import STDiT3
from vidaccel.open_sora.conditioning import (
    NUM_TRAIN_TIMESTEPS,
    FrameMask,
    apply_mask_strategies,
    continuation,
    kept_apart,
    parse_mask_strategies,
    usual_strategies,
)
from vidaccel.open_sora.prompts import clip_texts
from vidaccel.open_sora.references import fill_and_crop, for_each_video, read_image, read_video
from vidaccel.open_sora.schedule import shift_of, sigmas_of
from vidaccel.open_sora.sizes import VideoSize, video_size

Generators = torch.Generator | list[torch.Generator] | None


@dataclass
class OpenSoraPipelineOutput(BaseOutput):
    """frames: (B, F, H, W, 3) in [0, 1] for "np", (B, F, 3, H, W) for "pt", lists for "pil", latents for "latent"."""

    frames: Any


class OpenSoraPipeline(DiffusionPipeline, Mochi1LoraLoaderMixin):
    """Open-Sora 1.2, complete: prompts are cleaned and scored, sizes have names, frames may be given.

    The arguments of a call that diffusers' pipelines have mean what they mean there; the others:

    prompt: "|0|a|2|b" gives the clips of a long video different texts, see `num_loops`.
    height, width: pixels, or `resolution` ("480p") and `aspect_ratio` (height:width, "9:16"). A rest over 8 is lost:
        480x854 becomes 480x848.
    num_frames: of a clip, or a name such as "2s".
    max_sequence_length: text tokens; never more than the model knows (300).
    prompt_attention_mask: (B, L), true for the tokens of `prompt_embeds` that count; all do by default.
    fps: what the model is told; by default 24, and 120 for a single frame.
    image: the first frame, or two, first and last, or any list of references with a `mask_strategy`.
    video: a video to go on from its end, or with a `mask_strategy` the last reference.
    mask_strategy: which latent frames of which reference go where, the written form of `MaskStrategy`.
    align: starts in it are moved to multiples of this many latent frames, a chunk of the autoencoder; None leaves them.
    num_loops: clips. Each but the first begins with the last `condition_latent_frames` latent frames of the one before,
        kept (`condition_edit_ratio` 0) or joined with noise later on.
    aesthetic_score, motion_score, camera_motion: put behind the prompt unless it names them or they are None.
    clean_caption: clean the prompt as in training.

    A seed: the first noise is drawn in the transformer's number format and then widened, as in the original, so that
    one seed gives one noise in float32 and another in bfloat16.
    """

    model_cpu_offload_seq: Any = "text_encoder->transformer->vae"
    _callback_tensor_inputs: Any = ("latents", "prompt_embeds")
    tokenizer: Any
    text_encoder: Any
    vae: Any
    transformer: Any
    scheduler: Any

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        text_encoder: T5EncoderModel,
        vae: AutoencoderKLOpenSora,
        transformer: STDiT3,
        scheduler: FlowMatchEulerDiscreteScheduler,
    ) -> None:
        super().__init__()
        self.register_modules(
            tokenizer=tokenizer, text_encoder=text_encoder, vae=vae, transformer=transformer, scheduler=scheduler
        )
        self.video_processor = VideoProcessor(vae_scale_factor=8)
        self._guidance_scale = 1.0
        self._num_timesteps = 0
        self._current_timestep: Any = None
        self._interrupt = False

    @property
    def guidance_scale(self) -> float:
        """Of the present or last call."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the present or last call has two branches."""
        return self._guidance_scale > 1

    @property
    def batched_guidance(self) -> tuple[str, ...]:
        """The branches in the order in which they lie in the transformer's batch."""
        return ("cond", "uncond") if self.do_classifier_free_guidance else ("cond",)

    @property
    def num_timesteps(self) -> int:
        """Steps of one clip in the present or last call."""
        return self._num_timesteps

    @property
    def current_timestep(self) -> Any:
        """The timestep under way, None between calls."""
        return self._current_timestep

    @property
    def interrupt(self) -> bool:
        """Set `_interrupt` in a callback to leave out the remaining steps."""
        return self._interrupt

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | str = 51,
        num_inference_steps: int = 30,
        guidance_scale: float = 7.0,
        num_videos_per_prompt: int = 1,
        generator: Generators = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        output_type: str = "np",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict[str, Any]] | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        max_sequence_length: int = 300,
        resolution: str | None = None,
        aspect_ratio: str | None = None,
        fps: float | None = None,
        image: Any = None,
        video: Any = None,
        mask_strategy: str | None = None,
        align: int | None = 5,
        num_loops: int = 1,
        condition_latent_frames: int = 5,
        condition_edit_ratio: float = 0.0,
        aesthetic_score: float | None = 6.5,
        motion_score: float | None = None,
        camera_motion: str | None = None,
        clean_caption: bool = True,
    ) -> OpenSoraPipelineOutput | tuple[Any]:
        """Generate videos; the class tells the arguments. Raises `UserError` for values that do not fit together."""
        if isinstance(callback_on_step_end, PipelineCallback | MultiPipelineCallbacks):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        size = video_size(num_frames, height, width, resolution=resolution, aspect_ratio=aspect_ratio, fps=fps)
        self._check(prompt, prompt_embeds, callback_on_step_end_tensor_inputs, size)
        self._check_loops(num_loops, condition_latent_frames)
        scores = {"aesthetic_score": aesthetic_score, "motion_score": motion_score, "camera_motion": camera_motion}
        texts = clip_texts(prompt, num_loops, clean=clean_caption, **scores)
        self._guidance_scale, self._interrupt, self._num_timesteps = guidance_scale, False, num_inference_steps
        count = num_videos_per_prompt * len(texts[0] if prompt_embeds is None else prompt_embeds)
        given = [
            fill_and_crop(for_each_video(one, count), height=size.height, width=size.width)
            for one in _read(image, video)
        ]
        references = [self.encode_reference(frames, generator) for frames in given]
        if mask_strategy is None:
            num_images = len(given) - (video is not None)
            strategies = usual_strategies(num_images, references[num_images:], length=condition_latent_frames)
        else:
            strategies = parse_mask_strategies(mask_strategy)
        settings = (num_videos_per_prompt, prompt_embeds, prompt_attention_mask, max_sequence_length)
        clips: list[Tensor] = []
        videos: list[Tensor] = []
        for loop, (embeds, text_mask) in enumerate(self._encoded(texts, *settings)):
            if self._interrupt:
                break
            if loop:
                length = condition_latent_frames
                strategies.append(continuation(loop, len(references), length=length, edit_ratio=condition_edit_ratio))
                references.append(self.encode_reference(videos[-1], generator))
            noise = self.prepare_latents(count, size, generator, None if loop else latents)
            start, frame_mask = apply_mask_strategies(noise, references, strategies, loop=loop, align=align)
            clips.append(
                self.denoise(
                    start,
                    prompt_embeds=embeds,
                    prompt_attention_mask=text_mask,
                    size=size,
                    mask=frame_mask if references else None,
                    generator=generator,
                    callback_on_step_end=callback_on_step_end,
                    callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
                )
            )
            if output_type != "latent" or loop + 1 < num_loops:
                videos.append(self.decode(clips[-1], size.num_frames))
        result = self._joined(clips, videos, condition_latent_frames, output_type)
        self.maybe_free_model_hooks()
        return OpenSoraPipelineOutput(frames=result) if return_dict else (result,)

    def denoise(
        self,
        latents: Tensor,
        *,
        prompt_embeds: Tensor,
        prompt_attention_mask: Tensor | None,
        size: VideoSize,
        mask: Tensor | None,
        generator: Generators = None,
        callback_on_step_end: Any = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = (),
    ) -> Tensor:
        """Latents (B, C, F', H', W') through all steps of one clip, with the settings of the present call.

        prompt_embeds, prompt_attention_mask: of all branches, in the order of `batched_guidance`.
        mask: (B, F') on the CPU, see `vidaccel.open_sora.conditioning`; None generates everything.
        """
        sigmas = sigmas_of(self._num_timesteps, self._shift(size))
        self.scheduler.set_timesteps(sigmas=sigmas, device=latents.device)
        self.scheduler.set_begin_index(0)
        branches = len(self.batched_guidance)
        frame_mask = None if mask is None else FrameMask(mask)
        with self.progress_bar(total=len(sigmas)) as progress_bar:
            for index, (timestep, sigma) in enumerate(zip(self.scheduler.timesteps, sigmas, strict=True)):
                if self._interrupt:
                    continue
                self._current_timestep = timestep
                before, active = latents, None
                if frame_mask is not None:
                    noise = partial(_noise_like, latents, generator)
                    latents, active = frame_mask.enter(latents, NUM_TRAIN_TIMESTEPS * sigma, noise)
                with self.transformer.cache_context(
                    "cond_uncond", step_index=index, num_inference_steps=len(sigmas), sigma=sigma
                ):
                    output = self.transformer(
                        hidden_states=torch.cat([latents] * branches),
                        timestep=timestep.expand(branches * latents.shape[0]),
                        encoder_hidden_states=prompt_embeds,
                        encoder_attention_mask=prompt_attention_mask,
                        x_mask=None if active is None else active.repeat(branches, 1),
                        fps=size.fps,
                        height=size.height,
                        width=size.width,
                        return_dict=False,
                    )[0]
                velocity = self._guided(output[:, : latents.shape[1]])
                latents = self.scheduler.step(-velocity, timestep, latents, return_dict=False)[0]
                if active is not None:
                    latents = kept_apart(latents, before, active)
                if callback_on_step_end is not None:
                    known = {"latents": latents, "prompt_embeds": prompt_embeds}
                    wanted = {name: known[name] for name in callback_on_step_end_tensor_inputs}
                    changed = callback_on_step_end(self, index, timestep, wanted) or {}
                    latents = changed.get("latents", latents)
                    prompt_embeds = changed.get("prompt_embeds", prompt_embeds)
                progress_bar.update()
        self._current_timestep = None
        return latents

    def encode_prompt(
        self,
        prompt: Sequence[str],
        num_videos_per_prompt: int = 1,
        prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        max_sequence_length: int = 300,
    ) -> tuple[Tensor, Tensor | None]:
        """Text tokens (B, L, channels) and which of them count (B, L), None if all: only as many as the longest has."""
        if prompt_embeds is None:
            length = min(max_sequence_length, self.transformer.config.model_max_length)
            tokens = self.tokenizer(
                list(prompt), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
            ).to(self._execution_device)
            prompt_attention_mask = tokens.attention_mask
            prompt_embeds = self.text_encoder(tokens.input_ids, attention_mask=prompt_attention_mask)[0]
        prompt_embeds = prompt_embeds.to(self._execution_device, self.transformer.dtype)
        prompt_embeds = prompt_embeds.repeat_interleave(num_videos_per_prompt, dim=0)
        if prompt_attention_mask is None:
            return prompt_embeds, None
        counts = prompt_attention_mask.to(prompt_embeds.device).bool().repeat_interleave(num_videos_per_prompt, dim=0)
        longest = int(counts.any(dim=0).nonzero().max()) + 1
        counts = counts[:, :longest]
        return prompt_embeds[:, :longest], None if bool(counts.all()) else counts

    def prepare_latents(self, count: int, size: VideoSize, generator: Generators, latents: Tensor | None) -> Tensor:
        """Noise for a clip, (count, C, F', H', W') in float32, or `latents` on the right device."""
        if latents is not None:
            return latents.to(self._execution_device, torch.float32)
        shape = self.vae.latent_size(size.num_frames, size.height, size.width)
        shape = (count, self.transformer.config.in_channels, *shape)
        dtype = self.transformer.dtype
        return randn_tensor(shape, generator=generator, device=self._execution_device, dtype=dtype).float()

    def encode_reference(self, frames: Tensor, generator: Generators = None) -> Tensor:
        """Latents, as the transformer takes them, of frames (B, 3, F, H, W) in [-1, 1]; drawn, not their mean."""
        if isinstance(generator, list) and len(frames) == 1:
            frames = frames.expand(len(generator), -1, -1, -1, -1)  # each video draws for itself
        frames = frames.to(self._execution_device, self.vae.dtype)
        posterior = self.vae.encode(frames, generator=generator).latent_dist
        return self.vae.normalized(posterior.sample(generator)).float()

    def decode(self, latents: Tensor, num_frames: int) -> Tensor:
        """Frames (B, 3, F, H, W), about [-1, 1], of latents as the transformer makes them."""
        return self.vae.decode(
            self.vae.denormalized(latents.to(self.vae.dtype)), num_frames=num_frames, return_dict=False
        )[0]

    def _joined(self, clips: list[Tensor], videos: list[Tensor], repeated: int, output_type: str) -> Any:
        """The clips one after the other, each without what it repeats of the one before."""
        if output_type == "latent":
            return torch.cat([clip[:, :, repeated if index else 0 :] for index, clip in enumerate(clips)], dim=2)
        repeated = self.vae.most_frames(repeated)
        video = torch.cat([one[:, :, repeated if index else 0 :] for index, one in enumerate(videos)], dim=2)
        return self.video_processor.postprocess_video(video.float(), output_type=output_type)

    def _encoded(self, texts: Sequence[Sequence[str]], *settings: Any) -> list[tuple[Tensor, Tensor | None]]:
        """Text tokens of all branches for each clip, and their mask.

        Equal texts are encoded once. Their clips then share the very tensors, by which EasyCache knows that they belong
        to one call.
        """
        known: dict[tuple[str, ...], tuple[Tensor, Tensor | None]] = {}
        for text in map(tuple, texts):
            if text not in known:
                known[text] = self._with_null(*self.encode_prompt(text, *settings))
        return [known[tuple(text)] for text in texts]

    def _with_null(self, embeds: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Behind the text the learned tokens that stand for none, as many as the text has; its mask serves both."""
        if not self.do_classifier_free_guidance:
            return embeds, mask
        null = self.transformer.y_embedder.y_embedding[: embeds.shape[1]].to(embeds)
        both = torch.cat([embeds, null.expand_as(embeds)])
        return both, None if mask is None else mask.repeat(2, 1)

    def _guided(self, velocity: Tensor) -> Tensor:
        if not self.do_classifier_free_guidance:
            return velocity
        cond, uncond = velocity.chunk(2)
        return uncond + self._guidance_scale * (cond - uncond)

    def _shift(self, size: VideoSize) -> float:
        dtype = self.transformer.dtype if self.transformer.config.round_positions else torch.float32
        return shift_of(height=size.height, width=size.width, num_frames=size.num_frames, dtype=dtype)

    def _check(self, prompt: Any, prompt_embeds: Tensor | None, names: Sequence[str], size: VideoSize) -> None:
        if (prompt is None) == (prompt_embeds is None):
            raise UserError("Give either `prompt` or `prompt_embeds`.")
        longest = self.transformer.config.model_max_length
        if prompt_embeds is not None and not 0 < prompt_embeds.shape[1] <= longest:
            raise UserError(f"`prompt_embeds` must have 1 to {longest} tokens; got {prompt_embeds.shape[1]}.")
        if unknown := [name for name in names if name not in self._callback_tensor_inputs]:
            raise UserError(f"A callback can be given {', '.join(self._callback_tensor_inputs)}; got {unknown}.")
        if min(size.height, size.width) < self.vae.spatial_compression_ratio:
            raise UserError(
                f"`height` and `width` must be at least {self.vae.spatial_compression_ratio}; "
                f"got {size.height} and {size.width}."
            )
        if self.scheduler.config.shift != 1 or self.scheduler.config.use_dynamic_shifting:
            raise UserError("The scheduler must not shift by itself: FlowMatchEulerDiscreteScheduler(shift=1.0).")

    def _check_loops(self, num_loops: int, condition_latent_frames: int) -> None:
        chunk = self.vae.micro_latent_size
        if num_loops < 1:
            raise UserError(f"`num_loops` must be at least 1; got {num_loops}.")
        if condition_latent_frames < 1 or condition_latent_frames % chunk:
            raise UserError(
                f"`condition_latent_frames` must be a multiple of a chunk, {chunk}; got {condition_latent_frames}."
            )


def _read(image: Any, video: Any) -> list[Tensor]:
    """The references one by one, (1, 3, F, H, W) in their own sizes."""
    images = [] if image is None else list(image) if isinstance(image, list | tuple) else [image]
    return [read_image(one) for one in images] + ([] if video is None else [read_video(video)])


def _noise_like(latents: Tensor, generator: Generators) -> Tensor:
    return randn_tensor(latents.shape, generator=generator, device=latents.device, dtype=latents.dtype)
