"""What goes into a rollout and what comes out: the student, the shots of a prompt timeline, the finished chunks."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from torch import Tensor

from vidaccel.memory.keys_values import KeyValueMemory
from vidaccel.models.causal_blocks import PromptCache
from vidaccel.models.causal_wan import CausalWanTransformer3DModel
from vidaccel.rollout.skipping import StepSkipping
from vidaccel.rollout.timeline import Cut

Origin = Literal["made", "given", "saved"]


class Pass(Protocol):
    """One pass over a chunk that a memory has room for."""

    def __call__(
        self, latents: Tensor, timestep: Tensor, prompt: PromptCache, memory: KeyValueMemory, /, *, alone: bool = False
    ) -> Tensor:
        """Velocity (B, C, F, H, W) of latents at `timestep` (B,). alone: every frame sees itself only.

        `alone` is asked for in the pass that remembers a chunk, by students whose `clean_pass` is "frame".
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Student:
    """The network and how it is sampled.

    scheduler: a flow-matching scheduler of diffusers whose `step` takes `generator`; with `stochastic_sampling` it
        re-noises the estimate at every step, as few-step students are trained.
    guidance_scale: 1 leaves guidance out, as distilled students do.
    run: how passes are run, by the transformer as it is if None.
    skipping: steps whose pass is left out; None: every step is computed.
    """

    transformer: CausalWanTransformer3DModel
    scheduler: Any
    num_inference_steps: int = 4
    guidance_scale: float = 1.0
    run: Pass | None = None
    skipping: StepSkipping | None = None

    def __post_init__(self) -> None:
        if type(self.num_inference_steps) is not int or self.num_inference_steps < 1:
            raise ValueError(
                f"`num_inference_steps` must be a whole number of at least 1, got {self.num_inference_steps!r}."
            )
        if not isinstance(self.guidance_scale, int | float) or not math.isfinite(self.guidance_scale):
            raise ValueError(f"`guidance_scale` must be a finite number, got {self.guidance_scale!r}.")
        if self.skipping is not None:
            self.skipping.check(self.num_inference_steps)

    @property
    def num_branches(self) -> int:
        """Memories of a rollout: one for the prompt, and with guidance one for the negative prompt."""
        return 2 if self.guidance_scale != 1 else 1

    @property
    def passes_per_chunk(self) -> int:
        """Forward passes of a chunk: the steps and the one that writes the memory, for every branch; none left out."""
        return (self.num_inference_steps + 1) * self.num_branches

    def passes_of(self, chunk: "Chunk") -> list[int]:
        """Forward passes that a made chunk took, for each sample."""
        skipped = chunk.skipped or (0,) * len(chunk.latents)
        return [self.passes_per_chunk - self.num_branches * count for count in skipped]


@dataclass(frozen=True, kw_only=True)
class Shot:
    """A prompt from chunk `start_chunk` on.

    embeddings: one for each branch, (B, text tokens, text_dim).
    cut: how a shot after the first begins. "soft": what is remembered is written anew under the new prompt (LongLive,
        arXiv 2509.22622, KV recache), the picture goes on. "hard": the memory is emptied, a new picture begins.
    """

    start_chunk: int
    prompt: str
    embeddings: tuple[Tensor, ...]
    cut: Cut = "soft"


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """One finished chunk.

    index: 0-based; first_frame: of the whole rollout, in latent frames.
    latents: (B, C, F, H, W) float32; frames: pixels (B, f, 3, H, W) uint8 on the CPU, None without a decoder.
    seconds: wall time of "denoising", "clean_pass" (the pass that writes the memory) and "decoding" (which the commit
        is counted under); on a GPU the time until the work was queued, up to the decoding, which waits for the pixels.
    origin: "made" now; "given": of the image or clip that the video begins with; "saved": in a session before.
    sink, slow, fast: frames remembered after it, of the first sample; similarity: of its keys with the chunk before.
    camera: what `ChunkCamera` gave for it; None: the camera holds at 0.
    skipped: for each sample, how many steps were left out; nothing without `Student.skipping`.
    """

    index: int
    first_frame: int
    latents: Tensor
    frames: Tensor | None
    prompt: str
    seconds: dict[str, float]
    sink: tuple[int, ...]
    slow: tuple[int, ...]
    fast: tuple[int, ...]
    is_keyframe: bool
    similarity: float | None
    camera: tuple[list[float], list[float]] | None = None
    origin: Origin = "made"
    skipped: tuple[int, ...] = ()


def shot_at(shots: Sequence[Shot], chunk: int) -> Shot:
    """The shot that a chunk belongs to."""
    return [shot for shot in shots if shot.start_chunk <= chunk][-1]
