"""Small host tensors on their way to a GPU, for which the host does not wait."""

import torch
from torch import Tensor


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`; to a GPU through page-locked memory, because from other memory the host waits for the copy.

    The copy is in order with what the GPU does next, so the result can be used at once.
    """
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
