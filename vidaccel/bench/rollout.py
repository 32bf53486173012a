"""Speed of a rollout at full size with random weights: frames per second, milliseconds per chunk, and memory.

The loop is `vidaccel.rollout.loop.rollout`, as users run it; chunks follow each other, and a chunk is over when its
pixels are on the host. Four lines come from the phases of a chunk: the denoising passes, the clean pass in addition,
and the decoding in addition by a small or by the full decoder. Random weights say nothing about quality.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch

from vidaccel.bench.progress import BenchProgress
from vidaccel.bench.records import ResultFile
from vidaccel.bench.rollout_attention import AUTO, time_attention, use_attention
from vidaccel.bench.rollout_cell import Cell, DecoderKind, RandomStudent, measure_cell, memory_config, random_student
from vidaccel.bench.rollout_tables import rollout_markdown, save_rollout_plot, summarise_cells
from vidaccel.catalog.speed_shapes import SHAPES
from vidaccel.errors import UserError
from vidaccel.files.text import write_text
from vidaccel.generation.loading import resolve_device
from vidaccel.machine.environment import describe_environment
from vidaccel.models.fused_layers import fuse_layers
from vidaccel.rollout.passes import PassMode


@dataclass(frozen=True, kw_only=True)
class RolloutBenchConfig:
    """One measurement: a cell for every memory, way to run a pass, and decoder.

    output: folder for rollout.json, rollout.md and rollout.png; finished cells in it are not measured again.
    shape: a text-to-video Wan of `vidaccel.catalog.speed_shapes.SHAPES`, whose size serves where none is given here.
    memories: as the command line writes them; keyframes are uniform, so that slow memory fills without trained weights.
    modes: the first is the main one.
    decoders: "none", "tiny", "full"; the first is the main one.
    num_chunks: of a video made from its start, for each memory; with the main mode and decoder.
    num_filled_chunks: of every other cell, after its memory was filled.
    attention: a backend of diffusers, kernel/parts (see `vidaccel.models.split_attention`), or "auto": the fastest.
    fuse: join layers, see `vidaccel.models.fused_layers`.
    budget_seconds: no chunk begins after it.
    """

    output: Path
    shape: str = "wan2.1-1.3b"
    height: int | None = None
    width: int | None = None
    num_inference_steps: int = 4
    memories: tuple[str, ...] = ("slow-fast:3+12+6", "slow-fast:3+3+6")
    modes: tuple[PassMode, ...] = ("captured", "compiled", "eager")
    decoders: tuple[DecoderKind, ...] = ("tiny", "full")
    num_chunks: tuple[int, ...] = (310, 100)
    num_filled_chunks: int = 25
    attention: str = AUTO
    fuse: bool = True
    budget_seconds: float | None = None
    device: str = "auto"

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
        if self.budget_seconds is not None and self.budget_seconds <= 0:
            raise UserError(f"`budget_seconds` must be positive; got {self.budget_seconds:g}.")
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


def run_rollout_bench(
    config: RolloutBenchConfig, *, on_progress: Callable[[BenchProgress], None] | None = None
) -> dict[str, Any]:
    """Measure what is missing, write rollout.json, .md and .png into `config.output`; returns the first's content."""
    began = time.monotonic()
    deadline = began + (config.budget_seconds or float("inf"))
    device = resolve_device(config.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    tell = on_progress or (lambda progress: None)
    environment = describe_environment(device=device, weights="random", model=config.shape)
    results = ResultFile(config.output / "rollout.json", protocol=_protocol(config), environment=environment)
    modes = [mode for mode in config.modes if mode != "captured" or device.type == "cuda"]
    cells = config.cells(modes)
    missing = [cell for cell in cells if results.find(kind="cell", **cell.key) is None]
    total = len(cells)
    if missing:
        tell(BenchProgress(done=total - len(missing), total=total, label="making the model"))
        model = random_student(
            config.shape,
            height=config.size[0],
            width=config.size[1],
            num_inference_steps=config.num_inference_steps,
            device=device,
            dtype=dtype,
        )
        if config.fuse:
            fuse_layers(model.student.transformer)
        use_attention(model.student.transformer, _chosen_attention(config, model, results))
        for number, cell in enumerate(missing, total - len(missing)):

            def on_chunk(count: int, number: int = number, cell: Cell = cell) -> None:
                tell(BenchProgress(done=number, total=total, label=f"{cell.label}: {count}/{cell.num_chunks}"))

            try:
                record = measure_cell(cell, model, deadline=deadline, on_chunk=on_chunk)
            except torch.OutOfMemoryError as error:
                raise UserError(
                    f"Too little memory on {device} for {config.shape} at {config.size[1]} x {config.size[0]} "
                    f"({cell.label}); use a smaller size or memory. Finished cells are kept."
                ) from error
            if record is not None:
                results.add(record | {"elapsed_seconds": time.monotonic() - began})
    return _write(config, results, skipped=[mode for mode in config.modes if mode not in modes])


def _chosen_attention(config: RolloutBenchConfig, model: RandomStudent, results: ResultFile) -> str:
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


def _write(config: RolloutBenchConfig, results: ResultFile, *, skipped: list[str]) -> dict[str, Any]:
    results.summary = summarise_cells(results.records) | {"not_run": skipped}
    results.write()
    content = {
        "protocol": results.protocol,
        "environments": results.environments,
        "summary": results.summary,
        "records": results.records,
    }
    write_text(config.output / "rollout.md", rollout_markdown(content))
    save_rollout_plot(config.output / "rollout.png", content)
    return content


def _protocol(config: RolloutBenchConfig) -> dict[str, Any]:
    return {
        "benchmark": "rollout",
        "shape": config.shape,
        "height": config.size[0],
        "width": config.size[1],
        "num_inference_steps": config.num_inference_steps,
        "chunk_frames": memory_config(config.memories[0]).chunk_frames,
        "memories": list(config.memories),
        "modes": list(config.modes),
        "decoders": list(config.decoders),
        "num_chunks": list(config.num_chunks),
        "num_filled_chunks": config.num_filled_chunks,
        "attention": config.attention,
        "fuse": config.fuse,
    }
