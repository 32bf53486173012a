"""How a student makes a chunk from noise in a few passes, the same in trainings, validations and benchmarks."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from vidaccel.training.architecture import FLOW_SHIFT, Transformer
from vidaccel.training.chunk_batch import ChunkContext, velocity_in
from vidaccel.training.dmd import clean_estimate
from vidaccel.training.flow import noisy_latents

STUDENT_STEPS = 4


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """sigmas: the noise levels of the passes, from 1 down; the way ends at 0.

    stochastic: every step estimates the clean chunk and adds fresh noise to it (Self-Forcing, arXiv 2506.08009,
    algorithm 1); else the steps are Euler's.
    """

    sigmas: tuple[float, ...]
    stochastic: bool = True


def shifted_sampler(num_steps: int, *, shift: float = FLOW_SHIFT, stochastic: bool = False) -> Sampler:
    """`num_steps` passes at noise levels with diffusers' `shift`, by default Wan's."""
    return Sampler(sigmas=tuple(euler_sigmas(num_steps, shift=shift)[:-1]), stochastic=stochastic)


def euler_sigmas(num_steps: int, *, shift: float = FLOW_SHIFT) -> list[float]:
    """Noise levels from 1 to 0, `num_steps` + 1 of them: t -> shift t / (1 + (shift - 1) t) of equal steps t."""
    times = [1 - step / num_steps for step in range(num_steps + 1)]
    return [shift * time / (1 + (shift - 1) * time) for time in times]


FEW_STEPS = shifted_sampler(STUDENT_STEPS, stochastic=True)
"""Of a distilled student where nothing else is said: 1, 0.9, 0.75, 0.5."""


def sample_chunk(
    student: Transformer,
    context: ChunkContext,
    noise: Tensor,
    draw: Callable[[], Tensor],
    *,
    sampler: Sampler = FEW_STEPS,
    inputs: dict[int, Tensor] | None = None,
    stop: int | None = None,
) -> Tensor:
    """A chunk (B, C, T, h, w) from `noise` of that shape.

    draw: gives fresh noise of the same shape. inputs: filled with the noisy input of the steps that are its keys.
    stop: end before this step; the result is then its input.
    """
    noisy = noise
    for step, (sigma, following) in enumerate(itertools.pairwise((*sampler.sigmas, 0.0))):
        if inputs is not None and step in inputs:
            inputs[step] = noisy
        if step == stop:
            break
        levels = noise.new_full((len(noise),), sigma)
        velocity = velocity_in(student, context, noisy, levels)
        if sampler.stochastic and following > 0:
            clean = clean_estimate(noisy, velocity, levels)
            noisy = noisy_latents(clean, draw(), noise.new_full((len(noise),), following))
        else:
            noisy = noisy + (following - sigma) * velocity
    return noisy
