"""Faster video diffusion on diffusers: EasyCache for pipelines and transformers."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vidaccel.easycache.apply import apply_easycache, easycache_report, remove_easycache
    from vidaccel.easycache.config import EasyCacheConfig
    from vidaccel.easycache.report import EasyCacheReport

__all__ = ["EasyCacheConfig", "EasyCacheReport", "apply_easycache", "easycache_report", "remove_easycache"]


def __getattr__(name: str) -> Any:
    """Load a public name when it is first used, so that `vidaccel --help` does not wait for PyTorch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = {"EasyCacheConfig": "rule", "EasyCacheReport": "report"}.get(name, "apply")
    return getattr(import_module(f"{__name__}.easycache.{module}"), name)
