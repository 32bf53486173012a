"""Networks whose weights are shared out among several cards: PyTorch's FSDP2 (`fully_shard`), block by block.

Each card holds a part of every weight, of its gradient and of what optimizers keep; a block is put together when it is
called. accelerate's `prepare` takes one network an optimizer, and three networks learn from each other here, so that
`fully_shard` is called as it is.
"""

import warnings

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from vidaccel.training.architecture import Transformer
from vidaccel.training.ranks import is_shared, num_ranks

_CALLED = ("cache_prompt", "remember")  # besides `forward`


def shard(network: Transformer) -> None:
    """Share the weights of a causal student out among the ranks, in place; nothing happens to one that is alone.

    All ranks must hold equal weights. Projections of prompts are units of their own: `cache_prompt` needs them of all
    blocks and nothing else of these.
    """
    if not is_shared():
        return
    # Latents are a view of the last tokens; nobody writes into them, which is what this warns of.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(next(network.parameters()).device.type, (num_ranks(),))
    for block in network.blocks:
        attention = block.attn2
        fully_shard([attention.to_k, attention.to_v, attention.norm_k], mesh=mesh)
        fully_shard(block, mesh=mesh)
    fully_shard(network, mesh=mesh)
    for name in _CALLED:
        register_fsdp_forward_method(network, name)


def whole(tensor: Tensor) -> Tensor:
    """A tensor put together from all cards, to be called on all of them; others as they are."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gathered(tensor: Tensor) -> Tensor:
    """As `whole`, but in the host's memory where it was shared out: a card need not hold all that is saved."""
    return tensor.full_tensor().cpu() if isinstance(tensor, DTensor) else tensor


def placed(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole `tensor` that is equal on all cards, shared out as `like` is; without any traffic."""
    if not isinstance(like, DTensor) or isinstance(tensor, DTensor):
        return tensor
    tensor = tensor.to(like.device)
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


@torch.no_grad()
def load_tensors(network: Transformer, tensors: dict[str, Tensor]) -> None:
    """Copy whole `tensors` over those of their names in a network. Raises KeyError for a name that it does not have."""
    own = network.state_dict()
    for name, tensor in tensors.items():
        own[name].copy_(placed(tensor, own[name]))
