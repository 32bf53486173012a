"""What Open-Sora 2.0 needs around its networks: video sizes, prompts, schedule, guidance, conditions. Pure functions.

From the published code of Open-Sora 2.0 (`opensora/utils/sampling.py`, `inference.py`, `datasets/aspect.py`, facts
only). Shapes: latents are (B, C, F, H, W); packed latents are (B, L, 4C), one token for 2x2 latent pixels of a frame,
frame by frame, row by row; the channels of a token are ordered (channel, row, column).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from vidaccel.errors import UserError

PATCH = 2  # latent pixels of a token, each way
NUM_FRAMES, FPS, NUM_STEPS = 129, 24, 50
GUIDANCE_SCALE, IMAGE_GUIDANCE_SCALE, MOTION_SCORE = 7.5, 3.0, 4

_SIZE_MULTIPLE = 16  # pixels of a token, each way
_PIXELS = MappingProxyType({"256px": 256 * 256, "768px": 768 * 768})
# Width to height, as the model was trained; each stands for its upright twin too, and later rows win.
_RATIOS = ("2.39:1", "2:1", "16:9", "1.85:1", "9:16", "5:8", "3:2", "4:3", "1:1")
_FIRST_OSCILLATING_STEP = 10
_FPS_SUFFIX = re.compile(r"\d+ FPS\.$")


def video_sizes(resolution: str) -> dict[str, tuple[int, int]]:
    """Height and width in pixels for every aspect ratio, written width:height ("16:9" lies, "9:16" stands).

    resolution: "256px" or "768px"; the area is at most its square. Raises `UserError` for another one.
    """
    if resolution not in _PIXELS:
        raise UserError(f"`resolution` must be one of {', '.join(_PIXELS)}; got {resolution!r}.")
    pixels = _PIXELS[resolution]
    sizes, turned = {}, {}
    for ratio in _RATIOS:
        across, down = ratio.split(":")
        width = int(math.sqrt(pixels * (float(across) / float(down))) // _SIZE_MULTIPLE) * _SIZE_MULTIPLE
        height = int((pixels / width) // _SIZE_MULTIPLE) * _SIZE_MULTIPLE
        sizes[ratio], turned[f"{down}:{across}"] = (height, width), (width, height)
    return sizes | turned


def video_size(resolution: str, aspect_ratio: str) -> tuple[int, int]:
    """Height and width in pixels, (192, 336) for "256px" and "16:9". Raises `UserError` for an unknown name."""
    sizes = video_sizes(resolution)
    if aspect_ratio not in sizes:
        raise UserError(f"`aspect_ratio` must be one of {', '.join(sizes)} (width:height); got {aspect_ratio!r}.")
    return sizes[aspect_ratio]


def latent_size(size: tuple[int, int, int], strides: tuple[int, int]) -> tuple[int, int, int]:
    """(F, H, W) of the latents of a video of `size` = (frames, height, width) in pixels.

    strides: of the VAE, in time and in space. Raises `UserError` for a size that the model cannot make.
    """
    (num_frames, height, width), (temporal, spatial) = size, strides
    if num_frames < 1 or num_frames % temporal != 1 % temporal:
        raise UserError(f"`num_frames` must be {temporal}k + 1, got {num_frames}.")
    for name, value in (("height", height), ("width", width)):
        if value < 1 or value % (spatial * PATCH):
            raise UserError(f"`{name}` must be a positive multiple of {spatial * PATCH}, got {value}.")
    return (num_frames - 1) // temporal + 1, height // spatial, width // spatial


def finished_prompt(prompt: str, *, fps: int = FPS, motion_score: int | None = MOTION_SCORE) -> str:
    """The prompt as the model was trained on it: a full stop, the frame rate, the amount of motion.

    A prompt that ends with a frame rate keeps its own. motion_score: higher is livelier; None says nothing about it.
    """
    text = prompt.strip()
    text = text if text.endswith(".") else f"{text}."
    text = text if _FPS_SUFFIX.search(text) else f"{text} {fps} FPS."
    return text if motion_score is None else f"{text} {motion_score} motion score."


def schedule_shift(tokens_per_frame: int, num_latent_frames: int) -> float:
    """How far the schedule leans to noise: linear in the tokens of a frame (1 at 256, 3 at 4096), times sqrt(F)."""
    return (1 + (tokens_per_frame - 256) * 2 / (4096 - 256)) * math.sqrt(num_latent_frames)


def unshifted_sigmas(num_inference_steps: int) -> list[float]:
    """Noise levels before the shift, from 1 in equal steps; the scheduler appends the 0."""
    return [1 - step / num_inference_steps for step in range(num_inference_steps)]


def pack(latents: Tensor) -> Tensor:
    """(B, C, F, H, W) to (B, L, 4C)."""
    return rearrange(latents, "b c f (h p) (w q) -> b (f h w) (c p q)", p=PATCH, q=PATCH)


def unpack(tokens: Tensor, size: tuple[int, int, int]) -> Tensor:
    """(B, L, 4C) to (B, C, F, H, W) with `size` = (F, H, W) of the latents."""
    frames, height, width = size
    return rearrange(
        tokens,
        "b (f h w) (c p q) -> b c f (h p) (w q)",
        f=frames,
        h=height // PATCH,
        w=width // PATCH,
        p=PATCH,
        q=PATCH,
    )


def token_positions(size: tuple[int, int, int], *, device: torch.device) -> Tensor:
    """(L, 3): frame, row and column of every token, for latents of `size` = (F, H, W)."""
    frames, height, width = size
    axes = [torch.arange(length, device=device) for length in (frames, height // PATCH, width // PATCH)]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(-1, 3).float()


@dataclass(frozen=True, kw_only=True)
class Condition:
    """Which latent frames are given: as many at the head and the tail of the video as these numbers say.

    holds: images are given; they replace the sampled frames in the end. The frames of a video only guide.
    """

    head: int = 0
    tail: int = 0
    holds: bool = False

    @property
    def is_given(self) -> bool:
        """Whether anything is given at all."""
        return self.head + self.tail > 0

    def reference_frames(self, temporal_factor: int) -> int:
        """Pixel frames that a given part has: the causal VAE makes one latent frame of the first, then of each four."""
        return (max(self.head, self.tail) - 1) * temporal_factor + 1


CONDITIONS = MappingProxyType(
    {
        "t2v": Condition(),
        "i2v_head": Condition(head=1, holds=True),
        "i2v_tail": Condition(tail=1, holds=True),
        "i2v_loop": Condition(head=1, tail=1, holds=True),
        "v2v_head": Condition(head=9),
        "v2v_tail": Condition(tail=9),
        "v2v_head_easy": Condition(head=17),
        "v2v_tail_easy": Condition(tail=17),
    }
)


def find_condition(name: str | None, inputs: Mapping[str, Any], *, num_latent_frames: int) -> Condition:
    """The condition of that name, or the one that what is given asks for; `UserError` where the two do not agree.

    inputs: `image` (first frame), `last_image` and `video`, or None for each. Without a name both images are a loop,
    and a video is gone on with.
    """
    given = {key for key, value in inputs.items() if value is not None}
    if name is None:
        name = next((key for key in CONDITIONS if _takes(key) == given), None)
        if name is None:
            raise UserError(f"No `condition` takes {_listed(given)} together; leave images or video out.")
    if name not in CONDITIONS:
        raise UserError(f"`condition` must be one of {', '.join(CONDITIONS)}; got {name!r}.")
    if _takes(name) != given:
        raise UserError(f"`condition` {name!r} takes {_listed(_takes(name))}; got {_listed(given)}.")
    condition = CONDITIONS[name]
    if condition.head + condition.tail >= num_latent_frames:
        raise UserError(
            f"`condition` {name!r} gives {condition.head + condition.tail} latent frames and the video has "
            f"{num_latent_frames}; raise `num_frames`."
        )
    return condition


def _takes(name: str) -> Set[str]:
    condition = CONDITIONS[name]
    if not condition.holds:
        return {"video"} if condition.is_given else set()
    return {key for key, count in (("image", condition.head), ("last_image", condition.tail)) if count}


def _listed(names: Set[str]) -> str:
    return " and ".join(f"`{name}`" for name in sorted(names)) or "neither image nor video"


def place_references(
    condition: Condition, *, head: Tensor | None, tail: Tensor | None, like: Tensor
) -> tuple[Tensor, Tensor]:
    """Put the given latent frames in their places.

    head, tail: (B, C, >= condition.head or .tail, H, W), normalised latents; the first frames of a head and the last
    of a tail are taken. like: latents of the video, (B, C, F, H, W).

    Returns the mask (B, 1, F, H, W), 1 where a frame is given, and the given latents, 0 elsewhere, shaped like `like`.
    """
    mask, given = torch.zeros_like(like[:, :1]), torch.zeros_like(like)
    if head is not None:
        mask[:, :, : condition.head] = 1
        given[:, :, : condition.head] = head[:, :, : condition.head].to(given)
    if tail is not None:
        mask[:, :, -condition.tail :] = 1
        given[:, :, -condition.tail :] = tail[:, :, -condition.tail :].to(given)
    return mask, given


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """How strongly prompt and condition act in a step.

    scale, image_scale: weight of the prompt, and of the condition.
    oscillates, image_oscillates: from the tenth step on, every other step uses 1 instead.
    grows: image guidance grows along the video, as it does where images are given.
    """

    scale: float = GUIDANCE_SCALE
    image_scale: float = IMAGE_GUIDANCE_SCALE
    oscillates: bool = True
    image_oscillates: bool = True
    grows: bool = False

    def branches(self, *, conditioned: bool) -> tuple[str, ...]:
        """The forwards that a step needs, in their order in the batch.

        "cond" has prompt and condition, "uncond" the negative prompt and the condition, "uncond_2" the negative
        prompt alone. Without a condition the last two are the same forward, which then runs once.
        """
        if self.scale <= 1 and (not conditioned or self.image_scale <= 1):
            return ("cond",)
        return ("cond", "uncond", "uncond_2") if conditioned else ("cond", "uncond")

    def text_scale(self, step_index: int) -> float:
        """Weight of the prompt in a step."""
        return _oscillating(self.scale, step_index) if self.oscillates else self.scale

    def image_scales(self, step_index: int, *, num_inference_steps: int, num_latent_frames: int) -> Tensor:
        """Weight of the condition for every latent frame in a step, (F,), float32.

        Where it grows, from 1 at the first frame to a weight that falls to 1 at the end of the generation.
        """
        scale = _oscillating(self.image_scale, step_index) if self.image_oscillates else self.image_scale
        if not self.grows or scale <= 1:
            return torch.full((num_latent_frames,), scale)
        last = torch.linspace(scale, 1.0, num_inference_steps + 1)[step_index]
        return torch.linspace(1.0, float(last), num_latent_frames)


def _oscillating(scale: float, step_index: int) -> float:
    return scale if step_index < _FIRST_OSCILLATING_STEP or step_index % 2 == 0 else 1.0


def guided(predictions: Tensor, *, branches: int, scale: float, image_scales: Tensor) -> Tensor:
    """The predictions of all branches, (branches * B, L, C), as one, (B, L, C): text over image guidance.

    image_scales: (F,), one weight for the tokens of each latent frame. Two branches have no condition, for which
    image guidance cancels out.
    """
    if branches == 1:
        return predictions
    cond, uncond, *rest = predictions.chunk(branches)
    if not rest:
        return uncond + scale * (cond - uncond)
    tokens = image_scales.to(predictions).repeat_interleave(cond.shape[1] // len(image_scales))
    return rest[0] + tokens[None, :, None] * (uncond - rest[0]) + scale * (cond - uncond)


@dataclass(kw_only=True)
class Denoising:
    """What a generation carries from step to step.

    latents: packed, (B, L, 4C). texts: embeddings by argument name, `prompt_embeds` and so on.
    side: packed condition of all branches, (branches * B, L, 4C + 4). size: (F, H, W) of the latents.
    """

    latents: Tensor
    texts: dict[str, Tensor]
    side: Tensor
    size: tuple[int, int, int]

    @property
    def tokens_per_frame(self) -> int:
        """Tokens of one latent frame."""
        return self.latents.shape[1] // self.size[0]

    def text(self, name: str, branches: int) -> Tensor:
        """The text of that name for all branches: the prompt's in the first, the negative prompt's in the others."""
        return torch.cat([self.texts[name], *[self.texts[f"negative_{name}"] for _ in range(branches - 1)]])


def side_channels(mask: Tensor, references: Tensor, branches: Sequence[str]) -> Tensor:
    """Packed condition of all branches: mask and references (see `place_references`), nothing for "uncond_2"."""
    side = pack(torch.cat([mask, references], dim=1))
    return torch.cat([torch.zeros_like(side) if branch == "uncond_2" else side for branch in branches])
