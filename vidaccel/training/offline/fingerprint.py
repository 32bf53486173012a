"""What decides a teacher's trajectories, in a few words, so that stages that must follow the same can be held to it."""

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from vidaccel.errors import UserError, check_choice
from vidaccel.files.differences import differences

Structure = Literal["causal", "bidirectional"]
Stage = Literal["ode", "visited", "consistency", "dmd"]
_PIECE = 2**24  # numbers that are brought to the host at once

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TeacherFingerprint:
    """A teacher as far as its trajectories depend on it.

    weights: `weights_digest` of the network. structure: what a frame sees of later ones: nothing beyond its chunk, or
        everything. history: which remembered frames it is shown, by the name of a `HistoryView`.
    guidance_scale: weight of the prompt; 1 is none. schedule: solver, steps and shift of its noise levels.
    Raises UserError for another structure.
    """

    weights: str
    structure: Structure
    history: str
    guidance_scale: float
    schedule: str

    def __post_init__(self) -> None:
        check_choice("structure", self.structure, get_args(Structure))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "TeacherFingerprint":
        """What `to_dict` wrote. Raises UserError where names are missing or too many."""
        names = {field.name for field in fields(cls)}
        if not isinstance(values, Mapping) or set(values) != names:
            raise UserError(f"A fingerprint of a teacher has {', '.join(sorted(names))}; got {values!r}.")
        return cls(**values)


def check_consistency(recorded: TeacherFingerprint, teacher: TeacherFingerprint, *, stage: Stage) -> tuple[str, ...]:
    """Hold a stage to the teacher of the stage before it; returns where the two differ, a phrase each.

    "ode", "visited" and "consistency" learn where trajectories end, and a student that was begun on those of one
    teacher cannot follow another's: raises UserError. "dmd" compares distributions only, so any teacher will do; a
    difference is logged as a warning.
    """
    check_choice("stage", stage, get_args(Stage))
    found = tuple(differences(recorded.to_dict(), teacher.to_dict()))
    if not found:
        return found
    if stage == "dmd":
        logger.warning("The teacher of this stage is not that of the stage before: %s.", "; ".join(found))
        return found
    raise UserError(
        f"The stage {stage!r} must follow the trajectories of the teacher before it: {'; '.join(found)}. "
        "Take that teacher, or collect again and begin anew with this one."
    )


@torch.no_grad()
def weights_digest(network: nn.Module) -> str:
    """A digest of every weight, in 16 hexadecimal digits; the same on every device, number formats count."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        for piece in tensor.detach().reshape(-1).split(_PIECE):
            digest.update(_bytes_of(piece))
    return digest.hexdigest()[:16]


def _bytes_of(piece: Tensor) -> memoryview:
    return piece.cpu().contiguous().view(torch.uint8).numpy().data if piece.numel() else memoryview(b"")
