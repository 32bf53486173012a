"""Faster video diffusion on diffusers: EasyCache for pipelines and transformers."""

from vidaccel.easycache import EasyCacheConfig
from vidaccel.hooks import apply_easycache, easycache_report, remove_easycache
from vidaccel.report import EasyCacheReport

__all__ = ["EasyCacheConfig", "EasyCacheReport", "apply_easycache", "easycache_report", "remove_easycache"]
