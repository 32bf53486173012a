"""What offline distillation needs of a checkpoint beside its weights: who taught it; and prompts as a function."""

import torch
from torch import Tensor

from vidaccel.training.causal_rollout import TEXT_LENGTH
from vidaccel.training.causal_student import Donor
from vidaccel.training.checkpoint import TrainingState
from vidaccel.training.flow import prompt_embeddings
from vidaccel.training.offline.fingerprint import TeacherFingerprint
from vidaccel.training.offline.states import Embed

TEACHER = "teacher_fingerprint"  # in the recipe of a checkpoint


def recorded_teacher(state: TrainingState) -> TeacherFingerprint | None:
    """The teacher of the latest round that followed one's trajectories; None where no round did."""
    recipes = [past["recipe"] for past in state.history] + [state.recipe]
    found = [recipe[TEACHER] for recipe in recipes if TEACHER in recipe]
    return TeacherFingerprint.from_dict(found[-1]) if found else None


def embedding(donor: Donor) -> Embed:
    """The text encoder of a model as a function of tokens."""

    @torch.no_grad()
    def embed(tokens: Tensor) -> Tensor:
        return prompt_embeddings(donor.text_encoder, tokens, length=TEXT_LENGTH)

    return embed
