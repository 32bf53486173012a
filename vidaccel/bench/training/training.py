"""What training a causal student of published size takes: seconds by part and memory, on one card or several.

Random weights and noise: nothing here says anything about quality. On several cards the command is started by
`torchrun` or `accelerate launch`; the records of both go into one result.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from vidaccel.bench.shared.benchmark import Benchmark, BenchProgress, Tell, option
from vidaccel.bench.training.cells import PATCH_PIXELS, Cell, Sizes, Stage, measured
from vidaccel.bench.training.tables import training_markdown
from vidaccel.catalog.speed_shapes import SHAPES
from vidaccel.errors import UserError, check_amount, check_count
from vidaccel.machine.environment import describe_environment
from vidaccel.training.adapters import check_adapters
from vidaccel.training.device import training_device
from vidaccel.training.ranks import join_ranks, num_ranks, own_rank, shared_by_ranks

_STAGES: tuple[Stage, ...] = ("forcing", "1", "2")


@dataclass(frozen=True, kw_only=True)
class TrainingBench(Benchmark):
    """Finished cells are not measured again; what did not fit is a result."""

    name = "training"

    shape: str = option("Whose transformer is made causal: wan2.1-1.3b, wan2.1-14b or toy.", "wan2.1-1.3b")
    height: int = option("Pixels.", 480)
    width: int = option("Pixels.", 832)
    chunks: int = option("Chunks of 3 latent frames that the student makes in a step of the distillation.", 3)
    text: int = option("Tokens of a prompt.", 512)
    batch_size: int = option("Samples a card.", 1)
    lora: int = option("Rank of the adapters; 0: none are measured.", 128)
    steps: int = option("Steps that are timed, after one that is not.", 2)
    stages: tuple[str, ...] = option("Of forcing, 1 and 2.", _STAGES, recorded=False)
    budget_seconds: float | None = option("No cell begins after it.", None, recorded=False)

    def __post_init__(self) -> None:
        check_amount("budget_seconds", self.budget_seconds, optional=True)
        causal = [name for name, shape in SHAPES.items() if shape.causal is not None]
        if self.shape not in causal:
            raise UserError(f"`shape` must be one of {', '.join(causal)}, got {self.shape!r}.")
        for name in ("height", "width"):
            if (pixels := getattr(self, name)) < 1 or pixels % PATCH_PIXELS:
                raise UserError(f"`{name}` must be a multiple of {PATCH_PIXELS} pixels, got {pixels}.")
        for name, least in (("chunks", 1), ("text", 1), ("batch_size", 1), ("steps", 1), ("lora", 0)):
            check_count(name, getattr(self, name), minimum=least)
        if unknown := sorted(set(self.stages) - set(_STAGES)):
            raise UserError(f"`stages` may name {', '.join(_STAGES)}; got {', '.join(unknown)}.")
        if not self.stages:
            raise UserError("`stages` must not be empty.")

    def run(self, *, on_progress: Tell = None) -> dict[str, Any]:
        began = time.monotonic()
        if self.lora:
            check_adapters()
        device = join_ranks(training_device(self.device))
        environment = describe_environment(device=device, weights="random", model=self.shape)
        results = self.results(self.protocol({}), environment)
        waiting = [cell for cell in self._cells() if results.find(**cell.key) is None]
        for done, cell in enumerate(waiting):
            spent = shared_by_ranks(time.monotonic() - began, device)
            if self.budget_seconds is not None and spent > self.budget_seconds:
                break
            if on_progress is not None:
                on_progress(BenchProgress(done=done, total=len(waiting), label=f"stage {cell.stage}"))
            record = measured(cell, self._sizes(), steps=self.steps, device=device)
            if own_rank() == 0:
                results.add(record)
        if own_rank() != 0:
            return {}
        failed = sum(record["error"] is not None for record in results.records)
        summary = results.finish({"num_cells": len(results.records), "num_out_of_memory": failed})
        self.write_table(training_markdown(results.content))
        return summary

    def _sizes(self) -> Sizes:
        return Sizes(
            shape=self.shape,
            height=self.height,
            width=self.width,
            chunks=self.chunks,
            text=self.text,
            batch_size=self.batch_size,
        )

    def _cells(self) -> Iterator[Cell]:
        """The cheap ones first. On several cards one that runs out of memory would leave the others waiting, so that
        only those which compute again are measured there."""
        for stage in _STAGES:
            if stage not in self.stages:
                continue
            if stage != "forcing" and self.lora:
                yield Cell(stage=stage, lora=self.lora, checkpointing=True)
            yield Cell(stage=stage, lora=None, checkpointing=True)
            if num_ranks() == 1:
                yield Cell(stage=stage, lora=None, checkpointing=False)
