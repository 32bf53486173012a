"""Smaller memories of one student: of fewer layers, of fewer frames, of fewer bits a number.

The whole memory is that of the training's slots: 3 first frames, 12 of the past, 3 last ones, of every layer, in
bfloat16.
Bytes are those of keys before rotation and values, as an exact state on disk holds them; scales of 4 bits are counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor

from vidaccel.errors import UserError
from vidaccel.memory import DepthMap
from vidaccel.models.causal_blocks import History
from vidaccel.training.architecture import Transformer
from vidaccel.training.chunk_batch import EMPTY, FAST_FRAMES, SINK_FRAMES, SLOW_FRAMES, SlotLayout, slots_of
from vidaccel.training.depth_routing import ReadingStudent, reading

Kind = Literal["depth", "frames", "bits"]
MEMORIES = ("depth:1", "depth:2", "depth:4", "frames:2", "frames:4", "bits:4")
_NUMBER_BYTES = 2
_SCALE_BYTES = 4  # of a token's head: least value and step, in bfloat16


@dataclass(frozen=True, kw_only=True)
class SmallMemory:
    """One memory, written as its kind and a number.

    "depth:2": every 2nd layer is kept. "frames:2": every 2nd frame of slow memory is, which reaches as far back.
    "bits:4": keys and values are rounded to 4 bits, with a least value and a step for every token and head.
    Raises UserError for another.
    """

    kind: Kind
    number: int

    @classmethod
    def parse(cls, text: str) -> SmallMemory:
        """The memory that is written so."""
        kind, _, number = text.partition(":")
        if kind not in get_args(Kind) or not (number.isascii() and number.isdigit() and int(number) > 0):
            raise UserError(f"A memory must be such as {', '.join(MEMORIES)}; got {text!r}.")
        if kind == "bits" and int(number) > 8:
            raise UserError(f"Keys and values are rounded to at most 8 bits; got {text!r}.")
        return cls(kind=cast(Kind, kind), number=int(number))

    @property
    def name(self) -> str:
        """As it is written."""
        return f"{self.kind}:{self.number}"

    def words(self, num_layers: int) -> str:
        """What it is, for people."""
        if self.kind == "depth":
            kept = len(self.depth(num_layers).kept)
            return f"{kept} of {num_layers} layers ({kept / num_layers:.0%})"
        if self.kind == "frames":
            return f"{self.slow_frames} of {SLOW_FRAMES} slow frames"
        return f"{self.number} bits a number"

    def depth(self, num_layers: int) -> DepthMap:
        """Which layer's memory a layer reads."""
        return DepthMap.every(self.number if self.kind == "depth" else 1, num_layers)

    @property
    def slow_frames(self) -> int:
        """Frames in slow memory."""
        return len(range(0, SLOW_FRAMES, self.number)) if self.kind == "frames" else SLOW_FRAMES

    def of(self, student: Transformer) -> Transformer:
        """The student with this memory."""
        if self.kind == "bits":
            return ReadingStudent(student, self._rounded)
        return reading(student, self.depth(student.config.num_layers))

    def slots(self, chunk: int) -> SlotLayout:
        """The frames that are remembered when `chunk` is made: the first of every chunk, thinned out from the last."""
        layout = slots_of(chunk, "uniform")
        slow = layout.frames[SINK_FRAMES : SINK_FRAMES + SLOW_FRAMES]
        last = sum(frame != EMPTY for frame in slow) - 1
        step = self.number if self.kind == "frames" else 1
        kept = [frame for place, frame in enumerate(slow[: last + 1]) if (last - place) % step == 0]
        frames = (
            *layout.frames[:SINK_FRAMES],
            *kept,
            *[EMPTY] * (SLOW_FRAMES - len(kept)),
            *layout.frames[-FAST_FRAMES:],
        )
        return SlotLayout(frames, layout.first)

    def num_bytes(self, student: Transformer, *, tokens_per_frame: int) -> int:
        """Bytes of all remembered frames of one video."""
        config: Any = student.config
        heads, size = config.num_attention_heads, config.attention_head_dim
        a_head = size * _NUMBER_BYTES if self.kind != "bits" else size * self.number / 8 + _SCALE_BYTES
        frames = SINK_FRAMES + self.slow_frames + FAST_FRAMES
        layers = len(self.depth(config.num_layers).kept)
        return round(2 * layers * frames * tokens_per_frame * heads * a_head)

    def _rounded(self, history: History) -> History:
        layers = tuple((rounded(keys, self.number), rounded(values, self.number)) for keys, values in history.layers)
        return History(layers, history.mask)


def rounded(side: Tensor, bits: int) -> Tensor:
    """Keys or values (B, S, heads, D) as so many bits hold them: steps above the least value of a token's head."""
    least, most = side.float().amin(-1, keepdim=True), side.float().amax(-1, keepdim=True)
    least, step = (part.to(torch.bfloat16).float() for part in (least, (most - least) / (2**bits - 1)))
    steps = ((side.float() - least) / step.clamp(min=1e-12)).round().clamp(0, 2**bits - 1)
    return (least + step * steps).to(side.dtype)
