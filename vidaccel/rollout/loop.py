"""The loop of an autoregressive rollout (Context Forcing, arXiv 2602.06028; Self-Forcing, arXiv 2506.08009).

A chunk is denoised in a few steps while it attends to the memory, then passed once more at timestep 0 to be remembered:
with the same memory in sight, or by students that were trained so every frame alone (`clean_pass`).
The noise of a chunk is a function of the seed and its number: how long the rollout is, and whether it was resumed, does
not matter. Latents are (B, C, F, H, W), normalised as the transformer takes them.
"""

import copy
import math
import time
from collections.abc import Generator, Hashable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from vidaccel.errors import UserError
from vidaccel.machine.adapters import adapters_of, weight_places
from vidaccel.machine.components import onload
from vidaccel.memory.camera import Camera
from vidaccel.memory.keys_values import KeyValueMemory
from vidaccel.memory.transfer import sent
from vidaccel.models.causal_blocks import PromptCache
from vidaccel.models.fused_layers import separate_adapted_layers
from vidaccel.rollout.camera import ChunkCamera
from vidaccel.rollout.chunk import Chunk, Pass, Shot, Student, shot_at
from vidaccel.rollout.noise import chunk_generators
from vidaccel.rollout.passes import eager
from vidaccel.rollout.skipping import ChunkSteps, StepSkipping
from vidaccel.rollout.state import RolloutState

Groups = Generator[tuple[tuple[int, ...], ...]]  # frames to be passed together, for every sample its own


def rollout(
    student: Student,
    state: RolloutState,
    shots: Sequence[Shot],
    *,
    num_chunks: int,
    camera: ChunkCamera | None = None,
) -> Iterator[Chunk]:
    """Make chunks until `num_chunks` are done in all; yields each when it is finished. Arguments are checked at once.

    state: before the first chunk, or after any; between two chunks it may be saved. A chunk that was interrupted, by an
        error or Ctrl-C, has not happened: the state goes on with it as if for the first time.
    shots: prompts in the order of `start_chunk`, the first at 0. A list may be added to between two chunks: a shot
        that starts with the next chunk is entered there.
    camera: where the camera of every chunk stands; None: it holds at 0.
    Raises ValueError for shots out of order, UserError for a state or prompts that are not of this student, and for a
    camera where the student is not told of one.
    """
    check_rollout(student, state, shots, camera)
    return _made(_Runner(student, state, camera), shots, num_chunks)


def _made(runner: "_Runner", shots: Sequence[Shot], num_chunks: int) -> Iterator[Chunk]:
    while runner.state.num_chunks < num_chunks:
        yield runner.next_chunk(shot_at(shots, runner.state.num_chunks))


def ingest(
    student: Student, state: RolloutState, shot: Shot, latents: Tensor, *, camera: ChunkCamera | None = None
) -> Iterator[Chunk]:
    """Remember given latents (B, C, F, H, W), of an image or a clip, as if they had been made; yields their chunks.

    Those that the state has seen already are left out. Arguments are checked at once. camera: as `rollout` takes it.
    Raises UserError for latents of another size, in the official mode, and for a camera as `rollout` does.
    """
    _check_shot(student, state, shot)
    _check_can_be_given(state)
    if latents.shape[0] != len(state.seeds) or (latents.shape[1], *latents.shape[3:]) != state.size:
        raise UserError(
            f"The rollout is of {len(state.seeds)} videos with latents of size {state.size} (channels, height, width); "
            f"got {tuple(latents.shape)} to begin with."
        )
    return _ingested(_Runner(student, state, camera), shot, latents)


@torch.no_grad()
def _ingested(runner: "_Runner", shot: Shot, latents: Tensor) -> Iterator[Chunk]:
    left = latents[:, :, min(runner.state.num_frames, latents.shape[2]) :].float()
    for part in left.split(runner.state.memory.policy.chunk_frames, dim=2) if left.shape[2] else ():
        yield runner.ingest_chunk(shot, part)


@torch.no_grad()
def replay(
    student: Student,
    state: RolloutState,
    shots: Sequence[Shot],
    chunks: Iterator[Tensor],
    *,
    camera: ChunkCamera | None = None,
) -> None:
    """Bring the state to where it was after `chunks`, from their latents: one pass a chunk instead of all.

    The passes are those that wrote the memory, so that the state is the same bit for bit, if the camera is the one they
    were made with; pixels are decoded anew.
    Raises UserError as `ingest` does.
    """
    for shot in shots:
        _check_shot(student, state, shot)
    _check_can_be_given(state)
    runner = _Runner(student, state, camera)
    for latents in chunks:
        runner.ingest_chunk(shot_at(shots, state.num_chunks), latents)


