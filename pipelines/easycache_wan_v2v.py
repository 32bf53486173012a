"""`WanVideoToVideoPipeline` with EasyCache (arXiv 2507.02860) built in: the same call, fewer transformer forwards.

from vidaccel.pipelines.easycache_wan_v2v import EasyCacheWanVideoToVideoPipeline
pipe = EasyCacheWanVideoToVideoPipeline.from_pretrained("Wan-AI/Wan2.1-T2V-1.3B-Diffusers")
output = pipe(video=frames, prompt="a blue circle", strength=0.8, threshold=0.05)
print(output.report.num_reused, "of", output.report.num_steps, "steps reused")
"""

from __future__ import annotations

from diffusers import WanVideoToVideoPipeline
from vidaccel.pipelines.easycache_wan import EasyCacheWanPipelineOutput

from vidaccel.easycache.swap_in import EasyCacheSwapIn, easycache_call


class EasyCacheWanVideoToVideoPipeline(EasyCacheSwapIn, WanVideoToVideoPipeline):
    """Video to video with Wan2.1; `strength` shortens the schedule, and warm-up counts the steps that are left."""

    __call__ = easycache_call(WanVideoToVideoPipeline, EasyCacheWanPipelineOutput)
