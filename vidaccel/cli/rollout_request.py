"""What a rollout of the command line is, known before its model is loaded: settings, files, length, memory it takes."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from vidaccel.catalog.pipelines import STUDENT_PIPELINE, WAN_TEXT_TOKENS
from vidaccel.catalog.registry import model_index, pipeline_name, spec_of
from vidaccel.catalog.shares import shared_folder
from vidaccel.catalog.spec import ModelSpec
from vidaccel.cli.console import say_warning
from vidaccel.errors import UserError
from vidaccel.files.digest import folder_digest
from vidaccel.generation.expert_files import LoraFile
from vidaccel.generation.loading import component_dtypes, model_folder, resolve_device
from vidaccel.generation.request import GenerationRequest, Input, request_for
from vidaccel.machine.footprint import gigabytes
from vidaccel.memory import MemoryConfig, MemoryPolicy, parse_memory
from vidaccel.models.taehv import TinyWanDecoder
from vidaccel.rollout import PassMode
from vidaccel.rollout.camera import PlacedPath, check_takes_camera
from vidaccel.rollout.grid import ChunkGrid
from vidaccel.rollout.kept_session import SessionSettings
from vidaccel.rollout.plan import RolloutPlan, plan_rollout
from vidaccel.rollout.sizes import ModelSizes, RolloutSize
from vidaccel.rollout.skipping import StepSkipping
from vidaccel.rollout.start import check_length, start_settings
from vidaccel.rollout.timeline import PromptTimeline


@dataclass(frozen=True, kw_only=True)
class StudentFolder:
    """The folder of a causal student, what its index says, and what its parts measure."""

    spec: ModelSpec
    folder: Path
    shared: Path | None
    index: Mapping[str, Any]
    sizes: ModelSizes

    @classmethod
    def of(cls, spec: ModelSpec) -> "StudentFolder":
        """Read the files. Raises UserError for a model of another kind, before it is fetched where that is known."""
        if (named := pipeline_name(spec)) is not None:
            _check_kind(spec, named)
        folder = model_folder(spec)
        index = model_index(spec)
        if index is None:
            raise UserError(f"The model_index.json of {spec.name!r} in {folder} cannot be read; save the model again.")
        _check_kind(spec, index["_class_name"])
        shared = shared_folder(folder)

        def part(name: str) -> Path:
            return folder / name if shared is None or (folder / name).is_dir() else shared / name

        sizes = ModelSizes.of_folders(
            transformer=part("transformer"), vae=part("vae"), text_encoder=part("text_encoder")
        )
        spec = replace(spec, defaults=spec_of(str(folder)).defaults)  # of the folder, also where it came from the Hub
        return cls(spec=spec, folder=folder, shared=shared, index=index, sizes=sizes)

    @property
    def steps(self) -> int:
        """Steps of a chunk that the student was made for."""
        return int(self.index.get("num_inference_steps", 4))

    @property
    def guidance_scale(self) -> float:
        """Weight of the prompt that the student was made for."""
        return float(self.index.get("guidance_scale", 1.0))

    def request(self, prompt: str, flags: Mapping[str, Any]) -> GenerationRequest:
        """What is asked for; what is None in `flags` is the student's own. Raises UserError for a wrong value."""
        own = {"num_inference_steps": self.steps, "guidance_scale": self.guidance_scale}
        given: dict[str, Any] = own | {name: value for name, value in flags.items() if value is not None}
        request = request_for(self.spec.defaults, prompt, **given)
        if request.negative_prompt is not None and request.guidance_scale in (None, 1):
            say_warning("--negative-prompt has no effect without guidance; give --guidance-scale above 1.")
        return request

    def memory(self, text: str | None, **changes: Any) -> MemoryPolicy:
        """The memory of the flags; what is None is the student's own. Raises UserError for a wrong value."""
        given = {name: value for name, value in changes.items() if value is not None}
        words = text or self.index.get("memory", "slow-fast")
        if "%" in (text or "") and "depth_every" in given:
            raise UserError(f"--memory {text} and --depth-every {given['depth_every']} say the same; give one of them.")
        try:
            memory = parse_memory(words, int(self.index.get("chunk_frames", 3)))
            if not given:
                return memory
            if isinstance(memory, MemoryConfig):
                return replace(memory, **given)
        except ValueError as error:
            raise UserError(str(error)) from error
        flag = next(iter(given)).replace("_", "-")
        raise UserError(f"--{flag} is for slow-fast memories, and the memory is {words!r}; leave it out.")

    @property
    def takes_camera(self) -> bool:
        """Whether the student is told where its camera is."""
        return self.sizes.transformer.get("camera_dim") is not None

    def small_decoder(self, path: Path) -> "SmallDecoder":
        """The small decoder in a file. Raises UserError for another file, and for one of other models' latents."""
        model = TinyWanDecoder.from_single_file(path)
        shapes = {
            "channels": (model.latent_channels, int(self.sizes.vae.get("z_dim", 16))),
            "pixel frames a latent frame": (model.time_factor, int(self.sizes.vae.get("scale_factor_temporal", 4))),
            "pixels a side": (model.spatial_factor, int(self.sizes.vae.get("scale_factor_spatial", 8))),
        }
        for what, (its, wanted) in shapes.items():
            if its != wanted:
                raise UserError(
                    f"The decoder {path.name} is for latents of another model: {what} are {its}, and {self.spec.name!r}"
                    f" has {wanted}; taew2_1.safetensors is for Wan2.1, taew2_2.safetensors for Wan2.2 5B."
                )
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return SmallDecoder(model=model, name=path.name, digest=digest)

    def digests(self) -> list[str]:
        """Of the folders that the weights are in."""
        return [folder_digest(folder) for folder in (self.folder, self.shared) if folder is not None]


