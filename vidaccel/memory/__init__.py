"""The memory of an autoregressive rollout: which frames stay (integers) and their keys and values (tensors)."""

from vidaccel.memory.config import MemoryConfig
from vidaccel.memory.depth import DepthMap
from vidaccel.memory.entry import Entry, Part
from vidaccel.memory.index import MemoryIndex
from vidaccel.memory.policies import POLICIES, PolicyRow, parse_memory, parse_slow_fast
from vidaccel.memory.policy import ChunkPass, MemoryPolicy, being_made

__all__ = [
    "POLICIES",
    "ChunkPass",
    "DepthMap",
    "Entry",
    "MemoryConfig",
    "MemoryIndex",
    "MemoryPolicy",
    "Part",
    "PolicyRow",
    "being_made",
    "parse_memory",
    "parse_slow_fast",
]
