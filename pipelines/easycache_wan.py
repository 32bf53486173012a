"""`WanPipeline` with EasyCache (arXiv 2507.02860) built in: the same call, fewer transformer forwards.

from vidaccel.pipelines.easycache_wan import EasyCacheWanPipeline
pipe = EasyCacheWanPipeline.from_pretrained("Wan-AI/Wan2.1-T2V-1.3B-Diffusers")
output = pipe(prompt="a red circle moves left", threshold=0.05)
print(output.report.num_reused, "of", output.report.num_steps, "steps reused")
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from diffusers import WanPipeline
from diffusers.pipelines.wan.pipeline_output import WanPipelineOutput

from vidaccel import EasyCacheConfig, EasyCacheReport, apply_easycache, remove_easycache


@dataclass
class EasyCacheWanPipelineOutput(WanPipelineOutput):
    """`frames` as in diffusers, and what EasyCache did in the call; None where it stays away, in training mode."""

    report: EasyCacheReport | None = None


class EasyCacheWanPipeline(WanPipeline):
    """Text to video with Wan2.1 and Wan2.2; EasyCache is applied during a call and leaves nothing behind."""

    @classmethod
    def from_pipe(cls, pipeline: Any, **kwargs: Any) -> EasyCacheWanPipeline:
        """This pipeline around the components and settings of another one, or those given by name.

        The components stay as they are; diffusers' own `from_pipe` casts them to float32 unless it is told a dtype.
        Casts as diffusers does if `dtype` or `torch_dtype` is given.
        """
        if "dtype" in kwargs or "torch_dtype" in kwargs:
            return super().from_pipe(pipeline, **kwargs)  # type: ignore[misc]
        known = {**pipeline.config, **pipeline.components, **kwargs}
        return cls(**{name: known[name] for name in inspect.signature(cls.__init__).parameters if name in known})

    def __call__(
        self,
        *args: Any,
        threshold: float = 0.05,
        warmup_steps: int = 10,
        easycache: EasyCacheConfig | None = None,
        return_dict: bool = True,
        **kwargs: Any,
    ) -> EasyCacheWanPipelineOutput | tuple[Any, EasyCacheReport | None]:
        """Generate as `WanPipeline.__call__`, whose arguments all apply.

        threshold: tolerated accumulated relative change; 0 computes every step.
        warmup_steps: first steps that are always computed.
        easycache: all settings at once, in place of the two above.

        Returns frames and report as an output object, or as a tuple with `return_dict=False`.
        Raises ValueError for settings out of range, or if a cache is already applied to the transformer.
        """
        run = apply_easycache(self, easycache or EasyCacheConfig(threshold=threshold, warmup_steps=warmup_steps))
        try:
            frames = WanPipeline.__call__(self, *args, return_dict=False, **kwargs)[0]
        finally:
            remove_easycache(self)
        return EasyCacheWanPipelineOutput(frames=frames, report=run.report) if return_dict else (frames, run.report)
