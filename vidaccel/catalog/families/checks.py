"""What is tested on every family with EasyCache on, unless its row says why not."""

from collections.abc import Mapping
from types import MappingProxyType

CHECKS: Mapping[str, str] = MappingProxyType(
    {
        "equality": "threshold 0 and removal give the video of the plain pipeline, bit for bit",
        "reuse": "a reused step runs no part of the transformer; the first steps and the last one are computed",
        "rule": "a threshold between two errors reuses one step and computes the other",
        "sections": "the report has the steps of all loops of a call",
        "host reads": "at most one read of the device a step",
        "memory": "nothing is kept after a call, and only a few latents during one",
        "copy": "a copy of a model with EasyCache is refused",
        "steps": "a call with fewer steps is that of a fresh pipeline, and the next call too",
        "size": "so with another size",
        "frames": "so with another number of frames",
        "guidance": "so with guidance turned off or on",
        "switch": "guidance that comes on in a reused step uses no old vector, where it is a pass of its own",
        "errors": "after an error in any pass the next call is that of a fresh pipeline",
        "callback": "so after an error in the callback",
        "interrupt": "so after an interrupt",
        "threads": "two pipelines in two threads do not see each other",
        "batch": "a sample of a batch does not depend on the others",
        "model offload": "model offload, whether it or EasyCache was there first",
        "group offload": "group offload",
        "compile": "blocks of the transformer's class, compiled one by one, stay whole graphs",
        "command": "`vidaccel generate` with a tiny random folder",
    }
)
