"""Networks that differ by adapters (LoRA, arXiv 2106.09685) only and share the weights under them.

Three students of one architecture are one set of frozen weights and two adapters: the teacher is the weights alone. No
adapter is switched on or off while they learn, which gradient checkpointing would not notice: every network has modules
of its own, and only the tensors are the same.
"""

import copy
import importlib.util
from collections.abc import Mapping

import torch
from torch import Tensor

from vidaccel.errors import UserError
from vidaccel.training.architecture import Transformer

_NAME = "default"
_DOWN, _UP = f".lora_A.{_NAME}.weight", f".lora_B.{_NAME}.weight"
# What Context Forcing adapts in its teacher: all projections of attention and the two layers after it.
_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2")


def check_adapters() -> None:
    """Raise `UserError` where the package that makes adapters is missing."""
    if importlib.util.find_spec("peft") is None:
        raise UserError('Adapters need the package peft; install it with pip install "vidaccel[lora]".')


def adapted(network: Transformer, *, rank: int, seed: int) -> Transformer:
    """A network on the very weights of `network`, which are frozen, with an adapter that changes nothing yet.

    Its scale is 1 (alpha equals the rank). Raises `UserError` without peft.
    """
    check_adapters()
    from peft import LoraConfig

    network.requires_grad_(False)
    shared = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}
    twin: Transformer = copy.deepcopy(network, shared)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        twin.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=list(_TARGETS)), adapter_name=_NAME)
    return twin


def merged(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a plain network that gives what one with an adapter gives; other networks as they are.

    tensors: all of the network, whole, by their names.
    """
    plain = {name.replace(".base_layer.", "."): tensor for name, tensor in tensors.items() if ".lora_" not in name}
    for name, down in tensors.items():
        if name.endswith(_DOWN):
            stem = name.removesuffix(_DOWN)
            weight = plain[f"{stem}.weight"]
            plain[f"{stem}.weight"] = weight + (tensors[stem + _UP].float() @ down.float()).to(weight.dtype)
    return plain
