"""The swap-in pipelines with what their tests need of each: a plain twin and the arguments of a short call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tiny_hunyuan import hunyuan_arguments, tiny_hunyuan_i2v, tiny_hunyuan_t2v
from tiny_models import call_arguments, tiny_wan_i2v, tiny_wan_t2v, tiny_wan_two_experts, tiny_wan_v2v, tiny_wan_vace
from vidaccel.pipelines.easycache_hunyuan_video import EasyCacheHunyuanVideoPipeline
from vidaccel.pipelines.easycache_hunyuan_video_i2v import EasyCacheHunyuanVideoImageToVideoPipeline
from vidaccel.pipelines.easycache_wan import EasyCacheWanPipeline
from vidaccel.pipelines.easycache_wan_i2v import EasyCacheWanImageToVideoPipeline
from vidaccel.pipelines.easycache_wan_v2v import EasyCacheWanVideoToVideoPipeline
from vidaccel.pipelines.easycache_wan_vace import EasyCacheWanVACEPipeline

from vidaccel import EasyCacheConfig

CONFIG = EasyCacheConfig(threshold=0.5, warmup_steps=3)


@dataclass(frozen=True, kw_only=True)
class Case:
    """`make` builds the plain pipeline, `kind` is its swap-in."""

    kind: type[Any]
    make: Callable[[], Any]
    arguments_of: Callable[..., dict[str, Any]] = call_arguments

    def arguments(self, pipe: Any, **changes: Any) -> dict[str, Any]:
        return self.arguments_of(pipe, **({"num_inference_steps": 9} | changes))

    def swapped_in(self) -> Any:
        return self.kind.from_pipe(self.make())


CASES = {
    "wan": Case(kind=EasyCacheWanPipeline, make=tiny_wan_t2v),
    "wan two experts": Case(kind=EasyCacheWanPipeline, make=tiny_wan_two_experts),
    "wan i2v": Case(kind=EasyCacheWanImageToVideoPipeline, make=tiny_wan_i2v),
    "wan v2v": Case(kind=EasyCacheWanVideoToVideoPipeline, make=tiny_wan_v2v),
    "wan vace": Case(kind=EasyCacheWanVACEPipeline, make=tiny_wan_vace),
    "hunyuan": Case(kind=EasyCacheHunyuanVideoPipeline, make=tiny_hunyuan_t2v, arguments_of=hunyuan_arguments),
    "hunyuan i2v": Case(
        kind=EasyCacheHunyuanVideoImageToVideoPipeline, make=tiny_hunyuan_i2v, arguments_of=hunyuan_arguments
    ),
}


def plain_class(case: Case) -> type[Any]:
    """The diffusers class behind the swap-in."""
    return type(case.make())
