"""The teacher of a distillation, where it is not there yet: a round of teacher forcing that comes first.

It lies in `TEACHER_FOLDER` of the distillation's output. A finished one is used as it is; one that was stopped is begun
again, because teacher forcing keeps no optimizers, and what it would become after going on is another teacher.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

from vidaccel.errors import UserError
from vidaccel.training.causal_config import CausalTrainingConfig
from vidaccel.training.causal_trainer import causal_recipe, train_causal
from vidaccel.training.checkpoint import STATE_FILE, load_checkpoint
from vidaccel.training.loop import METRICS_FILE, Record, Schedule
from vidaccel.training.ranks import num_ranks

TEACHER_FOLDER = "teacher"
_BANK_SHARE = 0.28  # of the time, for rendering and encoding clips


def teacher_config(
    init: str, *, seconds: float | None, steps: int | None, layers: tuple[int, ...] | None, seed: int, device: str
) -> CausalTrainingConfig:
    """The settings of the round that made the embedded teacher, from `init`.

    seconds, steps: how long it is, one of them.

    Raises UserError unless one length is given.
    """
    schedule = Schedule(
        seconds=seconds,
        steps=steps,
        learning_rate=1e-3,
        decay="linear",
        flat_share=0.3,
        final_share=0.02,
        warmup_steps=100,
        num_validations=1,
    )
    return CausalTrainingConfig(
        schedule=schedule,
        seed=seed,
        device=device,
        init=init,
        layers=layers,
        bank_clips=40_000,
        bank_seconds=None if seconds is None else _BANK_SHARE * seconds,
        begin_clips=80_000,
        batch_size=96,
        begin_batch=128,
        return_share=0.3,
        change_share=0.5,
        landmark_weight=8.0,
    )


def has_teacher(config: CausalTrainingConfig, folder: Path) -> bool:
    """Whether a finished teacher of these settings lies in `folder`.

    Raises `UserError` for one of other settings, and on several cards.
    """
    if num_ranks() > 1:
        raise UserError("Teacher forcing runs on one card; make the teacher with `vidaccel train causal` first.")
    if not (folder / STATE_FILE).is_file():
        return False
    state, _ = load_checkpoint(folder, kind="causal")
    wanted = json.loads(json.dumps(causal_recipe(config)))
    names = [name for name in wanted if name != "version" and wanted[name] != state.recipe.get(name)]
    if names:
        raise UserError(f"{folder} is a teacher of other settings ({', '.join(names)}); give another --output.")
    return state.fraction >= 1


def train_teacher(
    config: CausalTrainingConfig, folder: Path, *, on_bank: Callable[[int, int], None] | None = None
) -> Iterator[Record]:
    """Train the teacher into `folder`, from the beginning; yields its records, as `train_causal` does."""
    (folder / METRICS_FILE).unlink(missing_ok=True)
    yield from train_causal(config, folder, on_bank=on_bank)
