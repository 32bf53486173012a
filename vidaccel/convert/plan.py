"""Which tensors a conversion writes, checked in full against the headers before anything is written."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vidaccel.convert.checkpoint import Checkpoint
from vidaccel.convert.formats import Config, Format, Transform, empty_model, unchanged
from vidaccel.errors import UserError
from vidaccel.files.tensors import num_bytes


@dataclass(frozen=True, kw_only=True)
class PlannedTensor:
    """One tensor to write: its name and form, and the tensors of the checkpoint that it is made of."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    sources: tuple[str, ...]
    transform: Transform


@dataclass(frozen=True, kw_only=True)
class ConversionPlan:
    """A network to write. model: on the meta device, for its configuration."""

    form: Format
    checkpoint: Checkpoint
    model: nn.Module
    settings: Config
    tensors: tuple[PlannedTensor, ...]

    @property
    def num_bytes(self) -> int:
        """Size of all tensors."""
        return sum(num_bytes(tensor) for tensor in self.tensors)

    def make(self, planned: PlannedTensor) -> Tensor:
        """Read what a tensor is made of, and make it."""
        sources = [self.checkpoint.read(source) for source in planned.sources]
        return planned.transform(sources, self.settings).to(planned.dtype).contiguous()


def make_plan(form: Format, checkpoint: Checkpoint, *, dtype: torch.dtype | None = None) -> ConversionPlan:
    """Everything that is written for a checkpoint. dtype: of floating numbers; None keeps the checkpoint's.

    Raises `UserError` unless the checkpoint has exactly the tensors of the format, in exactly its shapes.
    """
    model, settings = empty_model(form, checkpoint)
    wanted = _tensors_of(model)
    prefix = form.prefix_of(checkpoint.tensors) or ""
    made = [
        (name, tuple(prefix + source for source in sources), transform)
        for name, sources, transform in _expanded(form, settings, wanted)
    ]
    _check_names(form, checkpoint, {source for _, sources, _ in made for source in sources})
    tensors = []
    for name, sources, transform in made:
        shape = _made_shape(checkpoint, sources, transform, settings)
        if name not in wanted or shape != wanted[name]:
            raise UserError(_wrong_shape(form, checkpoint, sources, shape, wanted.get(name)))
        stored = checkpoint.tensors[sources[0]].dtype
        target = dtype if dtype is not None and stored.is_floating_point else stored
        tensors.append(PlannedTensor(name=name, shape=shape, dtype=target, sources=sources, transform=transform))
    return ConversionPlan(form=form, checkpoint=checkpoint, model=model, settings=settings, tensors=tuple(tensors))


def _tensors_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a model's file: tied weights once, under the first of their names."""
    kept = {name for name, _ in model.named_parameters()} | {name for name, _ in model.named_buffers()}
    return {name: tuple(value.shape) for name, value in model.state_dict().items() if name in kept}


def _expanded(
    form: Format, settings: Config, wanted: Mapping[str, tuple[int, ...]]
) -> Iterator[tuple[str, tuple[str, ...], Transform]]:
    if form.rules is None:
        for name in wanted:
            yield name, (name,), unchanged
        return
    made: set[str] = set()
    for rule in form.rules:
        for name, sources in rule.expand(settings):
            made.add(name)
            yield name, sources, rule.transform
    if made != set(wanted):
        differing = sorted(made ^ set(wanted))
        raise RuntimeError(f"The rules of {form.title} do not fit its class: {differing[:3]}.")


def _check_names(form: Format, checkpoint: Checkpoint, needed: Iterable[str]) -> None:
    needed = set(needed)
    held = {name for name in checkpoint.tensors if name in needed or not form.drops(name)}
    lacking, unknown = sorted(needed - held), sorted(held - needed)
    if lacking:
        raise UserError(
            f"{checkpoint.path} lacks {len(lacking)} of the {len(needed)} tensors of {form.title}, {lacking[0]} among "
            "them; it is incomplete or of another model."
        )
    if unknown:
        raise UserError(
            f"{checkpoint.path} has {len(unknown)} tensors that {form.title} does not have, {unknown[0]} among them; "
            "it is of another model or version."
        )


def _made_shape(
    checkpoint: Checkpoint, sources: Sequence[str], transform: Transform, settings: Config
) -> tuple[int, ...] | None:
    """The shape that the transform makes of the stored shapes; None where it makes nothing of them."""
    empty = [torch.empty(checkpoint.tensors[source].shape, device="meta") for source in sources]
    try:
        return tuple(transform(empty, settings).shape)
    except (RuntimeError, IndexError, ValueError):
        return None


def _wrong_shape(
    form: Format,
    checkpoint: Checkpoint,
    sources: Sequence[str],
    shape: tuple[int, ...] | None,
    wanted: tuple[int, ...] | None,
) -> str:
    held = " and ".join(f"{name} {list(checkpoint.tensors[name].shape)}" for name in sources)
    made = "cannot be put together" if shape is None else f"would become {list(shape)}"
    return (
        f"{checkpoint.path} has {held}, which {made} where {form.title} has {list(wanted or ())}; "
        "it is of another size or version."
    )
