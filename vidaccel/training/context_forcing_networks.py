"""The three networks of a distillation, all one architecture: generator, teacher and critic, and how they learn."""

import copy

import torch
from torch import Tensor, nn

from vidaccel.training.architecture import Transformer
from vidaccel.training.averaging import WeightAverage
from vidaccel.training.checkpoint import with_prefix, without_prefix
from vidaccel.training.context_forcing_config import UpdateRule
from vidaccel.training.muon import BatchedMuon, split_parameters

_BETAS = (0.0, 0.999)
_MOST_COMPILED = 64  # shapes and kinds of passes, of all networks together


class Learner:
    """A network with its optimizers.

    Muon takes the matrices of the blocks and AdamW the rest: fast enough to follow a student within minutes.
    """

    def __init__(self, network: Transformer, *, rate: float, momentum: float, max_grad_norm: float) -> None:
        self.network = network.eval()  # no dropout; what is compiled also serves the teacher
        self.parameters: list[nn.Parameter] = list(network.parameters())
        matrices, others = split_parameters(network, self.parameters)
        on_gpu = self.parameters[0].device.type == "cuda"
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(others, lr=rate, betas=_BETAS, weight_decay=0.0, fused=on_gpu),
            BatchedMuon(matrices, lr=rate, momentum=momentum),
        ]
        self._max_grad_norm = max_grad_norm

    def step(self) -> Tensor:
        """Apply the gradients, clipped, and forget them; their norm before clipping."""
        norm = nn.utils.clip_grad_norm_(self.parameters, self._max_grad_norm)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return norm

    def tensors(self) -> dict[str, Tensor]:
        """Weights and what the optimizers keep, by name."""
        found = with_prefix("network", self.network.state_dict())
        for index, optimizer in enumerate(self.optimizers):
            for number, values in optimizer.state_dict()["state"].items():
                found |= with_prefix(f"optimizer.{index}.{number}", values)
        return found

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take over what `tensors` of a learner like this one holds."""
        self.network.load_state_dict(without_prefix("network", tensors))
        for index, optimizer in enumerate(self.optimizers):
            state: dict[int, dict[str, Tensor]] = {}
            for name, tensor in without_prefix(f"optimizer.{index}", tensors).items():
                number, key = name.split(".", 1)
                state.setdefault(int(number), {})[key] = tensor
            optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


class Networks:
    """Generator, frozen teacher and critic; the average of the generator is what is exported."""

    def __init__(self, *, generator: Transformer, teacher: Transformer, rule: UpdateRule) -> None:
        """The critic begins as the teacher, which is not changed."""
        self.teacher = teacher.eval()
        self.generator = Learner(
            generator, rate=rule.learning_rate, momentum=rule.momentum, max_grad_norm=rule.max_grad_norm
        )
        self.critic = Learner(
            copy.deepcopy(teacher),
            rate=rule.critic_learning_rate,
            momentum=rule.critic_momentum,
            max_grad_norm=rule.max_grad_norm,
        )
        self.average = WeightAverage(self.generator.parameters, decay=rule.ema_decay)

    def compile(self) -> None:
        """Compile the blocks of all three; networks of one architecture share what is compiled."""
        compile_blocks(self.generator.network, self.teacher, self.critic.network)

    def averaged(self) -> dict[str, Tensor]:
        """The averaged weights of the generator."""
        with self.average.applied():
            return {name: tensor.detach().clone() for name, tensor in self.generator.network.state_dict().items()}

    def tensors(self) -> dict[str, Tensor]:
        """Everything that learns, by name; the averaged weights as `transformer`."""
        return {
            **with_prefix("transformer", self.averaged()),
            **with_prefix("generator", self.generator.tensors()),
            **with_prefix("critic", self.critic.tensors()),
            **with_prefix("teacher", self.teacher.state_dict()),
        }

    def load(self, tensors: dict[str, Tensor], *, num_updates: int) -> None:
        """Go on from `tensors`, after `num_updates` updates of the generator."""
        self.generator.load(without_prefix("generator", tensors))
        self.critic.load(without_prefix("critic", tensors))
        self.teacher.load_state_dict(without_prefix("teacher", tensors))
        averaged = without_prefix("transformer", tensors)
        names = [name for name, _ in self.generator.network.named_parameters()]
        self.average.load([averaged[name] for name in names], num_updates=num_updates)


def compile_blocks(*networks: Transformer) -> None:
    """Compile the blocks of networks for static shapes; with and without gradients are different compilations."""
    torch._dynamo.config.recompile_limit = _MOST_COMPILED
    for network in networks:
        network.compile_repeated_blocks(dynamic=False)
