"""Faster video diffusion (EasyCache) and minutes of video in bounded memory (Context Forcing), on diffusers.

These names are what most scripts need; everything else is imported from its package. Each loads when it is first used,
so that `import vidaccel` takes no time.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vidaccel.easycache.apply import apply_easycache, easycache_report, remove_easycache
    from vidaccel.easycache.config import EasyCacheConfig
    from vidaccel.easycache.report import EasyCacheReport
    from vidaccel.errors import UserError
    from vidaccel.generation.generate import Generation, generate
    from vidaccel.generation.loading import load_pipeline
    from vidaccel.generation.request import GenerationRequest
    from vidaccel.memory.config import MemoryConfig
    from vidaccel.pipelines.context_forcing_wan import ContextForcingWanPipeline
    from vidaccel.rollout.camera import CameraMove, CameraPath
    from vidaccel.rollout.timeline import PromptSpan, PromptTimeline
    from vidaccel.video.files import read_video, write_video
    from vidaccel.video.metrics import compare_videos

__all__ = [
    "CameraMove",
    "CameraPath",
    "ContextForcingWanPipeline",
    "EasyCacheConfig",
    "EasyCacheReport",
    "Generation",
    "GenerationRequest",
    "MemoryConfig",
    "PromptSpan",
    "PromptTimeline",
    "UserError",
    "apply_easycache",
    "compare_videos",
    "easycache_report",
    "generate",
    "load_pipeline",
    "read_video",
    "remove_easycache",
    "write_video",
]

_HOMES = {
    "vidaccel.easycache.apply": ("apply_easycache", "easycache_report", "remove_easycache"),
    "vidaccel.easycache.config": ("EasyCacheConfig",),
    "vidaccel.easycache.report": ("EasyCacheReport",),
    "vidaccel.errors": ("UserError",),
    "vidaccel.generation.generate": ("Generation", "generate"),
    "vidaccel.generation.loading": ("load_pipeline",),
    "vidaccel.generation.request": ("GenerationRequest",),
    "vidaccel.memory.config": ("MemoryConfig",),
    "vidaccel.pipelines.context_forcing_wan": ("ContextForcingWanPipeline",),
    "vidaccel.rollout.camera": ("CameraMove", "CameraPath"),
    "vidaccel.rollout.timeline": ("PromptSpan", "PromptTimeline"),
    "vidaccel.video.files": ("read_video", "write_video"),
    "vidaccel.video.metrics": ("compare_videos",),
}


def __getattr__(name: str) -> Any:
    """Load a public name when it is first used, so that `vidaccel --help` does not wait for PyTorch."""
    home = next((module for module, names in _HOMES.items() if name in names), None)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(home), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
