"""How a pipeline of any family is called: what it takes, which sizes it can make, and how its frames come back.

What a pipeline takes is read from the signature of its call. The few things no signature says are rows of
`vidaccel.catalog.traits.PIPELINES`.
"""

import inspect
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vidaccel.catalog.table import pipeline_traits
from vidaccel.errors import UserError
from vidaccel.generation.request import GenerationRequest
from vidaccel.machine.components import denoisers, patch_sizes, strides
from vidaccel.video.sound import as_waveform

logger = logging.getLogger(__name__)

FRAME_COUNTS = ("num_frames", "frames", "video_length")
_RATES = ("fps", "frame_rate")
# The parameters that an input may go to: the first one that the pipeline has.
_PLACES = {
    "image": ("image", "cond_image", "reference_images"),
    "last_image": ("last_image",),
    "video": ("video", "control_video", "background_video"),
    "mask": ("mask", "mask_video"),
    "pose_video": ("pose_video",),
    "face_video": ("face_video",),
}
_SAMPLE_RATES = {"vocoder": "output_sampling_rate", "sound_tokenizer": "sampling_rate"}  # part and its setting


def plain_call(pipe: Any) -> Callable[..., Any]:
    """The unbound call of a pipeline; of a swap-in with EasyCache built in, that of the pipeline below it.

    EasyCache is then applied by the caller, as on any other pipeline.
    """
    kind = pipe if isinstance(pipe, type) else type(pipe)
    for owner in kind.__mro__:
        call = owner.__dict__.get("__call__")
        if call is not None and "easycache" not in inspect.signature(call).parameters:
            return call
    raise UserError(f"{kind.__name__} cannot be called; use another --model.")


def parameters_of(pipe: Any) -> Mapping[str, inspect.Parameter]:
    """The parameters of the pipeline's call by name, without `self`."""
    parameters = inspect.signature(plain_call(pipe)).parameters
    return {name: parameter for name, parameter in parameters.items() if name != "self"}


def check_inputs(pipe: Any, request: GenerationRequest) -> None:
    """Raise `UserError` where the pipeline makes no video from a prompt, or an input is missing or superfluous."""
    parameters, name = parameters_of(pipe), type(pipe).__name__
    if "prompt" not in parameters or not _makes_video(parameters):
        raise UserError(f"{name} makes no video from a prompt, which is what this command does; use another --model.")
    given = set(request.inputs)
    for key in request.inputs:
        if _place(parameters, key) is None:
            taken = [f"--{_flag(other)}" for other in _PLACES if _place(parameters, other) is not None]
            others = f"it takes {', '.join(taken)}" if taken else "it takes a prompt alone"
            raise UserError(f"{name} takes no {_flag(key)}; leave --{_flag(key)} out ({others}).")
    missing = [key for key in _PLACES if key not in given and _is_needed(name, parameters, key)]
    if missing:
        flags = " and ".join(f"--{_flag(key)}" for key in missing)
        raise UserError(f"{name} starts from more than a prompt: give {flags}.")
    if "last_image" in given and "image" not in given and "image" in parameters:
        raise UserError("--last-image is the end of a video that begins with --image: give that too.")
    if "mask" in given and "video" not in given:
        raise UserError("--mask says which part of a video is made anew: give that --video too.")
    _check_arguments(name, parameters, request)


