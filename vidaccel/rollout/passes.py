"""Fast ways to run a pass over a chunk, as `Student.run`: compiled blocks, and CUDA graphs.

A pass is some two thousand launches at fixed places in memory: what a pass reads and writes of a `KeyValueMemory` are
views of buffers that never move. So a pass can be captured once and replayed for every step of every later chunk.
Arranging the memory and remembering a chunk stay outside. State belongs to the object that is made here.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol, get_args
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from vidaccel.errors import UserError
from vidaccel.machine.adapters import adapters_of
from vidaccel.machine.private_names import is_compiled
from vidaccel.memory.keys_values import KeyValueMemory
from vidaccel.models.causal_blocks import PromptCache
from vidaccel.models.causal_wan import CausalWanTransformer3DModel
from vidaccel.models.fused_layers import fuse_layers
from vidaccel.models.taehv import StreamingTinyDecoder
from vidaccel.rollout import PassMode
from vidaccel.rollout.chunk import Pass, Student
from vidaccel.rollout.state import RolloutState


def speed_up(student: Student, state: RolloutState, mode: PassMode, *, fuse: bool = True) -> Student:
    """The student whose passes run as `mode` says, for a rollout whose `state` is new.

    But for "eager", what surrounds the passes is compiled too, in place: rotation of remembered keys, and a small
    decoder. fuse: then also join layers, unless adapters are in them.
    Raises UserError as `make_pass` and `fuse_layers` do.
    """
    if fuse and mode != "eager" and not adapters_of(student.transformer):
        fuse_layers(student.transformer)
    run = make_pass(student.transformer, mode)
    if mode != "eager":
        for memory in state.memories:
            memory.compile()
        if isinstance(state.decoder, StreamingTinyDecoder):
            state.decoder.compile()
    return replace(student, run=run)


def make_pass(transformer: CausalWanTransformer3DModel, mode: PassMode) -> Pass:
    """What `Student.run` takes: "eager" as it is, "compiled", or "captured": compiled, then in CUDA graphs.

    Raises UserError for another mode, and for "captured" without CUDA.
    """
    if mode not in get_args(PassMode):
        raise UserError(f"A pass must be one of {', '.join(get_args(PassMode))}; got {mode!r}.")
    if mode == "captured":
        return captured(transformer, compiled(transformer))
    return compiled(transformer) if mode == "compiled" else eager(transformer)


def eager(transformer: CausalWanTransformer3DModel) -> Pass:
    """The transformer as it is."""

    def run(
        latents: Tensor, timestep: Tensor, prompt: PromptCache, memory: KeyValueMemory, *, alone: bool = False
    ) -> Tensor:
        velocity: Tensor = transformer(latents, timestep, prompt, memory=memory, alone=alone, return_dict=False)[0]
        return velocity

    return run


def compiled(transformer: CausalWanTransformer3DModel, *, backend: Any = "inductor") -> Pass:
    """The transformer with its blocks compiled, in place; `backend` is `torch.compile`'s.

    One block is compiled for all of them, once for the first chunk and once more, for any number of remembered
    frames, when that number changes; and twice more where frames are passed alone too. Compiling takes up to minutes
    and happens within the first passes.
    """
    if not any(is_compiled(block) for block in transformer.blocks):
        transformer.compile_repeated_blocks(fullgraph=True, backend=backend)  # type: ignore[no-untyped-call]
    return eager(transformer)


def captured(transformer: CausalWanTransformer3DModel, run: Pass | None = None) -> "CapturedPass":
    """`run` (by default the transformer as it is) in CUDA graphs. Raises UserError for a model that is not on CUDA."""
    device = transformer.patch_embedding.weight.device
    if device.type != "cuda":
        raise UserError(f"Passes can be captured on CUDA only, and this model is on {device}; use compiled or eager.")
    return CapturedPass(run or eager(transformer), CudaRecorder(device))


class Recording(Protocol):
    """Recorded work."""

    @property
    def output(self) -> Tensor:
        """The work's result, overwritten by every `replay`."""
        ...

    def replay(self) -> None:
        """Do the work again on what its inputs hold now."""
        ...

    def close(self) -> None:
        """Wait until it is done; it is not replayed again."""
        ...


Recorder = Callable[[Callable[[], Tensor]], Recording]


@dataclass
class _Shelf:
    """What one memory's passes have in common, their static inputs, and their recording once it is made."""

    prompt: PromptCache
    attended_frames: int
    latents: Tensor
    timestep: Tensor
    recording: Recording | None = None

    def fits(self, latents: Tensor, timestep: Tensor, prompt: PromptCache, memory: KeyValueMemory) -> bool:
        return (
            self.prompt is prompt
            and self.attended_frames == memory.attended_frames
            and (self.latents.shape, self.latents.dtype) == (latents.shape, latents.dtype)
            and (self.timestep.shape, self.timestep.dtype) == (timestep.shape, timestep.dtype)
        )


class CapturedPass:
    """A pass that is recorded when it comes a second time, and replayed from then on.

    What is recorded is bound to a memory, a prompt's cache, and the numbers of remembered and of new frames; when one
    of them changes the recording is dropped. Passes over frames alone are recorded beside those over chunks. A memory
    that needs a mask (samples that remember differently) is passed unrecorded, and so are frames of the past that are
    written once more. Not for several threads.
    """

    def __init__(self, run: Pass, record: Recorder) -> None:
        self._run, self._record = run, record
        self._shelves: WeakKeyDictionary[KeyValueMemory, dict[bool, _Shelf]] = WeakKeyDictionary()  # by `alone`

    @torch.no_grad()
    def __call__(
        self, latents: Tensor, timestep: Tensor, prompt: PromptCache, memory: KeyValueMemory, *, alone: bool = False
    ) -> Tensor:
        """Velocity (B, C, F, H, W), a new tensor."""
        run = partial(self._run, alone=True) if alone else self._run
        if memory.attention_mask is not None or memory.is_rewritten:
            return run(latents, timestep, prompt, memory)
        shelves = self._shelves.setdefault(memory, {})
        shelf = shelves.get(alone)
        if shelf is None or not shelf.fits(latents, timestep, prompt, memory):
            if shelf is not None and shelf.recording is not None:
                shelf.recording.close()
            shelves[alone] = _Shelf(prompt, memory.attended_frames, latents.clone(), timestep.clone())
            return run(latents, timestep, prompt, memory)
        shelf.latents.copy_(latents)
        shelf.timestep.copy_(timestep)
        if shelf.recording is None:
            inputs = (shelf.latents, shelf.timestep, prompt, memory)
            shelf.recording = self._record(lambda: run(*inputs))
        shelf.recording.replay()
        return shelf.recording.output.clone()


class CudaRecorder:
    """Records work on one device as a CUDA graph, after a rehearsal on the stream that it is captured on."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def __call__(self, work: Callable[[], Tensor]) -> "CudaRecording":
        """The recording; the work has been done once, in the rehearsal."""
        with torch.cuda.device(self._device):
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                work()
            torch.cuda.current_stream().wait_stream(self._stream)
            graph = torch.cuda.CUDAGraph()
            # Other threads, such as one that writes the video, may go on using the device meanwhile.
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                output = work()
        return CudaRecording(graph, output)


class CudaRecording:
    """A captured CUDA graph and the tensor it writes."""

    def __init__(self, graph: Any, output: Tensor) -> None:
        self._graph, self.output = graph, output

    def replay(self) -> None:
        """Run the graph on the current stream."""
        self._graph.replay()

    def close(self) -> None:
        """Wait for the device: a graph must not be freed while it runs."""
        torch.cuda.synchronize(self.output.device)
