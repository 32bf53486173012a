"""A bank of long encoded clips in which the camera leaves the subject and comes back, with captions per segment."""

import random
import time
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vidaccel.training.architecture import Vae, WordTokenizer
from vidaccel.training.latents import NUM_WORDINGS, TOKENS_PER_CAPTION, caption_tokens, encoded_scenes, vae_depth
from vidaccel.world import FRAME_SIZE, Scene, caption, random_scene
from vidaccel.world.scene import Split

_SCENES_AT_A_TIME = 4
_PIECE_FRAMES = 97


@dataclass(frozen=True, kw_only=True)
class LongClipBank:
    """Encoded clips of one length, rebuilt from seeds whenever they are needed.

    latents: (N, C, F, h, w) fp16, normalised as in WanPipeline. coverage: by the subject, (N, F, h, w) fp16.
    tokens: captions of the segments, (N, segments, wordings, length). segment_starts: first pixel frame of each.
    """

    latents: Tensor
    coverage: Tensor
    tokens: Tensor
    segment_starts: tuple[int, ...]

    def segment_of(self, frames: Sequence[int]) -> int:
        """The segment that the middle of these latent frames lies in."""
        middle = frames[len(frames) // 2]
        return bisect_right(self.segment_starts, max(4 * middle - 2, 0)) - 1


@torch.no_grad()
def build_long_bank(
    vae: Vae,
    tokenizer: WordTokenizer,
    *,
    seeds: Sequence[int],
    num_frames: int,
    split: Split = "train",
    hold_share: float = 0.0,
    seconds: float | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> LongClipBank:
    """Render and encode the scenes of `seeds`, each of `num_frames` pixel frames.

    vae: with `latents_mean` and `latents_std` in its config. hold_share: as in `long_scene`.
    seconds: stop early, with fewer clips, after this time.
    on_progress: called with finished and all clips.
    """
    began = time.monotonic()
    device = next(vae.parameters()).device
    mean, std = (
        torch.tensor(values, device=device).view(1, -1, 1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    size = FRAME_SIZE // 2 ** vae_depth(vae)
    shape = ((num_frames - 1) // vae.config.scale_factor_temporal + 1, size, size)
    latents = torch.empty(len(seeds), mean.numel(), *shape, dtype=torch.float16, device=device)
    coverage = torch.empty(len(seeds), *shape, dtype=torch.float16, device=device)
    tokens: list[Tensor] = []
    starts = _segment_starts(random_scene(seeds[0], num_frames=num_frames))
    finished = 0
    while finished < len(seeds) and (finished == 0 or seconds is None or time.monotonic() - began < seconds):
        batch = seeds[finished : finished + _SCENES_AT_A_TIME]
        scenes = [long_scene(seed, num_frames=num_frames, split=split, hold_share=hold_share) for seed in batch]
        part = slice(finished, finished + len(batch))
        encoded, coverage[part] = encoded_scenes(vae, scenes, piece_frames=_PIECE_FRAMES)
        latents[part] = (encoded.float() - mean) / std
        texts = [text for scene in scenes for text in segment_captions(scene, starts)]
        tokens.append(caption_tokens(tokenizer, texts))
        finished += len(batch)
        if device.type == "cuda" and seconds is not None:
            torch.cuda.synchronize(device)
        if on_progress is not None:
            on_progress(finished, len(seeds))
    return LongClipBank(
        latents=latents[:finished],
        coverage=coverage[:finished],
        tokens=torch.cat(tokens).view(finished, len(starts), NUM_WORDINGS, TOKENS_PER_CAPTION).to(device),
        segment_starts=starts,
    )


def long_scene(seed: int, *, num_frames: int, split: Split = "train", hold_share: float = 0.0) -> Scene:
    """A long scene of the world, in which the camera leaves the subject and comes back.

    hold_share: share of seeds in whose scenes the camera holds all the time instead: a rollout with one prompt does
        that for minutes, while the camera of the world never holds for more than one segment.
    """
    scene = random_scene(seed, num_frames=num_frames, split=split)
    if random.Random(f"vidaccel hold {seed}").random() >= hold_share:
        return scene
    home = scene.camera_moves[0].x
    moves = tuple(replace(move, kind="hold", x=home, distance=0.0) for move in scene.camera_moves)
    return replace(scene, camera="hold", camera_moves=moves)


def segment_captions(scene: Scene, starts: Sequence[int]) -> list[str]:
    """`NUM_WORDINGS` captions of the segment at each of `starts`: the scene's own wording, then others."""
    draw = random.Random(f"vidaccel wordings {scene.seed}")
    texts = []
    for start in starts:
        texts.append(caption(scene, frame=start))
        texts += [caption(scene, frame=start, paraphrase=draw.randrange(2**31)) for _ in range(NUM_WORDINGS - 1)]
    return texts


def _segment_starts(scene: Scene) -> tuple[int, ...]:
    return tuple(sorted({scene.segment_start(frame) for frame in range(scene.num_frames)}))
