"""Published settings of EasyCache, by model: a row says which models it is for and where its numbers come from.

A model without a row gets the defaults of `EasyCacheConfig`, which are those of the official Wan2.1 code.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

_OFFICIAL = "official code (H-EmbodVis/EasyCache, arXiv 2507.02860)"


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Settings with their source.

    name: the model they were published for.
    transformer: class name of the denoising network.
    pipelines: class names of the pipelines, or of base classes of theirs; empty for all with that transformer.
    pipeline_config: settings that the pipeline must have; True and False stand for any true or false value.
    """

    name: str
    threshold: float
    warmup_steps: int
    source: str
    transformer: str
    pipelines: tuple[str, ...] = ()
    pipeline_config: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))

    @classmethod
    def for_pipeline(cls, pipe: Any) -> Preset | None:
        """The published settings for a loaded pipeline, or None. A bare transformer does not say which model it is."""
        transformer = getattr(pipe, "transformer", None) or getattr(pipe, "transformer_2", None)
        return cls.for_classes(
            pipelines={kind.__name__ for kind in type(pipe).__mro__},
            transformers={kind.__name__ for kind in type(transformer).__mro__},
            config=getattr(pipe, "config", {}),
        )

    @classmethod
    def for_classes(
        cls, *, pipelines: Collection[str], transformers: Collection[str], config: Mapping[str, Any]
    ) -> Preset | None:
        """The same for a pipeline that is not loaded, from class names, base classes too, and its settings."""
        for preset in PRESETS:
            fits = preset.transformer in transformers
            fits = fits and (not preset.pipelines or bool(set(pipelines) & set(preset.pipelines)))
            if fits and all(bool(config.get(name)) is wanted for name, wanted in preset.pipeline_config.items()):
                return preset
        return None


_TWO_EXPERTS = MappingProxyType({"boundary_ratio": True})

# The first row that fits counts.
PRESETS: tuple[Preset, ...] = (
    Preset(
        name="Wan2.2 A14B image to video",
        threshold=0.05,
        warmup_steps=7,
        source=_OFFICIAL + ", preview for Wan2.2",
        transformer="WanTransformer3DModel",
        pipelines=("WanImageToVideoPipeline",),
        pipeline_config=_TWO_EXPERTS,
    ),
    Preset(
        name="Wan2.2 A14B text to video",
        threshold=0.06,
        warmup_steps=7,
        source=_OFFICIAL + ", preview for Wan2.2",
        transformer="WanTransformer3DModel",
        pipelines=("WanPipeline",),
        pipeline_config=_TWO_EXPERTS,
    ),
    Preset(
        name="Wan2.2 5B",
        threshold=0.05,
        warmup_steps=7,
        source=_OFFICIAL + ", preview for Wan2.2",
        transformer="WanTransformer3DModel",
        pipeline_config=MappingProxyType({"expand_timesteps": True}),
    ),
    Preset(
        name="Wan2.1",
        threshold=0.05,
        warmup_steps=10,
        source=_OFFICIAL,
        transformer="WanTransformer3DModel",
        pipelines=("WanPipeline", "WanImageToVideoPipeline"),
    ),
    Preset(
        name="HunyuanVideo",
        threshold=0.025,
        warmup_steps=5,
        source=_OFFICIAL,
        transformer="HunyuanVideoTransformer3DModel",
        pipelines=("HunyuanVideoPipeline",),
    ),
    Preset(
        name="Cosmos-Predict2.5",
        threshold=0.05,
        warmup_steps=5,
        source="the EasyCache port of WorldCache (umair1221/WorldCache)",
        transformer="CosmosTransformer3DModel",
        pipelines=("Cosmos2_5_PredictBasePipeline",),
    ),
)
