"""A pipeline and a transformer that no library has, with habits of their own, and the rows that describe them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from diffusers import ModelMixin, WanPipeline, WanTransformer3DModel
from diffusers.pipelines.wan.pipeline_output import WanPipelineOutput

from vidaccel.catalog.families.family import Component, Family
from vidaccel.catalog.table import CATALOG, Catalog, family_named
from vidaccel.catalog.traits import PipelineTraits, TransformerTraits

LEAST_STEPS = 3


class StormTransformer3DModel(WanTransformer3DModel, ModelMixin):  # diffusers looks for `ModelMixin` in the module
    """Wan's, with twice the channels: what it learned of the variance stands behind the prediction."""

    def forward(self, hidden_states: torch.Tensor, timestep: torch.Tensor, encoder_hidden_states: torch.Tensor) -> Any:
        (prediction,) = super().forward(hidden_states, timestep, encoder_hidden_states, return_dict=False)
        return (torch.cat([prediction, prediction.flip(2)], 1),)


class StormPipeline(WanPipeline):
    """Latent frames of equal groups, in two loops of at least three steps, always against a negative prompt.

    Both branches are one batch without a name, the conditional one first.
    """

    @torch.no_grad()
    def __call__(
        self,
        prompt: Any,
        negative_prompt: Any = None,
        height: int = 32,
        width: int = 32,
        num_frames: int = 8,
        num_inference_steps: int = 12,
        guidance_scale: float = 5.0,
        generator: Any = None,
        output_type: str = "np",
        callback_on_step_end: Any = None,
        callback_on_step_end_tensor_inputs: Any = None,
        max_sequence_length: int = 64,
    ) -> Any:
        if num_inference_steps < LEAST_STEPS or negative_prompt is None or num_frames % self.vae_scale_factor_temporal:
            raise ValueError("three steps, a negative prompt and whole groups of frames are needed")
        count, device = 1 if isinstance(prompt, str) else len(prompt), self._execution_device
        texts = torch.cat(self.encode_prompt(prompt, negative_prompt, max_sequence_length=max_sequence_length))
        size = (count, self.transformer.config.in_channels, height, width, num_frames)
        latents, self._interrupt, self._guidance_scale = 0.0, False, guidance_scale
        for _ in range(2):
            latents = latents + self.prepare_latents(*size, torch.float32, device, generator)
            self.scheduler.set_timesteps(num_inference_steps, device=device)
            self._num_timesteps = num_inference_steps
            for index, timestep in enumerate(self.scheduler.timesteps):
                if self.interrupt:
                    continue
                self._current_timestep = timestep
                output = self.transformer(
                    hidden_states=torch.cat([latents] * 2),
                    timestep=timestep.expand(2 * count),
                    encoder_hidden_states=texts,
                )[0]
                wanted, other = output.chunk(2, 1)[0].chunk(2)
                prediction = other + guidance_scale * (wanted - other)
                latents = self.scheduler.step(prediction, timestep, latents, return_dict=False)[0]
                if callback_on_step_end is not None:
                    callback_on_step_end(self, index, timestep, {})
        self._current_timestep = None
        video = latents if output_type == "latent" else self._decoded(latents, num_frames, output_type)
        self.maybe_free_model_hooks()
        return WanPipelineOutput(frames=video)

    def _decoded(self, latents: torch.Tensor, num_frames: int, output_type: str) -> Any:
        padded = torch.cat([latents, latents[:, :, -1:]], 2)
        video = self.vae.decode(padded.to(self.vae.dtype), return_dict=False)[0][:, :, :num_frames]
        return self.video_processor.postprocess_video(video, output_type=output_type)


def catalog_with_storm() -> Catalog:
    """The catalog and one more family, with the rows of its classes."""
    wan = family_named("wan2.1-t2v")
    transformer = Component(kind=f"{__name__}:StormTransformer3DModel", config=wan.components["transformer"].config)
    storm = Family(
        name="storm",
        description="two loops over frames in groups",
        pipeline=f"{__name__}:StormPipeline",
        components={**wan.components, "transformer": transformer},
        defaults=dict(wan.defaults) | {"num_frames": 8, "negative_prompt": "fog"},
    )
    pipeline = PipelineTraits(
        batched_guidance=("cond", "uncond"),
        several_loops=True,
        fewest_steps=LEAST_STEPS,
        frame_rule="groups",
        needs_negative_prompt=True,
    )
    return replace(
        CATALOG,
        families=(*CATALOG.families, storm),
        pipelines={**CATALOG.pipelines, "StormPipeline": pipeline},
        transformers={**CATALOG.transformers, "StormTransformer3DModel": TransformerTraits(holds_rest=True)},
    )
