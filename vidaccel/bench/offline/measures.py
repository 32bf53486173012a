"""What is measured of a student after an arm: distance to the teacher, recall and clearness of places, drift."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vidaccel.training.architecture import Transformer
from vidaccel.training.causal_rollout import continue_clips
from vidaccel.training.causal_score import recall_score
from vidaccel.training.causal_student import Donor
from vidaccel.training.chunk_sampler import Sampler
from vidaccel.training.offline.collect import CollectConfig, Targets, collect_shard
from vidaccel.training.offline.distill import end_distance
from vidaccel.training.offline.loading import embedding
from vidaccel.training.offline.teacher import Teacher
from vidaccel.training.return_visits import ReturnVisits
from vidaccel.training.trip_bank import CHUNK_FRAMES

DRIFT_CHUNKS = 12
_SEED = 31


@dataclass(frozen=True, kw_only=True)
class Judge:
    """Held-out trips, and the teacher that students are compared with.

    common: states that the student visits before any arm, with the teacher's ends.
    """

    donor: Donor
    teacher: Teacher
    visits: ReturnVisits
    collect: CollectConfig
    common: Targets

    @classmethod
    def of(cls, donor: Donor, teacher: Teacher, visits: ReturnVisits, *, num_states: int, student_steps: int) -> Judge:
        """`num_states` held-out states are asked about for every student."""
        collect = CollectConfig(
            kind="visited",
            num_states=num_states,
            student_steps=student_steps,
            rollouts_per_shard=max(1, num_states // 2),
            seed=_SEED,
        )
        common, _ = collect_shard(
            donor.transformer, teacher, visits.bank, config=collect, number=0, embed=embedding(donor)
        )
        return cls(donor=donor, teacher=teacher, visits=visits, collect=collect, common=common)

    def results(self, student: Transformer, *, sampler: Sampler) -> dict[str, float]:
        """All measures. `sampler`: of its rollouts."""
        embed = embedding(self.donor)
        own, _ = collect_shard(student, self.teacher, self.visits.bank, config=self.collect, number=0, embed=embed)
        return {
            "own_end_distance": end_distance(student, own.states, own.ends, embed),
            "common_end_distance": end_distance(student, self.common.states, self.common.ends, embed),
            **recall_score(student, self.visits, sampler=sampler),
            **self.drift(student, sampler=sampler),
        }

    def drift(self, student: Transformer, *, sampler: Sampler) -> dict[str, float]:
        """How far the statistics of own chunks are from those of the trips, after one and after `DRIFT_CHUNKS`."""
        bank = self.visits.bank
        first = bank.num_chunks - DRIFT_CHUNKS
        made = continue_clips(student, self.donor.text_encoder, bank, first_chunk=first, sampler=sampler)
        return {
            name: statistics_distance(*(_chunk(latents, chunk) for latents in (made, bank.latents.float())))
            for name, chunk in (("first_chunk_drift", first), ("last_chunk_drift", bank.num_chunks - 1))
        }


def statistics_distance(made: Tensor, true: Tensor) -> float:
    """Root mean square, over channels, of the differences of means and of standard deviations; latents (N, T, C, h, w).

    The unit is that of normalised latents: 1 is as far as an average channel varies.
    """
    means = made.mean((0, 1, 3, 4)) - true.mean((0, 1, 3, 4))
    deviations = made.std((0, 1, 3, 4)) - true.std((0, 1, 3, 4))
    return float((means.square() + deviations.square()).mean().sqrt())


def _chunk(latents: Tensor, chunk: int) -> Tensor:
    return latents[:, CHUNK_FRAMES * chunk : CHUNK_FRAMES * (chunk + 1)]
