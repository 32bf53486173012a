"""Minutes of video from a causal Wan student with a bounded memory (Context Forcing, arXiv 2602.06028).

from vidaccel.pipelines.context_forcing_wan import ContextForcingWanPipeline
pipe = ContextForcingWanPipeline.from_pretrained(folder)   # of `vidaccel convert causal-wan`, or the embedded student
for chunk in pipe.stream("a red ball hops on a meadow", num_chunks=80, height=128, width=128):
    show(chunk.frames)                                      # while the next chunk is made
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.pipelines.wan.pipeline_output import WanPipelineOutput
from diffusers.pipelines.wan.pipeline_wan import WanPipeline
from diffusers.video_processor import VideoProcessor
from torch import Tensor
from transformers import AutoTokenizer, UMT5EncoderModel

from vidaccel.catalog.shares import shared_components
from vidaccel.errors import UserError
from vidaccel.memory import MemoryConfig
from vidaccel.models.causal_wan import CausalWanTransformer3DModel
from vidaccel.rollout.chunk import Chunk, Shot, Student
from vidaccel.rollout.decode import StreamingDecoder, encode_start
from vidaccel.rollout.loop import ingest, rollout
from vidaccel.rollout.state import Decoder, RolloutState, new_state
from vidaccel.rollout.timeline import ChunkGrid, PromptTimeline

_ENDLESS = 2**62


class ContextForcingWanPipeline(WanPipeline):
    """Text, and an image or a clip to begin with, to video of any length; called like `WanPipeline`.

    `stream` gives chunks as they are finished. The memory, steps and guidance that a student was made for are part of
    the pipeline's config and need not be said.
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae"
    _optional_components: Any = WanPipeline._optional_components[:0]  # diffusers adds lists to it

    def __init__(
        self,
        tokenizer: AutoTokenizer,
        text_encoder: UMT5EncoderModel,
        vae: AutoencoderKLWan,
        scheduler: FlowMatchEulerDiscreteScheduler,
        transformer: CausalWanTransformer3DModel,
        memory: str = "slow-fast:3+12+6",
        chunk_frames: int = 3,
        num_inference_steps: int = 4,
        guidance_scale: float = 1.0,
    ) -> None:
        """Put the parts together.

        memory: as `MemoryConfig.parse` takes it. chunk_frames: latent frames made together.
        Raises UserError for a transformer that is not causal, and for a scheduler that cannot re-noise.
        """
        DiffusionPipeline.__init__(self)
        if scheduler is not None and not isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
            raise UserError(
                f"`scheduler` must be a FlowMatchEulerDiscreteScheduler, got {type(scheduler).__name__}; give one with "
                "the `shift` that the student was trained with, for few-step students with `stochastic_sampling=True`."
            )
        if transformer is not None and not isinstance(transformer, CausalWanTransformer3DModel):
            raise UserError(
                f"`transformer` must be a CausalWanTransformer3DModel, got {type(transformer).__name__}; load one with "
                "`CausalWanTransformer3DModel.from_pretrained`, or use `vidaccel convert causal-wan`."
            )
        self.register_modules(
            tokenizer=tokenizer, text_encoder=text_encoder, vae=vae, scheduler=scheduler, transformer=transformer
        )
        settings = {"memory": memory, "chunk_frames": chunk_frames, "num_inference_steps": num_inference_steps}
        self.register_to_config(**settings, guidance_scale=guidance_scale)
        autoencoder: Any = vae.config
        self.vae_scale_factor_temporal = autoencoder.scale_factor_temporal
        self.vae_scale_factor_spatial = autoencoder.scale_factor_spatial
        self.video_processor = VideoProcessor(vae_scale_factor=self.vae_scale_factor_spatial)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> Any:
        """As diffusers'; parts that a folder shares with an embedded model are loaded from there."""
        missing = shared_components(pretrained_model_name_or_path, given=kwargs)
        return super().from_pretrained(pretrained_model_name_or_path, **missing, **kwargs)

    @property
    def _settings(self) -> Any:
        return self.config

    # The parts of a rollout

    def memory_config(self, memory: MemoryConfig | str | None = None) -> MemoryConfig:
        """The memory that is meant; None: the one the student was made for. Raises ValueError."""
        if isinstance(memory, MemoryConfig):
            return memory
        return MemoryConfig.parse(memory or self._settings.memory, self._settings.chunk_frames)

    def student(self, num_inference_steps: int | None = None, guidance_scale: float | None = None) -> Student:
        """The transformer and how it is sampled; None: as the student was made for."""
        settings = self._settings
        return Student(
            transformer=self.transformer,
            scheduler=self.scheduler,
            num_inference_steps=settings.num_inference_steps if num_inference_steps is None else num_inference_steps,
            guidance_scale=settings.guidance_scale if guidance_scale is None else guidance_scale,
        )

    def new_state(
        self,
        student: Student,
        *,
        height: int = 480,
        width: int = 832,
        seeds: Sequence[int] = (0,),
        memory: MemoryConfig | str | None = None,
        decoder: Decoder | None = None,
    ) -> RolloutState:
        """The state before the first chunk, for videos of `height` x `width` pixels, one a seed.

        Raises UserError for sizes that the networks do not take.
        """
        side = self.vae_scale_factor_spatial
        rows, columns = (side * size for size in self.transformer.config.patch_size[1:])
        if height < 1 or width < 1 or height % rows or width % columns:
            raise UserError(
                f"`height` and `width` must be multiples of {rows} and {columns}, got {height} and {width}."
            )
        return new_state(
            student,
            self.memory_config(memory),
            height=height // side,
            width=width // side,
            seeds=tuple(seeds),
            decoder=decoder,
            device=self._execution_device,
        )

    def grid(self, *, fps: float = 16, given_frames: int = 0) -> ChunkGrid:
        """Where chunks lie in time. given_frames: latent frames that the video begins with."""
        return ChunkGrid(
            chunk_frames=self._settings.chunk_frames,
            fps=fps,
            temporal_stride=self.vae_scale_factor_temporal,
            given_frames=given_frames,
        )

    def shots(
        self,
        prompt: str | Sequence[str] | PromptTimeline,
        *,
        negative_prompt: str | Sequence[str] | None = None,
        guided: bool = False,
        num_videos: int = 1,
        num_chunks: int | None = None,
        max_sequence_length: int = 512,
        grid: ChunkGrid | None = None,
    ) -> list[Shot]:
        """Encode the prompts of a timeline, or one for every video, into shots.

        Raises UserError for another number of prompts than of videos.
        """
        negative = _for_each(negative_prompt or "", num_videos, "negative_prompt")
        if not isinstance(prompt, PromptTimeline):
            texts = _for_each(prompt, num_videos, "prompt")
            name = prompt if isinstance(prompt, str) else " | ".join(texts)
            embeddings = self._embeddings(texts, negative, guided, max_sequence_length)
            return [Shot(start_chunk=0, prompt=name, embeddings=embeddings)]
        changes = prompt.changes(grid or self.grid(), num_chunks=_ENDLESS if num_chunks is None else num_chunks)
        return [
            Shot(
                start_chunk=change.chunk,
                prompt=change.span.prompt,
                cut=change.span.cut,
                embeddings=self._embeddings([change.span.prompt] * num_videos, negative, guided, max_sequence_length),
            )
            for change in changes
        ]

    def _embeddings(self, texts: list[str], negative: list[str], guided: bool, length: int) -> tuple[Tensor, ...]:
        dtype = self.transformer.dtype
        with torch.no_grad():
            found = self.encode_prompt(
                prompt=texts,
                negative_prompt=negative,
                do_classifier_free_guidance=guided,
                max_sequence_length=length,
                device=self._execution_device,
            )
        return tuple(part.to(dtype) for part in found if part is not None)

    def _given_shot(self, embeddings: Tensor, negative: Tensor | None, guided: bool) -> Shot:
        """The shot of embeddings that were made elsewhere, named after what they hold."""
        parts = [part for part in (embeddings, negative if guided else None) if part is not None]
        width = self.transformer.config.text_dim
        if len(parts) != 1 + guided or any(part.ndim != 3 or part.shape[2] != width for part in parts):
            raise UserError(
                f"`prompt_embeds`, and with guidance `negative_prompt_embeds`, must be (videos, text tokens, {width}); "
                f"got {[tuple(part.shape) for part in parts]}."
            )
        digest = hashlib.sha256(embeddings.detach().float().cpu().numpy().tobytes()).hexdigest()
        return Shot(start_chunk=0, prompt=f"embeddings {digest[:16]}", embeddings=tuple(parts))

    # Making video

    def stream(
        self,
        prompt: str | Sequence[str] | PromptTimeline | None = None,
        *,
        num_chunks: int | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        image: Any = None,
        video: Any = None,
        height: int = 480,
        width: int = 832,
        seeds: Sequence[int] = (0,),
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        memory: MemoryConfig | str | None = None,
        fps: float = 16,
        max_sequence_length: int = 512,
        decode: bool = True,
        state: RolloutState | None = None,
    ) -> Iterator[Chunk]:
        """Finished chunks, one after the other: latents and, unless `decode` is False, pixel frames.

        prompt: one for all videos, one for each seed, or a timeline; or `prompt_embeds` (videos, text tokens,
            text_dim) in its place, with guidance `negative_prompt_embeds` too.
        num_chunks: of the whole rollout; None goes on until the caller stops.
        image, video: to begin with, (3, H, W) or (f, 3, H, W) in [0, 1], or what diffusers' pipelines take (PIL
            images are scaled); its own chunks come first and count.
        fps: what a timeline's seconds are counted in.
        state: to go on from, as `new_state` or a session gave it; it is advanced in place.
        Raises UserError for sizes, prompts and starts that do not go together.
        """
        student = self.student(num_inference_steps, guidance_scale)
        if state is None:
            decoder = StreamingDecoder(self.vae) if decode else None
            state = self.new_state(student, height=height, width=width, seeds=seeds, memory=memory, decoder=decoder)
        start = None
        if image is not None or video is not None:
            start = self._start(image, video, state)
        guided = student.num_branches > 1
        if prompt_embeds is not None and prompt is None:
            shots = [self._given_shot(prompt_embeds, negative_prompt_embeds, guided)]
        elif prompt is None or prompt_embeds is not None:
            raise UserError("Give `prompt` or `prompt_embeds`, one of them.")
        else:
            shots = self.shots(
                prompt,
                negative_prompt=negative_prompt,
                guided=guided,
                num_videos=len(state.seeds),
                num_chunks=num_chunks,
                max_sequence_length=max_sequence_length,
                grid=self.grid(fps=fps, given_frames=0 if start is None else start.shape[2]),
            )
        begin: Iterator[Chunk] = iter(())
        if start is not None:
            begin = ingest(student, state, shots[0], start)
        going_on = rollout(student, state, shots, num_chunks=_ENDLESS if num_chunks is None else num_chunks)
        return itertools.chain(begin, going_on)

    def _start(self, image: Any, video: Any, state: RolloutState) -> Tensor:
        if image is not None and video is not None:
            raise UserError("A rollout begins with an image or a video, not both.")
        side = self.vae_scale_factor_spatial
        size = (state.size[1] * side, state.size[2] * side)
        frames = video if image is None else image
        if not isinstance(frames, Tensor):
            frames = self.video_processor.preprocess(frames, *size) / 2 + 0.5
        elif image is not None and frames.ndim == 3:
            frames = frames[None]
        if tuple(frames.shape[-2:]) != size:
            raise UserError(
                f"The frames to begin with are {tuple(frames.shape[-2:])} and the video is {size} (height, width); "
                "scale and cut them first."
            )
        latents = encode_start(self.vae, frames)
        if len(latents) not in (1, len(state.seeds)):
            raise UserError(f"There are {len(latents)} clips to begin with and {len(state.seeds)} videos; give one.")
        return latents.expand(len(state.seeds), -1, -1, -1, -1)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | PromptTimeline | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        height: int = 480,
        width: int = 832,
        num_frames: int = 81,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        num_videos_per_prompt: int = 1,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        output_type: str = "np",
        return_dict: bool = True,
        memory: MemoryConfig | str | None = None,
        image: Any = None,
        video: Any = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        max_sequence_length: int = 512,
    ) -> Any:
        """Make whole videos of `num_frames` pixel frames, as `WanPipeline` does; see `stream` for the other arguments.

        generator: draws the seed of each video, or one for each.
        output_type: "np", "pt", "pil" or "latent".
        Returns a `WanPipelineOutput`, or a tuple without `return_dict`. Raises UserError.
        """
        for name, value in (("num_frames", num_frames), ("num_videos_per_prompt", num_videos_per_prompt)):
            if value < 1:
                raise UserError(f"`{name}` must be at least 1, got {value}.")
        if output_type not in ("np", "pt", "pil", "latent"):
            raise UserError(f"`output_type` must be np, pt, pil or latent; got {output_type!r}.")
        prompt, negative_prompt, prompt_embeds, negative_prompt_embeds = (
            _repeated(given, num_videos_per_prompt)
            for given in (prompt, negative_prompt, prompt_embeds, negative_prompt_embeds)
        )
        counted = prompt if prompt_embeds is None else prompt_embeds
        count = len(counted) if isinstance(counted, list | Tensor) else num_videos_per_prompt
        stride = self.vae_scale_factor_temporal
        num_latent_frames = (num_frames - 1 + stride - 1) // stride + 1
        chunks = self.stream(
            prompt,
            negative_prompt=negative_prompt,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            image=image,
            video=video,
            height=height,
            width=width,
            seeds=_seeds(generator, count),
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            memory=memory,
            max_sequence_length=max_sequence_length,
            decode=output_type != "latent",
        )
        frames, latents = [], []
        with self.progress_bar(total=num_latent_frames) as bar:
            for chunk in chunks:
                latents.append(chunk.latents)
                frames.append(chunk.frames)
                bar.update(chunk.latents.shape[2])
                if sum(part.shape[2] for part in latents) >= num_latent_frames:
                    break
        self.maybe_free_model_hooks()
        if output_type == "latent":
            result: Any = torch.cat(latents, dim=2)[:, :, :num_latent_frames]
        else:
            pixels = torch.cat([part for part in frames if part is not None], dim=1)[:, :num_frames]
            result = self.video_processor.postprocess_video(
                pixels.transpose(1, 2).float() / 127.5 - 1, output_type=output_type
            )
        return WanPipelineOutput(frames=result) if return_dict else (result,)


