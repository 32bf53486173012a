"""What stays known of frames whose keys are gone, and the search among them for those that should come back."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vidaccel.errors import UserError
from vidaccel.memory.camera import Camera
from vidaccel.memory.retrieval import Retrieval

_LEAST_SHARE = 1 / 8  # of a screen: a frame that shows less of what is missing does not come back
_MOST_SCREENS = 64  # that the camera may pass in a chunk
_FARTHEST = 1e9  # columns, beyond which whole numbers end
_STILL = 0.25  # columns a latent frame up to which a camera holds


@dataclass
class SeenFrames:
    """What stays known of every frame of one video's shot; its frames are counted from 0.

    num_columns: patch columns of a screen.
    columns, motions: of the camera of every frame.
    For "keys" only: starts, the first frame of every chunk; scene, the last chunk that is a keyframe (0: none is);
    directions, mean keys of every chunk with length 1, (chunks or more, layers, heads * D) in bfloat16 on the host.
    """

    retrieval: Retrieval
    num_columns: int
    columns: list[float] = field(default_factory=list)
    motions: list[float] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    scene: int = 0
    directions: Tensor = field(default_factory=lambda: torch.empty(0))

    def __len__(self) -> int:
        return len(self.columns)

    def add(self, cameras: Sequence[tuple[float, float]], *, is_keyframe: bool, mean: Tensor | None) -> None:
        """Take a finished chunk: column and motion of its frames, and for "keys" its mean keys (layers, heads * D)."""
        if self.retrieval.by == "keys" and mean is not None:
            self._add_direction(F.normalize(mean.float(), dim=-1).bfloat16())
            self.scene = len(self.starts) if is_keyframe else self.scene
            self.starts.append(len(self))
        self.columns += [_bounded(column) for column, _ in cameras]
        self.motions += [_bounded(motion) for _, motion in cameras]

    def _add_direction(self, direction: Tensor) -> None:
        count = len(self.starts)
        if count == len(self.directions):  # twice the room, so that a long video is not copied for every chunk
            more = direction.new_empty(max(2 * count, 16), *direction.shape)
            if count:
                more[:count] = self.directions
            self.directions = more
        self.directions[count] = direction

    def camera_of(self, frame: int) -> tuple[float, float]:
        """Column and motion of a frame."""
        return self.columns[frame], self.motions[frame]

    def wanted(self, present: Collection[int], coming: Sequence[float]) -> list[int]:
        """The frames that should come back for a chunk, the most useful first.

        present: frames of the past in the memory. coming: columns of the camera in the frames of the chunk.
        """
        if not len(self):
            return []
        return self._in_view(present, coming) if self.retrieval.by == "view" else self._alike(set(present))

    def _in_view(self, present: Collection[int], coming: Sequence[float]) -> list[int]:
        """Frame after frame the one that shows most of what too few show; of equals one that holds, then the latest."""
        width, coming = self.num_columns, [_bounded(column) for column in coming]
        if max(coming) - min(coming) > _MOST_SCREENS * width:  # a jump: what it goes to counts
            coming = coming[-1:]
        first = round(min(coming))
        size = round(max(coming)) + width - first
        places = torch.tensor(self.columns).round().long() - first
        begins, ends = places.clamp(0, size), (places + width).clamp(0, size)
        missing = torch.full((size,), self.retrieval.depth)
        for frame in present:
            missing[begins[frame] : ends[frame]] -= 1
        is_moving = torch.tensor(self.motions).abs() > _STILL
        age = torch.arange(len(self), 0, -1)
        found: list[int] = []
        while len(found) < self.retrieval.num_frames:
            sums = torch.cat([torch.zeros(1, dtype=torch.long), (missing > 0).cumsum(0)])
            gains = sums[ends] - sums[begins]
            gains[[*present, *found]] = 0
            best = int((gains * 2 - is_moving.long()).mul(len(self) + 1).sub(age).argmax())
            if gains[best] < max(1, width * _LEAST_SHARE):
                break
            missing[begins[best] : ends[best]] -= 1
            found.append(best)
        return found

    def _alike(self, present: set[int]) -> list[int]:
        """Frames of the chunks before the last keyframe that the last chunk resembles, the most alike first."""
        if not self.scene:
            return []
        earlier, last = self.directions[: self.scene].float(), self.directions[len(self.starts) - 1].float()
        similar = (earlier * last).sum(-1).mean(-1)
        order = similar.argsort(descending=True)
        alike = order[similar[order] >= self.retrieval.threshold].tolist()
        ends = [*self.starts[1:], len(self)]
        frames = [frame for chunk in alike for frame in range(self.starts[chunk], ends[chunk])]
        in_reach = sum(frame in present for frame in frames)
        count = min(self.retrieval.depth - in_reach, self.retrieval.num_frames)
        return [frame for frame in frames if frame not in present][: max(count, 0)]

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and JSON values that `load` takes."""
        tensors = {"cameras": torch.tensor([self.columns, self.motions], dtype=torch.float64)}
        if self.starts:
            tensors["directions"] = self.directions[: len(self.starts)].clone()
        return tensors, {"starts": list(self.starts), "scene": self.scene}

    def load(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Take over what `state` gave. Raises UserError where something of it is missing."""
        if {"cameras", *(["directions"] if values["starts"] else [])} - tensors.keys():
            raise UserError("The saved memory is damaged: what was seen before is not in it. Take an older one.")
        self.columns, self.motions = tensors["cameras"].tolist()
        self.starts, self.scene = list(values["starts"]), values["scene"]
        self.directions = tensors["directions"].cpu().clone() if self.starts else torch.empty(0)


def coming_columns(camera: Camera | None, sample: int, num_frames: int) -> list[float]:
    """Columns of the frames of a chunk; of a camera that is not given, those of one that holds at 0."""
    if camera is None:
        return [0.0] * num_frames
    columns: list[float] = camera.columns[sample].tolist()
    return columns


def _bounded(columns: float) -> float:
    return min(max(columns, -_FARTHEST), _FARTHEST)
