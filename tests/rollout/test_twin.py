"""The rollout against its slow twin: chosen memories, and drawn ones with cuts, starts, saved states and replays."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from tests.support.slow_rollout import Sampling, SlowVideo
from tests.support.tiny_causal import CONFIG, causal_model, shot
from vidaccel.memory import MemoryConfig
from vidaccel.rollout.chunk import Chunk, Shot, Student
from vidaccel.rollout.loop import ingest, replay, rollout
from vidaccel.rollout.skipping import StepSkipping
from vidaccel.rollout.state import RolloutState, new_state

SMALL = {"sink_frames": 3, "slow_frames": 3, "fast_frames": 6}


@dataclass(frozen=True, kw_only=True)
class Case:
    config: MemoryConfig
    sampling: Sampling
    seeds: tuple[int, ...] = (3,)
    size: tuple[int, int] = (4, 6)
    num_layers: int = 2
    num_chunks: int = 7
    shots: tuple[Shot, ...] = ()
    given: tuple[Tensor, ...] = ()
    stop: int | None = None  # after so many chunks the state is saved, or made anew
    way: str = "load"

    def student(self) -> Student:
        return Student(
            transformer=causal_model(num_layers=self.num_layers),
            scheduler=FlowMatchEulerDiscreteScheduler(
                shift=self.sampling.shift, stochastic_sampling=self.sampling.is_stochastic
            ),
            num_inference_steps=self.sampling.num_inference_steps,
            guidance_scale=self.sampling.guidance_scale,
            skipping=self.skipping(),
        )

    def skipping(self) -> StepSkipping | None:
        sampling = self.sampling
        return StepSkipping(steps=sampling.skipped, threshold=sampling.threshold) if sampling.skipped else None

    def state(self, student: Student) -> RolloutState:
        return new_state(student, self.config, height=self.size[0], width=self.size[1], seeds=self.seeds)

    def fast(self) -> list[Chunk]:
        student = self.student()
        state = self.state(student)
        made: list[Chunk] = []
        if self.given:
            made += ingest(student, state, self.shots[0], torch.cat(self.given, dim=2))
        made += rollout(student, state, self.shots, num_chunks=self.num_chunks if self.stop is None else self.stop)
        if self.stop is None:
            return made
        tensors, values = state.save_state()
        again = self.state(student)
        if self.way == "load":
            again.load_state({name: part.clone() for name, part in tensors.items()}, json.loads(json.dumps(values)))
        else:
            replay(student, again, self.shots, (chunk.latents for chunk in made))
        return made + list(rollout(student, again, self.shots, num_chunks=self.num_chunks))

    def check(self) -> None:
        made = self.fast()
        latents = torch.cat([chunk.latents for chunk in made], dim=2)
        for sample, seed in enumerate(self.seeds):
            slow = SlowVideo(self.student().transformer, self.config, self.sampling, seed, self.size)
            shots = [(one, sample) for one in self.shots]
            expected = slow.make(shots, self.num_chunks, [part[sample] for part in self.given])
            assert slow.margin > 1e-5, "rounding decides about a keyframe; take another seed"
            torch.testing.assert_close(latents[sample], expected, rtol=1e-4, atol=1e-4)
            if sample == 0:
                assert [(chunk.sink, chunk.slow, chunk.fast) for chunk in made] == slow.remembered


def shots(*cuts: tuple[int, Any], batch_size: int = 1) -> tuple[Shot, ...]:
    return (shot("p", 0, batch_size), *[shot(f"p{start}", start, batch_size, cut=cut) for start, cut in cuts])


def frames(count: int, size: tuple[int, int], batch_size: int) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randn(batch_size, CONFIG["in_channels"], count, *size, generator=generator)


CHOSEN = {
    "samples that remember differently, with guidance, under a second prompt": Case(
        config=MemoryConfig(**SMALL, similarity_threshold=0.98),
        sampling=Sampling(guidance_scale=3.0),
        seeds=(3, 4),
        num_chunks=8,
        shots=shots((6, "soft"), batch_size=2),
    ),
    "official, one decision for both branches of guidance": Case(
        config=MemoryConfig(**SMALL, similarity_threshold=0.9, mode="official"),
        sampling=Sampling(guidance_scale=2.0),
        num_chunks=8,
        shots=shots((6, "soft")),
    ),
    "official, uniform, in the middle of its growth": Case(
        config=MemoryConfig(keyframe_rule="uniform", mode="official"),
        sampling=Sampling(),
        num_chunks=9,
        shots=shots(),
    ),
    "a step is left out, with guidance, under a second prompt": Case(
        config=MemoryConfig(**SMALL, similarity_threshold=0.98),
        sampling=Sampling(num_inference_steps=4, skipped=(3,), guidance_scale=3.0),
        num_chunks=5,
        shots=shots((3, "soft")),
    ),
    "the chunk before stands in for the first step, but not behind a hard cut or an image": Case(
        config=MemoryConfig(**SMALL, similarity_threshold=0.98),
        sampling=Sampling(num_inference_steps=3, skipped=(1, 2)),
        shots=shots((3, "hard")),
        given=(frames(1, (4, 6), 1),),
        stop=5,
    ),
    "steps are left out of the chunks of some samples": Case(
        config=MemoryConfig(**SMALL, similarity_threshold=0.98),
        sampling=Sampling(num_inference_steps=4, skipped=(3, 4), threshold=1.27),
        seeds=(3, 4, 5),
        num_chunks=5,
        shots=shots(batch_size=3),
    ),
    "a step is left out, without fresh noise": Case(
        config=MemoryConfig.sliding_window(6),
        sampling=Sampling(num_inference_steps=3, skipped=(2,), is_stochastic=False),
        num_chunks=4,
        shots=shots(),
        stop=2,
        way="replay",
    ),
    "a sliding window": Case(config=MemoryConfig.sliding_window(6), sampling=Sampling(), shots=shots()),
    "first frames only": Case(
        config=MemoryConfig(sink_frames=6, slow_frames=0, fast_frames=3), sampling=Sampling(), shots=shots()
    ),
    "an image, then single frames": Case(
        config=MemoryConfig(sink_frames=1, slow_frames=2, fast_frames=2, chunk_frames=1, similarity_threshold=0.97),
        sampling=Sampling(is_stochastic=False),
        size=(2, 2),
        num_layers=1,
        shots=shots(),
        given=(frames(1, (2, 2), 1),),
    ),
    "an image, then four frames at once on a wide picture": Case(
        config=MemoryConfig(sink_frames=4, slow_frames=4, fast_frames=8, chunk_frames=4, keyframe_interval=8),
        sampling=Sampling(),
        size=(2, 10),
        num_layers=3,
        num_chunks=6,
        shots=shots((4, "hard")),
        given=(frames(1, (2, 10), 1),),
    ),
}


@pytest.mark.parametrize("name", CHOSEN)
def test_chosen_rollouts_are_the_slow_ones(name: str) -> None:
    """Behaviours 7 to 11, 15, 16, 27, 31 in the whole rollout."""
    CHOSEN[name].check()


def drawn_config(draw: random.Random) -> MemoryConfig:
    while True:
        chunk = draw.choice([1, 2, 3, 4])
        mode = draw.choice(["clean", "clean", "official"])
        settings: dict[str, Any] = {
            "sink_frames": draw.randint(0, 5),
            "slow_frames": draw.randint(0, 6),
            "fast_frames": draw.randint(chunk, 3 * chunk),
            "keyframe_rule": draw.choice(["similarity", "similarity", "uniform", "none"]),
            "similarity_threshold": draw.choice([0.9, 0.97, 0.99, 1.0]),
            "keyframe_interval": draw.randint(1, 7),
            "prefill": draw.choice(["none", "linear"]),
            "keyframe_frames": draw.randint(1, chunk) if mode == "clean" else 1,
        }
        total = sum(settings[name] for name in ("sink_frames", "slow_frames", "fast_frames"))
        if total % chunk == 0 and (mode == "clean" or settings["fast_frames"] >= settings["sink_frames"]):
            return MemoryConfig(chunk_frames=chunk, mode=mode, **settings)


def drawn(seed: int) -> Case:
    draw = random.Random(seed)
    config = drawn_config(draw)
    count, num_chunks = draw.randint(1, 3), draw.randint(3, 9)
    size = draw.choice([(4, 6), (2, 2), (6, 2)])
    given: Sequence[Tensor] = ()
    if config.mode == "clean" and draw.random() < 0.4:
        start = frames(draw.choice([1, 1, config.chunk_frames + 1]), size, count)
        given = start.split(config.chunk_frames, dim=2)
    cuts = [(chunk, draw.choice(["soft", "hard"])) for chunk in range(1, num_chunks) if draw.random() < 0.25]
    return Case(
        config=config,
        sampling=Sampling(
            num_inference_steps=draw.randint(1, 3),
            guidance_scale=draw.choice([1.0, 1.0, 2.0]),
            is_stochastic=draw.random() < 0.5,
        ),
        seeds=tuple(draw.randrange(10**6) for _ in range(count)),
        size=size,
        num_layers=draw.randint(1, 3),
        num_chunks=num_chunks,
        shots=shots(*[(chunk, cut) for chunk, cut in cuts if chunk >= len(given)], batch_size=count),
        given=tuple(given),
        stop=draw.choice([None, draw.randint(len(given), num_chunks)]),
        way=draw.choice(["load", "replay"]) if config.mode == "clean" else "load",
    )


@pytest.mark.parametrize("seed", range(12))
def test_drawn_rollouts_are_the_slow_ones(seed: int) -> None:
    drawn(seed).check()
