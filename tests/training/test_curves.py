"""The picture of a training: what is drawn where."""

from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

from vidaccel.training import curves
from vidaccel.training.curves import draw_curves, panels

RECORDS = [
    {"step": 1, "seconds": 1.0, "loss": 0.2, "grad_norm": 1.0, "flow_loss": 0.1, "begin_loss": 0.3},
    {"step": 1, "seconds": 2.0, "held_out_beginnings": 0.2, "as_seen": 0.9, "fraction": 1.0, "true_likelihood": 0.1},
]


def test_every_loss_is_above_and_every_other_result_of_a_validation_below() -> None:
    losses, validations, likelihoods = panels(RECORDS)
    assert losses == ["loss", "flow_loss", "begin_loss", "held_out_beginnings"]
    assert (validations, likelihoods) == (["as_seen"], ["true_likelihood"])


def test_likelihoods_have_a_panel_of_their_own(tmp_path: Path) -> None:
    draw_curves(RECORDS, tmp_path / "curves.png", title="one")
    assert Image.open(tmp_path / "curves.png").size == (1020, 900)


def test_a_training_of_which_nothing_is_known_yet_has_an_empty_picture(tmp_path: Path) -> None:
    assert panels([]) == ([], [], [])
    draw_curves([], tmp_path / "curves.png", title="nothing")
    assert Image.open(tmp_path / "curves.png").size == (1020, 600)


def test_no_two_lines_of_a_training_with_many_losses_look_alike() -> None:
    axes = Figure().subplots()
    names = [f"loss {number}" for number in range(24)]
    for number, name in enumerate(names):
        curves._line(axes, [{"seconds": 1.0, name: 0.1}], name, number)
    looks = {(line.get_color(), line.get_linestyle(), line.get_marker()) for line in axes.get_lines()}
    assert len(looks) == len(names)
