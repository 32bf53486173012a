"""The causal Wan students whose weights are published: what each remembers, and at which noise levels it was trained.

Rows, one a kind. Their weights all have Wan's own names and shapes, so nothing inside a file says whose it is.

Facts of the published codes and configurations on GitHub, read in November 2026: guandeh17/Self-Forcing and
tianweiy/CausVid (`configs/`), NVlabs/LongLive (its first release, of 1.3B), thu-ml/Causal-Forcing
(`configs/causal_forcing_dmd_*.yaml`; arXiv 2602.02214, 2605.15141), TencentARC/RollingForcing
(`configs/rolling_forcing_dmd.yaml`, `wan/modules/causal_model.py`; arXiv 2509.25161) and krea-ai/realtime-video
(`configs/self_forcing_server_14b.yaml`, `release_server.py`). Not verified: no published weights were at hand, so what
stands in the files is what these codes save and load. Krea's weights are the only ones published as safetensors.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from vidaccel.catalog.pipelines import STUDENT_PIPELINE
from vidaccel.catalog.spec import GenerationDefaults
from vidaccel.convert.causal_wan_map import STUDENT
from vidaccel.convert.folder import Recipe

LATENT_CHANNELS = 16  # of Wan2.1, which all of them were made from


@dataclass(frozen=True, kw_only=True)
class PublishedStudent:
    """One kind of student.

    recipe: what its folder holds; its `version` is the word of `--kind`. words: letters and digits that the names of
    file and folder have; the first one names the kind, the others a variant of it.
    chunk_frames: latent frames of a chunk of the published weights (`num_frame_per_block` there).
    remark: what its own code does when it makes a video and a rollout here does not.
    """

    recipe: Recipe
    words: tuple[str, ...]
    chunk_frames: int = 3
    remark: str = ""


def _recipe(
    name: str, memory: str, *, steps: int = 4, shift: float = 5.0, shift_terminal: float | None = None
) -> Recipe:
    """The folder of a student; its scheduler's settings are for evenly spaced steps from 1."""
    settings: dict[str, Any] = {"memory": memory, "num_inference_steps": steps, "guidance_scale": 1.0}
    return Recipe(
        name=name,
        version=name.lower().replace(" ", "-"),
        pipeline=STUDENT_PIPELINE,
        parts=MappingProxyType({"transformer": STUDENT}),
        tokenizers=MappingProxyType({}),
        scheduler=MappingProxyType({"stochastic_sampling": True, "shift": shift, "shift_terminal": shift_terminal}),
        defaults=GenerationDefaults(fps=16, height=480, width=832, guidance_scale=None, num_inference_steps=steps),
        settings=MappingProxyType(settings),
    )


_FIRST_CHUNK = "its own code makes the first chunk in 4 steps, a rollout here makes every chunk in {}"

STUDENTS = (
    PublishedStudent(recipe=_recipe("Self-Forcing", "window:21"), words=("selfforcing",)),
    # Its own code ends after 21 frames. Trained at timesteps 1000, 757 and 522, where a schedule of shift 8 has 1, 7/25
    # and 3/25: noise levels 1, 28/37 and 12/23. Three even steps are these with this shift, stretched to end at 12/23.
    PublishedStudent(
        recipe=_recipe("CausVid", "window:21", steps=3, shift=400 / 421, shift_terminal=12 / 23), words=("causvid",)
    ),
    PublishedStudent(recipe=_recipe("LongLive", "sink+window:3+9"), words=("longlive",)),
    PublishedStudent(recipe=_recipe("Context Forcing", "slow-fast:3+12+6"), words=("contextforcing",)),
    # Its chunk-wise and frame-wise weights are of one kind; `framewise` in the names tells them apart.
    PublishedStudent(recipe=_recipe("Causal Forcing", "window:21"), words=("causalforcing",)),
    PublishedStudent(
        recipe=_recipe("Causal Forcing 2-step", "window:21", steps=2),
        words=("causalforcing", "2step"),
        chunk_frames=1,
        remark=_FIRST_CHUNK.format("2 steps"),
    ),
    PublishedStudent(
        recipe=_recipe("Causal Forcing 1-step", "window:21", steps=1),
        words=("causalforcing", "1step"),
        chunk_frames=1,
        remark=_FIRST_CHUNK.format("1 step"),
    ),
    # At most 21 frames are attended to: the first chunk, moved to just before the others, and the last 18. Half of its
    # training denoises chunk after chunk, as a rollout here does, the other half five chunks at once.
    PublishedStudent(
        recipe=_recipe("Rolling Forcing", "sink+window:3+18", steps=5),
        words=("rollingforcing",),
        remark="its own code denoises five chunks together, a rollout here one after the other",
    ),
    # `kv_cache_num_frames` is 3, beside the 3 frames of the chunk.
    PublishedStudent(
        recipe=_recipe("Krea Realtime", "window:6"),
        words=("krea",),
        remark="its own code computes the keys of the last 3 frames anew for every chunk, a rollout here keeps them",
    ),
)


def named_student(names: Sequence[str]) -> PublishedStudent | None:
    """The kind that the first of the names to name one names; None where none does or one names two.

    names: of the file, of its folder. A variant is one whose other words stand in any of the names.
    """
    plain = [letters(name) for name in names]
    for name in plain:
        found = [
            student
            for student in STUDENTS
            if student.words[0] in name and all(any(word in other for other in plain) for word in student.words)
        ]
        if len({student.words[0] for student in found}) == 1:
            return max(found, key=lambda student: len(student.words))
    return None


def letters(name: str) -> str:
    """The letters and digits of a name, all small."""
    return re.sub(r"[^a-z0-9]", "", name.lower())
