"""`vidaccel generate` and `vidaccel rollout` as commands at full size, on one device, with every way to run them.

Each cell is a process of its own, started as a user starts it. What is recorded: whether it ended well and with which
line if not, seconds, and the most device memory. Random weights: nothing here says anything about quality.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from vidaccel.bench.full_size import FULL_SIZES, make_full_size
from vidaccel.bench.shared.benchmark import Benchmark, BenchProgress, Tell, option
from vidaccel.bench.shared.markdown import captions, markdown_table
from vidaccel.errors import UserError, check_amount
from vidaccel.generation.loading import resolve_device
from vidaccel.machine.attention import attention_call, usable_attention_backends
from vidaccel.machine.environment import describe_environment, without_folders

PROMPT = "a red ball hops up and down"
_MOST_SECONDS = 200.0
# Runs the command line in this process, then writes one line: the most memory that PyTorch held on the device.
_LAUNCHER = """
import json, sys
import torch
from vidaccel.cli import run
try:
    code = run(sys.argv[1:])
except SystemExit as ended:
    code = ended.code
peak = torch.cuda.max_memory_reserved() if torch.cuda.is_available() else 0
print("\\nmeasured " + json.dumps({"peak_bytes": peak}))
sys.exit(code)
"""


@dataclass(frozen=True, kw_only=True)
class CommandsBench(Benchmark):
    """Finished cells are not measured again."""

    name = "commands"

    folder: Path = option("Where the random models are written, up to 30 GB each.", recorded=False)
    models: tuple[str, ...] = option(
        f"Of {', '.join(FULL_SIZES)}.", ("wan2.1-1.3b", "causal-wan2.1-1.3b", "hunyuan-video"), recorded=False
    )
    height: int = option("Pixels.", 480)
    width: int = option("Pixels.", 832)
    num_frames: int = option("Frames of `vidaccel generate`.", 17)
    num_inference_steps: int = option("Denoising steps of `vidaccel generate`.", 12)
    seconds: float = option("Of `vidaccel rollout`.", 3.0)
    parallel: int = option("Commands at the same time; with more than one the seconds say little.", 1)
    budget_seconds: float | None = option("No command begins after it.", None, recorded=False)

    def __post_init__(self) -> None:
        check_amount("budget_seconds", self.budget_seconds, optional=True)
        if unknown := sorted(set(self.models) - FULL_SIZES.keys()):
            raise UserError(f"`models` may name {', '.join(FULL_SIZES)}; got {', '.join(unknown)}.")
        if self.parallel < 1:
            raise UserError(f"`parallel` must be at least 1 command, got {self.parallel}.")

    def run(self, *, on_progress: Tell = None) -> dict[str, Any]:
        device = resolve_device(self.device)
        environment = describe_environment(device=device, weights="random", model=", ".join(self.models))
        results = self.results(self.protocol({}), environment)
        began = time.monotonic()
        for name in self.models:
            waiting = [command for command in commands_of(name, device) if results.find(**command.key) is None]
            if not waiting or _is_over(self, began):
                continue
            if on_progress is not None:
                total = len(results.records) + len(waiting)
                on_progress(BenchProgress(done=len(results.records), total=total, label=name))
            dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
            folder = make_full_size(name, self.folder / name, device=device, dtype=dtype)
            if device.type == "cuda":
                torch.cuda.empty_cache()
            with ThreadPoolExecutor(self.parallel) as pool:
                for record in pool.map(partial(_measure, self, folder=folder, began=began), waiting):
                    if record is not None:
                        results.add(record)
        summary = results.finish({"num_failed": sum(record["exit_code"] != 0 for record in results.records)})
        self.write_table(commands_markdown(results.content))
        return summary


@dataclass(frozen=True, kw_only=True)
class Command:
    """One cell: a model and the flags that differ from the plain command."""

    model: str
    flags: tuple[str, ...]

    @property
    def key(self) -> dict[str, Any]:
        """What tells it from the others in a result file."""
        return {"model": self.model, "flags": " ".join(self.flags)}


def commands_of(model: str, device: torch.device) -> tuple[Command, ...]:
    """The ways to run a model on a device: formats, offloading, compiled blocks or captured passes, attention."""
    if FULL_SIZES[model].causal:
        ways = [*_rollout_ways(device.type), *_attention(model, device)]
    else:
        ways = [*_generate_ways(device.type), *_attention(model, device)]
    return tuple(Command(model=model, flags=tuple(way)) for way in ways)


def _generate_ways(device: str) -> Iterator[Sequence[str]]:
    yield ()
    yield ("--threshold", "0")
    if device != "cuda":
        return
    yield ("--dtype", "float16")
    yield ("--compile",)
    for offload in ("model", "sequential", "group"):
        yield ("--offload", offload)
    yield ("--offload", "model", "--compile")


def _rollout_ways(device: str) -> Iterator[Sequence[str]]:
    yield ()
    if device != "cuda":
        return
    yield ("--dtype", "float16")
    yield ("--passes", "compiled")
    yield ("--passes", "captured")
    yield ("--passes", "captured", "--dtype", "float16")


def _attention(model: str, device: torch.device) -> Iterator[Sequence[str]]:
    """Every backend that runs here what the model's transformer asks for, and downloads nothing."""
    if device.type != "cuda":
        return
    transformer = FULL_SIZES[model].components()["transformer"]
    call = attention_call(transformer.kind.rpartition(":")[2], transformer.config)
    for name in usable_attention_backends(device=device, dtype=torch.bfloat16, call=call, private=True):
        if name != "native":
            yield ("--attention", name)


