"""Several cards at work on one training: who is who, and what all of them must agree on.

Processes are started by `torchrun` or `accelerate launch`, one a card; accelerate's `PartialState` joins them. Every
process ("rank") has clips and random numbers of its own. What decides how often networks are called is taken from rank
0: a rank that made one pass more would wait for the others forever.
"""

import os
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from vidaccel.errors import UserError

Number = TypeVar("Number", int, float)


def join_ranks(device: torch.device) -> torch.device:
    """The device of this process, after it met the others; `device` where there are none."""
    if num_ranks() == 1:
        return device
    from accelerate import PartialState

    joined: torch.device = PartialState(cpu=device.type == "cpu").device
    return joined


def is_shared() -> bool:
    """Whether several ranks are at work."""
    return dist.is_available() and dist.is_initialized()


def num_ranks() -> int:
    """How many processes there are, also before this one met the others."""
    return dist.get_world_size() if is_shared() else int(os.environ.get("WORLD_SIZE", "1"))


def own_rank() -> int:
    """The number of this process, also before it met the others; 0 writes files and speaks."""
    return dist.get_rank() if is_shared() else int(os.environ.get("RANK", "0"))


def check_alone(work: str) -> None:
    """Raise `UserError` where several processes were started: `work` would be done, and written, by each of them."""
    if num_ranks() > 1:
        raise UserError(f"{work} runs on one card, and {num_ranks()} processes were started; start one.")


@contextmanager
def signals_of_ranks() -> Iterator[list[int]]:
    """For the block, numbers of the signals by which a training is stopped and that came to this rank.

    On several ranks they are noted here and nothing is raised: a rank that leaves what all of them do together lets the
    others wait. One that is alone is interrupted at once, as ever.
    """
    noted: list[int] = []
    if not is_shared() or threading.current_thread() is not threading.main_thread():
        yield noted
        return
    handlers = {
        number: signal.signal(number, lambda number, frame: noted.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield noted
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def shared_by_ranks(value: Number, device: torch.device) -> Number:
    """The value of rank 0 on every rank: rollouts are as long on all of them, or gradients would wait for nothing."""
    if not is_shared():
        return value
    tensor = torch.tensor([value], device=device, dtype=torch.float64 if isinstance(value, float) else torch.long)
    dist.broadcast(tensor, src=0)
    return type(value)(tensor.item())


def mean_of_ranks(values: Mapping[str, float], device: torch.device) -> dict[str, float]:
    """Every value averaged over the ranks, all of which know the same names."""
    if not is_shared():
        return dict(values)
    tensor = torch.tensor(list(values.values()), device=device, dtype=torch.float64)
    dist.all_reduce(tensor)
    return dict(zip(values, (tensor / num_ranks()).tolist(), strict=True))


def values_of_ranks(value: Any) -> list[Any]:
    """What every rank has, JSON values, in the order of their numbers."""
    if not is_shared():
        return [value]
    values: list[Any] = [None] * num_ranks()
    dist.all_gather_object(values, value)
    return values


def tensors_of_ranks(tensor: Tensor) -> list[Tensor]:
    """A tensor of every rank, all of one shape, in the order of their numbers."""
    if not is_shared():
        return [tensor]
    tensors = [torch.empty_like(tensor) for _ in range(num_ranks())]
    dist.all_gather(tensors, tensor.contiguous())
    return tensors
