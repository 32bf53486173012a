"""One video from one request: the pipeline's own loop, with or without EasyCache, timed and counted.

The same function makes the video of the command line, the twin it is compared with, and every figure of a benchmark.
"""

import inspect
import logging
import math
import string
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from vidaccel.components import denoisers, execution_device
from vidaccel.easycache import EasyCacheConfig
from vidaccel.errors import UserError
from vidaccel.footprint import available_bytes, footprint, gigabytes
from vidaccel.hooks import apply_easycache, easycache_report, remove_easycache
from vidaccel.registry import GenerationDefaults
from vidaccel.report import EasyCacheReport, StepDecision

logger = logging.getLogger(__name__)

_MOST_STEPS = 100_000  # schedulers keep tables of all steps: far above any use, and far below a full memory


@dataclass(frozen=True)
class GenerationRequest:
    """What to generate. Sizes are pixels; what the model itself cannot take is found by `check_request`.

    image: first frame for an image-to-video model, (3, H, W) in [0, 1]; not part of equality.
    max_sequence_length: tokens the prompt is padded to; None leaves it to the pipeline.
    """

    prompt: str
    _: KW_ONLY
    negative_prompt: str = ""
    num_inference_steps: int = 50
    guidance_scale: float = 5.0
    seed: int = 0
    num_frames: int = 49
    height: int = 128
    width: int = 128
    image: Tensor | None = field(default=None, compare=False)
    max_sequence_length: int | None = None

    def __post_init__(self) -> None:
        if not self.prompt.strip():
            raise UserError("`prompt` is empty; say in a few words what the video shows.")
        for name in ("prompt", "negative_prompt"):
            if not _is_unicode(getattr(self, name)):
                raise UserError(f"`{name}` holds bytes that are no UTF-8 text: {getattr(self, name)[:80]!a}.")
        for name in ("num_inference_steps", "num_frames", "height", "width"):
            if getattr(self, name) < 1:
                raise UserError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        if self.num_inference_steps > _MOST_STEPS:
            raise UserError(f"`num_inference_steps` must be at most {_MOST_STEPS}, got {self.num_inference_steps}.")
        if not (math.isfinite(self.guidance_scale) and self.guidance_scale >= 0):
            raise UserError(f"`guidance_scale` must be a number of at least 0, got {self.guidance_scale}.")
        if not 0 <= self.seed < 2**63:
            raise UserError(f"`seed` must be from 0 to 2**63 - 1, got {self.seed}.")
        if self.max_sequence_length is not None and self.max_sequence_length < 1:
            raise UserError(f"`max_sequence_length` must be at least 1, got {self.max_sequence_length}.")


def request_for(defaults: GenerationDefaults, prompt: str, **settings: Any) -> GenerationRequest:
    """A request in which every setting that is missing or None is the model's own.

    Raises `UserError` for a setting out of range.
    """
    own = {item.name: getattr(defaults, item.name) for item in fields(defaults) if item.name != "fps"}
    given = {name: value for name, value in settings.items() if value is not None}
    return GenerationRequest(prompt, **{**own, **given})


@dataclass(frozen=True, kw_only=True)
class StepProgress:
    """One finished denoising step: `seconds` since the first transformer call, by the host's clock."""

    step_index: int
    num_steps: int
    computed: bool
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Generation:
    """A finished video.

    frames: (F, 3, H, W), float32, CPU, in [0, 1].
    report: EasyCache's decisions, None for a plain run.
    num_forwards: transformer forwards that really ran (with classifier-free guidance two a computed step).
    denoising_seconds, total_seconds: from the first transformer call to the end of the last step, and of the whole
        pipeline call; the device is synchronised before the clock is read.
    """

    frames: Tensor
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
    """Run `pipe` once and return the video with its figures.

    easycache: applied for this call and removed after it; None runs the pipeline as it is.
    on_step: called after every denoising step.

    Raises `UserError` for a request the model cannot take and where memory runs out.
    """
    check_request(pipe, request)
    _warn_about_words(pipe, request)
    recorder = _Recorder(pipe, on_step)
    with _easycache(pipe, easycache, recorder), recorder.watch(), _machine_errors(pipe, request):
        started = _now(pipe)
        output = pipe(**_call_arguments(pipe, request), **recorder.callback_arguments())
        frames = output.frames[0].float().cpu()
        finished = _now(pipe)
        report = easycache_report(pipe) if easycache is not None else None
    if not torch.isfinite(frames).all():
        raise UserError("The model returned pixels that are not numbers; try --dtype float32 or another checkpoint.")
    return Generation(
        frames=frames,
        report=report,
        num_forwards=recorder.num_forwards,
        denoising_seconds=recorder.denoising_seconds(finished),
        total_seconds=finished - started,
    )


