"""Whether a student was trained for layers that share a memory, as a memory asks for."""

from __future__ import annotations

import logging
from typing import Any

from vidaccel.memory import DepthMap, MemoryPolicy

logger = logging.getLogger(__name__)


def warn_about_depth(transformer: Any, memory: MemoryPolicy) -> None:
    """Warn where `memory` keeps other layers than `transformer` was trained to read."""
    settings = transformer.config
    depth = memory.depth_map(settings.num_layers)
    if settings.kv_routing > 0 or depth == DepthMap.every(settings.depth_every, settings.num_layers):
        return
    kept = f"the memory keeps keys and values of {len(depth.kept)} of its {settings.num_layers} layers"
    if settings.depth_every > 1:
        logger.warning(
            "This student was trained with the memory of one layer in %d, and %s: expect worse videos; set "
            "`depth_every` to %d.",
            settings.depth_every,
            kept,
            settings.depth_every,
        )
    else:
        logger.warning(
            "This student was not trained for layers that share a memory (`kv_routing` in its transformer's config is "
            "0), and %s: expect it to forget; leave `depth_every` at 1, or train it with `vidaccel train causal "
            "--kv-routing 0.5`.",
            kept,
        )
