"""What to generate: one request, checked as far as that goes without a model and without loading PyTorch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field, fields
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, get_args

from vidaccel.catalog.spec import GenerationDefaults
from vidaccel.errors import UserError, check_seed
from vidaccel.video.rate import check_rate

if TYPE_CHECKING:
    from torch import Tensor

Input = Literal["image", "last_image", "video", "mask", "pose_video", "face_video"]
INPUTS: tuple[Input, ...] = get_args(Input)
_MOST_STEPS = 100_000  # schedulers keep tables of all steps: far above any use, and far below a full memory


@dataclass(frozen=True)
class GenerationRequest:
    """What to generate. Sizes are pixels; what the model itself cannot take is found by `check_request`.

    negative_prompt: None leaves it to the pipeline, some of which have one of their own.
    guidance_scale: weight of the prompt, or the strength a guidance-distilled model is told; None leaves it to the
        pipeline.
    true_cfg_scale: for models with distilled guidance (HunyuanVideo), the weight of the prompt against the negative
        one; needs `negative_prompt`. None leaves it to the pipeline.
    fps: frames a second, told to the models that ask for it (LTX, Cosmos, Open-Sora); None leaves it to the pipeline.
    max_sequence_length: tokens the prompt is padded to; None leaves it to the pipeline.
    inputs: pictures the model starts from or follows, by name: `image` and `last_image` of shape (3, H, W), `video`,
        `mask`, `pose_video` and `face_video` of shape (F, 3, H, W), all in [0, 1]; not part of equality.
    arguments: further arguments of the pipeline's call by name, such as `latent_window_size`.
    """

    prompt: str
    _: KW_ONLY
    negative_prompt: str | None = None
    num_inference_steps: int = 50
    guidance_scale: float | None = 5.0
    true_cfg_scale: float | None = None
    seed: int = 0
    num_frames: int = 49
    height: int = 128
    width: int = 128
    fps: float | None = None
    max_sequence_length: int | None = None
    inputs: Mapping[Input, Tensor] = field(default_factory=lambda: MappingProxyType({}), compare=False)
    arguments: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))

    def __post_init__(self) -> None:
        if not self.prompt.strip():
            raise UserError("`prompt` is empty; say in a few words what the video shows.")
        for name in ("prompt", "negative_prompt"):
            if not _is_unicode(getattr(self, name) or ""):
                raise UserError(f"`{name}` holds bytes that are no UTF-8 text: {getattr(self, name)[:80]!a}.")
        for name in ("num_inference_steps", "num_frames", "height", "width"):
            if getattr(self, name) < 1:
                raise UserError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        if self.num_inference_steps > _MOST_STEPS:
            raise UserError(f"`num_inference_steps` must be at most {_MOST_STEPS}, got {self.num_inference_steps}.")
        for name in ("guidance_scale", "true_cfg_scale"):
            scale = getattr(self, name)
            if scale is not None and not (math.isfinite(scale) and scale >= 0):
                raise UserError(f"`{name}` must be a number of at least 0, got {scale}.")
        check_seed(self.seed)
        if self.fps is not None:
            check_rate(self.fps)
        if self.max_sequence_length is not None and self.max_sequence_length < 1:
            raise UserError(f"`max_sequence_length` must be at least 1, got {self.max_sequence_length}.")
        for name, value in self.inputs.items():
            _check_input(name, value)


def request_for(defaults: GenerationDefaults, prompt: str, **settings: Any) -> GenerationRequest:
    """A request in which every setting that is missing or None is the model's own.

    Raises `UserError` for a setting out of range.
    """
    own = {item.name: getattr(defaults, item.name) for item in fields(defaults)}
    given = {name: value for name, value in settings.items() if value is not None}
    if "arguments" in given:
        given["arguments"] = {**defaults.arguments, **given["arguments"]}
    return GenerationRequest(prompt, **{**own, **given})


def _check_input(name: str, value: Tensor) -> None:
    if name not in INPUTS:
        raise UserError(f"`inputs` are {', '.join(INPUTS)}; got {name!r}.")
    shape = tuple(value.shape)
    wanted = "(3, H, W)" if name.endswith("image") else "(F, 3, H, W)"
    if len(shape) != wanted.count(",") + 1 or shape[-3] != 3 or 0 in shape:
        raise UserError(f"`{name}` must have the shape {wanted}, got {shape}.")


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # Python keeps undecodable bytes of a command line as lone surrogates
        return False
    return True
