"""The batch of one transformer call: which rows belong to which sample, and how to take and put them.

With batched guidance a batch of B rows is several slices of equal size, one for each guidance pass, and sample i is row
i of every slice.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vidaccel.catalog.traits import TransformerTraits

CONDITIONAL = "cond"


@dataclass(frozen=True, kw_only=True)
class Batch:
    """num_rows: rows of every batched tensor of the call. num_branches: branches among them, of which `deciding_branch`
    is the conditional one. per_sample: whether samples decide for themselves; if not, there is one group of all rows.
    """

    num_rows: int
    num_branches: int = 1
    deciding_branch: int = 0
    per_sample: bool = False

    @property
    def num_groups(self) -> int:
        """How many decisions the batch takes."""
        return self.num_rows // self.num_branches if self.per_sample else 1

    def rows(self, groups: Iterable[int]) -> list[int]:
        """The rows of these groups, slice by slice."""
        if not self.per_sample:
            return list(range(self.num_rows))
        chosen = list(groups)
        return [part * self.num_groups + group for part in range(self.num_branches) for group in chosen]

    def part(self, groups: Sequence[int]) -> Batch:
        """The batch of these groups alone, where samples decide for themselves."""
        return replace(self, num_rows=self.num_branches * len(groups))

    def take(self, tensor: Tensor, group: int) -> Tensor:
        """The rows of one group, a view; the tensor itself if there is no other group."""
        return tensor if self.num_groups == 1 else self._by_group(tensor)[:, group]

    def join(self, parts: Mapping[int, Tensor]) -> Tensor:
        """One new tensor from the tensors of all groups, rows in the order of the batch."""
        if self.num_groups == 1:
            return parts[0]
        first = next(iter(parts.values()))
        whole = first.new_empty((self.num_rows, *first.shape[1:]))
        for group, part in parts.items():
            self._by_group(whole)[:, group] = part
        return whole

    def _by_group(self, tensor: Tensor) -> Tensor:
        return tensor.view(self.num_branches, self.num_groups, *tensor.shape[1:])


def batch_of(num_rows: int, branches: Sequence[str], *, per_sample: bool) -> Batch:
    """The batch with these branches as slices, or in one where the rows cannot be divided so."""
    if len(branches) < 2 or num_rows % len(branches):
        return Batch(num_rows=num_rows, per_sample=per_sample)
    deciding = branches.index(CONDITIONAL) if CONDITIONAL in branches else 0
    return Batch(num_rows=num_rows, num_branches=len(branches), deciding_branch=deciding, per_sample=per_sample)


def select_rows(
    arguments: Mapping[str, Any], rows: Sequence[int], *, num_rows: int, traits: TransformerTraits
) -> dict[str, Any]:
    """The arguments of a call for some rows of its batch: every batched tensor loses the others."""

    def chosen(name: str, value: Any) -> Any:
        if isinstance(value, tuple | list) and name in traits.nested:
            return type(value)(chosen(name, part) for part in value)
        if not isinstance(value, Tensor) or value.ndim == 0 or name in traits.unbatched:
            return value
        if value.shape[0] == num_rows:
            return value[torch.tensor(rows, device=value.device)]
        if name in traits.folded and value.shape[0] % num_rows == 0:
            several = value.reshape(num_rows, -1, *value.shape[1:])
            return several[torch.tensor(rows, device=value.device)].flatten(0, 1)
        return value

    return {name: chosen(name, value) for name, value in arguments.items()}
