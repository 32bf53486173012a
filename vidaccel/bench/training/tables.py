"""The cost of training for people: a row a way to train."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vidaccel.bench.shared.markdown import captions, markdown_table

_STAGES = {"forcing": "teacher forcing", "1": "distillation, stage 1", "2": "distillation, stage 2"}
_PARTS = {
    "rollout": "rollout",
    "exit": "exit pass",
    "loss": "loss",
    "teacher": "teacher",
    "critic": "critic judges",
    "backward": "backward",
    "critic learns": "critic learns",
    "optimizer": "optimizers",
}


def training_markdown(content: Mapping[str, Any]) -> str:
    """The results as a page."""
    protocol = content["protocol"]
    size = f"{protocol['width']}x{protocol['height']}"
    lines = [
        "# Training a causal student at full size",
        "",
        f"Random weights of {protocol['shape']}, noise in place of clips: time, memory, and whether it fits; nothing "
        f"about quality. {size}, chunks of 3 latent frames, a memory of 3 + 12 + 3 that is full in teacher forcing and "
        f"in stage 2 and begins empty in stage 1; {protocol['chunks']} chunks a rollout, of which the last is scored; "
        f"prompts of {protocol['text']} tokens; {protocol['batch_size']} a card. A step of the distillation updates "
        "generator and critic. Weights in float32, passes in bfloat16 on a GPU. Checkpointing: what lies inside the "
        "blocks is computed again for gradients.",
        "",
        captions(content),
        "",
    ]
    header = ("stage", "learns", "checkpointing", "cards", "peak GB a card", "s a step", *_PARTS.values())
    lines += markdown_table(header, [_row(record) for record in content["records"]])
    return "\n".join(lines) + "\n"


def _row(record: Mapping[str, Any]) -> tuple[str, ...]:
    learns = "all weights" if record["lora"] is None else f"LoRA {record['lora']}"
    peak = "" if record["peak_bytes"] is None else f"{record['peak_bytes'] / 1e9:.1f}"
    seconds = record["error"] or f"{record['seconds']:.2f}"
    parts = (f"{record['parts'][name]:.2f}" if name in record["parts"] else "" for name in _PARTS)
    checkpointing = "yes" if record["checkpointing"] else "no"
    return _STAGES[record["stage"]], learns, checkpointing, str(record["cards"]), peak, seconds, *parts
