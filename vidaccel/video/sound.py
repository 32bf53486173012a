"""Sound beside a video: waveforms to wave files, as long as the pictures."""

from __future__ import annotations

import logging
import math
import wave
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from vidaccel.errors import UserError

_WHOLE = (torch.uint8, torch.int8, torch.int16, torch.int32)
_HEARD_SECONDS = 0.1
logger = logging.getLogger(__name__)


def as_waveform(sound: Tensor) -> Tensor:
    """Sound of any shape as float32 in [-1, 1]: whole numbers by the range of their type, uint8 around 128.

    Raises UserError for numbers of another type.
    """
    if sound.is_floating_point():
        return torch.nan_to_num(sound.float()).clamp(-1, 1)
    if sound.dtype not in _WHOLE:
        raise UserError(f"Sound must be floating in [-1, 1], or uint8, int8, int16 or int32; got {sound.dtype}.")
    levels = 2.0 ** (8 * sound.element_size() - 1)
    return ((sound.double() - (levels if sound.dtype == torch.uint8 else 0)) / levels).float()


@contextmanager
def wave_file(beside: Path, waveform: Tensor, rate: int, *, seconds: float) -> Iterator[Path]:
    """A wave file of 16 bits beside `beside`, for the time of the block, at most `seconds` long.

    waveform: (channels, samples) of one or two channels, numbers as `as_waveform` takes them. rate: samples a second.

    Raises UserError for another shape, for sound without samples and a rate below 1.
    """
    if not isinstance(waveform, Tensor):
        raise UserError(f"Sound must be a tensor (channels, samples), got {type(waveform).__name__}.")
    if waveform.ndim != 2 or waveform.shape[0] not in (1, 2) or not waveform.shape[1] or not 1 <= rate < math.inf:
        raise UserError(
            f"Sound must be (channels, samples) of 1 or 2 channels, not empty, got {tuple(waveform.shape)} at {rate}."
        )
    samples = (as_waveform(_of_length(waveform, rate, seconds)) * 32767).round().to(torch.int16).T.contiguous()
    path = beside.with_suffix(".wav")
    try:
        with wave.open(str(path), "wb") as file:
            file.setnchannels(waveform.shape[0])
            file.setsampwidth(2)
            file.setframerate(rate)
            file.writeframes(samples.cpu().numpy().astype("<i2").tobytes())
        yield path
    finally:
        path.unlink(missing_ok=True)


def _of_length(waveform: Tensor, rate: int, seconds: float) -> Tensor:
    """The waveform, cut to the length of the pictures; a difference that can be heard is said."""
    own = waveform.shape[1] / rate
    if abs(own - seconds) > _HEARD_SECONDS:
        fate = "it is cut there" if own > seconds else "the rest is silent"
        logger.warning("The sound is %.2f s long and the pictures are %.2f s; %s.", own, seconds, fate)
    return waveform[:, : max(1, round(seconds * rate))]
