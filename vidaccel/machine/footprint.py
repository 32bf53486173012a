"""How much memory a generation needs, and how much there is: asked before the work starts, not found out by a crash.

The need is an estimate from sizes that the model's configuration gives:

  weights      bytes of the parameters, all components (with offload: only the largest component on the device)
  transformer  L * (16 * hidden + 2 * ffn) * bytes, for L tokens: the residual stream, queries, keys, values, their
               normalised and rotated copies, and the feed-forward layer of one block
  VAE          9 * s * height * width * c * bytes, for s frames decoded at once and c channels before the last
               stage; 36 instead of 9 in float32 on a CPU, where PyTorch unfolds the 3 x 3 x 3 neighbourhood; plus
               the clip in pixels three times (decoded, concatenated, float32)

The factors were fitted to measured peaks on a CPU (128x128 and 256x256, 49 frames); they err on the low side, because
a wrong refusal is worse than an allocation that fails, which is said in words too. What a family's configuration does
not say counts as nothing.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from vidaccel.machine.components import decoder_channels, denoisers, hidden_sizes, modules, patch_sizes, strides
from vidaccel.machine.private_names import execution_device

GIB = 2**30
_PLAIN, _UNFOLDED = 9, 36  # copies of a full-size feature map that decoding holds at once
_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Estimated bytes of one generation: `weights` already or about to be loaded, and the working memory."""

    weights: int
    transformer: int
    vae: int

    @property
    def working(self) -> int:
        """Bytes beyond the weights: denoising and decoding follow each other, so the larger one counts."""
        return max(self.transformer, self.vae)


def footprint(pipe: Any, *, num_frames: int, height: int, width: int) -> Footprint:
    """The estimate for one video of `num_frames` frames of `height` x `width` pixels by a loaded pipeline."""
    transformer, vae = denoisers(pipe)[0], getattr(pipe, "vae", None)
    temporal, spatial = (stride or 1 for stride in strides(pipe))
    latent_frames = (num_frames - 1) // temporal + 1
    tokens = latent_frames * (height // spatial) * (width // spatial) // math.prod(patch_sizes(transformer))
    hidden, ffn = hidden_sizes(transformer)
    weights = sum(module_bytes(component) for component in modules(pipe).values())
    denoising = tokens * (16 * hidden + 2 * ffn) * transformer.dtype.itemsize
    if vae is None:
        return Footprint(weights=weights, transformer=denoising, vae=0)
    pixels, element = height * width, vae.dtype.itemsize
    decoded = num_frames * 3 * pixels
    copies = _UNFOLDED if execution_device(pipe).type == "cpu" and vae.dtype == torch.float32 else _PLAIN
    features = copies * temporal * pixels * decoder_channels(vae) * element
    return Footprint(weights=weights, transformer=denoising, vae=features + decoded * (2 * element + 4))


def weight_bytes(folder: Path, element_size: int) -> int:
    """Bytes the safetensors files below `folder` will take, loaded with `element_size` bytes per number."""
    from safetensors import safe_open

    total = 0
    for path in folder.rglob("*.safetensors"):
        with safe_open(path, framework="pt") as weights:
            total += sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())  # noqa: SIM118
    return total * element_size


def available_bytes(device: torch.device) -> int:
    """Free memory of `device`: what CUDA reports, else what the system and this process's control group allow."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return min(psutil.virtual_memory().available, _control_group_bytes())


def module_bytes(module: torch.nn.Module) -> int:
    """Bytes of a module's parameters and buffers."""
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


def gigabytes(num_bytes: float) -> str:
    """A size for people: `1.5 GiB`, or `12 MiB` below a tenth of a gibibyte."""
    return f"{num_bytes / GIB:.1f} GiB" if num_bytes >= GIB / 10 else f"{max(1, round(num_bytes / 2**20))} MiB"


def _control_group_bytes() -> int:
    try:
        limit = int((_CGROUP / "memory.max").read_text())
        used = int((_CGROUP / "memory.current").read_text())
        statistics = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no control group, or "max": no limit
        return 2**63
    return max(0, limit - used + int(statistics.get("inactive_file", 0)))
