"""`WanVACEPipeline` with EasyCache (arXiv 2507.02860) built in: the same call, fewer transformer forwards.

from vidaccel.pipelines.easycache_wan_vace import EasyCacheWanVACEPipeline
pipe = EasyCacheWanVACEPipeline.from_pretrained("Wan-AI/Wan2.1-VACE-1.3B-diffusers")
output = pipe(prompt="a red circle moves left", reference_images=[image], threshold=0.05)
print(output.report.num_reused, "of", output.report.num_steps, "steps reused")
"""

from __future__ import annotations

from diffusers import WanVACEPipeline
from vidaccel.pipelines.easycache_wan import EasyCacheWanPipelineOutput

from vidaccel.easycache.swap_in import EasyCacheSwapIn, easycache_call


class EasyCacheWanVACEPipeline(EasyCacheSwapIn, WanVACEPipeline):
    """Controlled generation and editing with Wan VACE; EasyCache is applied during a call only."""

    __call__ = easycache_call(WanVACEPipeline, EasyCacheWanPipelineOutput)
