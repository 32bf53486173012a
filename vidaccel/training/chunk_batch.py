"""What a student is given when it makes a chunk, drawn for every sample on its own, and its velocity.

A rollout remembers the first frames of the video (sink), frames of its past (slow) and the last ones (fast). A batch
has a slot for each of them, and slots may be empty: masked frames do not exist for attention, and the positions of the
others are counted without them, as in the rollout. Layouts are drawn so that no memory is new to the student.
Shapes: B samples, S remembered frames (`SLOTS`, or 0 for first chunks), chunks of T = `CHUNK_FRAMES`.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, Self

import torch
from torch import Tensor

from vidaccel.memory.camera import Camera
from vidaccel.models.causal_blocks import History, PromptCache
from vidaccel.training.architecture import TextEncoder, Transformer
from vidaccel.training.device import autocast
from vidaccel.training.flow import prompt_embeddings, timesteps_of
from vidaccel.training.trip_bank import CHUNK_FRAMES, TripBank

SINK_FRAMES, SLOW_FRAMES, FAST_FRAMES = 3, 12, 3
SLOTS = SINK_FRAMES + SLOW_FRAMES + FAST_FRAMES
EMPTY = -1
SlowMode = Literal["uniform", "every second", "keyframes", "random", "window", "none"]
MODE_SHARES: dict[SlowMode, float] = {
    "uniform": 0.25,
    "every second": 0.15,
    "keyframes": 0.15,
    "random": 0.25,
    "window": 0.1,
    "none": 0.1,
}
_SINK_SHARE = 0.85
_FIRST_KEYFRAME = FAST_FRAMES + CHUNK_FRAMES  # chunks that start before are never keyframes in a rollout


class SlotLayout(NamedTuple):
    """Frames in the slots [sink | slow | fast], `EMPTY` for none, and the first frame of the chunk being made.

    Layouts of one batch have the same number of slots.
    """

    frames: tuple[int, ...]
    first: int


FROM_NOTHING = SlotLayout((), 0)
"""Of a first chunk, which remembers nothing: empty slots would cost as much as filled ones."""


def slots_of(
    chunk: int,
    mode: SlowMode,
    *,
    keyframes: Sequence[int] = (),
    draw: random.Random | None = None,
    sink: bool = True,
    after_image: bool = False,
) -> SlotLayout:
    """The slots when `chunk` is made and slow memory holds, at most, its latest frames of a kind.

    mode: first frames of every chunk ("uniform": a keyframe interval of one chunk), of every second one, or of the
    chunks `keyframes`; a random choice, for which `draw` is needed; the latest of all ("window"); or none.
    after_image: the video began with a single given frame, so that chunk 0 is shorter.
    """
    first = first_frame(chunk, after_image=after_image)
    past = range(SINK_FRAMES, first - FAST_FRAMES)
    starts = {first_frame(number, after_image=after_image): number for number in range(chunk)}
    slow = sorted(_slow(past, mode, starts=starts, keyframes=keyframes, draw=draw))[-SLOW_FRAMES:]
    kept = list(range(min(first, SINK_FRAMES))) if sink else []
    fast = list(range(max(first - FAST_FRAMES, SINK_FRAMES), first))
    parts = ((kept, SINK_FRAMES), (slow, SLOW_FRAMES), (fast, FAST_FRAMES))
    return SlotLayout(tuple(frame for part, size in parts for frame in [*part, *[EMPTY] * (size - len(part))]), first)


def draw_slots(
    draw: random.Random, chunk: int, *, keyframes: Sequence[int] = (), after_image: bool = False
) -> SlotLayout:
    """Slots as any memory may have them when `chunk` is made; the sink is missing in some, except from short videos."""
    mode = draw.choices(list(MODE_SHARES), list(MODE_SHARES.values()))[0]
    has_sink = chunk < 2 or draw.random() < _SINK_SHARE
    return slots_of(chunk, mode, keyframes=keyframes, draw=draw, sink=has_sink, after_image=after_image)


def first_frame(chunk: int, *, after_image: bool = False) -> int:
    """First latent frame of a chunk; a given image is a chunk of one frame."""
    return max(chunk * CHUNK_FRAMES - (CHUNK_FRAMES - 1 if after_image else 0), 0)


def _slow(
    past: range,
    mode: SlowMode,
    *,
    starts: dict[int, int],
    keyframes: Sequence[int],
    draw: random.Random | None,
) -> Sequence[int]:
    if mode == "window":
        return past
    if mode == "random":
        assert draw is not None, "a random choice needs `draw`"
        return draw.sample(past, min(len(past), draw.randint(0, SLOW_FRAMES)))
    chosen = {"uniform": range(len(starts)), "every second": range(0, len(starts), 2), "keyframes": keyframes}
    numbers = chosen.get(mode, ())
    return [
        frame for frame, number in starts.items() if number in numbers and frame in past and frame >= _FIRST_KEYFRAME
    ]


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """What B chunks are made beside.

    context: (B, C, S, h, w) float32, zeros in empty slots. context_mask: (B, S) bool, which slots hold a frame.
    context_positions: (B, S) long, counted without the empty ones. context_camera, chunk_camera: (B, S) and (B, T).
    chunk_positions: (B, T).
    embeddings: (B, length, text_dim), once a text encoder made them of the tokens.
    """

    context: Tensor
    context_mask: Tensor
    context_camera: Camera
    context_positions: Tensor
    chunk_camera: Camera
    chunk_positions: Tensor
    embeddings: Tensor | None = None

    def packed(self) -> Self:
        """The same of one sample, without its empty slots: they cost as much as others. Waits for the device.

        One empty slot is kept where nothing is remembered, so that every network has work for the same layers.
        """
        filled = self.context_mask[0].nonzero().flatten()
        return self._with_slots(filled if len(filled) else filled.new_zeros(1))

    def _with_slots(self, kept: Tensor) -> Self:
        return replace(
            self,
            context=self.context[:, :, kept],
            context_mask=self.context_mask[:, kept],
            context_positions=self.context_positions[:, kept],
            context_camera=Camera(*(values[:, kept] for values in self.context_camera)),
        )


@dataclass(frozen=True, kw_only=True)
class ChunkBatch(Surroundings):
    """B chunks of clips, and what is remembered while each is made.

    chunk: the finished chunk, (B, C, T, h, w).
    tokens: of the caption of the chunk, (B, length). coverage, landmarks: of its cells, (B, 1, T, h, w).
    frames: (B, S) long, the frames in the slots. first: (B,) long, first frame of the chunk.
    """

    chunk: Tensor
    tokens: Tensor
    coverage: Tensor
    landmarks: Tensor
    frames: Tensor
    first: Tensor

    def weight(self, *, subject: float, landmarks: float) -> Tensor:
        """Weights of the cells of the chunk with mean 1: a cell that the subject covers weighs 1 + `subject`."""
        weight = 1 + subject * self.coverage + landmarks * self.landmarks
        return weight / weight.mean()

    def _with_slots(self, kept: Tensor) -> Self:
        return replace(super()._with_slots(kept), frames=self.frames[:, kept])

    def without(self, hidden: Tensor) -> "ChunkBatch":
        """The batch as if the frames in the slots of `hidden` (B, S) had never been remembered."""
        mask = self.context_mask & ~hidden
        context, chunk = positions_of(mask, CHUNK_FRAMES)
        return replace(
            self,
            context=self.context * mask[:, None, :, None, None],
            context_mask=mask,
            context_positions=context,
            chunk_positions=chunk,
        )

    def with_chunk(self, chunk: Tensor, first: Tensor) -> "ChunkBatch":
        """The batch with an own `chunk` (B, C, T, h, w) remembered in place of what is known of its frames.

        first: (B,) long, its first frame; where that is negative, and for frames not remembered, nothing changes.
        """
        place = self.frames - first[:, None]
        is_in = (place >= 0) & (place < CHUNK_FRAMES) & (first >= 0)[:, None] & self.context_mask
        index = place.clamp(0, CHUNK_FRAMES - 1)[:, None, :, None, None].expand_as(self.context)
        replaced = chunk.gather(2, index)
        return replace(self, context=replaced.where(is_in[:, None, :, None, None], self.context))

    def disturbed(self, most: float, generator: torch.Generator) -> "ChunkBatch":
        """The batch with noise on the remembered frames, each with its own amount, up to `most`."""
        device = generator.device
        levels = most * torch.rand(self.context_mask.shape, device=device, generator=generator) * self.context_mask
        levels = levels[:, None, :, None, None]
        noise = torch.randn(self.context.shape, device=device, generator=generator)
        return replace(self, context=(1 - levels) * self.context + levels * noise)

    def with_prompt(self, text_encoder: TextEncoder, tokens: Tensor, *, length: int) -> "ChunkBatch":
        """The batch with embeddings of `tokens`, padded to `length`; without gradients."""
        with torch.no_grad():
            return replace(self, embeddings=prompt_embeddings(text_encoder, tokens, length=length))


def gather_batch(
    bank: TripBank,
    rows: Sequence[int] | Tensor,
    chunks: Sequence[int] | Tensor,
    slots: Sequence[SlotLayout],
    *,
    latents: Tensor | None = None,
) -> ChunkBatch:
    """The `chunks` of the clips `rows`, with what `slots` say is remembered. Waits for nothing.

    latents: (B, F, C, h, w), the videos of the samples so far, in place of what the bank has of their clips.
    """
    device = bank.latents.device
    layout = torch.tensor([(*slot.frames, slot.first) for slot in slots])
    row, chunk, layout = (_sent(values, device) for values in (rows, chunks, layout))
    frames, first = layout[:, :-1], layout[:, -1]
    mask, known = frames != EMPTY, frames.clamp(min=0)
    current = first[:, None] + torch.arange(CHUNK_FRAMES, device=device)
    source, sample = (bank.latents, row) if latents is None else (latents, torch.arange(len(row), device=device))
    context = source[sample[:, None], known].float() * mask[:, :, None, None, None]
    context_positions, chunk_positions = positions_of(mask, CHUNK_FRAMES)
    return ChunkBatch(
        context=context.transpose(1, 2),
        context_mask=mask,
        context_camera=_camera(bank, row, known),
        context_positions=context_positions,
        chunk=source[sample[:, None], current].float().transpose(1, 2),
        chunk_camera=_camera(bank, row, current),
        chunk_positions=chunk_positions,
        tokens=bank.tokens[row, chunk],
        coverage=bank.coverage[row[:, None], current].float()[:, None],
        landmarks=bank.landmarks[row[:, None], current].float()[:, None],
        frames=frames,
        first=first,
    )


def positions_of(mask: Tensor, chunk_frames: int) -> tuple[Tensor, Tensor]:
    """Positions of the slots of `mask` (B, S), counted from 0 without the empty ones, and of the chunk behind them.

    As in a rollout; (B, S) and (B, chunk_frames), long.
    """
    counted = mask.long().cumsum(1)
    return (counted - 1).clamp(min=0), mask.sum(1, keepdim=True) + torch.arange(chunk_frames, device=mask.device)


def _camera(bank: TripBank, rows: Tensor, frames: Tensor) -> Camera:
    return Camera(bank.columns[rows[:, None], frames], bank.motions[rows[:, None], frames])


def _sent(values: Sequence[int] | Tensor, device: torch.device) -> Tensor:
    """`values` on the device; from the host through pinned memory, without waiting."""
    tensor = torch.as_tensor(values)
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


class ChunkContext(NamedTuple):
    """What all passes over a chunk have in common: prompt and remembered frames of one student, camera, positions.

    history: None where there are no slots.
    """

    prompt: PromptCache
    history: History | None
    camera: Camera
    positions: Tensor


def context_of(student: Transformer, batch: Surroundings, *, copies: int = 1) -> ChunkContext:
    """What `student` sees of the prompt and of the remembered frames, for `copies` of each chunk in a row.

    A sample alone is seen without its empty slots and without a mask: large networks are trained so, and attention
    without a mask has the faster kernels.
    """
    if batch.embeddings is None:
        raise ValueError("The batch has no embeddings; make them with `with_prompt`.")
    with autocast(batch.context.device):
        prompt = student.cache_prompt(batch.embeddings)
        history = _history(student, batch, prompt) if batch.context_mask.shape[1] else None
    context = ChunkContext(prompt, history, batch.chunk_camera, batch.chunk_positions)
    return context if copies == 1 else _repeated(context, copies)


def _history(student: Transformer, batch: Surroundings, prompt: PromptCache) -> History:
    mask: Tensor | None = batch.context_mask
    if len(batch.context) == 1:
        batch = batch.packed()
        mask = None if bool(batch.context_mask.all()) else batch.context_mask
    return student.remember(
        batch.context, prompt, positions=batch.context_positions, camera=batch.context_camera, mask=mask
    )


def velocity_in(student: Transformer, context: ChunkContext, noisy: Tensor, sigmas: Tensor) -> Tensor:
    """Velocity of `noisy` chunks (B, C, T, h, w) at the noise levels `sigmas` (B,), in float32."""
    with autocast(noisy.device):
        velocity = student(
            noisy,
            timesteps_of(sigmas),
            context.prompt,
            history=context.history,
            frame_positions=context.positions,
            camera=context.camera,
            return_dict=False,
        )[0]
    return velocity.float()


def velocity_of(student: Transformer, batch: ChunkBatch, noisy: Tensor, sigmas: Tensor, *, copies: int = 1) -> Tensor:
    """Velocity of `copies` noisy chunks of each sample, side by side: (B * copies, C, T, h, w), sigmas (B * copies,).

    With gradients also through what is remembered. The batch must have embeddings (`with_prompt`).
    """
    return velocity_in(student, context_of(student, batch, copies=copies), noisy, sigmas)


def _repeated(context: ChunkContext, copies: int) -> ChunkContext:
    return ChunkContext(
        context.prompt.repeated(copies),
        None if context.history is None else context.history.repeated(copies),
        context.camera.repeated(copies),
        context.positions.repeat_interleave(copies, 0),
    )
