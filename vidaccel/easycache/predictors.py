"""The two replaceable parts of step reuse: what a reused step returns, and how large a change is.

EasyCache (arXiv 2507.02860) adds the last transformation vector (equation 3) and measures mean absolute changes
(equations 2 and 4). Any function with the same signature may stand in for either. Pure torch: no model, no diffusers.

Precision: differences are formed in float32 (float64 for float64 tensors) from tensors stored in the model's own type,
so that a reused output is rounded once. In float32 it equals `latents + (output - input)` bit for bit.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vidaccel.errors import UserError

if TYPE_CHECKING:  # the command line reads the names of the tables before it loads PyTorch
    from torch import Tensor

MAX_EXTRAPOLATION = 4.0  # of a line: the gap that is bridged, in lengths of the one it was drawn over


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One full evaluation of a model: what went in and what came out, both of the same shape."""

    step_index: int
    latents: Tensor
    output: Tensor

    def tensors(self) -> tuple[Tensor, Tensor]:
        """What it holds: input and output."""
        return self.latents, self.output


Predictor = Callable[["Tensor", Evaluation], "Tensor"] | Callable[["Tensor", Evaluation, Evaluation | None], "Tensor"]
"""`(latents, last evaluation) -> output`, a new tensor with shape and type of the evaluation's output.

A function with a third parameter is also given the evaluation before the last one, None while there is none; only then
is that one kept. A parameter with another default than None is a setting of the function and left alone.

Called once for each stream and sample, or for all samples at once with decisions="batch". With batched guidance the
rows of all its branches are in `latents`.
"""

Statistic = Callable[["Tensor"], "Tensor"]
"""`difference or output, at least float32 -> (G,)`: one magnitude for each part that is watched on its own.

A step is reused where every part allows it: `lambda values: values.abs().flatten(1).mean(1)` lets the fastest changing
sample of a whole batch decide.
"""


def difference(left: Tensor, right: Tensor) -> Tensor:
    """`left - right` in at least float32."""
    return widened(left) - right  # the kernel widens the other one


def widened(tensor: Tensor) -> Tensor:
    """The tensor in at least float32."""
    return tensor if tensor.is_floating_point() and tensor.dtype.itemsize >= 4 else tensor.float()


def add_transformation(latents: Tensor, last: Evaluation) -> Tensor:
    """Equation 3: the latents plus the transformation vector of the last full evaluation."""
    return (latents + difference(last.output, last.latents)).to(last.output.dtype)


def hold_output(latents: Tensor, last: Evaluation) -> Tensor:
    """The output of the last full evaluation once more, whatever the latents."""
    return last.output.clone()


def extrapolate_output(latents: Tensor, last: Evaluation, previous: Evaluation | None) -> Tensor:
    """The line through the last two outputs, read where the latents have got to along their last displacement.

    With x_j, x_i the inputs and v_j, v_i the outputs of the last two evaluations and d = x_i - x_j, the output is
    v_i + w (v_i - v_j) with w = <x - x_i, d> / <d, d>, at most `MAX_EXTRAPOLATION`. On a straight path w is the share
    of the noise level gone through; no timestep is needed. Holds the last output where there is no earlier one.
    """
    if previous is None or previous.output.shape != last.output.shape:
        return hold_output(latents, last)
    displacement = difference(last.latents, previous.latents)
    progress = (difference(latents, last.latents) * displacement).sum() / displacement.square().sum()
    reach = progress.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).clamp(0.0, MAX_EXTRAPOLATION)
    return (widened(last.output) + reach * difference(last.output, previous.output)).to(last.output.dtype)


def mean_change(values: Tensor) -> Tensor:
    """Mean absolute value over all it is given (one sample, or the batch with decisions="batch"), shape (1,)."""
    return values.abs().mean().reshape(1)


# A row here is all that a new predictor needs: settings, command line and documentation of flags look names up here.
# `PREDICTOR_NAMES` in bench/caching/methods.py may give it words for tables.
PREDICTORS: dict[str, Predictor] = {
    "transformation": add_transformation,
    "output": hold_output,
    "extrapolation": extrapolate_output,
}
STATISTICS: dict[str, Statistic] = {"mean": mean_change}


def find_predictor(choice: str | Predictor) -> Predictor:
    """The predictor of that name, or the function itself."""
    return PREDICTORS[choice] if isinstance(choice, str) else choice


def takes_earlier_evaluation(predictor: Predictor) -> bool:
    """Whether a predictor takes the evaluation before the last one too.

    Raises `UserError` for a function that takes neither two nor three arguments.
    """
    try:
        signature = inspect.signature(predictor)
    except ValueError:  # a builtin that does not tell
        return False
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    places = [parameter for parameter in signature.parameters.values() if parameter.kind in kinds]
    wants = len(places) > 2 and places[2].default in (inspect.Parameter.empty, None)
    try:
        signature.bind(*range(3 if wants else 2))
    except TypeError as error:
        raise UserError(
            f"`predictor` must take (latents, last evaluation), or the evaluation before that too; got {predictor!r} "
            f"with {signature}."
        ) from error
    return wants


def find_statistic(choice: str | Statistic) -> Statistic:
    """The statistic of that name, or the function itself."""
    return STATISTICS[choice] if isinstance(choice, str) else choice
