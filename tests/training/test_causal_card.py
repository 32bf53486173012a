"""The card of an exported student: what it says follows from the rounds of its training and from their results."""

from __future__ import annotations

import re
from dataclasses import replace

from vidaccel.catalog.models import EMBEDDED_STUDENT
from vidaccel.catalog.registry import spec_of
from vidaccel.memory import MemoryConfig
from vidaccel.training.causal_card import student_card
from vidaccel.training.checkpoint import TrainingState

FORCED = {
    "schedule": {"seconds": 235.0, "learning_rate": 0.001},
    "init": "wan-tiny-causal",
    "layers": None,
    "num_chunks": 15,
    "validation_steps": 4,
    "validation_chunks": 16,
}
DISTILLED = {
    "init": "wan-tiny-causal",
    "seconds": 285.0,
    "learning_rate": 0.0002,
    "num_chunks": 15,
    "validation_steps": 4,
    "validation_sampler": "stochastic",
}
TEACHER_FORCED = TrainingState(
    kind="causal",
    round_step=5768,
    seconds=492.0,
    recipe=FORCED,
    results={"as_seen": 0.984375, "held_out_returns": 0.04914, "colour": 0.96875, "kept": 0.90625},
)
HISTORY = [{"steps": 5768, "seconds": 492.0, "recipe": FORCED}]


def card(state: TrainingState, name: str = "mine") -> str:
    text = student_card(state, name=name, num_steps=4, stochastic=True)
    return re.sub(r"\s+", " ", text)


def test_it_attends_to_as_many_frames_as_the_memory_of_the_rollout_holds_its_own_chunk_included() -> None:
    memory = MemoryConfig()
    frames = memory.sink_frames + memory.slow_frames + memory.fast_frames
    assert frames == 21
    assert f"attends to at most {frames} latent frames, its own chunk included" in card(TEACHER_FORCED)


def test_results_are_said_to_be_made_by_the_sampler_that_made_them() -> None:
    assert "float32, 4 Euler steps, no guidance" in card(TEACHER_FORCED)
    distilled = replace(TEACHER_FORCED, recipe=DISTILLED, history=HISTORY, results={"as_seen": 1.0})
    assert "float32, 4 stochastic steps, no guidance" in card(distilled)
    assert "Euler" not in card(distilled)


def test_every_result_is_explained_and_only_those_that_are_there() -> None:
    text = card(TEACHER_FORCED)
    for row in (
        "| as_seen | 98.4% | the landmark oracle reads",
        "| held_out_returns | 0.0491 | loss at high noise |",
        "| colour | 96.9% | right in the first 49 frames of a rollout of 48 latent frames with one prompt |",
        "| kept | 90.6% | colour, shape and place",
    ):
        assert row in text
    assert "own_recall" not in text
    results = {"valid": 0.5, "first_visit_valid": 1.0, "first_visit_likelihood": 0.2309, "held_out_end_distance": 0.1}
    distilled = card(replace(TEACHER_FORCED, recipe=DISTILLED, history=HISTORY, results=results))
    assert "| first_visit_likelihood | 0.2309 | how clear" in distilled
    assert "loss at high noise" not in distilled
    rows = re.findall(r"\| (\w+) \| [\d.]+%? \| ([^|]*) \|", distilled.partition("## Results")[2])
    assert [name for name, _ in rows] == list(results)
    assert all(meaning for _, meaning in rows)


def test_every_round_is_told_with_its_own_settings() -> None:
    text = card(replace(TEACHER_FORCED, round=1, recipe=DISTILLED, history=HISTORY, results={"blank": 0.0}))
    first, second = text.partition("round 1: ")[2].split("round 2: ")
    assert "learning_rate 0.001" in first
    assert "seconds 235.0" in first
    assert "learning_rate 0.0002" in second
    assert "seconds 285.0" in second


def test_what_it_began_from_is_told_by_name_and_version_and_that_the_name_is_now_its_own() -> None:
    dated = replace(TEACHER_FORCED, recipe={**FORCED, "version": "0.4.0"})
    assert "begun from all layers of the transformer of `wan-tiny-causal`, as of vidaccel 0.4.0." in card(dated)
    assert "of the transformer of `wan-tiny-causal`. Teacher" in card(TEACHER_FORCED)
    replacing = card(dated, "wan-tiny-causal")
    assert "of `wan-tiny-causal`, the student that this one replaces, as of vidaccel 0.4.0." in replacing
    layers = replace(TEACHER_FORCED, recipe={**FORCED, "init": "wan-tiny", "layers": [0, 2]})
    assert "begun from layers 0, 2 of the transformer of `wan-tiny`." in card(layers)


def test_measurements_are_linked_where_they_are_kept_and_else_their_commands_named() -> None:
    assert "recall-wan-tiny-causal/recall.md" in card(TEACHER_FORCED, "wan-tiny-causal")
    assert "student-wan-tiny-causal/student.md" in card(TEACHER_FORCED, "wan-tiny-causal")
    assert "`vidaccel bench recall` and `vidaccel bench student`" in card(TEACHER_FORCED)
    assert "docs/results" not in card(TEACHER_FORCED)


def test_the_card_of_the_embedded_student_is_as_it_would_be_written_today() -> None:
    spec = spec_of(EMBEDDED_STUDENT)
    assert spec.folder is not None
    shipped = re.sub(r"\s+", " ", (spec.folder / "README.md").read_text(encoding="utf-8"))
    distilled = replace(TEACHER_FORCED, round=1, recipe=DISTILLED, history=HISTORY, results={})
    before, after = card(distilled, EMBEDDED_STUDENT).split("| network | round |")
    assert shipped.startswith(before.partition("; begun from")[0])
    assert after.partition("## Results while training")[2].partition("| what |")[0] in shipped
    assert shipped.endswith(after.rpartition("|---|---|---|")[2])
