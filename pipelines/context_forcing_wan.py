"""Minutes of video from a causal Wan student with a bounded memory (Context Forcing, arXiv 2602.06028).

from vidaccel.pipelines.context_forcing_wan import ContextForcingWanPipeline
pipe = ContextForcingWanPipeline.from_pretrained(folder)   # of `vidaccel convert causal-wan`, or the embedded student
for chunk in pipe.stream("a red ball hops on a meadow", num_chunks=80):
    show(chunk.frames)                                      # while the next chunk is made
`session="run"` keeps finished chunks in a folder; `resume=True` goes on there, also after the process was killed.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Sequence
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

from vidaccel.catalog.pipelines import WAN_TEXT_TOKENS
from vidaccel.catalog.registry import recorded_defaults
from vidaccel.catalog.shares import shared_components
from vidaccel.errors import UserError
from vidaccel.memory import MemoryPolicy, parse_memory
from vidaccel.models.causal_wan import CausalWanTransformer3DModel
from vidaccel.rollout.camera import CameraPath
from vidaccel.rollout.chunk import Chunk, Shot, Student
from vidaccel.rollout.decode import StreamingDecoder
from vidaccel.rollout.depth import warn_about_depth
from vidaccel.rollout.fingerprint import session_settings
from vidaccel.rollout.grid import ChunkGrid
from vidaccel.rollout.inputs import camera_asked, chunks_asked, drawn_seeds, repeated, start_of, timeline_of
from vidaccel.rollout.production import Production
from vidaccel.rollout.prompts import PromptEncoder
from vidaccel.rollout.session_request import SessionRequest
from vidaccel.rollout.skipping import StepSkipping
from vidaccel.rollout.start import check_number
from vidaccel.rollout.state import Decoder, RolloutState, new_state
from vidaccel.rollout.timeline import PromptTimeline
from vidaccel.sessions import MAIN


class ContextForcingWanPipeline(WanPipeline):
    """Text, and an image or a clip to begin with, to video of any length; called like `WanPipeline`.

    `stream` gives chunks as they are finished. The memory, steps, guidance and sizes that a student was made for are
    part of the pipeline's config and need not be said.
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
        height: int = 480,
        width: int = 832,
        max_sequence_length: int = WAN_TEXT_TOKENS,
    ) -> None:
        """Put the parts together.

        memory: as `parse_memory` takes it. chunk_frames: latent frames made together. height, width,
            max_sequence_length: of videos in pixels and of prompts in tokens, where a call says nothing.
        Raises UserError for a transformer that is not causal, a scheduler that cannot re-noise, and sizes below 1.
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
        sizes = {"height": height, "width": width, "max_sequence_length": max_sequence_length}
        for name, size in sizes.items():
            check_number(name, size)
        self.register_to_config(**settings, guidance_scale=guidance_scale, **sizes)
        autoencoder: Any = vae.config
        self.vae_scale_factor_temporal = autoencoder.scale_factor_temporal
        self.vae_scale_factor_spatial = autoencoder.scale_factor_spatial
        self.video_processor = VideoProcessor(vae_scale_factor=self.vae_scale_factor_spatial)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> Any:
        """As diffusers'; a folder's `vidaccel.json` says its sizes and which parts an embedded model has."""
        missing = shared_components(pretrained_model_name_or_path, given=kwargs)
        sizes = recorded_defaults(pretrained_model_name_or_path, ("height", "width", "max_sequence_length"))
        return super().from_pretrained(pretrained_model_name_or_path, **missing, **(sizes | kwargs))

    @property
    def _settings(self) -> Any:
        return self.config

    # The parts of a rollout

    def memory_config(self, memory: MemoryPolicy | str | None = None) -> MemoryPolicy:
        """None: the student's memory. Words take its `chunk_frames`, an object keeps its own. Raises ValueError."""
        if memory is not None and not isinstance(memory, str):
            return memory
        return parse_memory(memory or self._settings.memory, self._settings.chunk_frames)

    def student(
        self,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        *,
        skip_steps: StepSkipping | str | None = None,
    ) -> Student:
        """The transformer and how it is sampled; None: as the student was made for.

        skip_steps: steps of a chunk whose pass is left out, `"3"`. Raises UserError for steps that cannot be.
        """
        settings = self._settings
        if skip_steps is not None and not isinstance(skip_steps, StepSkipping):
            skip_steps = StepSkipping.parse(skip_steps)
        return Student(
            transformer=self.transformer,
            scheduler=self.scheduler,
            num_inference_steps=settings.num_inference_steps if num_inference_steps is None else num_inference_steps,
            guidance_scale=settings.guidance_scale if guidance_scale is None else guidance_scale,
            skipping=skip_steps,
        )

    def new_state(
        self,
        student: Student,
        *,
        height: int | None = None,
        width: int | None = None,
        seeds: Sequence[int] = (0,),
        memory: MemoryPolicy | str | None = None,
        decoder: Decoder | None = None,
    ) -> RolloutState:
        """The state before the first chunk, for videos of `height` x `width` pixels, one a seed; None: the student's.

        Raises UserError for sizes that the networks do not take. Warns where layers share a memory (`depth_every`) and
        the student was not trained so.
        """
        height = self._settings.height if height is None else height
        width = self._settings.width if width is None else width
        side = self.vae_scale_factor_spatial
        rows, columns = (side * size for size in self.transformer.config.patch_size[1:])
        if height < 1 or width < 1 or height % rows or width % columns:
            raise UserError(
                f"`height` and `width` must be multiples of {rows} and {columns}, got {height} and {width}."
            )
        state = new_state(
            student,
            self.memory_config(memory),
            height=height // side,
            width=width // side,
            seeds=seeds,
            decoder=decoder,
            device=self._execution_device,
        )
        warn_about_depth(self.transformer, state.memory.policy)
        return state

    def grid(self, *, fps: float = 16, given_frames: int = 0, memory: MemoryPolicy | str | None = None) -> ChunkGrid:
        """Where chunks lie in time. given_frames: latent frames that the video begins with."""
        return ChunkGrid(
            chunk_frames=self.memory_config(memory).chunk_frames,
            fps=fps,
            temporal_stride=self.vae_scale_factor_temporal,
            given_frames=given_frames,
        )

    def shots(
        self,
        prompt: str | Sequence[str] | PromptTimeline,
        *,
        num_chunks: int | None = None,
        grid: ChunkGrid | None = None,
        **encoding: Any,
    ) -> list[Shot]:
        """Encode the prompts of a timeline, or one for every video, into shots.

        encoding: `negative_prompt`, `guided`, `num_videos`, `max_sequence_length`, as `PromptEncoder` takes them.
        Raises UserError for another number of prompts than of videos.
        """
        encoding = {"max_sequence_length": self._settings.max_sequence_length} | encoding
        return PromptEncoder(pipe=self, **encoding).shots(prompt, grid or self.grid(), num_chunks)

    # Making video

    def stream(
        self,
        prompt: str | Sequence[str] | PromptTimeline | None = None,
        *,
        num_chunks: int | None = None,
        num_frames: int | None = None,
        camera: CameraPath | str | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        image: Any = None,
        video: Any = None,
        decode_start: bool = False,
        height: int | None = None,
        width: int | None = None,
        seeds: Sequence[int] = (0,),
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        skip_steps: StepSkipping | str | None = None,
        memory: MemoryPolicy | str | None = None,
        fps: float = 16,
        max_sequence_length: int | None = None,
        decode: bool = True,
        state: RolloutState | None = None,
        session: str | os.PathLike[str] | None = None,
        resume: bool = False,
        branch: str = MAIN,
        branch_from: int | None = None,
        from_branch: str = MAIN,
        rewind: int | None = None,
        snapshot_every: int | None = None,
        replay: bool = True,
    ) -> Generator[Chunk]:
        """Finished chunks, one after the other: latents and, unless `decode` is False, pixel frames.

        prompt: one for all videos, one for each seed, or a timeline; or `prompt_embeds` (videos, text tokens,
            text_dim) in its place, with guidance `negative_prompt_embeds` too.
        num_chunks: of the whole rollout, or `num_frames`: as many as hold so many pixel frames; without either it goes
            on until the caller stops.
        camera: how the camera moves, in seconds and widths of the picture, for students that are told: a `CameraPath`
            or its text, `"2-2.75 right 1, 6-6.75 left 1"`; None: it holds, or moves as the timeline says.
        image, video: to begin with, (3, H, W) or (f, 3, H, W) in [0, 1], or what diffusers' pipelines take (PIL
            images are scaled); its own chunks come first and count. Their `frames` are the pixels that were given, with
            `decode_start` those that the autoencoder makes of them.
        height, width, max_sequence_length: None: as the student was made for.
        skip_steps: steps of a chunk whose pass is left out, `"3"`; see `StepSkipping`.
        fps: what the seconds of a timeline and a camera are counted in, and of the video in a session.
        state: to go on from, as `new_state` gave it; it is advanced in place, with its own memory, size and seeds.
        session: a folder in which finished chunks are kept, as `vidaccel rollout --checkpoint` does; either goes on
            with what the other began, with the same settings and the same bits. It is open until the iterator ends or
            is closed (`.close()`), which saves the chunk that was made last.
        resume, branch, branch_from, from_branch, rewind, snapshot_every: see `SessionRequest`.
        replay: with `resume`, give the chunks that the session holds too (`origin` is "saved"), decoded anew from
            their latents; False: new chunks only.

        Arguments are checked, and a session is opened, when this is called. Raises UserError for sizes, prompts and
        starts that do not go together, a start as long as the video, moves of a camera that the student is not told of
        or that the timeline has already, and a session as `open_session` does.
        """
        asked = SessionRequest.of(
            session,
            resume=resume,
            branch=branch,
            branch_from=branch_from,
            from_branch=from_branch,
            rewind=rewind,
            snapshot_every=snapshot_every,
        )
        if state is not None:
            _check_state_alone(asked, memory)
        tokens = self._settings.max_sequence_length if max_sequence_length is None else max_sequence_length
        student = self.student(num_inference_steps, guidance_scale, skip_steps=skip_steps)
        if state is None:
            decoder = StreamingDecoder(self.vae) if decode else None
            state = self.new_state(student, height=height, width=width, seeds=seeds, memory=memory, decoder=decoder)
        start = start_of(self, image, video, state, is_decoded=decode_start)
        given_frames = 0 if start is None else start.num_latent_frames
        grid = self.grid(fps=fps, given_frames=given_frames, memory=state.memory.policy)
        length = chunks_asked(num_chunks, num_frames, prompt, grid)
        moved = camera_asked(camera, prompt, grid, takes_camera=self.transformer.takes_camera)
        encoder = PromptEncoder(
            pipe=self,
            negative_prompt=negative_prompt,
            guided=student.num_branches > 1,
            num_videos=len(state.seeds),
            max_sequence_length=tokens,
        )
        shots = encoder.shots(prompt, grid, length, embeddings=prompt_embeds, negative=negative_prompt_embeds)
        made = Production(student=student, state=state, shots=shots, num_chunks=length, camera=moved, start=start)
        if asked is None:
            return made.chunks()
        made.fps = fps
        return self._kept_chunks(made, asked, encoder, num_given_chunks=grid.num_given_chunks, replay=replay)

    def _kept_chunks(
        self, made: Production, asked: SessionRequest, encoder: PromptEncoder, *, num_given_chunks: int, replay: bool
    ) -> Generator[Chunk]:
        """The chunks of a rollout that is kept in a session, which is opened at once."""
        planned = made.shots
        opened = made.open_session(
            asked,
            session_settings(self, made, encoder),
            encode=lambda text: encoder.past_embeddings(text, planned),
            num_given_chunks=num_given_chunks,
        )
        return made.session_chunks(opened, replay=replay)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | PromptTimeline | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int = 81,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        num_videos_per_prompt: int = 1,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        output_type: str = "np",
        return_dict: bool = True,
        memory: MemoryPolicy | str | None = None,
        image: Any = None,
        video: Any = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        max_sequence_length: int | None = None,
        fps: float = 16,
        decode_start: bool = False,
        camera: CameraPath | str | None = None,
        skip_steps: StepSkipping | str | None = None,
    ) -> Any:
        """Make whole videos of `num_frames` pixel frames, as `WanPipeline` does; see `stream` for the other arguments.

        generator: draws the seed of each video, or one for each.
        output_type: "np", "pt", "pil" or "latent".
        Returns a `WanPipelineOutput`, or a tuple without `return_dict`. Raises UserError.
        """
        check_number("num_videos_per_prompt", num_videos_per_prompt)
        if output_type not in ("np", "pt", "pil", "latent"):
            raise UserError(f"`output_type` must be np, pt, pil or latent; got {output_type!r}.")
        prompt, negative_prompt, prompt_embeds, negative_prompt_embeds = (
            repeated(given, num_videos_per_prompt)
            for given in (prompt, negative_prompt, prompt_embeds, negative_prompt_embeds)
        )
        counted = prompt if prompt_embeds is None else prompt_embeds
        count = len(counted) if isinstance(counted, list | Tensor) else num_videos_per_prompt
        chunks = self.stream(
            prompt,
            num_frames=num_frames,
            negative_prompt=negative_prompt,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            image=image,
            video=video,
            decode_start=decode_start,
            height=height,
            width=width,
            seeds=drawn_seeds(generator, count),
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            memory=memory,
            fps=fps,
            max_sequence_length=max_sequence_length,
            decode=output_type != "latent",
            camera=camera,
            skip_steps=skip_steps,
        )
        made = []
        with self.progress_bar(total=num_frames) as bar:
            for chunk in chunks:
                made.append(chunk)
                bar.update(0 if chunk.frames is None else chunk.frames.shape[1])
        self.maybe_free_model_hooks()
        if output_type == "latent":
            given_frames = sum(chunk.latents.shape[2] for chunk in made if chunk.origin == "given")
            grid = self.grid(fps=fps, given_frames=given_frames, memory=memory)
            surplus = timeline_of(prompt).first_pixel_frame(len(made), grid) - num_frames
            latents = torch.cat([chunk.latents for chunk in made], dim=2)
            result: Any = latents[:, :, : latents.shape[2] - surplus // self.vae_scale_factor_temporal]
        else:
            pixels = torch.cat([chunk.frames for chunk in made if chunk.frames is not None], dim=1)[:, :num_frames]
            result = self.video_processor.postprocess_video(
                pixels.transpose(1, 2).float() / 127.5 - 1, output_type=output_type
            )
        return WanPipelineOutput(frames=result) if return_dict else (result,)


def _check_state_alone(asked: SessionRequest | None, memory: MemoryPolicy | str | None) -> None:
    """Raise UserError where a rollout is to go on from a state and is given what the state has, or a second past."""
    if asked is not None:
        raise UserError("A rollout goes on from `state` or from a `session`; give one of them.")
    if memory is not None:
        raise UserError("A `state` has its memory already; leave out `memory`, or give it to `new_state`.")
