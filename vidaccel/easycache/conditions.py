"""Whether a call is given what an earlier one was given: by identity on the host, else by values on the device."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vidaccel.machine.private_names import tensor_version

Identity = tuple[Callable[[], Any], int]
ROUNDING = 1e-6  # of a sum in float32, whose order may differ between tensors of equal values


@dataclass(frozen=True, kw_only=True)
class Given:
    """What a guidance pass was given beside its latents: plain values, and tensors by identity and by `fingerprint`."""

    settings: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    identities: Mapping[str, Identity | None]
    prints: Mapping[str, Tensor]

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], settings: Mapping[str, Any], last: Given | None) -> Given:
        """What is given now; the fingerprints of tensors that `last` had are taken from there."""
        known = {} if last is None else last.identities
        same = {name for name, tensor in tensors.items() if is_identical(known.get(name), tensor)}
        return cls(
            settings=settings,
            shapes={name: tuple(tensor.shape) for name, tensor in tensors.items()},
            identities={name: identity_of(tensor) for name, tensor in tensors.items()},
            prints={
                name: last.prints[name] if last is not None and name in same else fingerprint(tensor)
                for name, tensor in tensors.items()
            },
        )

    def is_of(self, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> bool:
        """Whether these are the very tensors, and plain values equal to these: no work for the device."""
        return (
            self.shapes.keys() == tensors.keys()
            and all(
                is_identical(self.identities[name], tensor) and self.shapes[name] == tensor.shape
                for name, tensor in tensors.items()
            )
            and self.settings == settings
        )


class Conditions:
    """What every guidance pass was given at its last evaluation, and whether that has changed.

    A flag is False or True where the host knows, else a tensor of shape (), true or false on the device.
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """The next generation may be given anything."""
        self._kept: dict[str, Given] = {}
        self._now: dict[str, Given] = {}
        self._flags: dict[str, bool | Tensor] = {}
        self._anew: frozenset[str] = frozenset()
        self._unread: dict[str, bool | Tensor] = {}

    def has_changed(self, branch: str, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> bool | Tensor:
        """Whether the guidance pass is given something else than at its last evaluation; False if it has none.

        The flag is a tensor for other tensors that may be of equal values, as pipelines make them that prepare their
        conditions in every step.
        """
        last = self._kept.get(branch)
        if last is not None and last.is_of(tensors, settings):
            self._now[branch], self._flags[branch], self._anew = last, False, self._anew - {branch}
            return False
        self._now[branch] = Given.of(tensors, settings, last)
        self._flags[branch] = False if last is None else self._compare(branch, last, self._now[branch])
        return self._flags[branch]

    def _compare(self, branch: str, last: Given, now: Given) -> bool | Tensor:
        if last.settings != now.settings or last.shapes != now.shapes:
            return True
        pairs = [(value, last.prints[name]) for name, value in now.prints.items() if value is not last.prints[name]]
        self._anew = self._anew | {branch} if pairs else self._anew - {branch}
        if not pairs:
            return False
        return ~torch.stack([is_equal(one, other.to(one.device)) for one, other in pairs]).all()

    def are_made_anew(self, branch: str) -> bool:
        """Whether the guidance pass was last given other tensors than before, perhaps of equal values."""
        return branch in self._anew

    def keep(self, branch: str, tensors: Mapping[str, Tensor]) -> None:
        """The guidance pass has been evaluated; what changed before that evaluation is to be read with the next step.

        tensors: as given to `has_changed`, with those that are known only when the first output was seen.
        """
        now = self._now[branch]
        self._kept[branch] = now if now.prints.keys() == tensors.keys() else Given.of(tensors, now.settings, now)
        self.leave_unread(branch)

    def leave_unread(self, branch: str) -> None:
        """The last flag of the guidance pass is to be read with the next step."""
        self._unread[branch] = self._flags[branch]

    def take_unread(self, branch: str) -> tuple[bool | Tensor, bool | Tensor]:
        """The unread flag of this guidance pass, and one for all others; they are read by that."""
        unread, self._unread = self._unread, {}
        own = unread.pop(branch, False)
        if any(flag is True for flag in unread.values()):
            return own, True
        others = [flag for flag in unread.values() if isinstance(flag, Tensor)]
        return own, torch.stack([flag.to(others[0].device) for flag in others]).any() if others else False


def fingerprint(tensor: Tensor) -> Tensor:
    """Two sums that differ where the values do, shape (2,), on the tensor's device: by place, and of magnitudes."""
    flat = torch.nan_to_num(tensor.detach().flatten().float()).clamp(-1e4, 1e4)  # masks are -inf or the type's least
    return torch.stack([(flat * torch.linspace(1, 2, len(flat), device=flat.device)).sum(), flat.abs().sum()])


def is_equal(left: Tensor, right: Tensor) -> Tensor:
    """Whether two fingerprints are of equal values: true or false, shape ()."""
    return (left - right).abs().max() <= ROUNDING * right[1]


def identity_of(value: Any) -> Identity | None:
    """A weak reference to a tensor with its version; None for what cannot be followed."""
    if not isinstance(value, Tensor) or value.is_inference():
        return None
    return weakref.ref(value), tensor_version(value)


def is_identical(identity: Identity | None, value: Any) -> bool:
    """Whether the value is the very tensor that was seen, not changed in place since."""
    if identity is None or not isinstance(value, Tensor):
        return False
    reference, version = identity
    return reference() is value and tensor_version(value) == version


def conditions_among(
    arguments: Mapping[str, Any], *, moving: Collection[str]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the plain values among the arguments of a call, those in tuples, lists and mappings too.

    Without those named in `moving`, which change from step to step by themselves.
    """
    tensors: dict[str, Tensor] = {}
    plain: dict[str, Any] = {}

    def gather(name: str, value: Any) -> None:
        if isinstance(value, Tensor):
            tensors[name] = value
        elif isinstance(value, Mapping):
            for key, part in value.items():
                gather(f"{name}.{key}", part)
        elif isinstance(value, tuple | list):
            for index, part in enumerate(value):
                gather(f"{name}.{index}", part)
        elif isinstance(value, bool | int | float | str):
            plain[name] = value

    for name, value in arguments.items():
        if name not in moving:
            gather(name, value)
    return tensors, plain
