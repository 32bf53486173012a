"""What a benchmark is: a frozen dataclass whose fields are its protocol and the options of its command.

A field is written once, as `option(help, default)`. `vidaccel bench NAME` makes its flag from the field's name and
type, the result's protocol its record, and `run` reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

from vidaccel.bench.shared.records import ResultFile
from vidaccel.catalog.models import EMBEDDED_MODEL, EMBEDDED_STUDENT
from vidaccel.catalog.registry import spec_of
from vidaccel.errors import UserError
from vidaccel.files.text import write_text
from vidaccel.generation.loading import load_pipeline
from vidaccel.machine.environment import describe_environment, without_folders
from vidaccel.machine.private_names import execution_device
from vidaccel.models.causal_wan import CausalWanTransformer3DModel


@dataclass(frozen=True, kw_only=True)
class BenchProgress:
    """`done` of `total` parts are finished; `label` names the part that begins. Drawing it is the caller's part."""

    done: int
    total: int
    label: str


Tell = Callable[[BenchProgress], None] | None


def option(
    help: str,
    default: Any = MISSING,
    *,
    recorded: bool = True,
    flag: str | None = None,
    read: Callable[[str], Any] | None = None,
) -> Any:
    """A field of a benchmark.

    help: of the command's flag; an empty one makes no flag.
    recorded: part of the protocol, so that results with another value are other results.
    flag: where it is not the field's name. read: the value of a flag's text, where the type does not say how.
    """
    return field(default=default, metadata={"help": help, "recorded": recorded, "flag": flag, "read": read})


def changed(owner: type[Benchmark], name: str, default: Any) -> Any:
    """The option of another benchmark with a default of its own."""
    (known,) = (one for one in fields(owner) if one.name == name)
    return field(default=default, metadata=known.metadata)


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """One measurement; `name` is that of its command and of the files it writes into `output`."""

    name: ClassVar[str]

    output: Path = option("Folder for the results.", recorded=False)
    device: str = option("auto, cpu, cuda, cuda:N, mps", "auto", recorded=False)

    def run(self, *, on_progress: Tell = None) -> dict[str, Any]:
        """Measure what is missing, write the files, and return the summary."""
        raise NotImplementedError

    def path(self, suffix: str) -> Path:
        """A file of the results."""
        return self.output / f"{self.name}.{suffix}"

    def protocol(self, settled: Mapping[str, Any]) -> dict[str, Any]:
        """What all records of a result have in common: the recorded options, and `settled` in place of some.

        settled: what follows from options and model, such as a number of steps that was left to the model.
        """
        recorded = {one.name: getattr(self, one.name) for one in fields(self) if one.metadata["recorded"]}
        return {"benchmark": self.name, **recorded, **settled}

    def results(self, protocol: Mapping[str, Any], environment: Mapping[str, Any], **options: Any) -> ResultFile:
        """The result file of this protocol, begun or continued; `options` of `ResultFile`."""
        return ResultFile(self.path("json"), protocol=protocol, environment=environment, **options)

    def write_table(self, text: str) -> None:
        """Write the table for people."""
        write_text(self.path("md"), text)


@dataclass(frozen=True, kw_only=True)
class ModelBenchmark(Benchmark):
    """A measurement of a model with weights. An option that is None is the model's own setting."""

    model: str = option("A name of `vidaccel models`, a folder, or a Hub id.", EMBEDDED_MODEL)
    weights: str | None = option(
        "trained, toy, random, external: noted in the result. (default: the model's)", None, recorded=False
    )
    dtype: str = option("auto, float32, bfloat16, float16", "auto")

    def run(self, *, pipe: Any = None, on_progress: Tell = None) -> dict[str, Any]:
        """As `Benchmark.run`; `pipe` is a loaded pipeline to use instead of loading `model`."""
        raise NotImplementedError

    def loaded(self, pipe: Any) -> Any:
        """`pipe`, or the pipeline of `model` where there is none."""
        return load_pipeline(self.model, device=self.device, dtype=self.dtype) if pipe is None else pipe

    def loaded_student(self, pipe: Any) -> Any:
        """As `loaded`. Raises UserError where it is no causal student."""
        found = self.loaded(pipe)
        if not isinstance(found.transformer, CausalWanTransformer3DModel):
            raise UserError(
                f"`model` must be a causal student, and {self.model} has a {type(found.transformer).__name__}; take "
                f"{EMBEDDED_STUDENT}, or one of `vidaccel convert causal-wan`."
            )
        return found

    def student_protocol(self, pipe: Any, **settled: Any) -> dict[str, Any]:
        """As `protocol`, with how the student of `pipe` samples and what it remembers."""
        student = pipe.student()
        own = {
            "memory": pipe.config.memory,
            "num_inference_steps": student.num_inference_steps,
            "guidance_scale": student.guidance_scale,
        }
        return self.protocol({**own, **settled})

    def environment(self, pipe: Any) -> dict[str, Any]:
        """Where and with what `pipe` is measured."""
        weights = spec_of(self.model).weights if self.weights is None else self.weights
        return describe_environment(device=execution_device(pipe), weights=weights, model=self.model)

    def protocol(self, settled: Mapping[str, Any]) -> dict[str, Any]:
        return super().protocol({"model": without_folders(self.model), **settled})
