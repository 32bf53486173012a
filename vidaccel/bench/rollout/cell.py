"""One cell of the rollout benchmark: a rollout as users run it, timed phase by phase on the device's own time line."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from vidaccel.bench.shared.clock import DeviceClock
from vidaccel.bench.shared.random_model import call_tensors, random_transformer
from vidaccel.catalog.families.family import Component
from vidaccel.catalog.speed_shapes import SHAPES
from vidaccel.errors import UserError
from vidaccel.memory import MemoryConfig, MemoryIndex, MemoryPolicy, parse_slow_fast
from vidaccel.memory.keys_values import KeyValueMemory
from vidaccel.models.causal_blocks import PromptCache
from vidaccel.models.causal_wan import CausalWanTransformer3DModel
from vidaccel.models.taehv import StreamingTinyDecoder
from vidaccel.rollout import PassMode
from vidaccel.rollout.chunk import Chunk, Pass, Shot, Student
from vidaccel.rollout.decode import StreamingDecoder
from vidaccel.rollout.loop import ingest, rollout
from vidaccel.rollout.passes import speed_up
from vidaccel.rollout.state import Decoder, RolloutState, new_state

DecoderKind = Literal["none", "tiny", "full"]
WARM_CHUNKS = 3  # of a filled memory: the first passes are compiled, the second captured
_SHIFT = 5.0  # Self-Forcing's timesteps 1000, 750, 500, 250 are warped by it (arXiv 2506.08009, released config)
_SPATIAL_STEP, _TEMPORAL_STEP = 8, 4  # of Wan's VAE
_MOST_CHUNKS_TO_FILL = 1000
# Sizes of the published decoders, and of the toy's.
_FULL = Component(kind="diffusers:AutoencoderKLWan")
_TINY = Component(kind="vidaccel.models.taehv:TinyWanDecoder")
_TOY_FULL = replace(
    _FULL,
    config={"base_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1, "temperal_downsample": [False, True, True]},
)
_TOY_TINY = replace(_TINY, config={"channels": (8, 8, 4, 4)})


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One measurement.

    memory: as `parse_slow_fast` takes it; keyframes are uniform.
    num_chunks: chunks to measure. `from_start`: from the first of a video on, else after the memory was filled by clean
        passes over random latents, and some chunks that are not counted.
    """

    memory: str
    mode: PassMode
    decoder: DecoderKind
    num_chunks: int
    from_start: bool = False

    @property
    def key(self) -> dict[str, Any]:
        """What tells it from the others in a result file."""
        return {"memory": self.memory, "mode": self.mode, "decoder": self.decoder}

    @property
    def label(self) -> str:
        """For a progress bar."""
        return f"{self.mode}, {self.memory}, decoder: {self.decoder}"


def memory_config(text: str) -> MemoryConfig:
    """The memory of a cell: random weights would choose keyframes at random, so every other chunk has one."""
    config = parse_slow_fast(text)
    return replace(config, keyframe_rule="uniform" if config.slow_frames else "none")


@dataclass(frozen=True, kw_only=True)
class RandomStudent:
    """A student of published size with random weights, and the latents it makes.

    decoders: made once, when they are needed first.
    """

    student: Student
    shot: Shot
    height: int
    width: int
    shape: str
    decoders: dict[DecoderKind, Any] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """Where it calculates."""
        device: torch.device = self.student.transformer.patch_embedding.weight.device
        return device

    def decoder(self, kind: DecoderKind) -> Decoder | None:
        """A new decoder, of a new video; the small one is compiled, the full one runs as it is."""
        if kind == "none":
            return None
        if kind not in self.decoders:
            parameter: Tensor = self.student.transformer.patch_embedding.weight
            full, tiny = (_TOY_FULL, _TOY_TINY) if self.shape == "toy" else (_FULL, _TINY)
            component = full if kind == "full" else tiny
            made = random_transformer(component, device=parameter.device, dtype=parameter.dtype)
            if kind == "tiny":
                StreamingTinyDecoder(made).compile()
            self.decoders[kind] = made
        return StreamingDecoder(self.decoders[kind]) if kind == "full" else StreamingTinyDecoder(self.decoders[kind])


def random_student(
    shape: str, *, height: int, width: int, num_inference_steps: int, device: torch.device, dtype: torch.dtype
) -> RandomStudent:
    """The causal form of a row of `vidaccel.catalog.speed_shapes.SHAPES`. Raises UserError for one that has none."""
    row = SHAPES[shape]
    if row.causal is None:
        raise UserError(f"`shape` must be a text-to-video Wan; got {shape!r}.")
    component = replace(row.transformer, kind=row.causal)
    transformer: CausalWanTransformer3DModel = random_transformer(component, device=device, dtype=dtype)
    embeddings = {name: one for name, one in row.embeddings.items() if name == "prompt_embeds"}
    prompt = call_tensors(embeddings, device=device, dtype=dtype)["prompt_embeds"]
    student = Student(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=_SHIFT, stochastic_sampling=True),
        num_inference_steps=num_inference_steps,
    )
    return RandomStudent(
        student=student,
        shot=Shot(start_chunk=0, prompt="random", embeddings=(prompt,)),
        height=height // _SPATIAL_STEP,
        width=width // _SPATIAL_STEP,
        shape=shape,
    )


