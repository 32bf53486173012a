"""A bank of encoded clips in which the camera leaves places and comes back to them, for students that remember.

Four in five clips are trips (`vidaccel.world.trip`), the rest old long scenes. Everything is on the device and rebuilt
from seeds whenever it is needed; nothing has to be stored.
Shapes: N clips of F latent frames, in chunks of `CHUNK_FRAMES`; latents (h, w) with patches of `PATCH_CELLS` columns.
"""

import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, islice
from typing import Any, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from vidaccel.training.architecture import TRANSFORMER_ARCHITECTURE, Vae, WordTokenizer
from vidaccel.training.device import autocast
from vidaccel.training.latents import caption_tokens, pooled_coverage, vae_depth
from vidaccel.training.trip_rows import clip_cameras, row_tables
from vidaccel.training.vae_clip import encode_clip
from vidaccel.world import FRAME_SIZE, Scene, caption, random_scene, render, subject_mask
from vidaccel.world.captions import trip_caption
from vidaccel.world.scene import GROUND_Y, Landmark, Split
from vidaccel.world.sprites import LANDMARK_KINDS, LANDMARK_SIZE, landmark_sprites
from vidaccel.world.trip import Trip, frame_of
from vidaccel.world.trip_render import render_trips, trip_mask
from vidaccel.world.trips import random_trip

CHUNK_FRAMES = 3
CHANGE_CHUNKS = 4
PATCH_CELLS = TRANSFORMER_ARCHITECTURE["patch_size"][-1]
Clip = Trip | Scene
_CLIPS_AT_A_TIME = 16
_CHUNKS_AT_A_TIME = 240
_RUNS_IN_FLIGHT = 8
_RUNS = 5  # of clips rendered together, the last one is of old scenes
_CHANGE_SHARE = 0.9  # of trips: an asked-for change is rare, and the hardest thing to learn


@dataclass(frozen=True, kw_only=True)
class TripBank:
    """Encoded clips with captions a chunk and a numeric camera.

    latents: (N, F, C, h, w) fp16, normalised as in WanPipeline. columns, motions: of the camera, (N, F) float32 in
    patch columns. tokens: of the caption of every chunk, (N, chunks, length).
    coverage, landmarks: shares of the latent cells that the subject and the landmarks cover, (N, F, h, w) fp16.
    returns, arrivals, changes, keyframes: see `RowTables`. clips: what was rendered, in the order of the rows.
    """

    latents: Tensor
    columns: Tensor
    motions: Tensor
    tokens: Tensor
    coverage: Tensor
    landmarks: Tensor
    returns: tuple[tuple[int, int], ...]
    arrivals: tuple[tuple[int, int], ...]
    changes: tuple[tuple[int, int], ...]
    keyframes: tuple[tuple[int, ...], ...]
    clips: tuple[Clip, ...]

    @property
    def num_chunks(self) -> int:
        """Chunks of every clip."""
        return self.tokens.shape[1]

    @property
    def beginnings(self) -> tuple[tuple[int, int], ...]:
        """The first chunk of every clip, which is made from nothing; as the row tables."""
        return tuple((row, 0) for row in range(len(self.clips)))


class DrawnClips(Sequence[Clip]):
    """Clips that are drawn when they are asked for, every time anew; a bank whose time is over asks for no more."""

    def __init__(self, count: int, draw: Callable[[int], Clip]) -> None:
        self._places, self._draw = range(count), draw

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, place: int) -> Clip: ...

    @overload
    def __getitem__(self, place: slice) -> Sequence[Clip]: ...

    def __getitem__(self, place: int | slice) -> Clip | Sequence[Clip]:
        if isinstance(place, slice):
            return [self._draw(one) for one in self._places[place]]
        return self._draw(self._places[place])


def training_clips(
    seeds: Sequence[int], *, num_chunks: int, split: Split = "train", hold_share: float = 0.3
) -> DrawnClips:
    """A clip for every seed: trips, and in every fifth run of clips old long scenes of the same length.

    hold_share: share of the scenes in which the camera holds all the time, as in a rollout with one prompt.
    """
    num_frames = frame_of(num_chunks)

    def draw(place: int) -> Clip:
        if place // _CLIPS_AT_A_TIME % _RUNS == _RUNS - 1:
            return long_scene(seeds[place], num_frames=num_frames, split=split, hold_share=hold_share)
        return random_trip(seeds[place], num_chunks=num_chunks, split=split, change_share=_CHANGE_SHARE)

    return DrawnClips(len(seeds), draw)