def check_sizes(pipe: Any, request: GenerationRequest) -> None:
    """Raise `UserError` for sizes the pipeline would round or its transformer has no positions for."""
    temporal, spatial = strides(pipe)
    parameters, transformer = parameters_of(pipe), denoisers(pipe)[0]
    patch = (1, 1, 1) if pipeline_traits(pipe).pads_patches else patch_sizes(transformer)
    follows_clip = _clip_sets_length(parameters, request)
    if temporal is not None and (follows_clip or _has_frame_count(parameters)):
        _check_frames(pipe, request.num_frames, temporal)
    if (follows_clip or _is_controlled(parameters, request)) and len(request.inputs["video"]) < request.num_frames:
        raise UserError(
            f"--video has {len(request.inputs['video'])} frames and {request.num_frames} are asked for; "
            "give a longer one or fewer --num-frames."
        )
    if spatial is None or "height" not in parameters:
        return
    for name, multiple in (("height", spatial * patch[1]), ("width", spatial * patch[2])):
        size = getattr(request, name)
        if size % multiple:
            nearest = max(multiple, round(size / multiple) * multiple)
            raise UserError(f"`{name}` must be a multiple of {multiple} for this model, got {size}; try {nearest}.")
    longest = getattr(transformer.config, "rope_max_seq_len", None)
    patches = {
        "num_frames": ((request.num_frames - 1) // (temporal or 1) + 1) // patch[0],
        "height": request.height // (spatial * patch[1]),
        "width": request.width // (spatial * patch[2]),
    }
    for name, count in patches.items():
        if longest is not None and count > longest:
            raise UserError(
                f"`{name}` {getattr(request, name)} is too large: {count} positions, the model has {longest}."
            )


def call_arguments(pipe: Any, request: GenerationRequest) -> dict[str, Any]:
    """The keyword arguments of the pipeline's call that mean `request`; frames are asked for as a tensor."""
    parameters = parameters_of(pipe)
    rates = {} if request.fps is None else {name: _whole(request.fps) for name in _RATES}
    negative, traits = request.negative_prompt, pipeline_traits(pipe)
    if negative is None and (request.true_cfg_scale is not None or traits.needs_negative_prompt):
        negative = ""  # HunyuanVideo guides against a negative prompt only where one is given
    optional = {
        "negative_prompt": negative,
        "guidance_scale": request.guidance_scale,
        "true_cfg_scale": request.true_cfg_scale,
        "max_sequence_length": request.max_sequence_length,
    }
    wanted: dict[str, Any] = {
        "prompt": request.prompt,
        "num_inference_steps": request.num_inference_steps,
        **dict.fromkeys(FRAME_COUNTS, request.num_frames),
        "height": request.height,
        "width": request.width,
        "use_resolution_binning": False,  # the size asked for, not the nearest of a list
        "generator": torch.Generator().manual_seed(request.seed),  # on the CPU: the same noise on every device
        "output_type": traits.output_type,
        **rates,
        **{name: value for name, value in optional.items() if value is not None},
    }
    arguments = {name: value for name, value in wanted.items() if name in parameters}
    if "pyramid_num_inference_steps_list" in parameters:
        stages = len(parameters["pyramid_num_inference_steps_list"].default)
        arguments["pyramid_num_inference_steps_list"] = _shares(request.num_inference_steps, stages)
    return {**arguments, **_pictures(parameters, request), **request.arguments}


def negative_prompt_problem(pipe: Any, request: GenerationRequest) -> str | None:
    """Why the negative prompt of a request changes nothing, with the flag to use; None where it works or there is none.

    Guidance against a negative prompt is `true_cfg_scale` where the pipeline has it (its `guidance_scale` is then a
    number that a distilled model is told), else that of its `guider`, else `guidance_scale`, and with sound
    `audio_guidance_scale` too; up to 1 there is none.
    """
    if request.negative_prompt is None:
        return None
    parameters, name = parameters_of(pipe), type(pipe).__name__
    if "negative_prompt" not in parameters:
        return f"{name} takes no negative prompt; --negative-prompt has no effect."
    key = "true_cfg_scale" if "true_cfg_scale" in parameters else "guidance_scale"
    scales = [_scale(pipe, request, name) for name in (key, "audio_guidance_scale")]
    known = [scale for scale in scales if scale is not None]
    if not known or max(known) > 1:
        return None
    return f"--negative-prompt has no effect, as {key} is {known[0]:g}; give --{_flag(key)} above 1."


def _scale(pipe: Any, request: GenerationRequest, key: str) -> float | None:
    """The weight of that name that the pipeline will use: given, its guider's or its own; None where it has none."""
    parameters, guider = parameters_of(pipe), getattr(pipe, "guider", None)
    usual = parameters[key].default if key in parameters else getattr(guider, key, None)
    given = request.arguments.get(key, getattr(request, key, None))
    scale = usual if given is None else given
    return scale if isinstance(scale, int | float) else None


def fewest_steps(pipe: Any) -> int:
    """The smallest `num_inference_steps` that the pipeline runs with; `strength` takes its share of the steps."""
    return max(pipeline_traits(pipe).fewest_steps, 2 if "strength" in parameters_of(pipe) else 1)


@contextmanager
def guidance(pipe: Any, request: GenerationRequest) -> Iterator[None]:
    """For the block, tell a pipeline that guides by a component of its own (`guider`) the scale of the request."""
    guider = getattr(pipe, "guider", None)
    if guider is None or request.guidance_scale is None or not hasattr(guider, "guidance_scale"):
        yield
        return
    pipe.guider = guider.new(guidance_scale=request.guidance_scale)
    try:
        yield
    finally:
        pipe.guider = guider


def frames_of(output: Any) -> Tensor:
    """The first video of a pipeline's output, (F, 3, H, W) float32 on the CPU.

    Takes tensors (B, F, 3, H, W) or (B, 3, F, H, W), arrays (B, F, H, W, 3) and lists of pictures, with or without B.
    """
    video = next(getattr(output, name) for name in ("frames", "videos", "video") if hasattr(output, name))
    if isinstance(video[0], list) or getattr(video[0], "ndim", 0) == 4:  # a batch of videos
        video = video[0]
    if isinstance(video, list):
        video = torch.stack([torch.from_numpy(np.array(picture.convert("RGB"))) for picture in video]).float() / 255
    frames = torch.as_tensor(video).detach().float().cpu()
    if frames.shape[-1] == 3 and frames.shape[1] != 3:
        frames = frames.permute(0, 3, 1, 2)
    return frames if frames.shape[1] == 3 else frames.transpose(0, 1)


def sound_of(pipe: Any, output: Any) -> tuple[Tensor, int] | None:
    """The first waveform (channels, samples) of a pipeline that makes sound too, and its samples a second.

    Takes `audio`, (B, channels, samples) or (B, samples) (LTX-2, Kandinsky 6), and `sound`, (channels, samples)
    (Cosmos 3); floats in [-1, 1] or whole numbers, which count by the range of their type. Where the pipeline does not
    say how many samples a second are, there is a warning instead.
    """
    audio, sound = (getattr(output, name, None) for name in ("audio", "sound"))
    waveform = sound if audio is None else audio[0]
    if waveform is None:
        return None
    rate = _sample_rate(pipe)
    if rate is None:
        logger.warning("%s makes sound too, at an unknown rate; the sound is not written.", type(pipe).__name__)
        return None
    waveform = as_waveform(torch.as_tensor(waveform).detach().cpu())
    return (waveform if waveform.ndim == 2 else waveform[None]), rate


def _sample_rate(pipe: Any) -> int | None:
    own = getattr(pipe, "audio_sample_rate", None)
    for part, setting in _SAMPLE_RATES.items():
        own = own or getattr(getattr(getattr(pipe, part, None), "config", None), setting, None)
    return None if own is None else int(own)


def _makes_video(parameters: Mapping[str, Any]) -> bool:
    return any(name in parameters for name in (*FRAME_COUNTS, "video", "control_video", "pose_video"))


def _has_frame_count(parameters: Mapping[str, Any]) -> bool:
    return any(name in parameters for name in FRAME_COUNTS)


def _is_controlled(parameters: Mapping[str, Any], request: GenerationRequest) -> bool:
    """Whether the clip of the request is followed frame by frame (VACE)."""
    return "video" in request.inputs and _place(parameters, "video") == "video" and "mask" in parameters


def _clip_sets_length(parameters: Mapping[str, Any], request: GenerationRequest) -> bool:
    """Whether the clip of the request says how many frames are made, as there is no argument that does."""
    return "video" in request.inputs and _place(parameters, "video") == "video" and not _has_frame_count(parameters)


def _place(parameters: Mapping[str, Any], key: str) -> str | None:
    if key == "last_image" and "mask_strategy" in parameters:
        return "image"  # Open-Sora 1.2 takes a list of both
    return next((place for place in _PLACES[key] if place in parameters), None)


def _is_needed(name: str, parameters: Mapping[str, inspect.Parameter], key: str) -> bool:
    place = _place(parameters, key)
    if place is None:
        return False
    if parameters[place].default is inspect.Parameter.empty:
        return True
    if key == "image":
        return "ImageToVideo" in name or "Image2Video" in name
    return place in ("video", "control_video") and not _has_frame_count(parameters)


def _check_arguments(name: str, parameters: Mapping[str, inspect.Parameter], request: GenerationRequest) -> None:
    places = {_place(parameters, key) for key in _PLACES} | {"prompt"} | set(request.arguments)
    others = [
        key
        for key, value in parameters.items()
        if value.default is value.empty and value.kind is not value.VAR_KEYWORD and key not in places
    ]
    if others:
        raise UserError(f"{name} also needs {', '.join(others)}, which this command cannot give.")
    for key in request.arguments:
        if key not in parameters:
            raise UserError(f"{name} takes no argument `{key}`; it takes {', '.join(parameters)}.")
    if request.true_cfg_scale is not None and "true_cfg_scale" not in parameters:
        raise UserError(f"{name} takes no true_cfg_scale; use --guidance-scale.")


def _check_frames(pipe: Any, count: int, temporal: int) -> None:
    rule = pipeline_traits(pipe).frame_rule
    if rule == "own":
        return
    first = 0 if rule == "groups" else 1
    if count % temporal == first % temporal:
        return
    below = max(0, (count - first) // temporal) * temporal + first
    wanted = f"{temporal}k + 1" if first else f"a multiple of {temporal}"
    nearest = [number for number in (below, below + temporal) if number > 0]
    raise UserError(
        f"`num_frames` must be {wanted} for this model, got {count}; nearest are {' and '.join(map(str, nearest))}."
    )


def _pictures(parameters: Mapping[str, inspect.Parameter], request: GenerationRequest) -> dict[str, Any]:
    """The inputs as PIL images, under the names the pipeline has for them."""
    found: dict[str, Any] = {}
    for key in (key for key in _PLACES if key in request.inputs):
        place, value = _place(parameters, key), request.inputs[key]  # type: ignore[index]
        if place is not None:
            pictures = _as_pictures(value) if value.ndim == 4 else _as_pictures(value[None])[0]
            found[place] = [found[place], pictures] if place in found else pictures
    is_controlled = _is_controlled(parameters, request)
    if is_controlled or _clip_sets_length(parameters, request):
        found["video"] = found["video"][: request.num_frames]
    if is_controlled:
        size = (request.width, request.height)  # the pipeline would take the size of the video instead
        found["video"] = [picture.resize(size) for picture in found["video"]]
    for place in ("mask", "mask_video"):
        if place in found:
            frames = found.get("video") or found.get("background_video") or found[place]
            masks = (found[place] * len(frames) if len(found[place]) == 1 else found[place])[: len(frames)]
            if len(masks) < len(frames):
                raise UserError(f"--mask has {len(masks)} frames and --video {len(frames)}; give as many, or one.")
            found[place] = masks
    if "background_video" in found and "mode" in parameters:
        found["mode"] = "replace"
    return found


def _as_pictures(frames: Tensor) -> list[Any]:
    from PIL import Image

    pixels = (frames.float().clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(picture) for picture in pixels]


def _flag(key: str) -> str:
    return key.replace("_", "-")


def _whole(rate: float) -> float:
    return int(rate) if float(rate).is_integer() else rate


def _shares(total: int, parts: int) -> list[int]:
    """`total` steps in nearly equal shares of at least one."""
    return [max(1, total // parts + (index < total % parts)) for index in range(parts)]
