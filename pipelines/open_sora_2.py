"""Open-Sora 2.0: text, images or a video to video, on `FluxTransformer2DModel` and `AutoencoderKLHunyuanVideo`.

from vidaccel.pipelines.open_sora_2 import OpenSora2Pipeline
pipe = OpenSora2Pipeline.from_pretrained("folder made by `vidaccel convert open-sora`")
frames = pipe("a cat walks on a wall", resolution="256px", aspect_ratio="16:9").frames[0]
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKLHunyuanVideo, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from diffusers.loaders import FluxLoraLoaderMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from diffusers.video_processor import VideoProcessor
from torch import Tensor
from transformers import CLIPTextModel, PreTrainedTokenizerBase, T5EncoderModel

from vidaccel.open_sora.references import fill_and_crop, read_image, read_video
from vidaccel.open_sora.version_2 import (
    FPS,
    GUIDANCE_SCALE,
    IMAGE_GUIDANCE_SCALE,
    MOTION_SCORE,
    NUM_FRAMES,
    NUM_STEPS,
    PATCH,
    Condition,
    Denoising,
    Guidance,
    find_condition,
    finished_prompt,
    guided,
    latent_size,
    pack,
    place_references,
    schedule_shift,
    side_channels,
    token_positions,
    unpack,
    unshifted_sigmas,
    video_size,
)


@dataclass
class OpenSora2PipelineOutput(BaseOutput):
    """`frames`: (B, F, C, H, W) tensor, (B, F, H, W, C) array or lists of PIL images, as `output_type` asked."""

    frames: Any


class OpenSora2Pipeline(DiffusionPipeline, FluxLoraLoaderMixin):
    """Open-Sora 2.0 with the component names of Flux: `text_encoder` is CLIP, `text_encoder_2` is T5.

    The transformer takes packed latents and packed condition side by side: 132 channels in, 64 out. The VAE is set to
    code whole clips in tiles, as the original does; diffusers' own default blends clips of 16 frames.
    """

    model_cpu_offload_seq = "text_encoder->text_encoder_2->transformer->vae"  # type: ignore[assignment]
    _callback_tensor_inputs = (
        "latents",
        "prompt_embeds",
        "pooled_prompt_embeds",
        "negative_prompt_embeds",
        "negative_pooled_prompt_embeds",
    )

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        text_encoder: CLIPTextModel,
        tokenizer_2: PreTrainedTokenizerBase,
        text_encoder_2: T5EncoderModel,
        vae: AutoencoderKLHunyuanVideo,
        transformer: FluxTransformer2DModel,
        scheduler: FlowMatchEulerDiscreteScheduler,
    ) -> None:
        super().__init__()
        self.register_modules(
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            tokenizer_2=tokenizer_2,
            text_encoder_2=text_encoder_2,
            vae=vae,
            transformer=transformer,
            scheduler=scheduler,
        )
        self.vae_scale_factor_temporal = self.vae.config.temporal_compression_ratio if self.vae else 4
        self.vae_scale_factor_spatial = self.vae.config.spatial_compression_ratio if self.vae else 8
        self._strides = (self.vae_scale_factor_temporal, self.vae_scale_factor_spatial)
        self.video_processor = VideoProcessor(vae_scale_factor=self.vae_scale_factor_spatial)
        if self.vae:
            self.vae.use_framewise_encoding = self.vae.use_framewise_decoding = False
            self.vae.enable_tiling()
        self._branches: tuple[str, ...] = ()
        self._guidance = Guidance()

    @property
    def batched_guidance(self) -> tuple[str, ...]:
        """The branches that the transformer gets in one batch, in order; of the present or last call."""
        return self._branches

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether a step needs more than the forward with the prompt."""
        return len(self._branches) > 1

    @property
    def guidance_scale(self) -> float:
        """Text guidance of the present call."""
        return self._guidance.scale

    @property
    def num_timesteps(self) -> int:
        """Steps of the present call."""
        return self._num_timesteps

    @property
    def current_timestep(self) -> Tensor | None:
        """The timestep being computed, or None."""
        return self._current_timestep

    @property
    def interrupt(self) -> bool:
        """Set to leave out the steps that are left."""
        return self._interrupt

    def encode_prompt(self, prompt: list[str], *, max_sequence_length: int = 512) -> tuple[Tensor, Tensor]:
        """T5 states (B, max_sequence_length, D), computed without a mask over the padding, and CLIP's pooled state."""
        device = self._execution_device
        longest = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        ids = self.tokenizer_2(prompt, max_length=max_sequence_length, **longest).input_ids
        states = self.text_encoder_2(ids.to(device)).last_hidden_state
        positions = self.text_encoder.config.max_position_embeddings
        ids = self.tokenizer(prompt, max_length=positions, **longest).input_ids
        pooled = self.text_encoder(ids.to(device)).pooler_output
        return states, pooled

    def check_inputs(
        self,
        prompt: Any,
        prompt_embeds: Tensor | None,
        pooled_prompt_embeds: Tensor | None,
        callback_on_step_end_tensor_inputs: list[str],
    ) -> None:
        """Raise ValueError for prompts and callback inputs that do not fit together."""
        if (prompt is None) == (prompt_embeds is None):
            raise ValueError("Give either `prompt` or `prompt_embeds` with `pooled_prompt_embeds`.")
        if (prompt_embeds is None) != (pooled_prompt_embeds is None):
            raise ValueError("`prompt_embeds` (T5) and `pooled_prompt_embeds` (CLIP) go together.")
        unknown = set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs)
        if unknown:
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` may name {', '.join(self._callback_tensor_inputs)}; "
                f"got {', '.join(sorted(unknown))}."
            )

    def encode_references(self, frames: Tensor, *, batch_size: int, generator: Any = None) -> Tensor:
        """Normalised latents (batch_size, C, F, H, W) of pixels (1 or batch_size, 3, F, H, W) in [-1, 1], sampled."""
        if frames.shape[0] not in (1, batch_size):
            raise ValueError(f"Give one image or video, or one for each of {batch_size} prompts; got {len(frames)}.")
        if isinstance(generator, list) and len(frames) == 1:
            frames = frames.expand(batch_size, -1, -1, -1, -1)  # each video draws for itself
        frames = frames.to(device=self._execution_device, dtype=self.vae.dtype)
        latents = self.vae.encode(frames).latent_dist.sample(generator) * self.vae.config.scaling_factor
        return latents.float().expand(batch_size, -1, -1, -1, -1)

    def prepare_latents(
        self,
        shape: tuple[int, ...],
        *,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
    ) -> Tensor:
        """Noise (B, C, F, H, W) in float32, drawn in the transformer's number format as the original does."""
        device = self._execution_device
        if latents is not None:
            if tuple(latents.shape) != shape:
                raise ValueError(f"`latents` must have shape {shape} for this call, got {tuple(latents.shape)}.")
            return latents.to(device=device, dtype=torch.float32)
        if isinstance(generator, list) and len(generator) != shape[0]:
            raise ValueError(f"Give one generator, or one for each of {shape[0]} videos; got {len(generator)}.")
        return randn_tensor(shape, generator=generator, device=device, dtype=self.transformer.dtype).float()

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] = "",
        image: Any = None,
        last_image: Any = None,
        video: Any = None,
        condition: str | None = None,
        resolution: str = "256px",
        aspect_ratio: str = "16:9",
        height: int | None = None,
        width: int | None = None,
        num_frames: int = NUM_FRAMES,
        num_inference_steps: int = NUM_STEPS,
        sigmas: list[float] | None = None,
        guidance_scale: float = GUIDANCE_SCALE,
        image_guidance_scale: float = IMAGE_GUIDANCE_SCALE,
        oscillate_text_guidance: bool = True,
        oscillate_image_guidance: bool = True,
        fps: int = FPS,
        motion_score: int | None = MOTION_SCORE,
        num_videos_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
        output_type: str = "np",
        return_dict: bool = True,
        joint_attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: Callable[..., dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
        max_sequence_length: int = 512,
    ) -> OpenSora2PipelineOutput | tuple[Any]:
        """Generate a video for each prompt.

        image, last_image: first and last frame; PIL, array or tensor (3, H, W) in [0, 1], cut to the video's shape.
        video: frames that the video goes on from (`v2v_head`, 33 frames) or leads up to (`v2v_tail`): a list of PIL
            images, an array (F, H, W, 3) or a tensor (F, 3, H, W) in [0, 1]. The `_easy` conditions take 65 frames.
        condition: one of `vidaccel.open_sora.version_2.CONDITIONS`; None takes what the inputs ask for.
        resolution, aspect_ratio: the size, "256px" or "768px" and width:height, unless `height` and `width` are given.
        sigmas: noise levels before the shift, from 1 down, without the last 0.
        guidance_scale, image_guidance_scale: weight of the prompt, and of the condition where there is one.
        oscillate_text_guidance, oscillate_image_guidance: use 1 instead in every other step from the tenth on.
        fps, motion_score: said to the model at the end of the prompt; a motion score of None is not said.
        latents: noise to start from, (B, C, F, H, W). Callbacks get them packed, (B, L, 4C).
        output_type: "np", "pt", "pil", or "latent" for normalised latents (B, C, F, H, W).

        Returns an object with `frames`, or a tuple of them with `return_dict=False`.
        Raises ValueError, `vidaccel.errors.UserError` among them, for arguments that do not fit.
        """
        if height is None or width is None:
            height, width = video_size(resolution, aspect_ratio)
        reported = ["latents"] if callback_on_step_end_tensor_inputs is None else callback_on_step_end_tensor_inputs
        self.check_inputs(prompt, prompt_embeds, pooled_prompt_embeds, reported)
        size = latent_size((num_frames, height, width), self._strides)
        inputs = {"image": image, "last_image": last_image, "video": video}
        kind = find_condition(condition, inputs, num_latent_frames=size[0])
        weights: dict[str, Any] = {"scale": guidance_scale, "image_scale": image_guidance_scale, "grows": kind.holds}
        swings = {"oscillates": oscillate_text_guidance, "image_oscillates": oscillate_image_guidance}
        self._guidance = Guidance(**weights, **swings)
        self._branches = self._guidance.branches(conditioned=kind.is_given)
        self._interrupt, self._current_timestep = False, None

        if prompt is not None:
            prompts = [prompt] if isinstance(prompt, str) else prompt
            prompts = [finished_prompt(text, fps=fps, motion_score=motion_score) for text in prompts]
            prompt_embeds, pooled_prompt_embeds = self.encode_prompt(prompts, max_sequence_length=max_sequence_length)
        negative = (negative_prompt_embeds, negative_pooled_prompt_embeds)
        texts = self._texts(
            (prompt_embeds, pooled_prompt_embeds), negative, negative_prompt, count=num_videos_per_prompt
        )
        shape = (len(texts["prompt_embeds"]), self.transformer.config.out_channels // PATCH**2, *size)
        noise = self.prepare_latents(shape, generator=generator, latents=latents)
        mask, references = self._references(kind, inputs, noise, generator)
        side = side_channels(mask, references, self._branches)
        state = Denoising(latents=pack(noise), texts=texts, side=side, size=size)
        timesteps = self._set_timesteps(num_inference_steps, sigmas, state)
        self._denoise(state, timesteps, joint_attention_kwargs, callback_on_step_end, reported)

        sampled = torch.where(mask * kind.holds > 0, references, unpack(state.latents, size))
        frames = sampled if output_type == "latent" else self._decode(sampled, output_type)
        self.maybe_free_model_hooks()
        return OpenSora2PipelineOutput(frames=frames) if return_dict else (frames,)

    def _texts(
        self,
        embeds: tuple[Any, Any],
        negative_embeds: tuple[Tensor | None, Tensor | None],
        negative_prompt: str | list[str],
        *,
        count: int,
    ) -> dict[str, Tensor]:
        """The texts of all videos by argument name; without guidance there are no negative ones."""
        found: dict[str, Any] = dict(zip(("prompt_embeds", "pooled_prompt_embeds"), embeds, strict=True))
        if self.do_classifier_free_guidance:
            states, pooled = negative_embeds
            if states is None or pooled is None:
                texts = [negative_prompt] if isinstance(negative_prompt, str) else negative_prompt
                texts = texts * len(embeds[0]) if len(texts) == 1 else texts
                states, pooled = self.encode_prompt(texts, max_sequence_length=embeds[0].shape[1])
            found |= {"negative_prompt_embeds": states, "negative_pooled_prompt_embeds": pooled}
            if states.shape != embeds[0].shape or pooled.shape != embeds[1].shape:
                shapes = [tuple(value.shape) for value in (states, pooled, *embeds)]
                raise ValueError(f"Negative prompts must be as many and as long as prompts; got {shapes}.")
        target = {"device": self._execution_device, "dtype": self.transformer.dtype}
        return {key: value.to(**target).repeat_interleave(count, dim=0) for key, value in found.items()}

    def _references(
        self, kind: Condition, inputs: dict[str, Any], like: Tensor, generator: Any
    ) -> tuple[Tensor, Tensor]:
        """Mask and latents of what is given, shaped for the latents `like`."""
        video = inputs["video"]
        height, width = (side * self.vae_scale_factor_spatial for side in like.shape[-2:])
        encoded: dict[str, Tensor | None] = {"head": None, "tail": None}
        for place, picture in (("head", inputs["image"]), ("tail", inputs["last_image"])):
            if not getattr(kind, place):
                continue
            pixels = read_image(picture) if video is None else read_video(video)
            needed = kind.reference_frames(self.vae_scale_factor_temporal)
            if pixels.shape[2] < needed:
                raise ValueError(f"This condition takes {needed} frames of `video`, got {pixels.shape[2]}.")
            pixels = pixels[:, :, :needed] if place == "head" else pixels[:, :, -needed:]
            pixels = fill_and_crop(pixels, height=height, width=width)
            encoded[place] = self.encode_references(pixels, batch_size=len(like), generator=generator)
        return place_references(kind, **encoded, like=like)

    def _set_timesteps(self, num_inference_steps: int, sigmas: list[float] | None, state: Denoising) -> Tensor:
        """The timesteps of this video's size. A scheduler without dynamic shifting keeps its own shift."""
        sigmas = unshifted_sigmas(num_inference_steps) if sigmas is None else sigmas
        shift = schedule_shift(state.tokens_per_frame, state.size[0])
        config = self.scheduler.config
        arguments = {}
        if config.get("use_dynamic_shifting", False):
            arguments["mu"] = math.log(shift) if config.get("time_shift_type") == "exponential" else shift
        self.scheduler.set_timesteps(sigmas=sigmas, device=self._execution_device, **arguments)
        self.scheduler.set_begin_index(0)
        self._num_timesteps = len(self.scheduler.timesteps)
        return self.scheduler.timesteps

    def _denoise(
        self,
        state: Denoising,
        timesteps: Tensor,
        joint_attention_kwargs: dict[str, Any] | None,
        callback: Callable[..., dict[str, Any]] | None,
        reported: list[str],
    ) -> None:
        """Take the latents of `state` through all steps."""
        with self.progress_bar(total=len(timesteps)) as progress_bar:
            for index, timestep in enumerate(timesteps):
                if self.interrupt:
                    continue
                self._current_timestep = timestep
                predictions = self._predict(state, index, joint_attention_kwargs)
                prediction = guided(
                    predictions,
                    branches=len(self._branches),
                    scale=self._guidance.text_scale(index),
                    image_scales=self._guidance.image_scales(
                        index, num_inference_steps=len(timesteps), num_latent_frames=state.size[0]
                    ),
                )
                state.latents = self.scheduler.step(prediction, timestep, state.latents, return_dict=False)[0]
                if callback is not None:
                    known = {"latents": state.latents, **state.texts}
                    changed = callback(self, index, timestep, {name: known[name] for name in reported})
                    state.latents = changed.pop("latents", state.latents)
                    state.texts |= changed
                progress_bar.update()
        self._current_timestep = None

    def _predict(self, state: Denoising, index: int, joint_attention_kwargs: dict[str, Any] | None) -> Tensor:
        """The transformer's output for all branches of a step, (branches * B, L, 4C) in float32."""
        count, size, device = len(self._branches), state.size, state.latents.device
        inputs = torch.cat([state.latents.repeat(count, 1, 1), state.side], dim=-1)
        sigma, steps = self.scheduler.sigmas[index], len(self.scheduler.timesteps)
        with self.transformer.cache_context(
            "cond_uncond", step_index=index, num_inference_steps=steps, sigma=float(sigma)
        ):
            output = self.transformer(
                hidden_states=inputs.to(self.transformer.dtype),
                timestep=sigma.to(device).expand(len(inputs)),
                encoder_hidden_states=state.text("prompt_embeds", count),
                pooled_projections=state.text("pooled_prompt_embeds", count),
                img_ids=token_positions(size, device=device),
                txt_ids=torch.zeros(state.texts["prompt_embeds"].shape[1], 3, device=device),
                joint_attention_kwargs=joint_attention_kwargs,
                return_dict=False,
            )
        return output[0].float()

    def _decode(self, latents: Tensor, output_type: str) -> Any:
        latents = latents.to(self.vae.dtype) / self.vae.config.scaling_factor
        video = self.vae.decode(latents, return_dict=False)[0]
        return self.video_processor.postprocess_video(video, output_type=output_type)
