"""The weights of a causal Wan student into a folder of `ContextForcingWanPipeline`.

The kinds are the rows of `vidaccel.convert.students`: memory, chunk and noise levels are written to the folder's
`model_index.json`, `vidaccel.json` and scheduler, where pipeline, command line and rollout read them.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from vidaccel.convert.base_folder import BaseFolder, read_base
from vidaccel.convert.causal_wan_map import REFUSED, STUDENT
from vidaccel.convert.checkpoint import Checkpoint, find_checkpoints, is_pickled
from vidaccel.convert.chunk_frames import ChunkFrames, chunk_frames
from vidaccel.convert.folder import (
    ConvertOptions,
    ConvertProgress,
    Recipe,
    check_room,
    write_networks,
    write_settings,
)
from vidaccel.convert.formats import Format
from vidaccel.convert.plan import ConversionPlan, make_plan
from vidaccel.convert.students import LATENT_CHANNELS, STUDENTS, PublishedStudent, named_student
from vidaccel.convert.wan_layouts import student_weights, with_lora
from vidaccel.errors import UserError
from vidaccel.files.atomic import atomic_folder, check_model_folder
from vidaccel.memory import parse_memory

_FROM_BASE = ("attention_head_dim", "num_layers", "eps", "rope_max_seq_len")


@dataclass(frozen=True, kw_only=True)
class StudentFiles:
    """Where a student lies.

    checkpoint: its weights. weights: which of them, "ema", "plain" or "auto". base: a diffusers folder of the Wan model
    it was made from. lora: low-rank changes of the weights (LongLive), of scale `lora_alpha` / rank.
    """

    checkpoint: Path
    weights: str = "auto"
    base: Path | None = None
    lora: Path | None = None
    lora_alpha: float | None = None


@dataclass(frozen=True, kw_only=True)
class StudentSettings:
    """What is recorded of a student; None: what its files say, else what is published for its kind.

    chunk_frames: latent frames made at once. memory: as `parse_memory` takes it.
    """

    chunk_frames: int | None = None
    memory: str | None = None


USUAL = StudentSettings()


@dataclass(frozen=True, kw_only=True)
class Converted:
    """What was written.

    recipe: the folder, its settings as written. weights: which of the student's, ema, plain, or unnamed in the file.
    chunk: latent frames of a chunk and who says so. remark: of the kind, see `PublishedStudent`.
    """

    recipe: Recipe
    weights: str
    chunk: ChunkFrames
    remark: str = ""


def convert_causal_wan(
    files: StudentFiles,
    output: Path,
    *,
    kind: str = "auto",
    settings: StudentSettings = USUAL,
    options: ConvertOptions | None = None,
) -> Converted:
    """Write a student as a diffusers folder: its transformer, a few-step scheduler, and settings.

    With `files.base` VAE, text encoder and tokenizer are copied from there; without, they are not in the folder and are
    given to `from_pretrained`.
    kind: a `version` of `STUDENTS`; "auto" takes it from a LoRA or from the names of file and folder.
    settings: what is to be recorded instead of what the kind has.
    Raises `UserError` for files that are missing, damaged, pickled or of another model, for a base that does not fit,
    for a chunk that nothing tells or that does not fit the memory, and for an output that may not be written; nothing
    is written then.
    """
    options = options or ConvertOptions()
    given = [path for path in (files.checkpoint, files.lora, files.base) if path is not None]
    check_model_folder(output, given, overwrite=options.overwrite)
    if files.lora is None and files.lora_alpha is not None:
        raise UserError("`lora_alpha` is the scale of a LoRA and there is none; give --lora with it.")
    checkpoint, weights = student_weights(_open(files.checkpoint), files.weights)
    _check_model(checkpoint)
    student = _student(files, kind)
    if files.lora is not None:
        checkpoint = with_lora(checkpoint, _open(files.lora), files.lora_alpha)
    base = None if files.base is None else read_base(files.base)
    plan = make_plan(_form(checkpoint, base), checkpoint, dtype=options.dtype)
    _check_channels(plan)
    if base is not None:
        _check_fits(plan, base)
    chunk = _chunk(files, plan, student, settings.chunk_frames)
    recipe = _recorded(student.recipe, chunk, settings.memory)
    check_room(output, plan.num_bytes + (0 if base is None else base.num_bytes))
    with atomic_folder(output) as folder:
        _write(folder, recipe, plan, base, options)
    return Converted(recipe=recipe, weights=weights, chunk=chunk, remark=student.remark)


def _student(files: StudentFiles, kind: str) -> PublishedStudent:
    kinds = {student.recipe.version: student for student in STUDENTS}
    if kind in kinds:
        return kinds[kind]
    if kind != "auto":
        raise UserError(f"`--kind` must be one of auto, {', '.join(kinds)}; got {kind!r}.")
    if files.lora is not None:
        return kinds["longlive"]
    path = files.checkpoint.absolute()
    named = named_student((path.name, path.parent.name))
    if named is None:
        raise UserError(
            f"Nothing in the name of {files.checkpoint} says whose student it is; give --kind {' or '.join(kinds)}."
        )
    return named


def _chunk(files: StudentFiles, plan: ConversionPlan, student: PublishedStudent, given: int | None) -> ChunkFrames:
    """The chunk of a student; what is published holds for students of the same latents only."""
    known = plan.settings["in_channels"] == LATENT_CHANNELS
    source = f"published for {student.recipe.name}, nothing beside the weights says; give --chunk-frames for another"
    published = ChunkFrames(number=student.chunk_frames, source=source)
    weights = [plan.checkpoint.path, *([files.lora] if files.lora is not None else [])]
    return chunk_frames(weights, given=given, published=published if known else None)


def _recorded(recipe: Recipe, chunk: ChunkFrames, memory: str | None) -> Recipe:
    """The recipe with the chunk, and with the memory if one is given. Raises `UserError` where they do not fit."""
    memory = recipe.settings["memory"] if memory is None else memory
    try:
        parse_memory(memory, chunk.number)
    except ValueError as error:
        raise UserError(
            f"Chunks of {chunk.number} latent frames ({chunk.source}) do not fit the memory {memory}: {error} Give "
            "--memory with the one that the student was trained with."
        ) from error
    settings = dict(recipe.settings) | {"memory": memory, "chunk_frames": chunk.number}
    return replace(recipe, settings=MappingProxyType(settings))


def _open(path: Path) -> Checkpoint:
    if path.is_file() and is_pickled(path):
        raise UserError(_pickle_advice(path))
    found = find_checkpoints([path])
    if len(found) > 1:
        names = " and ".join(str(checkpoint.path) for checkpoint in found[:2])
        raise UserError(f"{path} holds {len(found)} checkpoints, {names} among them; name one of them.")
    return found[0]


def _pickle_advice(path: Path) -> str:
    """How to write the file anew: the networks side by side under the names they have in it, the critic left out."""
    code = (
        "import json, torch; from safetensors.torch import save_file; "
        f'state = torch.load({json.dumps(str(path))}, map_location="cpu", weights_only=True, mmap=True); '
        'save_file({(group + "." + name).strip("."): value.contiguous() '
        'for group, part in {"": state, **state}.items() if isinstance(part, dict) and "critic" not in group '
        "for name, value in part.items() if isinstance(value, torch.Tensor)}, "
        f"{json.dumps(str(path.with_suffix('.safetensors')))})"
    )
    return (
        f"{path} is pickled, and reading a pickle can run any code, so it is refused; if you trust it, write its "
        f"tensors to a .safetensors file with python -c {shlex.quote(code)}"
    )


def _check_model(checkpoint: Checkpoint) -> None:
    if STUDENT.recognises(checkpoint.tensors):
        return
    for form in REFUSED:
        if form.recognises(checkpoint.tensors):
            raise UserError(f"{checkpoint.path} is {form.title}: {form.refusal}.")
    first = min(checkpoint.tensors, default="nothing")
    raise UserError(
        f"{checkpoint.path} is not {STUDENT.title}: it has {len(checkpoint.tensors)} tensors, {first} first."
    )


def _form(checkpoint: Checkpoint, base: BaseFolder | None) -> Format:
    """The format, with what the base tells of a transformer of the same width and the shapes do not."""
    config: Mapping[str, Any] = {} if base is None else base.transformer
    heads, head_dim = config.get("num_attention_heads"), config.get("attention_head_dim")
    width = checkpoint.tensors["patch_embedding.weight"].shape[:1]
    if not isinstance(heads, int) or not isinstance(head_dim, int) or (heads * head_dim,) != width:
        return STUDENT
    return replace(STUDENT, settings=MappingProxyType({name: config[name] for name in _FROM_BASE if name in config}))


def _check_channels(plan: ConversionPlan) -> None:
    """Refuse a student that takes more than noisy latents: an image's latents and a mask, or a control video's."""
    taken, made = plan.settings["in_channels"], plan.settings["out_channels"]
    if taken != made:
        raise UserError(
            f"{plan.checkpoint.path} takes {taken} channels and gives {made}: it is a student of image to video or of "
            "a control video; a causal student of text to video is wanted, which takes as many as it gives."
        )


def _check_fits(plan: ConversionPlan, base: BaseFolder) -> None:
    """Refuse a base whose latents or text are of other sizes than the student's."""
    wanted = (plan.settings["in_channels"], plan.settings["text_dim"])
    given = (base.latent_channels, base.text_dim)
    if wanted != given:
        raise UserError(
            f"{plan.checkpoint.path} takes {wanted[0]} latent channels and text of {wanted[1]} numbers, and those of "
            f"{base.path} are {given[0]} and {given[1]}; give --base with the folder it was made from."
        )


def _write(
    folder: Path, recipe: Recipe, plan: ConversionPlan, base: BaseFolder | None, options: ConvertOptions
) -> None:
    classes: dict[str, Any] = {"transformer": plan.form.library_and_class}
    total = plan.num_bytes + (0 if base is None else base.num_bytes)
    report = options.on_progress

    def whole(progress: ConvertProgress) -> None:
        if report is not None:
            report(replace(progress, total=total))

    write_networks(folder, {"transformer": plan}, replace(options, on_progress=whole))
    if base is not None:
        classes |= base.classes
        done = plan.num_bytes
        for component, size in base.copy_to(folder):
            done += size
            whole(ConvertProgress(done=done, total=total, component=component))
    write_settings(folder, recipe, classes)
