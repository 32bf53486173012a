"""Speed of a rollout at full size with random weights: frames per second, milliseconds per chunk, and memory.

The loop is `vidaccel.rollout.loop.rollout`, as users run it; chunks follow each other, and a chunk is over when its
pixels are on the host. Four lines come from the phases of a chunk: the denoising passes, the clean pass in addition,
and the decoding in addition by a small or by the full decoder. Random weights say nothing about quality.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch

from vidaccel.bench.rollout.attention import AUTO, time_attention, use_attention
from vidaccel.bench.rollout.cell import (
    Cell,
    DecoderKind,
    RandomStudent,
    measure_cell,
    memory_config,
    random_student,
)
from vidaccel.bench.rollout.tables import rollout_markdown, save_rollout_plot, summarise_cells
from vidaccel.bench.shared.benchmark import Benchmark, BenchProgress, Tell, option
from vidaccel.bench.shared.records import ResultFile
from vidaccel.catalog.speed_shapes import SHAPES
from vidaccel.errors import UserError, check_amount
from vidaccel.generation.loading import resolve_device
from vidaccel.machine.environment import describe_environment
from vidaccel.models.fused_layers import fuse_layers
from vidaccel.rollout import PassMode


@dataclass(frozen=True, kw_only=True)
class RolloutBench(Benchmark):
    """A cell for every memory, way to run a pass, and decoder. Finished cells are not measured again.

    shape: a text-to-video Wan of `vidaccel.catalog.speed_shapes.SHAPES`, whose size serves where none is given here.
    memories: keyframes are uniform, so that slow memory fills without trained weights.
    """

    name = "rollout"

    shape: str = option("A text-to-video Wan of `bench speed`, or toy.", "wan2.1-1.3b")
    height: int | None = option("Pixels. (default: the shape's)", None)
    width: int | None = option("Pixels. (default: the shape's)", None)
    num_inference_steps: int = option("Denoising steps of a chunk.", 4)
    memories: tuple[str, ...] = option("What is remembered.", ("slow-fast:3+12+6", "slow-fast:3+3+6"))
    modes: tuple[PassMode, ...] = option("How passes are run; the main one first.", ("captured", "compiled", "eager"))
    decoders: tuple[DecoderKind, ...] = option("none, tiny, full; the main one first.", ("tiny", "full"))
    num_chunks: tuple[int, ...] = option("Chunks of the long run of each memory, from its start.", (310, 100))
    num_filled_chunks: int = option("Of all other runs, after the memory was filled.", 25)
    attention: str = option("auto (the fastest here), a backend of diffusers, or kernel/parts such as cudnn/2.", AUTO)
    fuse: bool = option("Join layers, for inference.", True)
    budget_seconds: float | None = option("No chunk begins after it.", None, recorded=False)

    def __post_init__(self) -> None:
        if self.shape not in SHAPES:
            raise UserError(f"`shape` must be one of {', '.join(SHAPES)}; got {self.shape!r}.")
        for name, choices in (("modes", get_args(PassMode)), ("decoders", get_args(DecoderKind))):
            chosen = getattr(self, name)
            if not chosen or not set(chosen) <= set(choices):
                raise UserError(f"`{name}` must be of {', '.join(choices)}; got {', '.join(chosen) or 'nothing'}.")
        if not self.memories or len(self.num_chunks) != len(self.memories):
            raise UserError(
                f"`num_chunks` must have a number for each of {len(self.memories)} memories, got {self.num_chunks}."
            )
        if min(*self.num_chunks, self.num_filled_chunks, self.num_inference_steps) < 1:
            raise UserError("`num_chunks`, `num_filled_chunks` and `num_inference_steps` must be at least 1.")
        check_amount("budget_seconds", self.budget_seconds, optional=True)
        for text in self.memories:
            memory_config(text)
        step = SHAPES[self.shape].pixel_step
        if self.size[0] % step or self.size[1] % step or min(self.size) < step:
            raise UserError(f"`height` and `width` must be multiples of {step}; got {self.size[0]} x {self.size[1]}.")

    @property
    def size(self) -> tuple[int, int]:
        """Height and width: as asked for, else those of the row."""
        row = SHAPES[self.shape]
        return self.height or row.height, self.width or row.width

    def cells(self, modes: Sequence[PassMode]) -> list[Cell]:
        """Every cell of `modes`, those that matter most first."""
        if not modes:
            return []
        main_mode, main_decoder = modes[0], self.decoders[0]
        cells = [
            Cell(
                memory=memory,
                mode=mode,
                decoder=decoder,
                num_chunks=chunks if (mode, decoder) == (main_mode, main_decoder) else self.num_filled_chunks,
                from_start=(mode, decoder) == (main_mode, main_decoder),
            )
            for memory, chunks in zip(self.memories, self.num_chunks, strict=True)
            for mode in modes
            for decoder in self.decoders
        ]
        return sorted(cells, key=lambda cell: cell.mode != main_mode and cell.decoder != main_decoder)

    def run(self, *, on_progress: Tell = None) -> dict[str, Any]:
        """Measure what is missing, write rollout.json, .md and .png, and return the first's content."""
        began = time.monotonic()
        deadline = began + (self.budget_seconds or float("inf"))
        device = resolve_device(self.device)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        tell = on_progress or (lambda progress: None)
        environment = describe_environment(device=device, weights="random", model=self.shape)
        settled = {
            **dict(zip(("height", "width"), self.size, strict=True)),
            "chunk_frames": memory_config(self.memories[0]).chunk_frames,
        }
        results = self.results(self.protocol(settled), environment)
        modes = [mode for mode in self.modes if mode != "captured" or device.type == "cuda"]
        cells = self.cells(modes)
        missing = [cell for cell in cells if results.find(kind="cell", **cell.key) is None]
        total = len(cells)
        if missing:
            tell(BenchProgress(done=total - len(missing), total=total, label="making the model"))
            model = random_student(
                self.shape,
                height=self.size[0],
                width=self.size[1],
                num_inference_steps=self.num_inference_steps,
                device=device,
                dtype=dtype,
            )
            if self.fuse:
                fuse_layers(model.student.transformer)
            use_attention(model.student.transformer, _chosen_attention(self, model, results))
            for number, cell in enumerate(missing, total - len(missing)):

                def on_chunk(count: int, number: int = number, cell: Cell = cell) -> None:
                    tell(BenchProgress(done=number, total=total, label=f"{cell.label}: {count}/{cell.num_chunks}"))

                try:
                    record = measure_cell(cell, model, deadline=deadline, on_chunk=on_chunk)
                except torch.OutOfMemoryError as error:
                    raise UserError(
                        f"Too little memory on {device} for {self.shape} at {self.size[1]} x {self.size[0]} "
                        f"({cell.label}); use a smaller size or memory. Finished cells are kept."
                    ) from error
                if record is not None:
                    results.add(record | {"elapsed_seconds": time.monotonic() - began})
        results.finish(
            summarise_cells(results.records) | {"not_run": [mode for mode in self.modes if mode not in modes]}
        )
        self.write_table(rollout_markdown(results.content))
        save_rollout_plot(self.path("png"), results.content)
        return results.content


def _chosen_attention(config: RolloutBench, model: RandomStudent, results: ResultFile) -> str:
    """The name asked for, or the fastest for the first memory; times are kept in the results."""
    if config.attention != AUTO:
        return config.attention
    shape = model.student.transformer.memory_shape(model.height, model.width)
    for text in config.memories:
        if results.find(kind="attention", memory=text) is None:
            memory = memory_config(text)
            rows = time_attention(
                shape,
                chunk_frames=memory.chunk_frames,
                attended_frames=memory.total_frames,
                device=model.device,
                dtype=model.student.transformer.patch_embedding.weight.dtype,
            )
            results.add({"kind": "attention", "memory": text, "candidates": rows})
    found = results.find(kind="attention", memory=config.memories[0])
    assert found is not None
    fastest: str = found["candidates"][0]["attention"]
    return fastest
