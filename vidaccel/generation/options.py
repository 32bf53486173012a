"""Where and in which numbers a model runs, checked as far as that goes without PyTorch and without the machine."""

import re
from typing import Literal, get_args

from vidaccel.errors import UserError

Offload = Literal["none", "model", "sequential", "group"]
DTYPES = ("float32", "bfloat16", "float16")
_DEVICE = re.compile(r"auto|cpu|mps|cuda(:\d+)?")
_INSIDE_BLOCKS = ("sequential", "group")


def check_options(*, device: str = "auto", dtype: str = "auto", offload: str = "none", compile: bool = False) -> None:
    """Raise `UserError` for a name that `load_pipeline` does not take, and for two that exclude each other."""
    if not _DEVICE.fullmatch(device):
        raise UserError(f"`device` must be auto, cpu, cuda, cuda:N or mps; got {device!r}.")
    if dtype not in ("auto", *DTYPES):
        raise UserError(f"`dtype` must be auto, {', '.join(DTYPES)}; got {dtype!r}.")
    if offload not in get_args(Offload):
        raise UserError(f"`offload` must be one of {', '.join(get_args(Offload))}; got {offload!r}.")
    if offload != "none" and device == "cpu":
        raise UserError(f"`offload` {offload!r} needs a GPU to offload from, and the device is the CPU; use none.")
    if compile and offload in _INSIDE_BLOCKS:
        raise UserError(
            f"`offload` {offload!r} puts hooks inside the blocks that `compile` compiles; use none or model."
        )
