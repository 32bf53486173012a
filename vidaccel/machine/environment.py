"""Where a figure was measured: hardware, versions, commit, command, and what the weights are worth."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import torch

from vidaccel.catalog.spec import Weights
from vidaccel.errors import UserError

COMMIT_VARIABLE = "VIDACCEL_COMMIT"  # for a copy of the code without its git folder
_PACKAGES = ("vidaccel", "diffusers", "transformers", "torchmetrics", "imageio-ffmpeg", "numpy")


def describe_environment(*, device: torch.device, weights: str, model: str) -> dict[str, Any]:
    """Everything a reader needs to judge or repeat a measurement, as plain JSON values.

    weights: "trained", "toy" (trained briefly, for tests), "random", or "external" (made elsewhere).
    """
    if weights not in get_args(Weights):
        raise UserError(f"`weights` must be one of {', '.join(get_args(Weights))}; got {weights!r}.")
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "hardware": _hardware(device),
        "versions": _versions(),
        "commit": package_commit(),
        "command": command_line(sys.argv),
        "model": without_folders(model),
        "weights": weights,
    }


def code_version() -> str:
    """The version of this package that is installed; its commit where none is."""
    return _version("vidaccel") or package_commit()


def package_commit() -> str:
    """The git commit of the code that runs, with "+changes" where files differ from it; "unknown" where none is found.

    Looked for in the checkout the package lies in, in the record pip keeps of an install from git, and in the
    variable VIDACCEL_COMMIT.
    """
    if commit := os.environ.get(COMMIT_VARIABLE):
        return commit
    package = Path(__file__).resolve().parents[1]
    if _git(package, "ls-files", "--error-unmatch", "__init__.py") is not None:
        changes = _git(package.parent, "status", "--porcelain", "--untracked-files=no")
        return f"{_git(package, 'rev-parse', 'HEAD') or 'unknown'}{'+changes' if changes else ''}"
    return _installed_commit() or "unknown"


def command_line(arguments: list[str]) -> str:
    """A command as it can be published: absolute paths are cut to their last part."""
    name = Path(arguments[0]).name
    name = "python -m vidaccel" if name == "__main__.py" else name
    return " ".join([name, *(shlex.quote(without_folders(argument)) for argument in arguments[1:])])


def without_folders(text: str) -> str:
    """`text` with absolute paths (also after `--option=`, or between commas) cut to their last parts."""
    option, equals, values = text.rpartition("=")
    parts = [Path(value).name if Path(value).is_absolute() else value for value in values.split(",")]
    return option + equals + ",".join(parts)


def hardware_line(environment: dict[str, Any]) -> str:
    """One line for a table's caption."""
    hardware, versions = environment["hardware"], environment["versions"]
    return (
        f"{hardware['name']}, torch {versions['torch']}, diffusers {versions['diffusers']}, "
        f"commit {environment['commit'][:12]}, weights: {environment['weights']}, {environment['date']}"
    )


def _hardware(device: torch.device) -> dict[str, Any]:
    described: dict[str, Any] = {"device": str(device), "cpu": _cpu_name(), "cpu_threads": torch.get_num_threads()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        described |= {"name": properties.name, "memory_bytes": properties.total_memory}
    else:
        described["name"] = f"{described['cpu']}, {torch.get_num_threads()} threads"
    return described


def _cpu_name() -> str:
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {"python": platform.python_version(), "torch": torch.__version__}
    versions |= {"cuda": torch.version.cuda}
    return versions | {package: _version(package) for package in _PACKAGES}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(folder: Path, *arguments: str) -> str | None:
    """Output of a git command, None where it fails or there is no git."""
    command = ["git", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _installed_commit() -> str | None:
    try:
        record = importlib.metadata.distribution("vidaccel").read_text("direct_url.json")
    except importlib.metadata.PackageNotFoundError:
        return None
    return json.loads(record).get("vcs_info", {}).get("commit_id") if record else None