class _ChunkTimes:
    """Marks of one chunk after another, and the milliseconds between them."""

    def __init__(self, device: torch.device) -> None:
        self._clock = DeviceClock(device)
        self._marks: list[tuple[str, Any]] = []
        self._began = 0.0
        self._attended_frames = 0

    def timed_pass(self, run: Pass) -> Pass:
        def timed(
            latents: Tensor, timestep: Tensor, prompt: PromptCache, memory: KeyValueMemory, *, alone: bool = False
        ) -> Tensor:
            self._attended_frames = memory.attended_frames
            self._mark("pass")
            velocity = run(latents, timestep, prompt, memory, alone=alone)
            self._mark("passed")
            return velocity

        return timed

    def timed_decode(self, decode: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def timed(latents: Tensor) -> Tensor:
            self._mark("decode")
            frames = decode(latents)
            self._mark("decoded")
            return frames

        return timed

    def begin(self) -> None:
        self._clock.synchronise()
        self._marks, self._began = [], time.perf_counter()
        self._mark("begin")

    def end(self) -> dict[str, Any]:
        """Milliseconds of the phases; the chunk's pixels are on the host."""
        self._mark("end")
        self._clock.synchronise()
        total = 1000 * (time.perf_counter() - self._began)
        marks = dict(self._marks)  # the last of each name; "pass" is then the clean one
        decode, decoded = (marks.get(name, marks["end"]) for name in ("decode", "decoded"))
        begins, ends = ([mark for name, mark in self._marks if name == kind] for kind in ("pass", "passed"))
        between = self._clock.between
        return {
            "total_ms": total,
            "denoising_ms": between(marks["begin"], marks["pass"]),
            "commit_ms": between(marks["pass"], decode),
            "decoding_ms": between(decode, decoded),
            "transfer_ms": between(decoded, marks["end"]),
            "before_passes_ms": between(marks["begin"], begins[0]),
            "passes_ms": [between(*pair) for pair in zip(begins, ends, strict=True)],
            "attended_frames": self._attended_frames,
        }

    def _mark(self, name: str) -> None:
        self._marks.append((name, self._clock.now()))


def measure_cell(
    cell: Cell, model: RandomStudent, *, deadline: float, on_chunk: Callable[[int], None]
) -> dict[str, Any] | None:
    """The record of a cell; None where the deadline (`time.monotonic`) came before a chunk that counts.

    A cell that the deadline cut short has fewer chunks than it should.
    """
    times = _ChunkTimes(model.device)
    began = time.monotonic()
    state = new_state(model.student, memory_config(cell.memory), height=model.height, width=model.width)
    student = speed_up(model.student, state, cell.mode, fuse=False)  # for all cells or none, as the protocol says
    assert student.run is not None
    student = replace(student, run=times.timed_pass(student.run))
    with torch.no_grad(), _uncompiled(cell.mode):
        filled = 0 if cell.from_start else _fill(student, state, model.shot)
        state.decoder = model.decoder(cell.decoder)
        if state.decoder is not None:
            state.decoder.decode = times.timed_decode(state.decoder.decode)  # type: ignore[assignment,method-assign]
        first = filled + (0 if cell.from_start else WARM_CHUNKS)
        _synchronise_and_reset_peak(model.device)
        setup = time.monotonic() - began
        rows, last = [], None
        chunks = rollout(student, state, [model.shot], num_chunks=first + cell.num_chunks)
        for row, last in _measured(chunks, times, deadline=deadline):
            rows += [row | _bytes(model.device)] if last.index >= first else []
            on_chunk(len(rows))
    if not rows or last is None:
        return None
    return {
        "kind": "cell",
        **cell.key,
        "attended_frames": state.memory.policy.total_frames,
        "from_start": cell.from_start,
        "first_chunk": first,
        "setup_seconds": setup,
        "finite": bool(torch.isfinite(last.latents).all()),
        "pixel_frames_per_chunk": _TEMPORAL_STEP * state.memory.policy.chunk_frames,
        "memory_bytes": state.memory.bytes_by_part(),
        "chunks": {name: [_rounded(row[name]) for row in rows] for name in rows[0]},
    }


def _measured(
    chunks: Iterator[Chunk], times: _ChunkTimes, *, deadline: float
) -> Iterator[tuple[dict[str, Any], Chunk]]:
    while time.monotonic() < deadline:
        times.begin()
        chunk = next(chunks, None)
        if chunk is None:
            return
        yield times.end(), chunk


def _fill(student: Student, state: RolloutState, shot: Shot) -> int:
    """Fill the memory by clean passes over random latents; returns the chunks that took."""
    count = chunks_to_fill(state.memory.policy)
    frames = count * state.memory.policy.chunk_frames
    channels, height, width = state.size
    latents = torch.randn(1, channels, frames, height, width, generator=torch.Generator().manual_seed(0))
    for _ in ingest(student, state, shot, latents):
        pass
    return count


def chunks_to_fill(policy: MemoryPolicy) -> int:
    """Chunks until a pass attends to as many frames as the memory allows. Raises UserError if that never happens."""
    index = MemoryIndex(policy)
    for count in range(_MOST_CHUNKS_TO_FILL):
        index.begin_chunk()
        if len(index.entries) == policy.total_frames:
            return count
        index.commit()
    raise UserError(f"This memory is not full after {_MOST_CHUNKS_TO_FILL} chunks, so its speed cannot be measured.")


def _uncompiled(mode: PassMode) -> AbstractContextManager[Any]:
    """Blocks that an earlier cell compiled run as they are."""
    return torch.compiler.set_stance("force_eager") if mode == "eager" else nullcontext()


def _synchronise_and_reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)


def _bytes(device: torch.device) -> dict[str, int | None]:
    if device.type != "cuda":
        return {"allocated_bytes": None, "peak_bytes": None}
    return {
        "allocated_bytes": torch.cuda.memory_allocated(device),
        "peak_bytes": torch.cuda.max_memory_allocated(device),
    }


def _rounded(value: Any) -> Any:
    if isinstance(value, list):
        return [_rounded(one) for one in value]
    return round(value, 3) if isinstance(value, float) else value
