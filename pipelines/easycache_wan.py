"""`WanPipeline` with EasyCache (arXiv 2507.02860) built in: the same call, fewer transformer forwards.

from vidaccel.pipelines.easycache_wan import EasyCacheWanPipeline
pipe = EasyCacheWanPipeline.from_pretrained("Wan-AI/Wan2.1-T2V-1.3B-Diffusers")
output = pipe(prompt="a red circle moves left", threshold=0.05)
print(output.report.num_reused, "of", output.report.num_steps, "steps reused")
"""

from __future__ import annotations

from dataclasses import dataclass

from diffusers import WanPipeline
from diffusers.pipelines.wan.pipeline_output import WanPipelineOutput

from vidaccel import EasyCacheReport
from vidaccel.easycache.swap_in import EasyCacheSwapIn, easycache_call


@dataclass
class EasyCacheWanPipelineOutput(WanPipelineOutput):
    """`frames` as in diffusers, and what EasyCache did in the call; None where it stays away, in training mode."""

    report: EasyCacheReport | None = None


class EasyCacheWanPipeline(EasyCacheSwapIn, WanPipeline):
    """Text to video with Wan2.1 and Wan2.2; EasyCache is applied during a call and leaves nothing behind."""

    __call__ = easycache_call(WanPipeline, EasyCacheWanPipelineOutput)
