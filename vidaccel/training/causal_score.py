"""Validation of the causal student: does it make again what it saw, how clear are new places, are prompts obeyed."""

from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean

import torch
from torch import Tensor

from vidaccel.training.architecture import Transformer
from vidaccel.training.causal_rollout import continue_clips
from vidaccel.training.causal_student import Donor
from vidaccel.training.chunk_sampler import Sampler
from vidaccel.training.device import seeded_generator
from vidaccel.training.latents import caption_tokens
from vidaccel.training.oracle_score import decoded
from vidaccel.training.return_visits import Cell, ReturnVisits, as_seen, share
from vidaccel.training.trip_bank import CHUNK_FRAMES, TripBank
from vidaccel.world import Scene, caption, read_clip

_ATTRIBUTES = ("colour", "shape", "motion", "background")
_BEGINNING = 49  # pixel frames
_END = 33


def recall_score(student: Transformer, visits: ReturnVisits, *, sampler: Sampler) -> dict[str, float]:
    """What the landmark oracle reads where the camera of `visits` has come back, `student` having made the way there.

    as_seen: the landmark is the one of the first visit, in kind, colour and place. blank: the same, but frames that
    showed the place are not remembered. own_recall: as_seen in videos made from their first chunk on.
    first_visit_likelihood: how clear landmarks of places seen for the first time are in those, and true_likelihood in
    decoded truth, in log-likelihood ratios a pixel.
    """

    def made(cell: Cell) -> Tensor:
        noise = seeded_generator(visits.bank.latents.device, visits.made_chunks(cell)[0])
        return visits.rolled_out(student, cell, sampler=sampler, generator=noise)

    trip, own = visits.trip, made("own")
    first = visits.read(own, trip.first_visit)
    return {
        "as_seen": share(as_seen(visits.truth, visits.read(made("memory"), trip.second_visit))),
        "blank": share(as_seen(visits.truth, visits.read(made("blank"), trip.second_visit))),
        "own_recall": share(as_seen(first, visits.read(own, trip.second_visit))),
        "first_visit_likelihood": fmean(first.likelihoods),
        "true_likelihood": fmean(visits.truth.likelihoods),
    }


@torch.no_grad()
def rollout_score(
    student: Transformer, donor: Donor, scenes: Sequence[Scene], *, bank: TripBank, num_chunks: int, sampler: Sampler
) -> dict[str, float]:
    """Share of rollouts in which the oracle reads what the caption of a scene's first segment asks for.

    By attribute in the first three seconds, and `kept`: colour, shape and background all still right at the end.
    The camera holds. bank: any, for the shape of its latents.
    """
    with torch.compiler.set_stance("force_eager"):
        blank = held_clips(donor, [caption(scene, frame=0) for scene in scenes], bank=bank, num_chunks=num_chunks)
        latents = continue_clips(student, donor.text_encoder, blank, first_chunk=0, sampler=sampler)
    return _shares(decoded(donor.vae, latents.transpose(1, 2)), scenes)


def held_clips(donor: Donor, captions: Sequence[str], *, bank: TripBank, num_chunks: int) -> TripBank:
    """Clips of which only the captions are there, and a camera that holds; of the kind of those of `bank`."""
    device, size = bank.latents.device, (len(captions), num_chunks * CHUNK_FRAMES)
    tokens = caption_tokens(donor.tokenizer, captions).to(device)[:, None].expand(-1, num_chunks, -1)
    nothing = torch.zeros(*size, *bank.coverage.shape[2:], device=device)
    return replace(
        bank,
        latents=torch.zeros(*size, *bank.latents.shape[2:], device=device),
        columns=torch.zeros(size, device=device),
        motions=torch.zeros(size, device=device),
        tokens=tokens,
        coverage=nothing,
        landmarks=nothing,
        returns=(),
        arrivals=(),
        changes=(),
        keyframes=((),) * len(captions),
        clips=(),
    )


def _shares(videos: Tensor, scenes: Sequence[Scene]) -> dict[str, float]:
    found = dict.fromkeys((*_ATTRIBUTES, "kept"), 0)
    for video, scene in zip(videos, scenes, strict=True):
        wanted = {
            "colour": scene.subject.colour,
            "shape": scene.subject.shape,
            "motion": scene.subject.motion,
            "background": scene.background,
        }
        first, last = read_clip(video[:_BEGINNING]), read_clip(video[-_END:])
        for name in _ATTRIBUTES:
            found[name] += getattr(first, name) == wanted[name]
        found["kept"] += all(getattr(last, name) == wanted[name] for name in _ATTRIBUTES if name != "motion")
    return {name: count / len(scenes) for name, count in found.items()}
