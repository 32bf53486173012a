"""One video from one request: the pipeline's own loop, with or without EasyCache, timed and counted.

The same function makes the video of the command line, the twin it is compared with, and every figure of a benchmark.
"""

import logging
import string
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vidaccel.easycache.apply import apply_easycache, easycache_report, remove_easycache
from vidaccel.easycache.config import EasyCacheConfig
from vidaccel.easycache.report import EasyCacheReport
from vidaccel.errors import UserError, first_line
from vidaccel.generation.calls import (
    call_arguments,
    check_inputs,
    check_sizes,
    fewest_steps,
    frames_of,
    guidance,
    negative_prompt_problem,
    parameters_of,
    plain_call,
    sound_of,
)
from vidaccel.generation.recorder import Recorder, StepProgress, now
from vidaccel.generation.request import GenerationRequest
from vidaccel.machine.footprint import available_bytes, footprint, gigabytes
from vidaccel.machine.private_names import execution_device

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Generation:
    """A finished video.

    frames: (F, 3, H, W), float32, CPU, in [0, 1]; F, H and W are those the pipeline made.
    sound: waveform (channels, samples) in [-1, 1] and samples a second, of a model that makes sound too; else None.
    report: EasyCache's decisions, None for a plain run.
    num_forwards: transformer forwards that really ran; with classifier-free guidance two a computed step, or one where
        the pipeline puts both branches in a batch.
    denoising_seconds, total_seconds: from the first transformer call to the end of the last step (of the last call,
        where the pipeline reports no steps), and of the whole pipeline call; the device is synchronised before the
        clock is read.
    """

    frames: Tensor
    sound: tuple[Tensor, int] | None = None
    report: EasyCacheReport | None
    num_forwards: int
    denoising_seconds: float
    total_seconds: float


def generate(
    pipe: Any,
    request: GenerationRequest,
    *,
    easycache: EasyCacheConfig | None = None,
    on_step: Callable[[StepProgress], None] | None = None,
) -> Generation:
    """Run `pipe`, a diffusers pipeline of any family that makes videos, once and return the video with its figures.

    easycache: applied for this call and removed after it; None runs the pipeline as it is.
    on_step: called after every denoising step.

    Raises `UserError` for a request the model cannot take and where memory runs out.
    """
    check_request(pipe, request)
    warn_about_words(pipe, (request.prompt, request.negative_prompt or ""), request.max_sequence_length)
    if problem := negative_prompt_problem(pipe, request):
        logger.warning(problem)
    recorder = Recorder(pipe, parameters=parameters_of(pipe), on_step=on_step)
    arguments = call_arguments(pipe, request) | recorder.callback_arguments()
    with _easycache(pipe, easycache, recorder), recorder.watch(), _call_errors(pipe, request):
        started = now(pipe)
        with guidance(pipe, request):
            output = plain_call(pipe)(pipe, **arguments)
        frames = frames_of(output)
        finished = now(pipe)
        report = easycache_report(pipe) if easycache is not None else None
    if not torch.isfinite(frames).all():
        raise UserError("The model returned pixels that are not numbers; try --dtype float32 or another checkpoint.")
    return Generation(
        frames=frames,
        sound=sound_of(pipe, output),
        report=report,
        num_forwards=recorder.num_forwards,
        denoising_seconds=recorder.denoising_seconds(finished),
        total_seconds=finished - started,
    )


def warm_up(pipe: Any, request: GenerationRequest) -> None:
    """Run the fewest steps of the request, without decoding, so that what only the first call costs is not timed."""
    check_request(pipe, request)
    arguments = call_arguments(pipe, replace(request, num_inference_steps=fewest_steps(pipe))) | {
        "output_type": "latent"
    }
    with _call_errors(pipe, request), guidance(pipe, request):
        plain_call(pipe)(pipe, **arguments)


def check_request(pipe: Any, request: GenerationRequest) -> None:
    """Raise `UserError` if `pipe` cannot make the request: inputs missing or unwanted, sizes, memory.

    What only the pipeline itself knows is found when it is called, and is a `UserError` too.
    """
    check_inputs(pipe, request)
    check_sizes(pipe, request)
    device = execution_device(pipe)
    need = footprint(pipe, num_frames=request.num_frames, height=request.height, width=request.width).working
    if need > available_bytes(device):
        raise _too_little_memory(pipe, request)


def unknown_words(pipe: Any, prompt: str) -> tuple[str, ...]:
    """The words of `prompt` that the pipeline's tokenizer only has its unknown token for, in order, each once."""
    tokenizer = getattr(pipe, "tokenizer", None)
    unknown = getattr(tokenizer, "unk_token_id", None)
    if tokenizer is None or unknown is None:
        return ()
    words = dict.fromkeys(word.strip(string.punctuation) or word for word in prompt.split())
    return tuple(word for word in words if unknown in tokenizer(word, add_special_tokens=False).input_ids)


def warn_about_words(pipe: Any, texts: Sequence[str], max_sequence_length: int | None) -> None:
    """Log which words of `texts` have no effect: unknown ones and those too many.

    max_sequence_length: tokens that the pipeline takes; None for its own number.
    """
    words = dict.fromkeys(word for text in texts for word in unknown_words(pipe, text))
    if words:
        logger.warning("The model does not know %s; these words have no effect.", ", ".join(words))
    tokenizer = getattr(pipe, "tokenizer", None)
    parameter = parameters_of(pipe).get("max_sequence_length")
    if tokenizer is None or parameter is None:
        return
    longest = parameter.default if max_sequence_length is None else max_sequence_length
    if not isinstance(longest, int):  # the pipeline finds it out by itself
        return
    if any(len(tokenizer(text).input_ids) > longest for text in texts):
        logger.warning("The prompt is longer than %d tokens; what comes after them has no effect.", longest)


@contextmanager
def _easycache(pipe: Any, config: EasyCacheConfig | None, recorder: Recorder) -> Iterator[None]:
    if config is None:
        yield
        return
    try:
        apply_easycache(pipe, config, on_step=recorder.decide)
    except ValueError as error:
        raise UserError(f"{_one_sentence(error)} Or compute every step: --no-cache.") from error
    try:
        yield
    finally:
        remove_easycache(pipe)


@contextmanager
def _call_errors(pipe: Any, request: GenerationRequest) -> Iterator[None]:
    """Say in one line what the machine lacks, and what the pipeline itself says is wrong with the request."""
    try:
        yield
    except UserError:
        raise
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise _too_little_memory(pipe, request) from error
    except torch._dynamo.exc.TorchDynamoException as error:
        raise UserError(
            f"Compiling failed on this machine ({first_line(error)[:160]}); leave --compile out."
        ) from error
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):  # how PyTorch's CPU allocator says it
            raise
        raise _too_little_memory(pipe, request) from error
    except ImportError as error:
        raise UserError(f"{type(pipe).__name__} needs more than is installed: {_one_sentence(error)}") from error
    except ValueError as error:
        raise UserError(f"{type(pipe).__name__} refuses this request: {_one_sentence(error)}") from error


def _one_sentence(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    text = text if len(text) <= 400 else text[:397] + "..."
    return text if text.endswith((".", "!", "?")) else text + "."


def _too_little_memory(pipe: Any, request: GenerationRequest) -> UserError:
    device = execution_device(pipe)
    need = footprint(pipe, num_frames=request.num_frames, height=request.height, width=request.width).working
    return UserError(
        f"Too little memory on {device}: this video needs about {gigabytes(need)} beside the weights and "
        f"{gigabytes(available_bytes(device))} are free; use fewer frames, a smaller size or --offload."
    )