@dataclass(frozen=True, kw_only=True)
class SmallDecoder:
    """What decodes instead of the autoencoder, the name of its file and the sha256 of it."""

    model: TinyWanDecoder
    name: str
    digest: str


@dataclass(frozen=True, kw_only=True)
class RolloutRequest:
    """Everything that decides the pixels of a rollout but its prompts and its length.

    start: pixel frames (f, 3, H, W) in [0, 1] to begin with, of the video's size. decode_start: show them as the
        autoencoder gives them back.
    request: prompt, seed, size and steps as for any other video.
    """

    student: StudentFolder
    request: GenerationRequest
    timeline: PromptTimeline
    memory: MemoryPolicy
    fps: float
    num_chunks: int
    start: Tensor | None = None
    decode_start: bool = False
    device: str = "auto"
    dtype: str = "auto"
    attention: str = "native"
    passes: PassMode = "eager"
    decoder: SmallDecoder | None = None
    loras: tuple[LoraFile, ...] = ()
    skip_steps: str | None = None

    def __post_init__(self) -> None:
        if self.passes == "captured" and (device := resolve_device(self.device)).type != "cuda":
            raise UserError(f"Passes can be captured on CUDA only, and the device is {device}; use compiled or eager.")
        check_takes_camera(
            self.timeline.camera, takes_camera=self.student.takes_camera, student=repr(self.student.spec.name)
        )
        if (rule := self.skipping) is not None:
            rule.check(self.request.num_inference_steps, observes_passes=self.memory.observes_passes)
        check_length(self.grid, self.num_chunks)
        last = self.grid.first_frame(self.num_chunks)
        if self.memory.max_frames is not None and last > self.memory.max_frames:
            raise UserError(
                f"The memory is for at most {self.memory.max_frames} latent frames and the video has {last}; give a "
                "larger or a bounded --memory, or fewer --seconds."
            )

    @property
    def grid(self) -> ChunkGrid:
        """Where chunks lie in time."""
        return grid_of(self.student, self.memory, self.fps, self.start)

    @property
    def skipping(self) -> StepSkipping | None:
        """Which steps of a chunk are left out. Raises UserError for a wrong value."""
        return None if self.skip_steps is None else StepSkipping.parse(self.skip_steps)

    @property
    def camera(self) -> PlacedPath | None:
        """Where the camera is in every chunk; None for a student that is not told."""
        return self.timeline.camera_on(self.grid) if self.student.takes_camera else None

    def camera_words(self) -> list[str]:
        """What the camera does from when until when, in the chunks that it takes; a line for every move that begins."""
        grid = self.timeline.grid_with_cuts(self.grid)
        moves = [move for move in self.timeline.camera.on(grid).moves if move.chunk < self.num_chunks]
        spans = [(grid.start_seconds(move.chunk), grid.start_seconds(move.end)) for move in moves]
        return [
            f"{move.move.words} from {start:g} to {end:g} s" for move, (start, end) in zip(moves, spans, strict=True)
        ]

    @property
    def text_tokens(self) -> int:
        """Length that prompts are padded to."""
        return self.request.max_sequence_length or WAN_TEXT_TOKENS

    @property
    def is_guided(self) -> bool:
        """Whether every step has a pass for the negative prompt too."""
        return self.request.guidance_scale not in (None, 1)

    def dtypes(self) -> dict[str, torch.dtype]:
        """The precision of every component, as it will be loaded."""
        return component_dtypes(self.dtype, resolve_device(self.device), pipeline=STUDENT_PIPELINE)

    def settings(self) -> SessionSettings:
        """What must agree for a session to go on to the same pixels."""
        request = self.request
        return SessionSettings(
            seeds=(request.seed,),
            height=request.height,
            width=request.width,
            num_inference_steps=request.num_inference_steps,
            guidance_scale=request.guidance_scale,
            negative_prompt=request.negative_prompt,
            max_sequence_length=self.text_tokens,
            model_digests=self.student.digests(),
            memory=self.memory,
            fps=self.fps,
            start=start_settings(self.start, stride=self.grid.temporal_stride, is_decoded=self.decode_start),
            decoder=None if self.decoder is None else self.decoder.digest,
            device=resolve_device(self.device).type,
            dtype=self.dtypes(),
            attention=self.attention,
            passes=self.passes,
            adapters=[lora.to_dict() for lora in self.loras],
            skip_steps=None if (rule := self.skipping) is None else str(rule),
        )

    def plan(self) -> RolloutPlan:
        """How much memory it will take. Raises UserError for a size that the model cannot make."""
        size = RolloutSize(
            memory=self.memory,
            height=self.request.height,
            width=self.request.width,
            num_branches=2 if self.is_guided else 1,
            text_tokens=self.text_tokens,
            dtypes=self.dtypes(),
            text_encoder="dropped",
            has_joined_layers=self.passes != "eager",
        )
        model = self.student.sizes
        if self.decoder is not None:
            model = replace(model, small_decoder=dict(self.decoder.model.config))
        return plan_rollout(model, size, device=resolve_device(self.device))


