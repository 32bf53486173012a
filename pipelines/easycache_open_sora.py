"""`OpenSoraPipeline` with EasyCache (arXiv 2507.02860) built in: the same call, fewer transformer forwards.

from vidaccel.pipelines.easycache_open_sora import EasyCacheOpenSoraPipeline
pipe = EasyCacheOpenSoraPipeline.from_pretrained("folder made by vidaccel convert open-sora")
output = pipe(prompt="a calm sea at dawn", threshold=0.1, warmup_steps=5)
print(output.report.num_reused, "of", output.report.num_steps, "steps reused")
"""

from __future__ import annotations

from dataclasses import dataclass

import vidaccel.pipelines.open_sora as module  # diffusers loads a file with one pipeline class only, so not by name

from vidaccel import EasyCacheReport
from vidaccel.easycache.swap_in import EasyCacheSwapIn, easycache_call


@dataclass
class EasyCacheOpenSoraPipelineOutput(module.OpenSoraPipelineOutput):
    """`frames`, and what EasyCache did; None where it stays away.

    The clips of a long video are sections of the report; it begins with the first clip that has the last one's text.
    """

    report: EasyCacheReport | None = None


class EasyCacheOpenSoraPipeline(EasyCacheSwapIn, module.OpenSoraPipeline):
    """Open-Sora 1.2 in all its forms; EasyCache is applied during a call and leaves nothing behind."""

    __call__ = easycache_call(module.OpenSoraPipeline, EasyCacheOpenSoraPipelineOutput)
