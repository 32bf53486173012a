"""Prompts of a rollout, encoded by its pipeline: one for all videos, one for each, a timeline, or embeddings."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vidaccel.catalog.pipelines import WAN_TEXT_TOKENS
from vidaccel.errors import UserError
from vidaccel.machine.private_names import execution_device
from vidaccel.rollout.chunk import Shot
from vidaccel.rollout.grid import ChunkGrid
from vidaccel.rollout.start import check_number
from vidaccel.rollout.timeline import ENDLESS, PromptChange, PromptTimeline

_BETWEEN = " | "  # prompts of several videos, in the name of their shot
_EMBEDDINGS = re.compile(r"embeddings [0-9a-f]{16}")


@dataclass(frozen=True, kw_only=True)
class PromptEncoder:
    """How a pipeline encodes the prompts of `num_videos` videos.

    pipe: with `encode_prompt` of `WanPipeline`. guided: encode negative prompts too.
    max_sequence_length: in tokens, what prompts are padded to. Raises UserError unless it is a whole number from 1 on.
    """

    pipe: Any
    negative_prompt: str | Sequence[str] | None = None
    guided: bool = False
    num_videos: int = 1
    max_sequence_length: int = WAN_TEXT_TOKENS

    def __post_init__(self) -> None:
        check_number("max_sequence_length", self.max_sequence_length)

    def shots(
        self,
        prompt: str | Sequence[str] | PromptTimeline | None,
        grid: ChunkGrid,
        num_chunks: int | None = None,
        *,
        embeddings: Tensor | None = None,
        negative: Tensor | None = None,
    ) -> list[Shot]:
        """The shots of a rollout of `num_chunks` chunks, or without an end.

        prompt: one for all videos, one for each, or a timeline; or `embeddings` in its place, with guidance `negative`
            ones too, each (videos, text tokens, text_dim).
        Raises UserError for both or neither, and for another number of prompts than of videos.
        """
        if (prompt is None) == (embeddings is None):
            raise UserError("Give `prompt` or `prompt_embeds`, one of them.")
        if embeddings is not None:
            return [self._given_shot(embeddings, negative)]
        if isinstance(prompt, PromptTimeline):
            end = ENDLESS if num_chunks is None else num_chunks
            return [self._shot_of(change) for change in prompt.changes(grid, num_chunks=end)]
        assert prompt is not None
        return [self._shot(prompt)]

    def _shot(self, prompt: str | Sequence[str]) -> Shot:
        """One prompt for all videos, or one for each, from chunk 0 on. Raises UserError for another number of them."""
        texts = _for_each(prompt, self.num_videos, "prompt")
        name = prompt if isinstance(prompt, str) else _BETWEEN.join(texts)
        return Shot(start_chunk=0, prompt=name, embeddings=self._embeddings(texts))

    def _shot_of(self, change: PromptChange) -> Shot:
        """The shot of a span of a timeline, the same for all videos."""
        span = change.span
        texts = [span.prompt] * self.num_videos
        return Shot(start_chunk=change.chunk, prompt=span.prompt, cut=span.cut, embeddings=self._embeddings(texts))

    def _given_shot(self, embeddings: Tensor, negative: Tensor | None) -> Shot:
        """The shot of embeddings that were made elsewhere, named after what they hold. Raises UserError for others."""
        parts = [part for part in (embeddings, negative if self.guided else None) if part is not None]
        width = self.pipe.transformer.config.text_dim
        if len(parts) != 1 + self.guided or any(part.ndim != 3 or part.shape[2] != width for part in parts):
            raise UserError(
                f"`prompt_embeds`, and with guidance `negative_prompt_embeds`, must be (videos, text tokens, {width}); "
                f"got {[tuple(part.shape) for part in parts]}."
            )
        digest = hashlib.sha256(embeddings.detach().float().cpu().numpy().tobytes()).hexdigest()
        return Shot(start_chunk=0, prompt=f"embeddings {digest[:16]}", embeddings=tuple(parts))

    def past_embeddings(self, prompt: str, planned: Sequence[Shot]) -> tuple[Tensor, ...]:
        """The embeddings of a shot that a session names. Raises UserError where its name does not tell them."""
        found = next((shot.embeddings for shot in planned if shot.prompt == prompt), None)
        if found is not None:
            return found
        if _EMBEDDINGS.fullmatch(prompt) or (self.num_videos > 1 and _BETWEEN in prompt):
            raise UserError(
                f"The session has chunks that were made with {prompt!r}, which it does not hold; go on with the same "
                "`prompt_embeds` or list of prompts, or begin another session."
            )
        return self._shot(prompt).embeddings

    def _embeddings(self, texts: list[str]) -> tuple[Tensor, ...]:
        with torch.no_grad():
            found = self.pipe.encode_prompt(
                prompt=texts,
                negative_prompt=_for_each(self.negative_prompt or "", self.num_videos, "negative_prompt"),
                do_classifier_free_guidance=self.guided,
                max_sequence_length=self.max_sequence_length,
                device=execution_device(self.pipe),
            )
        return tuple(part.to(self.pipe.transformer.dtype) for part in found if part is not None)


def _for_each(prompt: str | Sequence[str], count: int, name: str) -> list[str]:
    """A text for every video."""
    texts = [prompt] * count if isinstance(prompt, str) else list(prompt) if isinstance(prompt, Sequence) else []
    if len(texts) != count or not all(isinstance(text, str) for text in texts):
        raise UserError(f"`{name}` must be a text, or one for each of the {count} videos (seeds); got {prompt!r}.")
    return texts
