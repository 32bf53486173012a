"""`WanImageToVideoPipeline` with EasyCache (arXiv 2507.02860) built in: the same call, fewer transformer forwards.

from vidaccel.pipelines.easycache_wan_i2v import EasyCacheWanImageToVideoPipeline
pipe = EasyCacheWanImageToVideoPipeline.from_pretrained("Wan-AI/Wan2.1-I2V-14B-480P-Diffusers")
output = pipe(image=image, prompt="the circle moves left", threshold=0.05)
print(output.report.num_reused, "of", output.report.num_steps, "steps reused")
"""

from __future__ import annotations

from diffusers import WanImageToVideoPipeline
from vidaccel.pipelines.easycache_wan import EasyCacheWanPipelineOutput

from vidaccel.easycache.swap_in import EasyCacheSwapIn, easycache_call


class EasyCacheWanImageToVideoPipeline(EasyCacheSwapIn, WanImageToVideoPipeline):
    """Image to video with Wan2.1 and Wan2.2, first and last frame too; EasyCache is applied during a call only."""

    __call__ = easycache_call(WanImageToVideoPipeline, EasyCacheWanPipelineOutput)
