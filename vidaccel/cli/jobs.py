"""Which videos a command makes, what they are called, and which of them are finished already.

A video NAME.mp4 has a sidecar NAME.json with everything that can change its pixels and the names of its files. It is
written before them, so that a command that was killed in between can be run again. A job is finished when all its
files exist and the sidecar says the same; a file that the sidecar does not list is never overwritten unasked.
"""

import hashlib
import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vidaccel.catalog.spec import ModelSpec
from vidaccel.cli.console import say_warning
from vidaccel.errors import UserError
from vidaccel.files.differences import differences
from vidaccel.files.text import plain_values, read_prompt_file, write_json
from vidaccel.generation.expert_files import LoraFile, TransformerFile
from vidaccel.generation.options import check_options
from vidaccel.generation.request import GenerationRequest
from vidaccel.video.paths import VIDEO_SUFFIXES
from vidaccel.video.rate import check_rate

_SLUG_LENGTH = 60
_SHOWN = 3  # differences that an error line names
_MEDIA_SUFFIX = re.compile(r"\.[A-Za-z][A-Za-z0-9]{1,3}")  # a folder may be called wan2.1


@dataclass(frozen=True, kw_only=True)
class SharedSettings:
    """What all videos of one command share.

    easycache: the settings that the command was given; what is left out is published for the model. None without reuse.
    """

    spec: ModelSpec
    easycache: Mapping[str, Any] | None
    device: str
    dtype: str
    attention: str
    offload: str
    compile_blocks: bool
    loras: tuple[LoraFile, ...] = ()
    transformer_files: tuple[TransformerFile, ...] = ()
    fps: float
    compare: bool
    report: bool

    def __post_init__(self) -> None:
        check_options(device=self.device, dtype=self.dtype, offload=self.offload, compile=self.compile_blocks)
        check_rate(self.fps)


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

    @property
    def possible_files(self) -> tuple[Path, ...]:
        """Every file a job of this name can have."""
        return (self.video, self.sidecar, self.side_by_side, self.report_json, self.report_picture)

    def recorded(self) -> dict[str, Any]:
        """What the sidecar on disk says if it records the settings of this job, else nothing."""
        recorded = _read_object(self.sidecar)
        return recorded if recorded.get("settings") == plain_values(self.settings) else {}

    def own_files(self) -> list[Path]:
        """The files on disk that an earlier run made with the settings of this job."""
        return _listed(self, self.recorded())

    def is_finished(self) -> bool:
        """Whether there is nothing left to do."""
        return set(self.files) <= set(self.own_files())

    def write_sidecar(self, content: Mapping[str, Any]) -> None:
        """Write the sidecar, before the files it lists; what other settings made (`--overwrite`) goes first.

        Without that a file of other settings would pass for one of this job after the next interrupt.
        """
        recorded = self.recorded()
        if not recorded:
            for path in {*self.files, *_listed(self, _read_object(self.sidecar))}:
                path.unlink(missing_ok=True)
        names = sorted({path.name for path in (*self.files, *_listed(self, recorded))})
        news = {name: value for name, value in content.items() if value is not None}
        write_json(self.sidecar, plain_values({**content, **recorded, **news, "files": names}))


def read_prompts(arguments: Sequence[str], prompt_file: Path | None) -> list[str]:
    """The prompts of the command line and of a file (one a line, `#` starts a comment line), each once."""
    prompts = list(arguments)
    if prompt_file is not None:
        prompts += read_prompt_file(prompt_file)
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
    if _MEDIA_SUFFIX.fullmatch(output.suffix) and not output.is_dir():
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
    waiting = [job for job in jobs if overwrite or not job.is_finished()]
    for job in waiting:
        _check_files(job)
        if not overwrite:
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
    """The request as plain values; pictures and clips by their digests."""
    values = {name: value for name, value in vars(request).items() if name != "inputs"}
    digests = {
        name: hashlib.sha256(f"{tuple(tensor.shape)}".encode() + tensor.contiguous().numpy().tobytes()).hexdigest()
        for name, tensor in request.inputs.items()
    }
    return {**values, "arguments": dict(request.arguments), "inputs": digests}


def _check_free(job: Job) -> None:
    own = job.own_files()  # the same video: files that are missing are added, the others come out as they are
    taken = [path for path in job.files if path.exists() and path not in own]
    if taken:
        raise UserError(
            f"{taken[0]} exists and was not made with these settings{_what_differs(job)}; give --overwrite or another "
            "--output."
        )


def _what_differs(job: Job) -> str:
    """In brackets what the sidecar on disk records otherwise, the first of many; nothing where there is none."""
    recorded = _read_object(job.sidecar).get("settings")
    if not isinstance(recorded, dict):
        return ""
    found = [words for words in differences(recorded, plain_values(job.settings)) if "digest" not in words]
    more = [f"and {len(found) - _SHOWN} more"] if len(found) > _SHOWN else []
    return f" ({'; '.join([*found[:_SHOWN], *more])})" if found else ""


def _check_files(job: Job) -> None:
    for path in job.files:
        if path.is_dir():
            raise UserError(f"{path} is a folder and the name of a file to write; choose another --output.")


def _listed(job: Job, sidecar: Mapping[str, Any]) -> list[Path]:
    names = sidecar.get("files")
    return [path for path in job.possible_files if isinstance(names, list) and path.name in names and path.is_file()]


def _read_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