def _on_host(frames: Tensor) -> Tensor:
    """Pixels on the host; from CUDA in page-locked memory, which is faster and used again when it is free."""
    if frames.device.type != "cuda":
        return frames.cpu()
    return torch.empty(frames.shape, dtype=frames.dtype, pin_memory=True).copy_(frames)


def check_rollout(
    student: Student, state: RolloutState, shots: Sequence[Shot], camera: ChunkCamera | None = None
) -> None:
    """What `rollout` checks, and raises, for those who call it later."""
    starts = [shot.start_chunk for shot in shots]
    if not shots or starts[0] != 0 or starts != sorted(set(starts)):
        raise ValueError(f"`shots` must begin at chunk 0 and follow each other, got starts {starts}.")
    for shot in shots:
        _check_shot(student, state, shot)
    _Runner(student, state, camera)


def _check_shot(student: Student, state: RolloutState, shot: Shot) -> None:
    count, embeddings = len(state.seeds), shot.embeddings[: student.num_branches]
    if len(embeddings) < student.num_branches or any(len(part) != count for part in embeddings):
        raise UserError(
            f"The shot {shot.prompt!r} has embeddings of {[len(part) for part in embeddings]} prompts; this rollout is "
            f"of {count} videos and takes {student.num_branches} (with guidance also a negative one)."
        )


def _check_can_be_given(state: RolloutState) -> None:
    if state.memory.policy.observes_passes:
        raise UserError("The official mode remembers noisy passes, which given latents do not have; use clean.")


