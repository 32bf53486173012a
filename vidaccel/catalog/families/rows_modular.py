"""Pipelines that diffusers puts together from blocks, with the parts of the pipelines they are another form of.

How strong the guidance is, is a setting of their guider. They have no folder and no callback, so they are made and
called in Python only.
"""

from collections.abc import Mapping
from types import MappingProxyType

from vidaccel.catalog.families.family import Component, Family
from vidaccel.catalog.families.rows_hunyuan import HUNYUAN_FAMILIES
from vidaccel.catalog.families.rows_ltx import LTX_FAMILIES
from vidaccel.catalog.families.rows_wan import WAN_FAMILIES
from vidaccel.catalog.families.rows_wan_based import WAN_BASED_FAMILIES

_NO_CALLBACK = "pipelines of blocks have no callback"
_OF_BLOCKS = {
    "callback": _NO_CALLBACK,
    "interrupt": _NO_CALLBACK,
    "model offload": "pipelines of blocks have none of their own",
    "command": "pipelines of blocks are put together in Python; there is no folder to name on the command line",
}
_OF_THE_FORM = ("compile",)  # it is the same transformer
_NOTHING: Mapping[str, str] = MappingProxyType({})
_ONE_IMAGE = {"batch": "the blocks take one image and fail with more prompts"}
_DECODED = {"batch": "the blocks decode whatever they are asked for, and the VAE of diffusers fails with two videos"}
_FORMS = {family.name: family for family in (*WAN_FAMILIES, *HUNYUAN_FAMILIES, *LTX_FAMILIES, *WAN_BASED_FAMILIES)}
_GUIDER = Component(kind="diffusers:ClassifierFreeGuidance", config={"guidance_scale": 5.0})
_LTX2_GUIDER = Component(
    kind="diffusers:LTX2Guidance",
    config={
        "guidance_scale": 3.0,
        "stg_scale": 1.0,
        "modality_scale": 3.0,
        "spatio_temporal_guidance_blocks": [1],
    },
)


def _blocks(name: str, pipeline: str, *, untested: Mapping[str, str] = _NOTHING, **guiders: Component) -> Family:
    """The family called `name` in blocks, under the guiders given; `untested` besides what holds of all blocks."""
    form = _FORMS[name]
    return Family(
        name=f"{name}-blocks",
        description=f"{form.description}, in blocks",
        pipeline=f"diffusers:{pipeline}",
        components=dict(form.components) | guiders,
        settings=form.settings,
        inputs=form.inputs,
        defaults=form.defaults,
        untested={
            **{check: reason for check, reason in form.untested.items() if check in _OF_THE_FORM},
            **_OF_BLOCKS,
            **untested,
        },
    )


MODULAR_FAMILIES: tuple[Family, ...] = (
    _blocks("wan2.1-t2v", "WanModularPipeline", guider=_GUIDER),
    _blocks("wan2.1-i2v", "WanImage2VideoModularPipeline", untested=_ONE_IMAGE, guider=_GUIDER),
    _blocks("wan2.2-t2v", "Wan22ModularPipeline", guider=_GUIDER, guider_2=_GUIDER),
    _blocks("wan2.2-i2v", "Wan22Image2VideoModularPipeline", guider=_GUIDER, guider_2=_GUIDER),
    _blocks("hunyuan-video-1.5-t2v", "HunyuanVideo15ModularPipeline", untested=_DECODED, guider=_GUIDER),
    _blocks("hunyuan-video-1.5-i2v", "HunyuanVideo15ModularPipeline", untested=_DECODED, guider=_GUIDER),
    _blocks("ltx-t2v", "LTXModularPipeline", guider=_GUIDER),
    _blocks("ltx-i2v", "LTXModularPipeline", guider=_GUIDER),
    _blocks("ltx2-t2v", "LTX2ModularPipeline", guider=_LTX2_GUIDER, audio_guider=_LTX2_GUIDER),
    _blocks("helios", "HeliosModularPipeline", guider=_GUIDER),
    _blocks("helios-pyramid", "HeliosPyramidModularPipeline", guider=_GUIDER),
)
