"""Faster video diffusion on diffusers: EasyCache for pipelines and transformers."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vidaccel.easycache import EasyCacheConfig
    from vidaccel.hooks import apply_easycache, easycache_report, remove_easycache
    from vidaccel.report import EasyCacheReport

__all__ = ["EasyCacheConfig", "EasyCacheReport", "apply_easycache", "easycache_report", "remove_easycache"]


def __getattr__(name: str) -> Any:
    """Load a public name when it is first used, so that `vidaccel --help` does not wait for PyTorch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = {"EasyCacheConfig": "easycache", "EasyCacheReport": "report"}.get(name, "hooks")
    return getattr(import_module(f"{__name__}.{module}"), name)