def _for_each(prompt: str | Sequence[str], count: int, name: str) -> list[str]:
    """A text for every video."""
    texts = [prompt] * count if isinstance(prompt, str) else list(prompt)
    if len(texts) != count or not all(isinstance(text, str) for text in texts):
        raise UserError(f"`{name}` must be a text, or one for each of the {count} videos (seeds); got {prompt!r}.")
    return texts


def _repeated(given: Any, times: int) -> Any:
    """Prompts, or their embeddings, with each as often in a row as there are videos of it; one text is for all."""
    if isinstance(given, Tensor):
        return given.repeat_interleave(times, dim=0)
    if given is None or isinstance(given, str | PromptTimeline):
        return given
    return [one for one in given for _ in range(times)]


def _seeds(generator: torch.Generator | Sequence[torch.Generator] | None, count: int) -> tuple[int, ...]:
    """A seed for every video, drawn from the generators."""
    if isinstance(generator, Sequence):
        if len(generator) != count:
            raise UserError(f"There must be a generator for each of the {count} videos, got {len(generator)}.")
        sources: list[torch.Generator | None] = list(generator)
    else:
        sources = [generator] * count
    return tuple(
        int(torch.randint(2**62, (1,), generator=source, device="cpu" if source is None else source.device))
        for source in sources
    )
