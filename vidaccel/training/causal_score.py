"""Validation of the causal student: does it make again what it saw, how clear are new places, are prompts obeyed."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property, partial

import torch
from torch import Tensor

from vidaccel.training.architecture import Transformer
from vidaccel.training.causal_rollout import continue_clips
from vidaccel.training.causal_student import Donor
from vidaccel.training.latents import caption_tokens
from vidaccel.training.oracle_score import decoded
from vidaccel.training.trip_bank import CHUNK_FRAMES, TripBank, build_trip_bank, pixels_per_column
from vidaccel.world import Scene, caption, read_clip
from vidaccel.world.landmark_oracle import SAME_PLACE, LandmarkReadings, read_landmarks
from vidaccel.world.trip import ReturnTrip
from vidaccel.world.trips import test_trip

_ATTRIBUTES = ("colour", "shape", "motion", "background")
_BEGINNING = 49  # pixel frames
_END = 33
_DECODED_FRAMES = 12  # latent frames decoded for a still picture, and pixel frames whose median it is
_STILL_FRAMES = 9


def build_visits(donor: Donor, seeds: Sequence[int], *, away_chunks: int = 6) -> TripBank:
    """Encoded held-out trips in which the camera sees a place, leaves it and comes back after `away_chunks`."""
    trips = [test_trip(seed, away_chunks=away_chunks) for seed in seeds]
    return build_trip_bank(donor.vae, donor.tokenizer, trips=trips)


@torch.no_grad()
def recall_score(
    student: Transformer, donor: Donor, visits: TripBank, *, num_steps: int, stochastic: bool = False
) -> dict[str, float]:
    """What the landmark oracle reads where the camera of `visits` has come back, `student` having made the way there.

    as_seen: the landmark is the one of the first visit, in kind, colour and place. blank: the same, but frames that
    showed the place are not remembered. own_recall: as_seen in videos made from their first chunk on.
    first_visit_likelihood: how clear landmarks of places seen for the first time are in those, and true_likelihood in
    decoded truth, in log-likelihood ratios a pixel.
    """
    make = partial(continue_clips, student, donor.text_encoder, visits, num_steps=num_steps, stochastic=stochastic)
    prefix = _trips(visits)[0].prefix_chunks
    with torch.compiler.set_stance("force_eager"):
        truth = _Visits(donor, visits, visits.latents.float())
        remembered = _Visits(donor, visits, make(first_chunk=prefix))
        blank = _Visits(donor, visits, make(first_chunk=prefix, hidden=shows_target(visits)))
        own = _Visits(donor, visits, make(first_chunk=0))
        return {
            "as_seen": truth.as_seen_in(remembered),
            "blank": truth.as_seen_in(blank),
            "own_recall": own.as_seen_in(own),
            "first_visit_likelihood": float(own.first.likelihoods.mean()),
            "true_likelihood": float(truth.first.likelihoods.mean()),
        }


class _Visits:
    """What the oracle reads of the first and of the second visit in videos of the same trips."""

    def __init__(self, donor: Donor, visits: TripBank, latents: Tensor) -> None:
        trip = _trips(visits)[0]
        self._donor, self._latents = donor, latents
        self._scale = pixels_per_column(donor.vae)
        self._ends = [CHUNK_FRAMES * chunks.stop for chunks in (trip.first_visit, trip.second_visit)]
        self._columns = visits.columns

    @cached_property
    def first(self) -> LandmarkReadings:
        """At the end of the first visit."""
        return self._read(self._ends[0])

    @cached_property
    def second(self) -> LandmarkReadings:
        """At the end of the second visit."""
        return self._read(self._ends[1])

    def _read(self, end: int) -> LandmarkReadings:
        latents = self._latents[:, max(end - _DECODED_FRAMES, 0) : end].transpose(1, 2)
        video = decoded(self._donor.vae, latents)
        return read_landmarks(video[:, -_STILL_FRAMES:].median(dim=1).values)

    def as_seen_in(self, other: "_Visits") -> float:
        """Share of trips in which the second visit of `other` shows the landmark of the first visit of this."""
        readings = (self.first, other.second)
        places = [
            reading.x + self._scale * self._columns[:, end - 1].to(reading.x.device)
            for reading, end in zip(readings, self._ends, strict=True)
        ]
        is_near = (places[0] - places[1]).abs() <= SAME_PLACE
        names = [zip(reading.kinds, reading.colours, strict=True) for reading in readings]
        found = [near and was == now for near, was, now in zip(is_near.tolist(), *names, strict=True)]
        return sum(found) / len(found)


def _trips(visits: TripBank) -> list[ReturnTrip]:
    return [clip for clip in visits.clips if isinstance(clip, ReturnTrip)]


def shows_target(visits: TripBank) -> Tensor:
    """(N, F) bool: frames of chunks that show the place which is visited twice."""
    rows = [[trip.shows_target(chunk) for chunk in range(visits.num_chunks)] for trip in _trips(visits)]
    return torch.tensor(rows, device=visits.latents.device).repeat_interleave(CHUNK_FRAMES, 1)


@torch.no_grad()
def rollout_score(
    student: Transformer, donor: Donor, scenes: Sequence[Scene], *, bank: TripBank, num_chunks: int, num_steps: int
) -> dict[str, float]:
    """Share of rollouts in which the oracle reads what the caption of a scene's first segment asks for.

    By attribute in the first three seconds, and `kept`: colour, shape and background all still right at the end.
    The camera holds. bank: any, for the shape of its latents.
    """
    with torch.compiler.set_stance("force_eager"):
        blank = held_clips(donor, [caption(scene, frame=0) for scene in scenes], bank=bank, num_chunks=num_chunks)
        latents = continue_clips(student, donor.text_encoder, blank, first_chunk=0, num_steps=num_steps)
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