def first_chunks(clips: Sequence[Clip]) -> DrawnClips:
    """`clips` cut to their first chunk, of which many more can be encoded in the same time."""

    def draw(place: int) -> Clip:
        clip = clips[place]
        return replace(clip, num_chunks=1) if isinstance(clip, Trip) else replace(clip, num_frames=frame_of(1))

    return DrawnClips(len(clips), draw)


def change_clips(seeds: Sequence[int]) -> DrawnClips:
    """A trip of `CHANGE_CHUNKS` for every seed, in which the prompt changes, mostly while the camera holds."""
    return DrawnClips(len(seeds), lambda place: random_trip(seeds[place], num_chunks=CHANGE_CHUNKS, change_share=1.0))


def long_scene(seed: int, *, num_frames: int, split: Split = "train", hold_share: float = 0.0) -> Scene:
    """A long scene of the old world; in `hold_share` of the seeds its camera holds all the time."""
    scene = random_scene(seed, num_frames=num_frames, split=split)
    if random.Random(f"vidaccel hold {seed}").random() >= hold_share:
        return scene
    home = scene.camera_moves[0].x
    moves = tuple(replace(move, kind="hold", x=home, distance=0.0) for move in scene.camera_moves)
    return replace(scene, camera="hold", camera_moves=moves)


