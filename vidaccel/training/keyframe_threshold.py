"""Which similarity makes a chunk a keyframe where the camera starts or stops, measured on clips that a student sees.

Slow memory keeps chunks whose keys differ from those of the chunk before (Context Forcing, arXiv 2602.06028, equation
7). How much they differ depends on the student, so the threshold is measured and not chosen.
"""

import itertools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vidaccel.memory import DepthMap
from vidaccel.memory.camera import Camera
from vidaccel.memory.rotary import rotate
from vidaccel.training.architecture import TextEncoder, Transformer
from vidaccel.training.causal_rollout import TEXT_LENGTH
from vidaccel.training.device import autocast
from vidaccel.training.flow import prompt_embeddings
from vidaccel.training.trip_bank import CHUNK_FRAMES, TripBank

_CHUNKS_AT_A_TIME = 256
_STILL = 0.03  # columns that a camera at rest may come between two chunks


class KeyframeThreshold(NamedTuple):
    """Similarities of chunks with those before, from the least: where the camera starts or stops, and where it rests.

    threshold: what divides the two best.
    """

    threshold: float
    turning: tuple[float, ...]
    resting: tuple[float, ...]

    @property
    def found(self) -> float:
        """Share of the chunks where the camera starts or stops that are keyframes."""
        return sum(value < self.threshold for value in self.turning) / len(self.turning)

    @property
    def spared(self) -> float:
        """Share of the chunks in which the camera rests that are none."""
        return sum(value >= self.threshold for value in self.resting) / len(self.resting)


def calibrate_threshold(student: Transformer, text_encoder: TextEncoder, bank: TripBank) -> KeyframeThreshold:
    """Measure on the clips of `bank`. Raises ValueError if they have no chunk of one of the two kinds."""
    similarities = chunk_similarities(student, text_encoder, bank)
    columns = bank.columns.cpu().unflatten(1, (-1, CHUNK_FRAMES))
    rests = columns.amax(2) - columns.amin(2) < _STILL
    turns = rests[:, 1:] != rests[:, :-1]
    is_known = (bank.tokens[:, 1:] == bank.tokens[:, :-1]).all(2).cpu()  # not where the prompt changes
    turning = sorted(similarities[turns & is_known].tolist())
    resting = sorted(similarities[rests[:, 1:] & rests[:, :-1] & is_known].tolist())
    if not turning or not resting:
        raise ValueError("These clips have no chunk in which the camera starts or stops, or none in which it rests.")
    return KeyframeThreshold(_dividing(turning, resting), tuple(turning), tuple(resting))


@torch.no_grad()
def chunk_similarities(student: Transformer, text_encoder: TextEncoder, bank: TripBank) -> Tensor:
    """Cosine similarity of the mean keys of each chunk with those of the one before; (N, chunks - 1) on the CPU.

    The keys are those of the clean pass before rotation, as `KeyValueMemory` compares them.
    """
    parts = [
        part.flatten(0, 1).split(_CHUNKS_AT_A_TIME)
        for part in (
            bank.latents.unflatten(1, (-1, CHUNK_FRAMES)),
            bank.motions.unflatten(1, (-1, CHUNK_FRAMES)),
            bank.tokens,
        )
    ]
    means = [_mean_keys(student, text_encoder, *piece) for piece in zip(*parts, strict=True)]
    keys = torch.cat(means, dim=1).unflatten(1, bank.tokens.shape[:2])  # (kept layers, N, chunks, heads * D)
    return F.cosine_similarity(keys[:, :, 1:], keys[:, :, :-1], dim=-1).mean(0).cpu()


def _mean_keys(
    student: Transformer, text_encoder: TextEncoder, latents: Tensor, motions: Tensor, tokens: Tensor
) -> Tensor:
    """Of chunks (B, T, C, h, w), each encoded alone; (kept layers, B, heads * D)."""
    positions = torch.arange(latents.shape[1], device=latents.device)
    embeddings = prompt_embeddings(text_encoder, tokens, length=TEXT_LENGTH)
    with autocast(latents.device), torch.compiler.set_stance("force_eager"):
        history = student.remember(
            latents.float().transpose(1, 2),
            student.cache_prompt(embeddings),
            positions=positions,
            camera=Camera(torch.zeros_like(motions), motions),
        )
    cosines, sines = student.rotary_table(*latents.shape[-2:]).to(latents.device).at(positions)
    kept = DepthMap.every(student.config.depth_every, student.config.num_layers).kept
    raw = [rotate(history.layers[layer][0].float(), cosines[None], -sines[None]) for layer in kept]
    return torch.stack([keys.mean(1).flatten(1) for keys in raw])


def _dividing(low: list[float], high: list[float]) -> float:
    """The value below which most of `low` and least of `high` lies, halfway between two of them."""
    values = sorted({*low, *high})
    halves = [(first + second) / 2 for first, second in itertools.pairwise(values)] or values
    return max(halves, key=lambda at: sum(x < at for x in low) / len(low) - sum(x < at for x in high) / len(high))
