"""`HunyuanVideoImageToVideoPipeline` with EasyCache (arXiv 2507.02860) built in: the same call, fewer forwards.

from vidaccel.pipelines.easycache_hunyuan_video_i2v import EasyCacheHunyuanVideoImageToVideoPipeline
pipe = EasyCacheHunyuanVideoImageToVideoPipeline.from_pretrained("hunyuanvideo-community/HunyuanVideo-I2V")
output = pipe(image=image, prompt="the circle moves left", threshold=0.025)
print(output.report.num_reused, "of", output.report.num_steps, "steps reused")
"""

from __future__ import annotations

from diffusers import HunyuanVideoImageToVideoPipeline
from vidaccel.pipelines.easycache_hunyuan_video import EasyCacheHunyuanVideoPipelineOutput

from vidaccel.easycache.swap_in import EasyCacheSwapIn, easycache_call


class EasyCacheHunyuanVideoImageToVideoPipeline(EasyCacheSwapIn, HunyuanVideoImageToVideoPipeline):
    """Image to video with HunyuanVideo, both kinds of image conditioning; EasyCache is applied during a call only."""

    __call__ = easycache_call(HunyuanVideoImageToVideoPipeline, EasyCacheHunyuanVideoPipelineOutput)
