"""The memory of an autoregressive rollout: which frames stay (integers) and their keys and values (tensors)."""

from vidaccel.memory.config import MemoryConfig
from vidaccel.memory.entry import Entry
from vidaccel.memory.index import MemoryIndex

__all__ = ["Entry", "MemoryConfig", "MemoryIndex"]
