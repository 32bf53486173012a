"""The three networks of a distillation, all one architecture: generator, teacher and critic, and how they learn."""

import copy

import torch
from torch import Tensor, nn

from vidaccel.memory.prefixes import with_prefix, without_prefix
from vidaccel.training.adapters import adapted, merged
from vidaccel.training.architecture import Transformer
from vidaccel.training.averaging import WeightAverage
from vidaccel.training.context_forcing_config import UpdateRule
from vidaccel.training.muon import BatchedMuon, split_parameters
from vidaccel.training.sharding import gathered, load_tensors, placed, shard, whole

_BETAS = (0.0, 0.999)
_MOST_COMPILED = 64  # shapes and kinds of passes, of all networks together


class Learner:
    """A network with its optimizers, for those of its weights that are not frozen.

    Muon takes the matrices of the blocks and AdamW the rest: fast enough to follow a student within minutes. Adapters
    are AdamW's.
    """

    def __init__(self, network: Transformer, *, rate: float, momentum: float, max_grad_norm: float) -> None:
        self.network = network.eval()  # no dropout; what is compiled also serves the teacher
        self._frozen = {name for name, one in network.named_parameters() if not one.requires_grad}
        self.parameters: list[nn.Parameter] = [one for one in network.parameters() if one.requires_grad]
        matrices, others = ([], self.parameters) if self._frozen else split_parameters(network, self.parameters)
        on_gpu = self.parameters[0].device.type == "cuda"
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(others, lr=rate, betas=_BETAS, weight_decay=0.0, fused=on_gpu)
        ]
        if matrices:
            self.optimizers.append(BatchedMuon(matrices, lr=rate, momentum=momentum))
        self._max_grad_norm = max_grad_norm

    def step(self) -> Tensor:
        """Apply the gradients, clipped, and forget them; their norm before clipping."""
        norm = nn.utils.clip_grad_norm_(self.parameters, self._max_grad_norm)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return whole(norm)

    def tensors(self) -> dict[str, Tensor]:
        """Weights that learn and what the optimizers keep, by name, whole."""
        weights = {name: one for name, one in self.network.state_dict().items() if name not in self._frozen}
        found = with_prefix("network", weights)
        for index, optimizer in enumerate(self.optimizers):
            for number, values in optimizer.state_dict()["state"].items():
                found |= with_prefix(f"optimizer.{index}.{number}", values)
        return {name: gathered(tensor) for name, tensor in found.items()}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take over what `tensors` of a learner like this one holds."""
        load_tensors(self.network, without_prefix("network", tensors))
        for index, optimizer in enumerate(self.optimizers):
            parameters = [one for group in optimizer.param_groups for one in group["params"]]
            state: dict[int, dict[str, Tensor]] = {}
            for name, tensor in without_prefix(f"optimizer.{index}", tensors).items():
                number, key = name.split(".", 1)
                like = parameters[int(number)]
                kept = placed(tensor, like) if tensor.shape == like.shape else tensor
                state.setdefault(int(number), {})[key] = kept
            optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


class Networks:
    """Generator, frozen teacher and critic; the average of the generator is what is exported."""

    def __init__(
        self,
        *,
        generator: Transformer,
        teacher: Transformer,
        rule: UpdateRule,
        critic: Transformer | None = None,
        checkpointing: bool = False,
    ) -> None:
        """On several ranks the networks are shared out among them, in place.

        critic: begins as a copy of the teacher where it is not given. checkpointing: keep what goes into the blocks
        of generator and critic and compute the rest again for gradients.
        """
        critic = copy.deepcopy(teacher) if critic is None else critic
        self.teacher = teacher.eval()
        for network in (generator, critic):
            if checkpointing:
                network.enable_gradient_checkpointing()
        for network in (generator, teacher, critic):
            shard(network)
        self.generator = Learner(
            generator, rate=rule.learning_rate, momentum=rule.momentum, max_grad_norm=rule.max_grad_norm
        )
        self.critic = Learner(
            critic,
            rate=rule.critic_learning_rate,
            momentum=rule.critic_momentum,
            max_grad_norm=rule.max_grad_norm,
        )
        self.average = WeightAverage(self.generator.parameters, decay=rule.ema_decay)

    def compile(self) -> None:
        """Compile the blocks of all three; networks of one architecture share what is compiled."""
        compile_blocks(self.generator.network, self.teacher, self.critic.network)

    def averaged(self) -> dict[str, Tensor]:
        """The averaged weights of the generator, whole and with its adapter merged into them."""
        with self.average.applied():
            tensors = self.generator.network.state_dict()
            return merged({name: gathered(tensor).detach().clone() for name, tensor in tensors.items()})

    def tensors(self) -> dict[str, Tensor]:
        """Everything that learns, by name; the averaged weights as `transformer`."""
        return {
            **with_prefix("transformer", self.averaged()),
            **with_prefix("average", self._averages()),
            **with_prefix("generator", self.generator.tensors()),
            **with_prefix("critic", self.critic.tensors()),
            **with_prefix("teacher", {name: gathered(one) for name, one in self.teacher.state_dict().items()}),
        }

    def load(self, tensors: dict[str, Tensor], *, num_updates: int) -> None:
        """Go on from `tensors`, after `num_updates` updates of the generator."""
        load_tensors(self.teacher, without_prefix("teacher", tensors))
        self.generator.load(without_prefix("generator", tensors))
        self.critic.load(without_prefix("critic", tensors))
        averaged = without_prefix("average", tensors) or without_prefix("transformer", tensors)
        values = [placed(averaged[name], one) for name, one in self._learning().items()]
        self.average.load(values, num_updates=num_updates)

    def _averages(self) -> dict[str, Tensor]:
        """The averages of an adapter, which are no weights of the merged network."""
        if len(self.average.values) == len(list(self.generator.network.parameters())):
            return {}
        return {name: gathered(one) for name, one in zip(self._learning(), self.average.values, strict=True)}

    def _learning(self) -> dict[str, Tensor]:
        return {name: one for name, one in self.generator.network.named_parameters() if one.requires_grad}


def adapted_networks(teacher: Transformer, *, rank: int, seed: int, rule: UpdateRule, checkpointing: bool) -> Networks:
    """Generator and critic as adapters of `rank` on the weights of the teacher, which are in memory once."""
    return Networks(
        generator=adapted(teacher, rank=rank, seed=seed),
        teacher=teacher,
        critic=adapted(teacher, rank=rank, seed=seed + 1),
        rule=rule,
        checkpointing=checkpointing,
    )


def compile_blocks(*networks: Transformer) -> None:
    """Compile the blocks of networks for static shapes; with and without gradients are different compilations."""
    torch._dynamo.config.recompile_limit = _MOST_COMPILED
    for network in networks:
        network.compile_repeated_blocks(dynamic=False)
