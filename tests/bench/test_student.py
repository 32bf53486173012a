"""The student benchmark: what is read in the world itself, figures of made-up tries, and all of it at toy size."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.tiny_models import save_student, tiny_student
from vidaccel.bench.student import student
from vidaccel.bench.student.changes import KEPT, PART, is_obeyed, kept_of, measure_changes
from vidaccel.bench.student.readings import SeenLandmark, Shown, read_part, sharpness_of
from vidaccel.bench.student.rollouts import Filming, Sampler, Script, encoded_trips, first_pixel
from vidaccel.bench.student.scenes import SETTINGS, covering_scenes, scene_prompt
from vidaccel.bench.student.student import StudentBench
from vidaccel.bench.student.subjects import staying_prompts
from vidaccel.bench.student.summary import summarise_student
from vidaccel.bench.student.visits import measure_visits
from vidaccel.cli import run
from vidaccel.errors import UserError
from vidaccel.rollout.skipping import StepSkipping
from vidaccel.world import CHANGES, FRAME_SIZE, asked_by, change_trip, render, render_trips
from vidaccel.world.landmark_oracle import VALID_LIKELIHOOD

MARK = SeenLandmark(kind="house", colour="rose", x=88.0, likelihood=2 * VALID_LIKELIHOOD)
SHOWN = Shown(
    colour="red",
    shape="ball",
    motion="hop",
    background="snow",
    background_distance=1.0,
    sharpness=100.0,
    landmark=MARK,
)
ASKED = {
    "colour": "red",
    "shape": "ball",
    "motion": "hop",
    "background": "snow",
    "landmark": "house",
    "landmark colour": "rose",
    "landmark place": 88.0,
}


@pytest.fixture
def filming(tiny_wan_folder: Path) -> Filming:
    return Filming(pipe=tiny_student(tiny_wan_folder))


def told(filming: Filming) -> Filming:
    """The same with a random transformer that is told of its camera."""
    pipe = filming.pipe
    torch.manual_seed(0)
    pipe.transformer = type(pipe.transformer)(**{**pipe.transformer.config, "camera_dim": 8}).eval()
    return filming


def test_the_world_itself_obeys_every_change_and_keeps_everything_else() -> None:
    for attribute in CHANGES:
        trip = change_trip(4, attribute)
        change = first_pixel(trip.spans[1].start_chunk)
        video = render_trips([trip], num_frames=change + 48 + PART)[0]
        before, after = read_part(video[change - PART : change]), read_part(video[change + 48 :])
        asked = [_asked_of(trip, number) for number in (0, 1)]
        assert is_obeyed(before, asked[0], attribute), attribute
        assert is_obeyed(after, asked[1], attribute), attribute
        assert not is_obeyed(before, asked[1], attribute), attribute
        kept = kept_of(before, after, asked)
        assert set(kept) == set(KEPT) - {attribute}
        assert all(kept.values()), (attribute, kept)


def _asked_of(trip: Any, number: int) -> dict[str, Any]:
    span = trip.spans[number]
    mark = span.landmarks[trip.subject_stop]
    subject = {name: getattr(span.subject, name) for name in ("colour", "shape", "motion")}
    place = mark.x - FRAME_SIZE * trip.subject_stop
    own = {"landmark": mark.kind, "landmark colour": mark.colour, "landmark place": round(place, 2)}
    return subject | {"background": span.background} | own


def test_kept_is_what_was_read_before_and_not_what_was_asked_for() -> None:
    asked = [ASKED, ASKED | {"colour": "blue"}]
    other = replace(SHOWN, shape="star", background="night")
    assert all(kept_of(other, other, asked).values())  # wrong before, and still so
    assert "colour" not in kept_of(SHOWN, SHOWN, asked)
    found = kept_of(SHOWN, replace(other, landmark=replace(MARK, x=95.0, colour="teal")), asked)
    names = ("shape", "motion", "background", "landmark", "landmark colour", "landmark place")
    assert found == dict(zip(names, (False, True, False, True, False, True), strict=True))
    assert not kept_of(SHOWN, replace(SHOWN, landmark=replace(MARK, x=97.0)), asked)["landmark place"]


def test_a_landmark_that_is_not_valid_is_none() -> None:
    ghost = replace(SHOWN, landmark=replace(MARK, likelihood=VALID_LIKELIHOOD / 2))
    asked = [ASKED, ASKED | {"colour": "blue"}]
    assert is_obeyed(SHOWN, ASKED, "landmark")
    assert not is_obeyed(ghost, ASKED, "landmark")
    assert not any(kept_of(SHOWN, ghost, asked)[name] for name in KEPT if name.startswith("landmark"))
    assert not [name for name in kept_of(ghost, SHOWN, asked) if name.startswith("landmark")]


def test_a_reading_is_the_same_after_json() -> None:
    assert Shown.from_dict(json.loads(json.dumps(SHOWN.to_dict()))) == SHOWN


def test_a_mixture_of_two_backgrounds_is_not_clear_and_a_blur_is_less_sharp() -> None:
    scenes = list(zip(range(3), covering_scenes(0), strict=False))
    clips = [render([scene], num_frames=33)[0] for _, scene in scenes]
    readings = [read_part(clip) for clip in clips]
    assert all(one.is_clear for one in readings)
    assert [one.background for one in readings] == [scene.background for _, scene in scenes]
    one, other = clips[0], render([replace(scenes[0][1], background="night")], num_frames=33)[0]
    assert scenes[0][1].background != "night"
    assert not read_part((one + other) / 2).is_clear
    blurred = torch.nn.functional.avg_pool2d(one[-1:], 5, stride=1, padding=2)[0]
    assert sharpness_of(blurred) < sharpness_of(one[-1]) / 3
    assert sharpness_of(torch.full((3, 8, 8), 0.5)) == pytest.approx(0, abs=1e-6)


def test_landmarks_of_covering_scenes_stand_behind_the_subject() -> None:
    for _, scene in zip(range(5), covering_scenes(1), strict=False):
        (x, _), motion = scene.subject_xy(0), scene.subject.motion
        assert min(abs(mark.x - x) for mark in scene.landmarks) <= 20
        assert motion in ("still", "hop", "loop")
        assert scene.camera_x(0) == scene.camera_x(60)


def test_unusual_prompts_say_what_they_are_called() -> None:
    prompts = staying_prompts(40)
    assert len({one.text for one in prompts}) == 40
    for number, one in enumerate(prompts):
        plain, near = (asked_by(scene_prompt(one, setting, number)) for setting in SETTINGS[:2])
        subject = (one.colour, one.shape, one.motion)
        assert (plain.colour, plain.shape, plain.motion) == (near.colour, near.shape, near.motion) == subject
        assert (plain.background, plain.landmark) == (None, None)
        assert near.background == one.background
        assert near.landmark is not None
    assert "an orange" in scene_prompt(next(one for one in prompts if one.colour == "orange"), SETTINGS[0], 0)


def test_videos_made_together_are_those_made_alone_in_the_order_of_their_scripts(filming: Filming) -> None:
    scripts = [
        Script(seed=1, prompts=((0, "a red circle moves left"), (2, "a blue circle moves left"))),
        Script(seed=2, prompts=((0, "a green square on the sky"),)),
        Script(seed=3, prompts=((0, "a red square"), (2, "a blue square"))),
    ]
    together = filming.film(scripts, 3)
    for place, script in enumerate(scripts):
        torch.testing.assert_close(filming.film([script], 3)[0], together[place], atol=2e-4, rtol=0)
    given = together[1, :, :6]
    begun = filming.film([replace(scripts[1], given=given)], 3)[0]
    assert torch.equal(begun[:, :6], given)
    assert torch.equal(begun[:, 6:], filming.film([scripts[1]], 3)[0][:, 6:])  # what was given is what it made


def test_a_part_that_is_decoded_alone_is_that_of_the_whole_video_the_more_the_longer_the_decoder_warms_up(
    filming: Filming, monkeypatch: pytest.MonkeyPatch
) -> None:
    latents = torch.randn(1, 16, 9, 4, 4, generator=torch.Generator().manual_seed(0))
    whole = filming.decode(latents, 0, 33)
    assert whole.shape == (1, 33, 3, 32, 32)
    assert torch.equal(filming.decode(latents, 5, 12), whole[:, 5:12])
    for start, stop in ((20, 32), (21, 22), (25, 29)):
        errors = []
        for warm_up in (1, 3, 9):
            monkeypatch.setattr("vidaccel.bench.student.rollouts._WARM_UP", warm_up)
            part = filming.decode(latents, start, stop)
            assert part.shape[1] == stop - start
            errors.append(float((part.float() - whole[:, start:stop].float()).abs().mean()))
        assert errors[0] > errors[1] > errors[2] == 0


def test_a_sampler_takes_euler_steps_fewer_or_leaves_some_out(filming: Filming) -> None:
    usual, euler = Sampler.parse("student").student(filming.pipe), Sampler.parse("euler:3").student(filming.pipe)
    assert usual == filming.pipe.student()
    assert euler.num_inference_steps == 3
    assert not euler.scheduler.config.stochastic_sampling
    fewer, skipping = Sampler.parse("steps:3").student(filming.pipe), Sampler.parse("skip:2").student(filming.pipe)
    assert (fewer.num_inference_steps, fewer.scheduler) == (3, usual.scheduler)
    assert skipping == replace(usual, skipping=StepSkipping(steps=(2,)))
    for text in ("euler", "euler:0", "heun:4", ""):
        with pytest.raises(UserError, match="euler:8"):
            Sampler.parse(text)


def test_a_given_change_begins_with_the_worlds_own_video(filming: Filming, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Script] = []
    film = Filming.film

    def spied(self: Filming, scripts: Sequence[Script], num_chunks: int) -> Tensor:
        seen.extend(scripts)
        return film(self, scripts, num_chunks)

    monkeypatch.setattr(Filming, "film", spied)
    made = [measure_changes(filming, "colour", count=1, seed=0, is_given=is_given) for is_given in (False, True)]
    (plain, given), trip = seen, change_trip(0, "colour")
    assert (plain.prompts, plain.seed, plain.given) == (given.prompts, given.seed, None)
    assert torch.equal(given.given, encoded_trips(filming.pipe.vae, [trip], trip.spans[1].start_chunk)[0])
    assert [rows[0].label for rows in (one.rows for one in made)] == ["colour, before", "given, colour, before"]
    assert made[0].tries[0]["world"] == made[1].tries[0]["world"]


def test_the_camera_of_a_first_visit_leads_to_its_place(filming: Filming) -> None:
    made = {name: measure_visits(told(filming), name, count=1, seed=0) for name in ("truth", "given", "nothing")}
    assert all(len(one.tries) == 1 for one in made.values())
    prompts = [[each["prompt"] for each in one.tries] for one in made.values()]
    assert prompts[0] == prompts[1] == prompts[2]
    stills = [one.rows[0].pictures for one in made.values()]
    assert stills[0].shape == (1, 3, FRAME_SIZE, FRAME_SIZE)
    assert not torch.equal(stills[1], stills[2])


def test_students_of_other_chunks_are_refused(filming: Filming) -> None:
    filming.pipe.register_to_config(chunk_frames=2)
    with pytest.raises(UserError, match="chunks of 3 latent frames of 4 frames each; this student makes 2 of 4"):
        replace(filming)


def tries_of(*pairs: tuple[Shown, Shown], attribute: str = "colour") -> dict[str, Any]:
    """Made-up changes: what was shown before, and 1, 2, 3 seconds after."""
    asked = [ASKED, ASKED | {attribute: "blue"}]
    tries = [
        {
            "asked": asked,
            "shown": {"before": before.to_dict(), **{str(wait): after.to_dict() for wait in (1, 2, 3)}},
            "world": {"before": SHOWN.to_dict(), "3": replace(SHOWN, colour="blue").to_dict()},
        }
        for before, after in pairs
    ]
    return {"part": "changes", "of": attribute, "sampler": "student", "tries": tries}


def test_changes_are_counted_obeyed_kept_and_without_landmark() -> None:
    ghost = replace(MARK, likelihood=0.0)
    blue = replace(SHOWN, colour="blue")
    record = tries_of(
        (SHOWN, blue), (SHOWN, replace(blue, shape="star")), (SHOWN, SHOWN), (SHOWN, replace(blue, landmark=ghost))
    )
    summary = summarise_student([record])
    (row,) = summary["changes"]
    assert row["obeyed"]["3"]["correct"] == 3
    assert row["within"]["correct"] == 3
    assert row["before"]["correct"] == row["before"]["count"] == 4
    assert (row["kept"]["all"]["correct"], row["kept"]["shape"]["correct"]) == (2, 3)
    assert row["kept"]["colour"] is None
    assert row["world"]["obeyed"]["share"] == row["world"]["all"]["share"] == 1
    (ghosts,) = summary["ghosts"]
    assert (ghosts["share"]["correct"], ghosts["share"]["count"]) == (1, 8)


def test_given_changes_are_rows_of_their_own_and_no_ghosts() -> None:
    plain = tries_of((SHOWN, SHOWN))
    given = tries_of((SHOWN, replace(SHOWN, colour="blue"))) | {"part": "given"}
    summary = summarise_student([plain, given])
    assert [row["within"]["correct"] for row in (*summary["changes"], *summary["given"])] == [0, 1]
    assert summarise_student([plain]) == summary | {"given": []}


def test_a_change_that_is_obeyed_for_a_while_is_obeyed_within_the_last_wait() -> None:
    record = tries_of((SHOWN, SHOWN), (SHOWN, SHOWN), (SHOWN, replace(SHOWN, colour="blue")))
    record["tries"][0]["shown"]["1"] = replace(SHOWN, colour="blue").to_dict()
    (row,) = summarise_student([record])["changes"]
    assert [row["obeyed"][wait]["correct"] for wait in ("1", "2", "3")] == [2, 1, 1]
    assert row["within"]["correct"] == 2


def visits_of(of: str, *marks: SeenLandmark) -> dict[str, Any]:
    return {"part": "visits", "of": of, "sampler": "student", "tries": [{"landmark": vars(mark)} for mark in marks]}


def test_first_visits_are_set_against_the_truth_and_collapse_shows_as_few_bits() -> None:
    sharp = replace(MARK, likelihood=0.2)
    truth = visits_of(
        "truth", sharp, replace(sharp, kind="rock"), replace(sharp, kind="tent"), replace(sharp, kind="pine")
    )
    own = visits_of("nothing", *[replace(sharp, likelihood=0.1)] * 3, replace(MARK, likelihood=0.0, kind="tree"))
    summary = summarise_student([truth, own])
    rows = {row["of"]: row for row in summary["visits"]}
    assert rows["nothing"]["of_truth"] == pytest.approx(0.375)
    assert rows["nothing"]["valid"]["correct"] == 3
    assert (rows["truth"]["entropy"], rows["nothing"]["entropy"]) == (2, 0)
    assert rows["nothing"]["kinds"] == {"house": 3}
    assert summary["ghosts"] == [{"part": "visits", "share": rows["nothing"]["valid"] | summary["ghosts"][0]["share"]}]
    assert summary["ghosts"][0]["share"]["correct"] == 1
    assert summarise_student([own])["visits"][0]["of_truth"] is None


def test_colours_between_two_are_counted_of_valid_landmarks_before_after_and_at_first_visits() -> None:
    pure, mixed, ghost = replace(MARK, purity=0.9), replace(MARK, purity=0.1), replace(MARK, likelihood=0.0, purity=0.9)
    before, after = replace(SHOWN, landmark=pure), replace(SHOWN, landmark=mixed)
    records = [
        tries_of((before, after), (replace(SHOWN, landmark=ghost), after), attribute="landmark"),
        tries_of((after, after)),
        visits_of("truth", pure, pure),
        visits_of("given", pure, mixed, ghost),
    ]
    summary = summarise_student(records)
    rows = {
        row["of"]: (row["one"]["correct"], row["one"]["count"], row["purity"]["mean"]) for row in summary["colours"]
    }
    assert rows == {
        "before changes": (1, 2, pytest.approx(0.5)),
        "after changes of the landmark": (0, 2, pytest.approx(0.1)),
        "the world after the autoencoder": (2, 2, pytest.approx(0.9)),
        "first visits, begun with given": (1, 2, pytest.approx(0.5)),
    }
    unread = summarise_student([tries_of((SHOWN, SHOWN)), visits_of("given", MARK)])
    assert unread["colours"] == [], "of results from before it was read"


def test_it_says_what_it_cannot_do() -> None:
    for changes, words in [
        ({"parts": ()}, "`parts` must be of changes, visits, subjects, scenes, given; got none"),
        ({"parts": ("recall",)}, "got recall"),
        ({"num_visits": 0}, "`num_visits` must be at least 1, got 0"),
        ({"seconds": 12}, "`seconds` must be a multiple of 5, got 12"),
        ({"samplers": ()}, "`samplers` must name at least one"),
        ({"samplers": ("euler",)}, "euler:8"),
    ]:
        with pytest.raises(UserError, match=words):
            StudentBench(output=Path("x"), **changes)  # type: ignore[arg-type]


@pytest.fixture
def student_folder(tiny_wan_folder: Path, tmp_path: Path) -> Path:
    pipe = tiny_student(tiny_wan_folder)
    return save_student(pipe, tmp_path / "student", height=FRAME_SIZE, width=FRAME_SIZE)


def test_all_of_it_at_toy_size_without_a_camera_and_nothing_is_made_twice(
    student_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(student, "CHANGES", ("motion",))
    monkeypatch.setattr(student, "SETTINGS", SETTINGS[2:])
    output = tmp_path / "results"
    counts = [f"--num-{part}=1" for part in ("changes", "visits", "subjects", "scenes")]
    arguments = ["bench", "student", "--output", str(output), "--model", str(student_folder), "--device", "cpu"]
    arguments += [*counts, "--seconds", "5"]
    assert run([*arguments, "--parts", "subjects,scenes"]) == 0
    assert run(arguments) == 0
    assert {path.name for path in output.iterdir()} == {"student.json", "student.md", "student.png", "pictures"}
    assert (output / "pictures" / "sheet.png").stat().st_size > 1000
    result = json.loads((output / "student.json").read_text())
    assert [record["part"] for record in result["records"]] == ["subjects", "scenes", "changes"]
    assert [len(one["shown"]) for one in result["records"][0]["tries"]] == [1]
    (change,) = result["records"][-1]["tries"]
    assert change["asked"][0]["motion"] != change["asked"][1]["motion"]
    assert [asked_by(text).motion for text in change["prompts"]] == [one["motion"] for one in change["asked"]]
    assert list(change["shown"]) == ["before", "1", "2", "3"]
    text = (output / "student.md").read_text()
    assert "First visits were left out" in text
    assert all(f"## {title}" in text for title in ("Soft changes of the prompt", "One prompt", "Unusual", "Ghosts"))

    def never(*_: object, **__: object) -> None:
        raise AssertionError("this was measured before")

    for name in ("changes", "subjects", "scenes"):
        monkeypatch.setattr(student, f"measure_{name}", never)
    stored = (output / "student.json").read_text()
    assert run(arguments) == 0
    assert json.loads((output / "student.json").read_text())["records"] == json.loads(stored)["records"]