def _check_kind(spec: ModelSpec, pipeline: str) -> None:
    if pipeline != STUDENT_PIPELINE:
        raise UserError(
            f"A rollout needs a causal student ({STUDENT_PIPELINE}), and {spec.name!r} is a {pipeline}; make one with "
            "`vidaccel convert causal-wan`, or use `vidaccel generate` for this model."
        )


def grid_of(student: StudentFolder, memory: MemoryPolicy, fps: float, start: Tensor | None) -> ChunkGrid:
    """Where chunks lie in time; `start` as in `RolloutRequest`. Raises UserError for a rate out of range."""
    stride = int(student.sizes.vae.get("scale_factor_temporal", 4))  # the default of AutoencoderKLWan
    given = 0 if start is None else (start.shape[0] - 1) // stride + 1
    return ChunkGrid(chunk_frames=memory.chunk_frames, fps=fps, temporal_stride=stride, given_frames=given)


def fitted_start(given: Mapping[Input, Tensor], size: tuple[int, int]) -> Tensor | None:
    """The frames to begin with (f, 3, H, W), scaled to cover `size` and cut to it in the middle."""
    if not given:
        return None
    (frames,) = given.values()
    frames = frames if frames.ndim == 4 else frames[None]
    if tuple(frames.shape[-2:]) == size:
        return frames
    scale = max(side / given for side, given in zip(size, frames.shape[-2:], strict=True))
    covering = [max(side, round(given * scale)) for side, given in zip(size, frames.shape[-2:], strict=True)]
    scaled = torch.nn.functional.interpolate(frames, size=covering, mode="bicubic", antialias=True).clamp(0, 1)
    top, left = ((given - side) // 2 for given, side in zip(covering, size, strict=True))
    return scaled[..., top : top + size[0], left : left + size[1]]


def plan_table(plan: RolloutPlan, grid: ChunkGrid) -> Table:
    """The plan, part by part; `grid`: of the rollout."""
    table = Table("part", "size", "held while", "what it is")
    for part in plan.parts:
        phases = "always" if len(part.phases) == 3 else ", ".join(part.phases)
        table.add_row(part.name, gigabytes(part.num_bytes), phases, part.description)
    table.add_section()
    table.add_row(
        "most at once", gigabytes(plan.total_bytes), "", f"{gigabytes(plan.free_bytes)} are free on {plan.device}"
    )
    table.add_row("state", gigabytes(plan.state_bytes), "on disk", "an exact state in a session, --snapshot-every")
    if plan.size.memory.retrieval is not None:
        minute = round(60 * grid.fps / grid.temporal_stride) * plan.latent_frame_bytes
        where = "on disk or in main memory"
        table.add_row("archive", gigabytes(minute), where, "of a minute: latents, from which frames come back")
    return table
