"""Pipeline classes by name, those of this package and those of diffusers, and what `module:Name` names."""

from importlib import import_module
from typing import Any

# Classes of this package that `model_index.json` may name and diffusers does not know: the module each is in.
OWN_PIPELINES = {
    "ContextForcingWanPipeline": "vidaccel.pipelines.context_forcing_wan",
    "EasyCacheHunyuanVideoImageToVideoPipeline": "vidaccel.pipelines.easycache_hunyuan_video_i2v",
    "EasyCacheHunyuanVideoPipeline": "vidaccel.pipelines.easycache_hunyuan_video",
    "EasyCacheOpenSoraPipeline": "vidaccel.pipelines.easycache_open_sora",
    "EasyCacheWanImageToVideoPipeline": "vidaccel.pipelines.easycache_wan_i2v",
    "EasyCacheWanPipeline": "vidaccel.pipelines.easycache_wan",
    "EasyCacheWanVACEPipeline": "vidaccel.pipelines.easycache_wan_vace",
    "EasyCacheWanVideoToVideoPipeline": "vidaccel.pipelines.easycache_wan_v2v",
    "OpenSora2Pipeline": "vidaccel.pipelines.open_sora_2",
    "OpenSoraPipeline": "vidaccel.pipelines.open_sora",
}


def pipeline_class(name: str) -> type | None:
    """The pipeline class of that name in this package or in diffusers, None where neither has it."""
    import diffusers

    if name in OWN_PIPELINES:
        return getattr(import_module(OWN_PIPELINES[name]), name)
    found = getattr(diffusers, name, None) if name.endswith("Pipeline") else None
    return found if isinstance(found, type) and issubclass(found, diffusers.DiffusionPipeline) else None


def named_class(path: str) -> Any:
    """What `module:Name` names."""
    module, _, name = path.partition(":")
    return getattr(import_module(module), name)


def is_modular(pipeline: Any) -> bool:
    """Whether a pipeline class of diffusers is put together from blocks (`ModularPipeline`)."""
    from diffusers import ModularPipeline

    return isinstance(pipeline, type) and issubclass(pipeline, ModularPipeline)
