"""The swap-in pipelines with what their tests need of each: a plain twin, random and tiny, and a short call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vidaccel.pipelines.easycache_hunyuan_video import EasyCacheHunyuanVideoPipeline
from vidaccel.pipelines.easycache_hunyuan_video_i2v import EasyCacheHunyuanVideoImageToVideoPipeline
from vidaccel.pipelines.easycache_open_sora import EasyCacheOpenSoraPipeline
from vidaccel.pipelines.easycache_wan import EasyCacheWanPipeline
from vidaccel.pipelines.easycache_wan_i2v import EasyCacheWanImageToVideoPipeline
from vidaccel.pipelines.easycache_wan_v2v import EasyCacheWanVideoToVideoPipeline
from vidaccel.pipelines.easycache_wan_vace import EasyCacheWanVACEPipeline

from tests.support.family_calls import call_inputs
from vidaccel import EasyCacheConfig
from vidaccel.random_models.build import build_random

CONFIG = EasyCacheConfig(threshold=0.5, warmup_steps=3)


@dataclass(frozen=True, kw_only=True)
class Case:
    """`kind` is the swap-in of the pipeline class that `family` names; `lora_targets` are layers of its transformer."""

    family: str
    kind: type[Any]
    lora_targets: tuple[str, ...] = ("to_q", "to_v")

    def make(self) -> Any:
        """The plain pipeline."""
        return build_random(self.family)

    def swapped_in(self) -> Any:
        return self.kind.from_pipe(self.make())

    def arguments(self, **changes: Any) -> dict[str, Any]:
        """Arguments of one seeded call; the frames are latents as a tensor."""
        return call_inputs(self.family, **({"num_inference_steps": 9, "output_type": "latent"} | changes))


KINDS = {
    "wan2.1-t2v": EasyCacheWanPipeline,
    "wan2.2-t2v": EasyCacheWanPipeline,
    "wan2.1-i2v": EasyCacheWanImageToVideoPipeline,
    "wan2.1-v2v": EasyCacheWanVideoToVideoPipeline,
    "wan2.1-vace": EasyCacheWanVACEPipeline,
    "hunyuan-video-t2v": EasyCacheHunyuanVideoPipeline,
    "hunyuan-video-i2v": EasyCacheHunyuanVideoImageToVideoPipeline,
    "open-sora-1.2": EasyCacheOpenSoraPipeline,
}
LORA_TARGETS = {"open-sora-1.2": ("qkv", "proj", "q_linear", "kv_linear", "fc1", "fc2")}
OTHER_FORMS = {
    "wan2.1-flf2v": EasyCacheWanImageToVideoPipeline,
    "wan2.2-ti2v-5b-i2v": EasyCacheWanImageToVideoPipeline,
    "hunyuan-video-t2v-cfg": EasyCacheHunyuanVideoPipeline,
    "hunyuan-video-i2v-replace": EasyCacheHunyuanVideoImageToVideoPipeline,
    "open-sora-1.2-i2v": EasyCacheOpenSoraPipeline,
}


def _case(family: str, kind: type[Any]) -> Case:
    targets = {"lora_targets": LORA_TARGETS[family]} if family in LORA_TARGETS else {}
    return Case(family=family, kind=kind, **targets)


CASES = {family: _case(family, kind) for family, kind in KINDS.items()}
MORE_CASES = CASES | {family: _case(family, kind) for family, kind in OTHER_FORMS.items()}
