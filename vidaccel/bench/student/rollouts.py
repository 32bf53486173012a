"""Videos by the path that users run, many at once: prompts that change, a camera, a beginning that is given.

Latents are (N, C, F, h, w) on the CPU, normalised as the transformer's; only the parts that are read are decoded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from vidaccel.errors import UserError
from vidaccel.rollout.chunk import Chunk, Shot, Student
from vidaccel.rollout.decode import StreamingDecoder, encode_start
from vidaccel.rollout.loop import replay, rollout
from vidaccel.rollout.skipping import StepSkipping
from vidaccel.world import FRAME_SIZE, Trip, render_trips

CHUNK_FRAMES = 3  # in which the trips of the world are counted
STRIDE = 4
CHUNK_PIXELS = CHUNK_FRAMES * STRIDE
Told = Callable[[Sequence[int], Chunk], None]
_VIDEOS = 32  # made together
_DECODED = 8  # decoded together, where a CPU is fastest
_ENCODED = 4  # trips that are encoded together
_WARM_UP = 3  # latent frames decoded before a part: after these, pixels differ by a third of a level in the mean


@dataclass(frozen=True, kw_only=True)
class Script:
    """What a video is made of.

    seed: of its noise. prompts: first chunk and text of each. camera: screens of every latent frame; None: it holds.
    given: latents (C, F, h, w) of whole chunks that it begins with.
    """

    seed: int
    prompts: tuple[tuple[int, str], ...]
    camera: tuple[float, ...] | None = None
    given: Tensor | None = None

    @property
    def form(self) -> tuple[Any, ...]:
        """What videos that are made together have in common."""
        starts = tuple(start for start, _ in self.prompts)
        return starts, self.camera, 0 if self.given is None else self.given.shape[1]


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """How a chunk is sampled.

    num_inference_steps: None as the student was made for. is_euler: without fresh noise, whatever its scheduler says.
    skipping: steps that are left out.
    """

    num_inference_steps: int | None = None
    is_euler: bool = False
    skipping: StepSkipping | None = None

    @classmethod
    def parse(cls, text: str) -> Sampler:
        """`student`, `steps:3`, `euler:8`, or `skip:3`. Raises UserError for anything else."""
        kind, _, value = text.partition(":")
        if text == "student":
            return cls()
        if kind == "skip":
            return cls(skipping=StepSkipping.parse(value))
        if kind not in ("euler", "steps") or not value.isdecimal() or int(value) < 1:
            raise UserError(
                "A sampler is `student`, `steps:` or `euler:` and a number of steps, such as euler:8, or `skip:` and "
                f"steps to leave out, such as skip:3; got {text!r}."
            )
        return cls(num_inference_steps=int(value), is_euler=kind == "euler")

    def student(self, pipe: Any) -> Student:
        """The student of a pipeline that samples so. Raises UserError for steps that it does not have."""
        made: Student = replace(pipe.student(self.num_inference_steps), skipping=self.skipping)
        if not self.is_euler:
            return made
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config, stochastic_sampling=False)
        return replace(made, scheduler=scheduler)


@dataclass(frozen=True, kw_only=True)
class Filming:
    """A pipeline and how it is used."""

    pipe: Any
    sampler: Sampler = Sampler()

    def __post_init__(self) -> None:
        sizes = self.pipe.config.chunk_frames, self.pipe.vae_scale_factor_temporal
        if sizes != (CHUNK_FRAMES, STRIDE):
            raise UserError(
                f"The trips of the world are in chunks of {CHUNK_FRAMES} latent frames of {STRIDE} frames each; this "
                f"student makes {sizes[0]} of {sizes[1]}. Measure one of {CHUNK_FRAMES} and {STRIDE}."
            )

    @property
    def has_camera(self) -> bool:
        """Whether the student can be told how its camera moves."""
        return bool(self.pipe.transformer.takes_camera)

    def film(self, scripts: Sequence[Script], num_chunks: int, *, tell: Told | None = None) -> Tensor:
        """The latents of all videos, in the order of their scripts, with what they were given.

        tell: called with every chunk that is made, and the places of the scripts whose videos it is of.
        """
        alike: dict[tuple[Any, ...], list[int]] = {}
        for place, script in enumerate(scripts):
            alike.setdefault(script.form, []).append(place)
        batches = [places[at : at + _VIDEOS] for places in alike.values() for at in range(0, len(places), _VIDEOS)]
        made: dict[int, Tensor] = {}
        for batch in batches:
            told = None if tell is None else partial(tell, batch)
            part = self._batch([scripts[place] for place in batch], num_chunks, told)
            made.update(zip(batch, part, strict=True))
        return torch.stack([made[place] for place in range(len(scripts))])

    @torch.no_grad()
    def _batch(self, scripts: Sequence[Script], num_chunks: int, tell: Callable[[Chunk], None] | None) -> Tensor:
        student = self.sampler.student(self.pipe)
        seeds = [script.seed for script in scripts]
        state = self.pipe.new_state(student, height=FRAME_SIZE, width=FRAME_SIZE, seeds=seeds)
        shots = self._shots(scripts, student)
        given = [] if scripts[0].given is None else [torch.stack([_given(script) for script in scripts])]
        camera = {} if scripts[0].camera is None else {"camera": _chunk_camera(scripts[0].camera)}
        if given:
            replay(student, state, shots, iter(given[0].split(CHUNK_FRAMES, dim=2)), **camera)
        made = list(given)
        for chunk in rollout(student, state, shots, num_chunks=num_chunks, **camera):
            made.append(chunk.latents.float().cpu())
            if tell is not None:
                tell(chunk)
        return torch.cat(made, dim=2)

    def _shots(self, scripts: Sequence[Script], student: Student) -> list[Shot]:
        return [
            replace(
                self.pipe.shots(
                    [script.prompts[number][1] for script in scripts],
                    num_videos=len(scripts),
                    guided=student.num_branches > 1,
                )[0],
                start_chunk=start,
            )
            for number, (start, _) in enumerate(scripts[0].prompts)
        ]

    def decode(self, latents: Tensor, start: int, stop: int) -> Tensor:
        """Pixel frames `start` to `stop` of videos, (N, f, 3, H, W) uint8, on the device that they are read on too."""
        first, last = _latent_of(start), _latent_of(stop - 1)
        begin = max(first - _WARM_UP, 0)
        parts = latents[:, :, begin : last + 1].split(_DECODED)
        videos = torch.cat([StreamingDecoder(self.pipe.vae).decode(part) for part in parts])
        return videos[:, start - STRIDE * begin : stop - STRIDE * begin]


def first_pixel(chunk: int) -> int:
    """The first pixel frame of a chunk."""
    return max(CHUNK_PIXELS * chunk - STRIDE + 1, 0)


def encoded_trips(vae: Any, trips: Sequence[Trip], num_chunks: int) -> Tensor:
    """Latents of the first chunks as the world shows them."""
    parts = [trips[first : first + _ENCODED] for first in range(0, len(trips), _ENCODED)]
    frames = CHUNK_PIXELS * num_chunks - CHUNK_PIXELS + first_pixel(1)
    clips = (render_trips(part, num_frames=frames, device=vae.device) for part in parts)
    return torch.cat([encode_start(vae, clip).cpu() for clip in clips])


def _latent_of(pixel: int) -> int:
    return -(-pixel // STRIDE)


def _given(script: Script) -> Tensor:
    assert script.given is not None, "videos that are made together begin alike"
    return script.given


def _chunk_camera(screens: Sequence[float]) -> Any:
    """Screens and motions of the frames of a chunk, as a rollout asks for them."""

    def camera(chunk: int, first: int, count: int) -> tuple[list[float], list[float]]:
        before = [screens[0], *screens]
        here = list(screens[first : first + count])
        return here, [now - then for now, then in zip(here, before[first : first + count], strict=True)]

    return camera
