"""The teacher: where its probability-flow ODE ends from a state (arXiv 2011.13456, section 4.3), by Euler steps."""

import itertools
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vidaccel.errors import UserError, check_count
from vidaccel.training.architecture import FLOW_SHIFT, Transformer
from vidaccel.training.chunk_batch import context_of, velocity_in
from vidaccel.training.chunk_sampler import euler_sigmas
from vidaccel.training.flow import empty_prompt
from vidaccel.training.offline.fingerprint import TeacherFingerprint, weights_digest
from vidaccel.training.offline.states import Embed, HistoryView, States, first_of

_NEAR = 1e-4  # noise levels are told apart by more than this


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """A causal network that is asked, never trained.

    history: what it is shown of the frames that the student remembers. num_steps: of its grid of noise levels, Euler
    with shift 3; a state in between has the rest of them before it. guidance_scale: weight of the prompt; 1 is none.
    Raises UserError for a number of steps under 1.
    """

    network: Transformer
    history: HistoryView = field(default_factory=HistoryView)
    num_steps: int = 16
    guidance_scale: float = 1.0

    def __post_init__(self) -> None:
        check_count("num_steps", self.num_steps, minimum=1)

    @property
    def fingerprint(self) -> TeacherFingerprint:
        """What its trajectories depend on; reads all weights."""
        return TeacherFingerprint(
            weights=weights_digest(self.network),
            structure="causal",
            history=self.history.name,
            guidance_scale=self.guidance_scale,
            schedule=f"euler {self.num_steps} steps, shift {FLOW_SHIFT:g}",
        )

    def check_levels(self, sigmas: list[float]) -> None:
        """Raise UserError where a level is not one of the teacher's grid, as its trajectories have no state there."""
        grid = euler_sigmas(self.num_steps)
        for sigma in sigmas:
            if min(abs(sigma - known) for known in grid) > _NEAR:
                raise UserError(
                    f"The teacher's {self.num_steps} steps do not stop at the student's noise level {sigma:g}; take a "
                    "multiple of the student's steps."
                )


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a teacher says to n states.

    ends: the ends of its trajectories, (n, C, f, h, w) float32. velocities: at the states themselves.
    num_forwards: passes over one chunk.
    """

    ends: Tensor
    velocities: Tensor
    num_forwards: int


@torch.no_grad()
def ask(teacher: Teacher, states: States, embed: Embed) -> Answer:
    """Follow the teacher from every state to its end. Raises UserError for a level that its grid does not have."""
    levels: list[float] = states.sigmas.tolist()
    teacher.check_levels(sorted(set(levels)))
    order = torch.tensor(sorted(range(len(levels)), key=lambda row: -levels[row]), device=states.sigmas.device)
    answer = _follow(teacher, states.rows(order), sorted(levels, reverse=True), embed)
    back = order.argsort()
    return Answer(ends=answer.ends[back], velocities=answer.velocities[back], num_forwards=answer.num_forwards)


def _follow(teacher: Teacher, states: States, levels: list[float], embed: Embed) -> Answer:
    """As `ask`, for states in descending order of their `levels`: those that have begun are the first ones."""
    guided = _Guided(teacher, states, embed)
    ways, firsts, begun, count = states.noisy.float(), [], 0, 0
    for sigma, following in itertools.pairwise(euler_sigmas(teacher.num_steps)):
        active = sum(level > sigma - _NEAR for level in levels)
        if active == 0:
            continue
        step = guided.velocity(ways[:active], sigma, active)
        firsts.append(step[begun:])
        moved = ways[:active] + (following - sigma) * step
        ways, begun = torch.cat([moved, ways[active:]]), active
        count += active * guided.passes
    return Answer(ends=ways, velocities=torch.cat(firsts), num_forwards=count)


@dataclass(frozen=True, kw_only=True)
class Way:
    """Ways of a teacher from pure noise.

    stops: at levels that were asked for, in their order: the level, the chunks there and the velocities there.
    ends: clean latents. num_forwards: passes over one chunk.
    """

    stops: tuple[tuple[float, Tensor, Tensor], ...]
    ends: Tensor
    num_forwards: int


@torch.no_grad()
def trajectory(teacher: Teacher, noise: States, levels: list[float], embed: Embed) -> Way:
    """The teacher's ways from pure noise. Raises UserError for a level that its grid does not have."""
    teacher.check_levels(levels)
    guided, ways, stops = _Guided(teacher, noise, embed), noise.noisy.float(), []
    for sigma, following in itertools.pairwise(euler_sigmas(teacher.num_steps)):
        step = guided.velocity(ways, sigma, len(noise))
        if any(abs(sigma - level) <= _NEAR for level in levels):
            stops.append((sigma, ways, step))
        ways = ways + (following - sigma) * step
    return Way(stops=tuple(stops), ends=ways, num_forwards=teacher.num_steps * len(noise) * guided.passes)


class _Guided:
    """The teacher's velocity for some chunks, with the weight of the prompt."""

    def __init__(self, teacher: Teacher, states: States, embed: Embed) -> None:
        self._network, self._scale = teacher.network, teacher.guidance_scale
        texts = [embed(states.tokens)]
        if self._scale != 1:
            texts.append(embed(empty_prompt(states.tokens.device).expand(len(states), -1)))
        self._contexts = [context_of(self._network, states.surroundings(text, view=teacher.history)) for text in texts]

    @property
    def passes(self) -> int:
        return len(self._contexts)

    def velocity(self, noisy: Tensor, sigma: float, count: int) -> Tensor:
        """Of the first `count` chunks, all at one level."""
        sigmas = noisy.new_full((count,), sigma)
        conditional, *others = (
            velocity_in(self._network, first_of(one, count), noisy, sigmas) for one in self._contexts
        )
        return conditional if not others else others[0] + self._scale * (conditional - others[0])
