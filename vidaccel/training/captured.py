"""Passes of a small student as CUDA graphs: a step of its training is thousands of launches, which a GPU waits for.

A graph is bound to one pass, to the shapes of what it is given, and to whether gradients are wanted; it is captured
when they come for the first time. Gradients go through it as through the pass.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from vidaccel.errors import UserError
from vidaccel.memory.camera import Camera
from vidaccel.models.causal_blocks import History, PromptCache
from vidaccel.rollout.passes import CudaRecorder
from vidaccel.training.architecture import Transformer

Run = Callable[..., tuple[Tensor, ...]]
Capture = Callable[[nn.Module, Sequence[Tensor]], Run]


def check_capture(device: torch.device, *, checkpointing: bool) -> None:
    """Raise `UserError` where passes cannot be captured."""
    if device.type != "cuda":
        raise UserError(f"CUDA graphs need a GPU, and this training runs on {device.type}; leave out --cuda-graphs.")
    if checkpointing:
        raise UserError("CUDA graphs keep all that gradients need: leave out --cuda-graphs or --checkpointing.")


def cuda_graph(work: nn.Module, inputs: Sequence[Tensor]) -> Run:
    """`work` as a graph that is replayed with the values of new inputs; with gradients if they are on.

    inputs: the graph's own, which are written to.
    """
    if torch.is_grad_enabled():
        return InTurn(_with_gradients(work, inputs))
    recording = CudaRecorder(inputs[0].device)(lambda: work(*inputs))

    def replayed(*values: Tensor) -> tuple[Tensor, ...]:
        for own, value in zip(inputs, values, strict=True):
            own.copy_(value)
        recording.replay()
        return tuple(output.clone() for output in recording.output)

    return replayed


def _with_gradients(work: nn.Module, inputs: Sequence[Tensor]) -> Run:
    """Captured over other parameters in the same places: those of `work` may be in a step that is going on, on another
    stream, and a capture that met their gradients would fail."""
    learning = {name: one for name, one in work.named_parameters() if one.requires_grad}
    own = {name: nn.Parameter(one.detach()) for name, one in learning.items()}

    def run(*values: Tensor) -> Any:
        given, weights = values[: len(inputs)], values[len(inputs) :]
        return torch.func.functional_call(work, dict(zip(own, weights, strict=True)), given)

    with torch.autocast("cuda", enabled=False):
        made: Any = torch.cuda.make_graphed_callables(run, (*inputs, *own.values()), allow_unused_input=True)
    return lambda *values: cast(tuple[Tensor, ...], made(*values, *learning.values()))


class InTurn:
    """A graph with gradients, which must go backward before it goes forward again: it keeps one step's values."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._is_waiting = False

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """What the graph makes of `inputs`. Raises RuntimeError if its last outputs were not gone backward through."""
        if self._is_waiting:
            raise RuntimeError("A captured pass went forward twice in a row; go backward through its first outputs.")
        outputs = self._run(*inputs)
        learning = [output for output in outputs if output.requires_grad]
        if learning:
            self._is_waiting = True
            torch.autograd.graph.register_multi_grad_hook(learning, self._went_backward, mode="any")
        return outputs

    def _went_backward(self, gradient: Any) -> None:
        self._is_waiting = False


class CapturedStudent:
    """A student whose passes over a chunk and over what is remembered are captured; else it is `student`."""

    def __init__(self, student: Transformer, capture: Capture = cuda_graph) -> None:
        self._student, self._capture = student, capture
        self._runs: dict[Any, Run] = {}

    def remember(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: PromptCache,
        *,
        positions: Tensor,
        camera: Camera | None = None,
        mask: Tensor | None = None,
    ) -> History:
        """As the student's."""

        def work(latents: Tensor, prompt: PromptCache, positions: Tensor, camera: Camera | None) -> tuple[Tensor, ...]:
            history = self._student.remember(latents, prompt, positions=positions, camera=camera)
            return tuple(side for layer in history.layers for side in layer)

        sides = self._ran("remember", work, (hidden_states, encoder_hidden_states, positions, camera))
        if mask is not None:
            mask = mask.repeat_interleave(sides[0].shape[1] // hidden_states.shape[2], 1)
        return History(tuple(zip(sides[::2], sides[1::2], strict=True)), mask)

    def __call__(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: PromptCache,
        *,
        return_dict: bool,
        history: History | None = None,
        frame_positions: Tensor | None = None,
        camera: Camera | None = None,
    ) -> tuple[Tensor, ...]:
        """As the student's over a chunk, with `return_dict` False."""

        def work(latents: Tensor, timestep: Tensor, prompt: PromptCache, *others: Any) -> tuple[Tensor, ...]:
            history, positions, camera = others
            velocity: tuple[Tensor, ...] = self._student(
                latents,
                timestep,
                prompt,
                history=history,
                frame_positions=positions,
                camera=camera,
                return_dict=return_dict,
            )
            return velocity

        inputs = (hidden_states, timestep, encoder_hidden_states, history, frame_positions, camera)
        return self._ran("velocity", work, inputs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._student, name)

    def _ran(self, name: str, work: Callable[..., tuple[Tensor, ...]], inputs: tuple[Any, ...]) -> tuple[Tensor, ...]:
        tensors = _tensors_of(inputs)
        key = (name, torch.is_grad_enabled(), _mapped(inputs, _Form.of))
        run = self._runs.get(key)
        if run is None:
            own = [one.detach().clone().requires_grad_(one.requires_grad) for one in tensors]
            run = self._runs[key] = self._capture(_Work(self._student, work, inputs), own)
        return run(*tensors)


class _Form(NamedTuple):
    """What a graph needs to know of a tensor that it is given."""

    shape: torch.Size
    dtype: torch.dtype
    requires_grad: bool

    @classmethod
    def of(cls, tensor: Tensor) -> "_Form":
        return cls(tensor.shape, tensor.dtype, tensor.requires_grad)


class _Work(nn.Module):
    """A pass of `student` as a function of tensors alone, in the precision that was on when it was made."""

    def __init__(self, student: Transformer, work: Callable[..., tuple[Tensor, ...]], inputs: tuple[Any, ...]) -> None:
        super().__init__()
        self.student = student
        self._work, self._inputs = work, _mapped(inputs, _Form.of)
        device = next(student.parameters()).device.type
        self._precision = {
            "device_type": device,
            "dtype": torch.get_autocast_dtype(device),
            "enabled": torch.is_autocast_enabled(device),
        }

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        following = iter(tensors)
        inputs = _mapped(self._inputs, lambda form: next(following))
        with torch.autocast(**self._precision, cache_enabled=False):
            return self._work(*inputs)


def _tensors_of(value: Any) -> list[Tensor]:
    found: list[Tensor] = []
    _mapped(value, found.append)
    return found


def _mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    """`value` with `change` of every tensor, or of every form of one, in place of it."""
    if isinstance(value, Tensor | _Form):
        return change(value)
    if isinstance(value, PromptCache):
        return PromptCache(_mapped(value.layers, change))
    if isinstance(value, History):
        return History(_mapped(value.layers, change), _mapped(value.mask, change))
    if isinstance(value, Camera):
        return Camera(*(_mapped(part, change) for part in value))
    if isinstance(value, tuple):
        return tuple(_mapped(part, change) for part in value)
    return value
