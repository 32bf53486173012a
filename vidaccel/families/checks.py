"""What is tested on every family with EasyCache on, unless its row says why not."""

from collections.abc import Mapping
from types import MappingProxyType

CHECKS: Mapping[str, str] = MappingProxyType(
    {
        "reuse": "steps are reused, and a reused one runs no part of the transformer",
        "equality": "threshold 0 and removal give the video of the plain pipeline, bit for bit",
        "repeat": "the same seed gives the same video",
        "fresh": "after an error, an interrupt or another size the next call is that of a fresh pipeline",
        "threads": "two pipelines in two threads do not see each other",
        "guidance": "guidance on, off and switched during the run",
        "batch": "decisions for each sample or for the whole batch",
        "offload": "model and group offload, whichever was called first",
        "compile": "compiled blocks without a graph break",
        "command": "`vidaccel generate` with a tiny random folder",
    }
)
