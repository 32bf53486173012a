"""What does a memory of fewer layers cost, beside fewer frames and fewer bits, and does training for it help?

Students are trained alike but for routing (`vidaccel train causal --kv-routing`), and each is measured with every
memory: recall on held-out trips that come back (`ReturnVisits`), and the loss at high noise on held-out chunks.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch

from vidaccel.bench.depth.memories import MEMORIES, SmallMemory
from vidaccel.bench.depth.tables import depth_markdown, save_depth_plot, summarise_depth
from vidaccel.bench.shared.benchmark import Benchmark, BenchProgress, Tell, option
from vidaccel.catalog.models import EMBEDDED_STUDENT
from vidaccel.errors import UserError, check_amount, check_count
from vidaccel.machine.environment import describe_environment, without_folders
from vidaccel.training.architecture import Transformer
from vidaccel.training.causal_rollout import TEXT_LENGTH
from vidaccel.training.causal_student import Donor
from vidaccel.training.chunk_batch import gather_batch, velocity_of
from vidaccel.training.chunk_sampler import shifted_sampler
from vidaccel.training.context_forcing_starts import load_forced
from vidaccel.training.device import seeded_generator, training_device
from vidaccel.training.flow import draw_high_sigmas, noisy_latents
from vidaccel.training.return_visits import ReturnVisits, as_seen
from vidaccel.training.trip_bank import TripBank, build_trip_bank, training_clips

_TRIP_SEED, _LOSS_SEED = 79_500_000, 77_500_000
_LOSS_KINDS = ("returns", "arrivals")
_CHUNKS_AT_A_TIME = 64


@dataclass(frozen=True, kw_only=True)
class DepthBench(Benchmark):
    """Finished memories are not measured again, and students may be added later."""

    name = "depth"

    models: tuple[str, ...] = option(
        "Students: checkpoints of `vidaccel train causal`, folders or names.", (EMBEDDED_STUDENT,), recorded=False
    )
    weights: str = option("trained, toy, random, external: noted in the result.", "trained", recorded=False)
    memories: tuple[str, ...] = option(f"Such as {', '.join(MEMORIES)}.", MEMORIES, recorded=False)
    num_trips: int = option("Held-out trips.", 128)
    away_chunks: int = option("Chunks that the camera stays away on them.", 6)
    num_chunks: int = option("Held-out chunks of each kind for the loss.", 256)
    num_inference_steps: int = option("Passes a chunk.", 4)
    stochastic: bool = option("Add fresh noise in every step, for students that were distilled.", False)
    batch_size: int = option("Trips rolled out at a time.", 64, recorded=False)
    seed: int = option("Draws the noise.", 0)
    budget_seconds: float | None = option("No memory is begun after it.", None, recorded=False)

    def __post_init__(self) -> None:
        check_amount("budget_seconds", self.budget_seconds, optional=True)
        for name in ("num_trips", "away_chunks", "num_chunks", "num_inference_steps", "batch_size"):
            check_count(name, getattr(self, name), minimum=1)
        names = [SmallMemory.parse(text).name for text in self.memories]
        if not names or len(set(names)) < len(names) or len(set(self.students)) < len(self.models) or not self.models:
            raise UserError("`models` and `memories` must name different students and memories, at least one of each.")

    @property
    def students(self) -> list[str]:
        """Names of the students: the last part of each path."""
        return [without_folders(model) for model in self.models]

    def run(self, *, on_progress: Tell = None) -> dict[str, Any]:
        began = time.monotonic()
        device = training_device(self.device)
        environment = describe_environment(device=device, weights=self.weights, model=", ".join(self.students))
        results = self.results(self.protocol({}), environment)
        tell = on_progress or (lambda progress: None)
        ground: _Ground | None = None
        total, done = len(self.models) * len(self.memories), 0
        for model, student in zip(self.models, self.students, strict=True):
            beginning = None
            for memory in map(SmallMemory.parse, self.memories):
                is_over = self.budget_seconds is not None and time.monotonic() - began > self.budget_seconds
                if results.find(student=student, memory=memory.name) is None and not is_over:
                    tell(BenchProgress(done=done, total=total, label=f"{student}, {memory.name}"))
                    if beginning is None:
                        beginning = load_forced(model, option="models")
                        beginning.student.to(device).eval().requires_grad_(False)
                    ground = ground or _Ground(self, beginning.donor, device)
                    results.add(
                        {"student": student, "memory": memory.name, **ground.measured(beginning.student, memory)}
                    )
                done += 1
        summary = results.finish(summarise_depth(results.records))
        self.write_table(depth_markdown(results.content))
        save_depth_plot(self.path("png"), results.content)
        return summary


class _Ground:
    """Held-out trips and chunks, encoded once for all students."""

    def __init__(self, bench: DepthBench, donor: Donor, device: torch.device) -> None:
        self._bench, self._donor, self._device = bench, donor, device
        for network in (donor.vae, donor.text_encoder):
            network.to(device)
        trips = range(_TRIP_SEED, _TRIP_SEED + bench.num_trips)
        size = min(bench.batch_size, bench.num_trips)
        self._visits = ReturnVisits(donor, trips, batch_size=size, away_chunks=bench.away_chunks)
        seeds = range(_LOSS_SEED, _LOSS_SEED + max(1, bench.num_chunks // 2))
        self._bank: TripBank = build_trip_bank(
            donor.vae, donor.tokenizer, trips=training_clips(seeds, num_chunks=15, split="test", hold_share=0.0)
        )

    def measured(self, student: Transformer, memory: SmallMemory) -> dict[str, Any]:
        """Recall, loss and bytes of a student with a memory."""
        began, small = time.monotonic(), memory.of(student)
        seen, clearness = self._recall(small, memory)
        rows, columns = self._bank.latents.shape[-2:]
        _, high, wide = student.config.patch_size
        config = student.config
        return {
            "words": memory.words(config.num_layers),
            "kv_routing": config.kv_routing,
            "depth_every": config.depth_every,
            "as_seen": list(seen),
            "clearness": clearness,
            "losses": {kind: self._loss(small, memory, kind) for kind in _LOSS_KINDS if getattr(self._bank, kind)},
            "bytes": memory.num_bytes(student, tokens_per_frame=rows // high * (columns // wide)),
            "seconds": round(time.monotonic() - began, 2),
        }

    def _recall(self, student: Transformer, memory: SmallMemory) -> tuple[tuple[bool, ...], float]:
        bench, visits = self._bench, self._visits
        made = visits.rolled_out(
            student,
            "memory",
            sampler=shifted_sampler(bench.num_inference_steps, stochastic=bench.stochastic),
            generator=seeded_generator(self._device, bench.seed),
            rule=lambda row, chunk: memory.slots(chunk),
        )
        second = visits.read(made, visits.trip.second_visit)
        return as_seen(visits.truth, second), sum(second.likelihoods) / len(second.likelihoods)

    @torch.no_grad()
    def _loss(self, student: Transformer, memory: SmallMemory, kind: str) -> float:
        """Mean squared error of the velocity at high noise; the same chunks and noise for all."""
        generator = seeded_generator(self._device, self._bench.seed, _LOSS_KINDS.index(kind))
        pairs = getattr(self._bank, kind)[: self._bench.num_chunks]
        total = 0.0
        for first in range(0, len(pairs), _CHUNKS_AT_A_TIME):
            rows, chunks = zip(*pairs[first : first + _CHUNKS_AT_A_TIME], strict=True)
            batch = gather_batch(self._bank, rows, chunks, [memory.slots(chunk) for chunk in chunks])
            batch = batch.with_prompt(self._donor.text_encoder, batch.tokens, length=TEXT_LENGTH)
            sigmas = draw_high_sigmas(len(rows), generator)
            noise = torch.randn(batch.chunk.shape, device=self._device, generator=generator)
            velocity = velocity_of(student, batch, noisy_latents(batch.chunk, noise, sigmas), sigmas)
            total += float((velocity - (noise - batch.chunk)).square().mean((1, 2, 3, 4)).sum())
        return round(total / len(pairs), 5)
