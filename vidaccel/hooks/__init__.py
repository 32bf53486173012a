"""EasyCache on diffusers models: one hook around a whole transformer, decided in `vidaccel.easycache`."""

from vidaccel.hooks.install import apply_easycache, easycache_report, remove_easycache
from vidaccel.hooks.run import EasyCacheRun

__all__ = ["EasyCacheRun", "apply_easycache", "easycache_report", "remove_easycache"]
