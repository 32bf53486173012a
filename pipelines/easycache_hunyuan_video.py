"""`HunyuanVideoPipeline` with EasyCache (arXiv 2507.02860) built in: the same call, fewer transformer forwards.

from vidaccel.pipelines.easycache_hunyuan_video import EasyCacheHunyuanVideoPipeline
pipe = EasyCacheHunyuanVideoPipeline.from_pretrained("hunyuanvideo-community/HunyuanVideo")
output = pipe(prompt="a red circle moves left", threshold=0.025)
print(output.report.num_reused, "of", output.report.num_steps, "steps reused")
"""

from __future__ import annotations

from dataclasses import dataclass

from diffusers import HunyuanVideoPipeline
from diffusers.pipelines.hunyuan_video.pipeline_output import HunyuanVideoPipelineOutput

from vidaccel import EasyCacheReport
from vidaccel.easycache.swap_in import EasyCacheSwapIn, easycache_call


@dataclass
class EasyCacheHunyuanVideoPipelineOutput(HunyuanVideoPipelineOutput):
    """`frames` as in diffusers, and what EasyCache did in the call; None where it stays away, in training mode."""

    report: EasyCacheReport | None = None


class EasyCacheHunyuanVideoPipeline(EasyCacheSwapIn, HunyuanVideoPipeline):
    """Text to video with HunyuanVideo, distilled or with `true_cfg_scale`; EasyCache is applied during a call only."""

    __call__ = easycache_call(HunyuanVideoPipeline, EasyCacheHunyuanVideoPipelineOutput)
