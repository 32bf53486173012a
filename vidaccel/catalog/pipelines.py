"""Pipeline classes by name, those of this package and those of diffusers, and what `module:Name` names."""

from importlib import import_module
from typing import Any

from vidaccel.catalog import table

STUDENT_PIPELINE = "ContextForcingWanPipeline"
WAN_TEXT_TOKENS = 512  # that prompts are padded to: the default of WanPipeline and of students
STUDENT_TRANSFORMER = "vidaccel.models.causal_wan:CausalWanTransformer3DModel"
# Classes of this package that `model_index.json` may name, diffusers does not know and no family has: their modules.
OWN_PIPELINES = {
    STUDENT_PIPELINE: "vidaccel.pipelines.context_forcing_wan",
    "EasyCacheHunyuanVideoImageToVideoPipeline": "vidaccel.pipelines.easycache_hunyuan_video_i2v",
    "EasyCacheHunyuanVideoPipeline": "vidaccel.pipelines.easycache_hunyuan_video",
    "EasyCacheOpenSoraPipeline": "vidaccel.pipelines.easycache_open_sora",
    "EasyCacheWanImageToVideoPipeline": "vidaccel.pipelines.easycache_wan_i2v",
    "EasyCacheWanPipeline": "vidaccel.pipelines.easycache_wan",
    "EasyCacheWanVACEPipeline": "vidaccel.pipelines.easycache_wan_vace",
    "EasyCacheWanVideoToVideoPipeline": "vidaccel.pipelines.easycache_wan_v2v",
}


def pipeline_class(name: str) -> type | None:
    """The pipeline class of that name in this package, in the catalog or in diffusers, None where none has it."""
    import diffusers

    for family in table.CATALOG.families:
        if family.pipeline_name == name:
            return named_class(family.pipeline)
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
