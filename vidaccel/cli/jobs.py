"""Which videos a command makes, what they are called, and which of them are finished already.

A video NAME.mp4 has a sidecar NAME.json with everything that can change its pixels. A job is finished when all its
files exist and the sidecar says the same; a video with another sidecar, or none, is never overwritten unasked.
"""

import hashlib
import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vidaccel.cli.console import say_warning
from vidaccel.errors import UserError
from vidaccel.generation import GenerationRequest
from vidaccel.metrics import json_number
from vidaccel.video import VIDEO_SUFFIXES

_SLUG_LENGTH = 60
_DIGEST_BYTES = 2**16


@dataclass(frozen=True, kw_only=True)
class Job:
    """One video to make: the request, its files, and the settings its sidecar records."""

    request: GenerationRequest
    video: Path
    settings: dict[str, Any]
    compare: bool = False
    report: bool = False

    @property
    def sidecar(self) -> Path:
        """JSON with the settings and the figures of the run."""
        return self.video.with_suffix(".json")

    @property
    def side_by_side(self) -> Path:
        """The video beside its twin without reuse (`--compare`)."""
        return self.video.with_suffix(".compare.mp4")

    @property
    def report_json(self) -> Path:
        """EasyCache's decisions as numbers (`--report`)."""
        return self.video.with_suffix(".report.json")

    @property
    def report_picture(self) -> Path:
        """EasyCache's decisions as a picture (`--report`)."""
        return self.video.with_suffix(".report.png")

    @property
    def files(self) -> tuple[Path, ...]:
        """Every file a finished job has."""
        comparison = (self.side_by_side,) if self.compare else ()
        report = (self.report_json, self.report_picture) if self.report else ()
        return (self.video, self.sidecar, *comparison, *report)

    def is_same(self) -> bool:
        """Whether the sidecar on disk records the settings of this job."""
        try:
            recorded = json.loads(self.sidecar.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        return isinstance(recorded, dict) and recorded.get("settings") == plain_values(self.settings)

    def is_finished(self) -> bool:
        """Whether there is nothing left to do."""
        return self.is_same() and all(path.is_file() for path in self.files)


def read_prompts(arguments: Sequence[str], prompt_file: Path | None) -> list[str]:
    """The prompts of the command line and of a file (one a line, `#` starts a comment line), each once."""
    prompts = list(arguments)
    if prompt_file is not None:
        try:
            lines = prompt_file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"The prompt file {prompt_file} cannot be read ({error}).") from error
        found = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
        if not found:
            raise UserError(f"The prompt file {prompt_file} has no prompts; write one on each line.")
        prompts += found
    if not prompts:
        raise UserError("No prompt given; say in quotes what the video shows, or give --prompt-file.")
    unique = list(dict.fromkeys(prompts))
    if len(unique) < len(prompts):
        say_warning(f"{len(prompts) - len(unique)} prompts were given twice; each is made once.")
    return unique


def video_paths(prompts: Sequence[str], seed: int, output: Path) -> list[Path]:
    """Where each prompt's video goes: `output` itself if it names a video, else `output/<prompt>-seed<seed>.mp4`."""
    if output.suffix.lower() in VIDEO_SUFFIXES and not output.is_dir():
        if len(prompts) > 1:
            raise UserError(f"`--output` {output} names one video and there are {len(prompts)} prompts; give a folder.")
        return [output]
    if output.suffix and not output.is_dir():
        raise UserError(f"`--output` must end in {', '.join(VIDEO_SUFFIXES)} or be a folder, got {output}.")
    paths = [output / f"{slug(prompt)}-seed{seed}.mp4" for prompt in prompts]
    for number, path in enumerate(paths):
        if path in paths[:number]:
            raise UserError(f"Two prompts lead to the same file {path}; give them in two calls with two --output.")
    return paths


def slug(prompt: str) -> str:
    """A file name of the prompt: lower-case words and dashes, at most 60 characters, a digest where it was cut."""
    text = re.sub(r"[^\w]+", "-", prompt.lower()).strip("-_")
    if text and len(text.encode()) <= _SLUG_LENGTH:
        return text
    digest = hashlib.sha256(prompt.encode()).hexdigest()[:8]
    cut = text.encode()[:_SLUG_LENGTH].decode(errors="ignore").rstrip("-_")
    return f"{cut}-{digest}" if cut else digest


def unfinished(jobs: Sequence[Job], *, overwrite: bool) -> list[Job]:
    """The jobs still to do. Raises `UserError` for files in the way and for folders that cannot be written."""
    if overwrite:
        waiting = list(jobs)
    else:
        waiting = [job for job in jobs if not job.is_finished()]
        for job in waiting:
            _check_free(job)
    for folder in {job.video.parent for job in waiting}:
        check_writable(folder)
    return waiting


def check_writable(folder: Path) -> None:
    """Make `folder` and write to it once, or raise `UserError`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"Cannot write to {folder} ({error.strerror or error}); choose another --output.") from error


def request_settings(request: GenerationRequest) -> dict[str, Any]:
    """The request as plain values; the image by its digest."""
    values = {name: value for name, value in vars(request).items() if name != "image"}
    image = request.image
    values["image"] = None if image is None else hashlib.sha256(image.contiguous().numpy().tobytes()).hexdigest()
    return values


def folder_digest(folder: Path) -> str:
    """A digest of a model folder that tells two trainings apart: names, sizes, first and last 64 KiB of each file."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder).as_posix()} {size}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(_DIGEST_BYTES))
            file.seek(max(0, size - _DIGEST_BYTES))
            digest.update(file.read())
    return digest.hexdigest()


def _check_free(job: Job) -> None:
    if job.is_same():
        return  # the same video: files that are missing are added, the others come out as they are
    taken = [path for path in job.files if path.exists()]
    if taken:
        raise UserError(f"{taken[0]} exists and was made with other settings; give --overwrite or another --output.")


def plain_values(value: Any) -> Any:
    """Nested values as strict JSON holds them: lists for tuples, infinities and NaN as strings."""
    if isinstance(value, Mapping):
        return {key: plain_values(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_values(item) for item in value]
    return json_number(value) if isinstance(value, float) else value
