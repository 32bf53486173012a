"""One iteration of distillation: roll out, let teacher and critic judge the last chunks, update critic and generator.

Context Forcing (arXiv 2602.06028, section 3 and algorithm 1): stage 1 is Self-Forcing's DMD on short rollouts from
nothing, stage 2 contextual DMD, in which teacher and critic are given what the student remembers. Both score networks
are causal students themselves, so a window of several chunks is judged chunk by chunk, each with its own past: the
chain rule of the paper's equation 2 with terms of one chunk.
"""

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from vidaccel.training.architecture import Transformer
from vidaccel.training.chunk_batch import ChunkBatch, context_of, velocity_in, velocity_of
from vidaccel.training.context_forcing_config import ContextForcingConfig
from vidaccel.training.context_forcing_networks import Networks
from vidaccel.training.context_forcing_views import ErrorBank, View, view_of
from vidaccel.training.dmd import (
    clean_estimate,
    draw_score_sigmas,
    flow_loss,
    guided,
    matching_gradient,
    matching_loss,
)
from vidaccel.training.flow import noisy_latents
from vidaccel.training.ranks import own_rank, shared_by_ranks
from vidaccel.training.self_rollout import (
    PromptTable,
    ScoredChunk,
    StartShares,
    draw_starts,
    drawn_length,
    exit_pass,
    layout_rule,
    new_video,
    roll_out_chunks,
)
from vidaccel.training.trip_bank import TripBank

FIRST_STAGE_CHUNKS = 3
_FROM_NOTHING = StartShares(returns=0, arrivals=0, changes=0, anything=1, own=1)
_DECIDED = StartShares(returns=0.5, arrivals=0, changes=0.5, anything=0, own=0)
_LANDMARKS_DECIDED = 8.0  # extra weight of their cells, few of a chunk and all that is asked of a return
_ERRORS_KEPT = 512


Part = Literal["rollout", "exit", "teacher", "critic", "backward", "critic learns", "optimizer"]