@torch.no_grad()
def build_trip_bank(
    vae: Vae,
    tokenizer: WordTokenizer,
    *,
    trips: Sequence[Clip],
    seconds: float | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> TripBank:
    """Render and encode `trips`, which all have the same number of chunks; runs of one kind are rendered together.

    vae: with `latents_mean` and `latents_std` in its config. seconds: stop early, with fewer clips, after this time.
    on_progress: called with finished and all clips. Raises ValueError without clips.
    """
    if not trips:
        raise ValueError("A bank needs at least one clip.")
    began = time.monotonic()
    device = next(vae.parameters()).device
    parts: list[dict[str, Tensor]] = []
    finished: list[Clip] = []
    for clips in _runs(trips):
        parts.append(_encoded_clips(vae, tokenizer, clips))
        finished += clips
        if device.type == "cuda" and seconds is not None and len(parts) % _RUNS_IN_FLIGHT == 0:
            torch.cuda.synchronize(device)
        if on_progress is not None:
            on_progress(len(finished), len(trips))
        if seconds is not None and time.monotonic() - began > seconds:
            break
    return trip_bank({name: torch.cat([part[name] for part in parts]) for name in parts[0]}, finished)


def trip_bank(tensors: dict[str, Tensor], clips: Sequence[Clip]) -> TripBank:
    """The bank of tensors by their names in `TripBank`, with the rows that follow from the cameras of `clips`."""
    tables = row_tables(clips, chunk_frames=CHUNK_FRAMES)
    return TripBank(
        **tensors,
        returns=tables.returns,
        arrivals=tables.arrivals,
        changes=tables.changes,
        keyframes=tables.keyframes,
        clips=tuple(clips),
    )


def clip_caption(clip: Clip, chunk: int) -> str:
    """What a clip shows in one of its chunks, in the wording of its seed."""
    if isinstance(clip, Trip):
        return trip_caption(clip, chunk)
    return caption(clip, frame=(frame_of(chunk) + frame_of(chunk + 1)) // 2)


def pixels_per_column(vae: Vae) -> int:
    """Pixels that one patch column of the transformer covers of a picture's width."""
    return PATCH_CELLS * 2 ** vae_depth(vae)


def _runs(clips: Sequence[Clip]) -> Iterator[list[Clip]]:
    """Neighbours of one kind, not more than are rendered together."""
    together = max(1, _CHUNKS_AT_A_TIME * CHUNK_FRAMES // len(clip_cameras(clips[0])[0]))
    for _, group in groupby(clips, key=lambda clip: isinstance(clip, Trip)):
        while run := list(islice(group, together)):
            yield run


def _encoded_clips(vae: Vae, tokenizer: WordTokenizer, clips: Sequence[Clip]) -> dict[str, Tensor]:
    """The tensors of a bank of `clips`, which are of one kind."""
    device: Any = next(vae.parameters()).device
    draw: tuple[Any, Any] = (render_trips, trip_mask) if isinstance(clips[0], Trip) else (render, subject_mask)
    # First what the host does alone: a GPU is still at work on the clips before.
    cameras = torch.tensor([clip_cameras(clip) for clip in clips], dtype=torch.float32)
    num_chunks = cameras.shape[2] // CHUNK_FRAMES
    tokens = caption_tokens(tokenizer, [clip_caption(clip, chunk) for clip in clips for chunk in range(num_chunks)])
    columns, motions = (cameras / pixels_per_column(vae)).to(device).unbind(1)
    coverage = pooled_coverage(
        draw[1](clips, device=device), scale=2 ** vae_depth(vae), stride=vae.config.scale_factor_temporal
    )
    return {
        "columns": columns,
        "motions": motions,
        "tokens": tokens.view(len(clips), num_chunks, -1).to(device),
        "coverage": coverage.half(),
        "landmarks": landmark_coverage(clips, cameras[:, 0].to(device), cells=coverage.shape[-2:]).half(),
        "latents": _encoded(vae, draw[0](clips, device=device)),
    }


def _encoded(vae: Vae, video: Tensor) -> Tensor:
    """Normalised latents (B, F, C, h, w) fp16 of pictures (B, frames, 3, H, W) in [0, 1]."""
    mean, std = (
        torch.tensor(values, device=video.device).view(1, -1, 1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    at_a_time = 1 if video.device.type == "cpu" else len(video)  # a CPU gains nothing by more, and 16 take 16 GB
    with autocast(video.device):
        moments = [encode_clip(vae, part.transpose(1, 2) * 2 - 1) for part in video.split(at_a_time)]
    latents = torch.cat(moments).chunk(2, dim=1)[0]
    return ((latents.float() - mean) / std).transpose(1, 2).half()


def landmark_coverage(clips: Sequence[Clip], cameras: Tensor, *, cells: Sequence[int]) -> Tensor:
    """How much of each latent cell is covered by landmarks; (N, F, *cells).

    cameras: left edge of the screen in every latent frame, (N, F) in pixels on the device of the result.
    """
    size = FRAME_SIZE // cells[-1]
    sprites = F.avg_pool2d(F.pad(landmark_sprites()[:, 3], (size,) * 4), size, stride=1).to(cameras.device)
    middles, kinds = _landmarks(clips, cameras.shape[1])
    (height, width), (most_y, most_x) = LANDMARK_SIZE, (side - 1 for side in sprites.shape[-2:])
    left, top = middles.to(cameras.device) - width / 2 - cameras[..., None], GROUND_Y + 2 - height
    x = torch.arange(cells[1], device=cameras.device) * size - left[..., None] + size
    y = torch.arange(cells[0], device=cameras.device) * size - top + size
    grid = torch.stack(torch.broadcast_tensors(x[..., None, :] / most_x, y[:, None] / most_y), dim=-1) * 2 - 1
    shown = F.grid_sample(sprites[kinds.flatten()][:, None], grid.flatten(0, 2), align_corners=True)
    return shown.view(*middles.shape, *cells).amax(2)


def _landmarks(clips: Sequence[Clip], num_frames: int) -> tuple[Tensor, Tensor]:
    """Canvas positions and numbers of the kinds of the landmarks in every latent frame; both (N, F, landmarks)."""
    frames = [[_landmarks_in(clip, frame // CHUNK_FRAMES) for frame in range(num_frames)] for clip in clips]
    middles = [[[landmark.x for landmark in landmarks] for landmarks in row] for row in frames]
    kinds = [[[LANDMARK_KINDS.index(landmark.kind) for landmark in landmarks] for landmarks in row] for row in frames]
    return torch.tensor(middles, dtype=torch.float32), torch.tensor(kinds)


def _landmarks_in(clip: Clip, chunk: int) -> Sequence[Landmark]:
    return clip.span_at(chunk).landmarks if isinstance(clip, Trip) else clip.landmarks