def warm_up(pipe: Any, request: GenerationRequest) -> None:
    """Run one step of the request without decoding, so that what only the first call costs is not timed."""
    check_request(pipe, request)
    with _machine_errors(pipe, request):
        pipe(**(_call_arguments(pipe, request) | {"num_inference_steps": 1, "output_type": "latent"}))


def check_request(pipe: Any, request: GenerationRequest) -> None:
    """Raise `UserError` if `pipe` cannot make the request: sizes, missing or unwanted image, memory."""
    _check_inputs(pipe, request)
    spatial, temporal = pipe.vae_scale_factor_spatial, pipe.vae_scale_factor_temporal
    transformer = denoisers(pipe)[0]
    patch = getattr(transformer.config, "patch_size", (1, 1, 1))
    if request.num_frames % temporal != 1 % temporal:
        below = max(0, (request.num_frames - 1) // temporal) * temporal + 1
        raise UserError(
            f"`num_frames` must be {temporal}k + 1 for this model, got {request.num_frames}; "
            f"nearest are {below} and {below + temporal}."
        )
    for name, size, multiple in (
        ("height", request.height, spatial * patch[1]),
        ("width", request.width, spatial * patch[2]),
    ):
        if size % multiple:
            nearest = max(multiple, round(size / multiple) * multiple)
            raise UserError(f"`{name}` must be a multiple of {multiple} for this model, got {size}; try {nearest}.")
    longest = getattr(transformer.config, "rope_max_seq_len", None)
    patches = {
        "num_frames": ((request.num_frames - 1) // temporal + 1) // patch[0],
        "height": request.height // (spatial * patch[1]),
        "width": request.width // (spatial * patch[2]),
    }
    for name, count in patches.items():
        if longest is not None and count > longest:
            raise UserError(
                f"`{name}` {getattr(request, name)} is too large: {count} positions, the model has {longest}."
            )
    _check_memory(pipe, request)


def unknown_words(pipe: Any, prompt: str) -> tuple[str, ...]:
    """The words of `prompt` that the pipeline's tokenizer only has its unknown token for, in order, each once."""
    tokenizer = getattr(pipe, "tokenizer", None)
    unknown = getattr(tokenizer, "unk_token_id", None)
    if tokenizer is None or unknown is None:
        return ()
    words = dict.fromkeys(word.strip(string.punctuation) or word for word in prompt.split())
    return tuple(word for word in words if unknown in tokenizer(word, add_special_tokens=False).input_ids)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # Python keeps undecodable bytes of a command line as lone surrogates
        return False
    return True


def _warn_about_words(pipe: Any, request: GenerationRequest) -> None:
    texts = (request.prompt, request.negative_prompt)
    words = dict.fromkeys(word for text in texts for word in unknown_words(pipe, text))
    if words:
        logger.warning("The model does not know %s; these words have no effect.", ", ".join(words))
    tokenizer = getattr(pipe, "tokenizer", None)
    parameter = inspect.signature(pipe.__call__).parameters.get("max_sequence_length")
    if tokenizer is None or parameter is None:
        return
    longest = parameter.default if request.max_sequence_length is None else request.max_sequence_length
    if any(len(tokenizer(text).input_ids) > longest for text in texts):
        logger.warning("The prompt is longer than %d tokens; what comes after them has no effect.", longest)


class _Recorder:
    """Counts the transformer forwards that run, reads the clock, and passes finished steps on; one per call."""

    def __init__(self, pipe: Any, on_step: Callable[[StepProgress], None] | None) -> None:
        self.pipe = pipe
        self.on_step = on_step
        self.num_forwards = 0
        self.computed = True
        self.first: float | None = None
        self.last: float | None = None

    def denoising_seconds(self, finished: float) -> float:
        """Seconds of the loop; `finished` stands in for the end where the pipeline reports no steps."""
        last = finished if self.last is None else self.last
        return 0.0 if self.first is None else last - self.first

    def decide(self, decision: StepDecision) -> None:
        """Take a decision of EasyCache, made before the step runs."""
        self.computed = decision.computed

    def callback_arguments(self) -> dict[str, Any]:
        """Keyword arguments that make the pipeline report its steps, if it can."""
        if "callback_on_step_end" not in inspect.signature(self.pipe.__call__).parameters:
            return {}
        return {"callback_on_step_end": self._end_step, "callback_on_step_end_tensor_inputs": []}

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Watch the transformers: their first call starts the clock, their first layer counts what really runs."""
        handles = []
        for model in denoisers(self.pipe):
            handles.append(model.register_forward_pre_hook(self._start))
            handles.append(_first_layer(model).register_forward_pre_hook(self._count))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _start(self, *_: Any) -> None:
        if self.first is None:
            self.first = _now(self.pipe)

    def _count(self, *_: Any) -> None:
        self.num_forwards += 1

    def _end_step(self, pipe: Any, step_index: int, *_: Any) -> dict[str, Any]:
        num_steps = pipe.num_timesteps
        now = _now(pipe) if step_index == num_steps - 1 else time.perf_counter()
        self.last = now
        if self.on_step is not None:
            start = now if self.first is None else self.first
            self.on_step(
                StepProgress(step_index=step_index, num_steps=num_steps, computed=self.computed, seconds=now - start)
            )
        return {}


@contextmanager
def _easycache(pipe: Any, config: EasyCacheConfig | None, recorder: _Recorder) -> Iterator[None]:
    if config is None:
        yield
        return
    try:
        apply_easycache(pipe, config, on_step=recorder.decide)
    except ValueError as error:
        raise UserError(str(error)) from error
    try:
        yield
    finally:
        remove_easycache(pipe)


@contextmanager
def _machine_errors(pipe: Any, request: GenerationRequest) -> Iterator[None]:
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise _too_little_memory(pipe, request) from error
    except torch._dynamo.exc.TorchDynamoException as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"Compiling failed on this machine ({reason[:160]}); leave --compile out.") from error
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):  # how PyTorch's CPU allocator says it
            raise
        raise _too_little_memory(pipe, request) from error


def _too_little_memory(pipe: Any, request: GenerationRequest) -> UserError:
    device = execution_device(pipe)
    need = footprint(pipe, num_frames=request.num_frames, height=request.height, width=request.width).working
    return UserError(
        f"Too little memory on {device}: this video needs about {gigabytes(need)} beside the weights and "
        f"{gigabytes(available_bytes(device))} are free; use fewer frames, a smaller size or --offload."
    )


def _check_memory(pipe: Any, request: GenerationRequest) -> None:
    device = execution_device(pipe)
    need = footprint(pipe, num_frames=request.num_frames, height=request.height, width=request.width).working
    if need > available_bytes(device):
        raise _too_little_memory(pipe, request)


def _check_inputs(pipe: Any, request: GenerationRequest) -> None:
    parameters = inspect.signature(pipe.__call__).parameters
    name = type(pipe).__name__
    if "prompt" not in parameters or "num_frames" not in parameters:
        raise UserError(f"{name} is no text-to-video or image-to-video pipeline, which is what this command runs.")
    image = parameters.get("image")
    if image is None and request.image is not None:
        raise UserError(f"{name} takes no image; leave --image out or use an image-to-video model.")
    if image is not None and image.default is inspect.Parameter.empty and request.image is None:
        raise UserError(f"{name} starts from an image; give one with --image.")
    others = [key for key, value in parameters.items() if value.default is inspect.Parameter.empty and key != "image"]
    others = [key for key in others if parameters[key].kind is not inspect.Parameter.VAR_KEYWORD and key != "prompt"]
    if others:
        raise UserError(f"{name} also needs {', '.join(others)}, which this command cannot give.")


def _call_arguments(pipe: Any, request: GenerationRequest) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt,
        "num_inference_steps": request.num_inference_steps,
        "guidance_scale": request.guidance_scale,
        "num_frames": request.num_frames,
        "height": request.height,
        "width": request.width,
        "generator": torch.Generator().manual_seed(request.seed),  # on the CPU: the same noise on every device
        "output_type": "pt",
    }
    if request.max_sequence_length is not None:
        arguments["max_sequence_length"] = request.max_sequence_length
    if request.image is not None:
        arguments["image"] = request.image[None]
    return arguments


def _first_layer(model: torch.nn.Module) -> torch.nn.Module:
    """The first child with weights: the patch embedding, which runs once in every forward and is never compiled."""
    return next(child for child in model.children() if any(True for _ in child.parameters()))


def _now(pipe: Any) -> float:
    device = execution_device(pipe)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