class ContextForcing:
    """Networks, data and random numbers of a distillation; `iterate` is one iteration.

    draw, generator: all that is random comes from them, on every rank other numbers. num_iterations counts those of the
    critic. on_part: called with the name of every part of an iteration when it ends; nothing is waited for.
    """

    def __init__(
        self,
        networks: Networks,
        config: ContextForcingConfig,
        *,
        bank: TripBank,
        prompts: PromptTable,
        generator: torch.Generator,
        on_part: Callable[[Part], None] = lambda part: None,
    ) -> None:
        self.networks, self.config, self.bank, self.generator = networks, config, bank, generator
        self.prompts = prompts
        self.device = bank.latents.device
        of_rank = f" rank {own_rank()}" if own_rank() else ""
        self.draw = random.Random(f"context forcing {config.seed}{of_rank}")
        self._ended = on_part
        self.errors = ErrorBank(_ERRORS_KEPT, _chunk_shape(bank), device=self.device)
        self.num_iterations = 0

    @property
    def num_updates(self) -> int:
        """Updates of the generator."""
        return self.networks.average.num_updates

    def iterate(self, progress: float) -> dict[str, Tensor]:
        """One iteration, `progress` (0 to 1) into the training; scalars to record, not waited for."""
        rule = self.config.update
        learns = self.num_iterations >= rule.critic_only and self.num_iterations % rule.ratio == 0
        self.num_iterations += 1
        stage, progress = self.stage_at(progress)
        view: View = "short" if stage == 1 else self.config.matching.view
        scalars: dict[str, Tensor] = {}
        made: list[tuple[ChunkBatch, Tensor]] = []
        chunks = self._rolled_out(stage, progress)
        self._ended("rollout")
        for scored in chunks:
            seen = view_of(scored.batch, view)
            with torch.set_grad_enabled(learns):
                latents = exit_pass(self.networks.generator.network, scored)
            self._ended("exit")
            if learns:
                _add(scalars, self._match(latents, seen), share=1 / len(chunks))
                self._ended("backward")
            made.append((seen, latents.detach()))
        if learns:
            self._regress(scalars)
            scalars["grad_norm"] = self.networks.generator.step()
            self.networks.average.update()
            self._ended("optimizer")
        for seen, latents in made:
            _add(scalars, self._follow(latents, seen), share=1 / len(made))
        self._ended("critic learns")
        scalars["critic_grad_norm"] = self.networks.critic.step()
        self._ended("optimizer")
        return scalars

    def stage_at(self, progress: float) -> tuple[int, float]:
        """Which stage it is, 1 or 2, and how far that is."""
        config = self.config
        if config.stage != "both":
            return int(config.stage), progress
        if progress < config.first_share:
            return 1, progress / config.first_share
        return 2, (progress - config.first_share) / max(1 - config.first_share, 1e-9)

    def _rolled_out(self, stage: int, progress: float) -> list[ScoredChunk]:
        """The scored chunks of new rollouts, with recycled errors in what is remembered."""
        config, rule, matching = self.config, self.config.rollout, self.config.matching
        most = min(FIRST_STAGE_CHUNKS, rule.max_chunks) if stage == 1 else rule.max_chunks
        grown = progress / rule.growth_share
        drawn = drawn_length(rule.length, self.draw, progress=grown, least=1, most=most)
        num_chunks = shared_by_ranks(drawn, self.device)
        shares = _FROM_NOTHING if stage == 1 else rule.shares
        starts = draw_starts(self.bank, self.draw, count=config.batch_size, num_chunks=num_chunks, shares=shares)
        layouts = layout_rule(self.bank, rule.layouts, self.draw)
        chunks = roll_out_chunks(
            self.networks.generator.network,
            new_video(self.bank, self.prompts, starts, rule=layouts),
            num_chunks=num_chunks,
            num_scored=min(rule.scored, num_chunks),
            draw=self.draw,
            generator=self.generator,
            sampler=rule.sampler,
        )
        share, slow = matching.error_share, matching.error_slow
        return [
            replace(scored, batch=self.errors.disturbed(scored.batch, share=share, slow=slow, generator=self.generator))
            for scored in chunks
        ]

    def _match(self, latents: Tensor, seen: ChunkBatch) -> dict[str, Tensor]:
        """The matching loss of `latents`, whose gradients are left in the generator when the caller goes backward."""
        matching = self.config.matching
        copies = matching.levels
        with torch.no_grad():
            clean = latents.detach().repeat_interleave(copies, 0)
            sigmas = draw_score_sigmas(len(clean), self.generator, shift=matching.score_shift)
            noisy = noisy_latents(clean, self._noise(clean), sigmas)
            real = self._teacher_estimate(seen, noisy, sigmas)
            self._ended("teacher")
            fake = _estimate(self.networks.critic.network, seen, noisy, sigmas, copies=copies)
            self._ended("critic")
            gradient = matching_gradient(clean, real=real, fake=fake).unflatten(0, (-1, copies)).mean(1)
            self.errors.add((clean - real)[::copies], sigmas[::copies])
            distance = (clean - real).abs().mean()
        loss = matching_loss(latents, gradient, weight=self._weight(seen))
        return {"loss": loss, "distance": distance}

    def _teacher_estimate(self, seen: ChunkBatch, noisy: Tensor, sigmas: Tensor) -> Tensor:
        """What the frozen teacher estimates, with guidance where that is asked for."""
        matching = self.config.matching
        real = _estimate(self.networks.teacher, seen, noisy, sigmas, copies=matching.levels)
        if matching.guidance == 0:
            return real
        assert seen.embeddings is not None
        without = replace(seen, embeddings=self.prompts.empty.expand_as(seen.embeddings))
        other = _estimate(self.networks.teacher, without, noisy, sigmas, copies=matching.levels)
        return guided(real, other, matching.guidance)

    def _regress(self, scalars: dict[str, Tensor]) -> None:
        """Flow matching beside the matching loss, on real chunks that memory and prompt decide: matching alone makes
        colours stronger and stronger, and what is shown again must be as it was."""
        share = self.config.matching.flow_share
        if share <= 0:
            return
        starts = draw_starts(self.bank, self.draw, count=self.config.batch_size, num_chunks=1, shares=_DECIDED)
        layouts = layout_rule(self.bank, self.config.rollout.layouts, self.draw)
        batch = new_video(self.bank, self.prompts, starts, rule=layouts).batch(0)
        levels = torch.tensor(self.draw.choices(self.config.rollout.sampler.sigmas, k=len(starts)))
        sigmas, noise = levels.to(self.device, non_blocking=True), self._noise(batch.chunk)
        noisy = noisy_latents(batch.chunk, noise, sigmas)
        velocity = velocity_of(self.networks.generator.network, batch, noisy, sigmas)
        weight = batch.weight(subject=0.0, landmarks=_LANDMARKS_DECIDED)
        _add(scalars, {"flow_loss": flow_loss(velocity, noise=noise, clean=batch.chunk, weight=weight)}, share=share)

    def _follow(self, latents: Tensor, seen: ChunkBatch) -> dict[str, Tensor]:
        """The critic's loss on what the student made; what is remembered is clean, only the chunk is noisy."""
        copies, shift = self.config.matching.levels, self.config.matching.score_shift
        clean = latents.repeat_interleave(copies, 0)
        sigmas = _critic_sigmas(len(clean), self.generator, shift=shift)
        noise = self._noise(clean)
        noisy = noisy_latents(clean, noise, sigmas)
        velocity = velocity_of(self.networks.critic.network, seen, noisy, sigmas, copies=copies)
        weight = self._weight(seen).repeat_interleave(copies, 0)
        return {"critic_loss": flow_loss(velocity, noise=noise, clean=clean, weight=weight)}

    def _weight(self, seen: ChunkBatch) -> Tensor:
        return seen.weight(subject=0.0, landmarks=self.config.matching.landmark_weight)

    def _noise(self, like: Tensor) -> Tensor:
        return torch.randn(like.shape, device=self.device, generator=self.generator)


def _add(scalars: dict[str, Tensor], values: dict[str, Tensor], *, share: float) -> None:
    """Go backward through the loss among `values`, scaled by `share`, and add all of them to `scalars`."""
    for name, value in values.items():
        if value.requires_grad:
            (share * value).backward()
        scalars[name] = scalars.get(name, torch.zeros_like(value.detach())) + share * value.detach()


def _estimate(network: Transformer, seen: ChunkBatch, noisy: Tensor, sigmas: Tensor, *, copies: int) -> Tensor:
    context = context_of(network, seen, copies=copies)
    return clean_estimate(noisy, velocity_in(network, context, noisy, sigmas), sigmas)


def _critic_sigmas(count: int, generator: torch.Generator, *, shift: float) -> Tensor:
    """Of all times: the critic must know every level at which it is asked."""
    return draw_score_sigmas(count, generator, times=(0.0, 1.0), shift=shift)


def _chunk_shape(bank: TripBank) -> tuple[int, ...]:
    """(C, T, h, w) of a chunk."""
    _, num_frames, channels, height, width = bank.latents.shape
    return channels, num_frames // bank.num_chunks, height, width
