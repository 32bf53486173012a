"""Where a training runs and with which settings of PyTorch."""

from contextlib import AbstractContextManager

import torch

from vidaccel.errors import UserError


def training_device(name: str) -> torch.device:
    """`auto` is the GPU if there is one. Raises `UserError` for a device that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"`device` must be auto, cpu or cuda, got {name!r}.") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("`device` is cuda, but PyTorch sees no GPU here; use cpu or auto.")
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True
    return device


def autocast(device: torch.device) -> AbstractContextManager[object]:
    """bf16 on a GPU, float32 elsewhere."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def seeded_generator(device: torch.device, *numbers: int) -> torch.Generator:
    """A generator whose seed mixes `numbers` (seed, round, step, ...)."""
    seed = 0
    for number in numbers:
        seed = (seed * 1_000_003 + number) % (2**63)
    return torch.Generator(device).manual_seed(seed)