@dataclass
class _Runner:
    """The running values of one call: the prompt's cached keys, and the steps of a chunk."""

    student: Student
    state: RolloutState
    camera: ChunkCamera | None = None
    _prompts: tuple[PromptCache, ...] = ()
    _shot: Shot | None = None
    _weights: Hashable = None
    _seconds: dict[str, float] = field(default_factory=dict)
    _screens: tuple[list[float], list[float]] | None = None  # of the chunk being made: what `camera` gave
    _noise: tuple[int, list[torch.Generator], Tensor] | None = None
    _skipped: tuple[int, ...] = ()  # of the chunk being made

    def __post_init__(self) -> None:
        """Refuse a state of another number of branches or another number format, and a camera nobody is told of."""
        student, memories = self.student, self.state.memories
        if len(memories) != student.num_branches:
            raise UserError(
                f"The rollout was begun with {len(memories)} memories and `guidance_scale` {student.guidance_scale:g} "
                f"takes {student.num_branches} (2 with guidance, 1 without); keep to one or begin anew."
            )
        dtype = student.transformer.patch_embedding.weight.dtype
        if memories[0].dtype != dtype:
            raise UserError(
                f"The memory of this rollout is {memories[0].dtype} and the transformer is now {dtype}; convert it "
                "back or begin anew."
            )
        if student.skipping is not None:
            policy = self.state.memory.policy
            student.skipping.check(student.num_inference_steps, observes_passes=policy.observes_passes)
        if self.camera is not None and not student.transformer.takes_camera:
            raise UserError(
                "This student is not told of a camera (`camera_dim` in its config.json is missing or null); leave the "
                "camera out, or take a student that is."
            )

    @torch.no_grad()
    def next_chunk(self, shot: Shot) -> Chunk:
        self._enter(shot)
        began = time.perf_counter()
        self._begin(self.state.memory.policy.chunk_frames)
        latents = self._denoise()
        self._seconds = {"denoising": time.perf_counter() - began}
        return self._finish(shot, latents, is_made=True)

    def ingest_chunk(self, shot: Shot, latents: Tensor) -> Chunk:
        self._enter(shot)
        self._begin(latents.shape[2])
        self._seconds = {"denoising": 0.0}
        return self._finish(shot, latents.to(self._device))

    def _begin(self, num_frames: int) -> None:
        """Let the memories make room for a chunk, and tell them where its camera stands."""
        state, camera = self.state, None
        self._screens = None
        if self.camera is not None:
            self._screens = self.camera(state.num_chunks, state.num_frames, num_frames)
            if not all(len(side) == num_frames and all(map(math.isfinite, side)) for side in self._screens):
                raise ValueError(
                    f"The camera of chunk {state.num_chunks} must be finite positions and motions of {num_frames} "
                    f"latent frames, got {self._screens!r}."
                )
            config: Any = self.student.transformer.config
            across = state.size[2] // config.patch_size[2]
            columns, motions = torch.tensor(self._screens, dtype=torch.float32) * across
            camera = Camera(columns.expand(len(state.seeds), -1), motions.expand(len(state.seeds), -1))
        wanted = None
        for memory, prompt in zip(state.memories, self._prompts, strict=True):
            wanted = memory.begin_chunk(num_frames, camera=camera, wanted=wanted)
            self._write(memory.recover(), prompt, memory)

    @property
    def _device(self) -> torch.device:
        return self.state.memory.device

    def _enter(self, shot: Shot) -> None:
        """Make the prompt of `shot` the one that is attended to, and cut if another was before."""
        state = self.state
        done = {index.num_frames for memory in state.memories for index in memory.indexes}
        if done != {state.num_frames - state.shot_start}:
            raise UserError(
                "The rollout was interrupted in the very moment in which a chunk was counted; go on from a saved state."
            )
        self._cache_prompts(shot)
        name = (shot.start_chunk, shot.prompt)
        if state.num_chunks and state.shot != name:
            if shot.cut == "hard":
                state.forget()
            else:
                state.shot = None  # until it is done: interrupted, it is done again, whatever comes next
                self._recache()
        state.shot = name

    def _cache_prompts(self, shot: Shot) -> None:
        """Project the prompt with the weights of this very chunk: adapters may have changed since the last one.

        That is half a percent of a chunk, and weights that were merged in place cannot be told by the host. Captured
        passes go on with the same tensors; only where layers were put in or out, or weights moved, are they new.
        """
        transformer = self.student.transformer
        separate_adapted_layers(transformer)
        weights = adapters_of(transformer), weight_places(transformer) if self.student.run is not None else ()
        prompts = self._cached(shot)
        if self._shot is shot and self._weights == weights:
            for kept, new in zip(self._prompts, prompts, strict=True):
                kept.copy_(new)
            return
        self._prompts, self._shot, self._weights = prompts, shot, weights

    def _cached(self, shot: Shot) -> tuple[PromptCache, ...]:
        student = self.student
        _check_shot(student, self.state, shot)  # it may have come in since the rollout was begun
        embeddings = shot.embeddings[: student.num_branches]
        onload(student.transformer)
        given = [part.to(self._device, self.state.memory.dtype) for part in embeddings]
        return tuple(student.transformer.cache_prompt(part) for part in given)

    def _recache(self) -> None:
        """Write what is remembered anew under the present prompt, in the order of the positions."""
        for memory, prompt in zip(self.state.memories, self._prompts, strict=True):
            self._write(memory.rebuild(), prompt, memory)

    def _write(self, groups: Groups, prompt: PromptCache, memory: KeyValueMemory) -> None:
        """Pass groups of frames, of every sample its own, from their latents, which then stay at hand."""
        remembered = self.state.remembered
        with closing(groups):  # a memory whose groups have not ended is still being written
            for frames in groups:
                remembered |= {frame: self.state.latents_of(frame) for frame in chain(*frames)}
                rows = [[remembered[frame][sample] for frame in group] for sample, group in enumerate(frames)]
                videos = [torch.stack(row, dim=1) for row in rows]
                self._clean_pass(torch.stack(videos).to(self._device), prompt, memory)

    def _denoise(self) -> Tensor:
        student, state = self.student, self.state
        generators, latents = self._drawn(state.num_chunks)
        latents = sent(latents, self._device)
        scheduler = copy.deepcopy(student.scheduler)
        steps = student.num_inference_steps
        scheduler.set_timesteps(sigmas=[1 - step / steps for step in range(steps)], device=self._device)
        scheduler.set_begin_index(0)
        taken = None if student.skipping is None else self._steps(student.skipping, scheduler.sigmas.tolist())
        for timestep in scheduler.timesteps:
            compute = partial(self._velocity, latents, timestep)
            velocity = compute() if taken is None else taken.velocity(latents, compute)
            latents = scheduler.step(velocity, timestep, latents, generator=generators, return_dict=False)[0]
        self._skipped = () if taken is None else taken.num_skipped
        return latents

    def _velocity(self, latents: Tensor, timestep: Tensor) -> Tensor:
        """Of one step: a pass for every branch, and guidance."""
        student, state = self.student, self.state
        branches = [
            self._pass(latents, timestep, prompt, memory)
            for prompt, memory in zip(self._prompts, state.memories, strict=True)
        ]
        velocity = branches[0]
        if len(branches) > 1:
            velocity = branches[1] + student.guidance_scale * (branches[0] - branches[1])
        similarity = state.memory.observe()
        for memory in state.memories[1:]:
            memory.observe(similarity)
        return velocity

    def _steps(self, rule: StepSkipping, sigmas: Sequence[float]) -> ChunkSteps:
        before = self.state.last_frames(self.state.memory.policy.chunk_frames)
        return ChunkSteps(rule, sigmas, None if before is None else before.to(self._device))

    def _drawn(self, chunk: int) -> tuple[list[torch.Generator], Tensor]:
        """The noise of a chunk and the sources it came from, which go on to re-noise."""
        if self._noise is None or self._noise[0] != chunk:
            self._draw(chunk)
        assert self._noise is not None
        (_, generators, noise), self._noise = self._noise, None
        return generators, noise

    def _draw(self, chunk: int) -> None:
        channels, height, width = self.state.size
        shape = (channels, self.state.memory.policy.chunk_frames, height, width)
        generators = chunk_generators(self.state.seeds, chunk)
        noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators])
        self._noise = (chunk, generators, noise)

    def _clean_pass(self, latents: Tensor, prompt: PromptCache, memory: KeyValueMemory) -> None:
        """Write the keys and values of finished latents: a pass at timestep 0, whose velocity nobody needs.

        Only students of the clean pass "frame" ask for `alone`, so that a `Pass` for others need not know of it.
        """
        inputs = (latents.to(memory.dtype), latents.new_zeros(latents.shape[0]), prompt, memory)
        if self.student.transformer.clean_pass == "frame":
            self._run(*inputs, alone=True)
        else:
            self._run(*inputs)

    def _pass(self, latents: Tensor, timestep: Tensor, prompt: PromptCache, memory: KeyValueMemory) -> Tensor:
        """Velocity (float32) of one pass."""
        return self._run(latents.to(memory.dtype), timestep.expand(latents.shape[0]), prompt, memory).float()

    @property
    def _run(self) -> Pass:
        return self.student.run or eager(self.student.transformer)

    def _finish(self, shot: Shot, latents: Tensor, *, is_made: bool = False) -> Chunk:
        """Write the memory, decode, count; an error before the end leaves the state as it was.

        is_made: True for generated chunks: the next noise is drawn on the host while the GPU works.
        """
        state, decoder = self.state, self.state.decoder
        began = time.perf_counter()
        for memory, prompt in zip(state.memories, self._prompts, strict=True):
            self._clean_pass(latents, prompt, memory)
        passed = time.perf_counter()
        before = None if decoder is None else decoder.save_state()
        try:
            pixels = None if decoder is None else decoder.decode(latents)
            if is_made:
                self._draw(state.num_chunks + 1)
            frames = None if pixels is None else _on_host(pixels)
            self._commit()
        except BaseException:
            if decoder is not None and before is not None:
                decoder.load_state(*before)
            raise
        self._seconds |= {"clean_pass": passed - began, "decoding": time.perf_counter() - passed}
        state.remember(latents, state.num_frames - state.shot_start)
        index, similarity = state.memory.indexes[0], state.memory.similarity
        chunk = Chunk(
            index=state.num_chunks,
            first_frame=state.num_frames,
            latents=latents,
            frames=frames,
            prompt=shot.prompt,
            seconds=dict(self._seconds),
            sink=tuple(frame + state.shot_start for frame in index.sink),
            slow=tuple(frame + state.shot_start for frame in index.slow),
            fast=tuple(frame + state.shot_start for frame in index.fast),
            is_keyframe=index.is_keyframe,
            similarity=None if similarity is None else float(similarity[0]),
            camera=self._screens,
            origin="made" if is_made else "given",
            skipped=self._skipped if is_made else (),
        )
        state.num_chunks, state.num_frames = state.num_chunks + 1, state.num_frames + latents.shape[2]
        return chunk

    def _commit(self) -> None:
        """Remember the chunk in every branch by the similarity of the prompt's, the only step that waits first."""
        first, *others = self.state.memories
        first.commit()
        for memory in others:
            memory.commit(first.similarity)