def _measure(config: CommandsBench, command: Command, *, folder: Path, began: float) -> dict[str, Any] | None:
    """Run one command; None where the budget is used up."""
    if _is_over(config, began):
        return None
    name = "-".join(flag.strip("-").replace("_", "") for flag in command.flags) or "plain"
    video = config.folder / "videos" / f"{command.model}-{name}.mp4"
    start = time.monotonic()
    try:
        done = subprocess.run(
            [sys.executable, "-c", _LAUNCHER, *_arguments(config, command, folder, video)],
            capture_output=True,
            text=True,
            timeout=_MOST_SECONDS,
            check=False,
        )
        code, lines = done.returncode, done.stdout.splitlines()
        errors = [line for line in done.stderr.splitlines() if line.strip()]
    except subprocess.TimeoutExpired:
        code, lines, errors = 124, [], [f"did not end within {_MOST_SECONDS:.0f} s"]
    measured: dict[str, Any] = next((json.loads(line[9:]) for line in lines if line.startswith("measured ")), {})
    return {
        **command.key,
        "exit_code": code,
        "error": without_folders(errors[-1])[:300] if code and errors else None,
        "seconds": time.monotonic() - start,
        "peak_bytes": measured.get("peak_bytes"),
        "result": _result_of(video),
    }


def _arguments(config: CommandsBench, command: Command, folder: Path, video: Path) -> list[str]:
    size = ["--height", str(config.height), "--width", str(config.width)]
    common = [PROMPT, "--model", str(folder), *size, "--output", str(video), "--overwrite", *command.flags]
    if FULL_SIZES[command.model].causal:
        return ["rollout", *common, "--seconds", str(config.seconds)]
    reuse = [] if "--threshold" in command.flags else ["--threshold", "1000"]  # noise changes fast
    length = ["--num-frames", str(config.num_frames), "--num-inference-steps", str(config.num_inference_steps)]
    return ["generate", *common, *length, *reuse, "--warmup-steps", "3"]


def _result_of(video: Path) -> dict[str, Any] | None:
    sidecar = video.with_suffix(".json")
    if not sidecar.is_file():
        return None
    result: dict[str, Any] = json.loads(sidecar.read_text(encoding="utf-8"))["result"]
    return {name: value for name, value in result.items() if isinstance(value, int | float | type(None))}


def _is_over(config: CommandsBench, began: float) -> bool:
    return config.budget_seconds is not None and time.monotonic() - began > config.budget_seconds


def commands_markdown(content: Mapping[str, Any]) -> str:
    """The results as a page: one row a command."""
    protocol = content["protocol"]
    lines = [
        "# `vidaccel generate` and `vidaccel rollout` as commands at full size",
        "",
        "Random weights: time, memory, and whether it runs; nothing about quality. Each row is a process, started as a "
        f"user starts it: {protocol['width']}x{protocol['height']}, {protocol['num_frames']} frames and "
        f"{protocol['num_inference_steps']} steps, or {protocol['seconds']:g} s of a rollout; at most "
        f"{protocol['parallel']} at the same time.",
        "",
        captions(content),
        "",
    ]
    header = ("model", "flags", "ended", "s in all", "s denoising", "forwards", "steps reused", "peak GB")
    lines += markdown_table(header, [_row(record) for record in content["records"]])
    return "\n".join(lines) + "\n"


def _row(record: Mapping[str, Any]) -> tuple[str, ...]:
    result = record["result"] or {}
    ended = "well" if record["exit_code"] == 0 else f"{record['exit_code']}: {record['error']}"
    seconds = result.get("denoising_seconds", result.get("seconds"))
    peak = record["peak_bytes"]
    return (
        record["model"],
        f"`{record['flags']}`" if record["flags"] else "none",
        ended,
        f"{record['seconds']:.1f}",
        "" if seconds is None else f"{seconds:.2f}",
        str(result.get("num_forwards", result.get("num_passes", ""))),
        str(result.get("num_reused", "")),
        "" if peak is None else f"{peak / 1e9:.2f}",
    )
