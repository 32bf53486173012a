"""Teacher forcing of the causal student: layouts, visibility, data, training, export."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline
from torch import Tensor
from typer.testing import CliRunner
from vidaccel.pipelines.context_forcing_wan import ContextForcingWanPipeline

from vidaccel import world
from vidaccel.catalog.registry import spec_of
from vidaccel.errors import UserError
from vidaccel.memory import MemoryConfig, parse_memory
from vidaccel.models.causal_wan import CausalWanTransformer3DModel
from vidaccel.rollout.chunk import Shot, Student
from vidaccel.rollout.loop import chunk_generators, rollout
from vidaccel.rollout.state import new_state
from vidaccel.training import app as training_app
from vidaccel.training.architecture import (
    TEXT_ENCODER_ARCHITECTURE,
    TRANSFORMER_ARCHITECTURE,
    VAE_ARCHITECTURE,
    new_scheduler,
    new_text_encoder,
    new_tokenizer,
    new_transformer,
    new_vae,
)
from vidaccel.training.causal_data import build_long_bank, long_scene, segment_captions
from vidaccel.training.causal_export import export_student
from vidaccel.training.causal_layout import ChunkLayout, chunk_layouts, chunk_sequence, draw_layouts, num_context_slots
from vidaccel.training.causal_student import (
    chunk_velocity,
    euler_sigmas,
    load_donor,
    new_student,
    roll_out,
    student_architecture,
    student_tensors,
)
from vidaccel.training.causal_trainer import CausalTask, CausalTrainingConfig, train_causal, trained_student
from vidaccel.training.checkpoint import TrainingState, load_checkpoint, save_checkpoint
from vidaccel.training.latents import caption_tokens, encoded_scenes
from vidaccel.training.loop import Schedule

MEMORY = MemoryConfig(sink_frames=2, slow_frames=2, fast_frames=4, chunk_frames=2)
SCHEDULE = Schedule(steps=4, log_steps=2, num_validations=1, warmup_steps=2)
NUM_FRAMES = 29


@pytest.fixture(scope="module")
def donor_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny untrained Wan pipeline that knows the words of the world."""
    torch.manual_seed(0)
    transformer = {"num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 32, "num_layers": 3, "freq_dim": 32}
    text = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_heads": 2}
    vae = new_vae({**VAE_ARCHITECTURE, "base_dim": 4, "dim_mult": [1, 1, 2, 2]})
    vae.register_to_config(latents_mean=[0.1] * 16, latents_std=[0.5] * 16)
    folder = tmp_path_factory.mktemp("donor")
    WanPipeline(
        tokenizer=new_tokenizer(world.vocabulary()),
        text_encoder=new_text_encoder({**TEXT_ENCODER_ARCHITECTURE, **text}, words=world.vocabulary()),
        vae=vae,
        scheduler=new_scheduler(),
        transformer=new_transformer({**TRANSFORMER_ARCHITECTURE, **transformer, "text_dim": 16}),
    ).save_pretrained(folder)
    return str(folder)


def causal_config(init: str, **changes: object) -> CausalTrainingConfig:
    config = CausalTrainingConfig(
        schedule=SCHEDULE,
        device="cpu",
        init=init,
        layers=(0, 2),
        memory=MEMORY,
        num_frames=NUM_FRAMES,
        bank_clips=2,
        batch_size=2,
        copies=2,
        validation_clips=1,
        validation_chunks=2,
        validation_steps=2,
    )
    return replace(config, **changes)


@pytest.fixture(scope="module")
def trained(donor_folder: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("causal") / "student"
    list(train_causal(causal_config(donor_folder), folder))
    return folder


@pytest.fixture(scope="module")
def task(donor_folder: str) -> CausalTask:
    """A task of which nothing is trained."""
    config = causal_config(donor_folder)
    donor = load_donor(donor_folder)
    architecture = student_architecture(donor.transformer, num_layers=2)
    student = new_student(architecture, student_tensors(donor.transformer, layers=(0, 2)))
    bank = build_long_bank(donor.vae, donor.tokenizer, seeds=range(3), num_frames=NUM_FRAMES)
    return CausalTask(student, donor, config, bank=bank, state=TrainingState(kind="causal"))


def layout_at(chunk: int, *, keyframes: list[bool]) -> ChunkLayout:
    return list(chunk_layouts(MEMORY, chunk_sizes=[2] * (chunk + 1), keyframes=keyframes))[chunk]


def weights(folder: Path) -> dict[str, Tensor]:
    return load_checkpoint(folder, kind="causal")[1]


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


def test_the_visibility_is_the_one_written_by_hand() -> None:
    layout = layout_at(4, keyframes=[False, False, True, False, False])
    assert (layout.context, layout.chunks, layout.current) == ((0, 1, 4, 6, 7), (0, 0, 2, 3, 3), (8, 9))
    sequence = chunk_sequence(layout, num_slots=6, copies=2)
    rows = [
        "11........",  # sink
        "11........",
        "111.......",  # slow
        "11111.....",  # fast
        "11111.....",
        ".....1....",  # padding
        "11111.11..",  # the first copy
        "11111.11..",
        "11111...11",  # the second one
        "11111...11",
    ]
    assert ["".join(".1"[seen] for seen in row) for row in sequence.visibility.tolist()] == rows
    assert sequence.frame_positions.tolist() == [0, 1, 2, 3, 4, 0, 5, 6, 5, 6]


def test_layouts_are_those_of_the_memory_of_a_rollout() -> None:
    uniform = MemoryConfig(keyframe_rule="uniform")
    layouts = list(chunk_layouts(uniform, chunk_sizes=[3] * 32))
    assert layouts[0].context == ()
    assert layouts[1].context == (0, 1, 2)
    assert layouts[7].context == (0, 1, 2, 6, 12, 18, 19, 20)
    assert layouts[31].context == (0, 1, 2, *range(18, 90, 6), 90, 91, 92)
    assert layouts[31].positions == tuple(range(21))
    after_image = list(chunk_layouts(MemoryConfig(), chunk_sizes=[1, 3, 3, 3], keyframes=[True] * 4))
    assert after_image[2].context == (0, 1, 2, 3)
    assert after_image[2].chunks == (0, 1, 1, 1)
    assert after_image[3].current == (7, 8, 9)


def test_drawn_layouts_cover_all_chunks_and_any_fill_of_the_memory() -> None:
    draw = random.Random(0)
    config = MemoryConfig()
    slow: set[int] = set()
    starts: set[int] = set()
    for _ in range(600):
        layout, previous = draw_layouts(config, num_frames=97, image_share=0.2, draw=draw)
        assert len(layout.context) <= num_context_slots(config) == 18
        assert layout.current[-1] < 97
        assert len(layout.current) == 3
        assert all(frame < layout.current[0] for frame in layout.context)
        assert (previous is None) == (layout.current[0] == 0)
        assert previous is None or previous.current[-1] + 1 == layout.current[0]
        slow.add(len(layout.context) - 6)
        starts.add(layout.current[0])
    assert set(range(13)) <= slow
    assert {start % 3 for start in starts} == {0, 1}
    assert 50 < len(starts) <= 64, "32 chunks from the start on and 32 after an image"


def test_hiding_takes_from_what_remembered_chunks_see_and_from_nothing_else() -> None:
    layout = layout_at(4, keyframes=[False, False, True, True, False])
    shown = chunk_sequence(layout, num_slots=6, copies=1).visibility
    hidden = [chunk_sequence(layout, num_slots=6, copies=1, hide=random.Random(i)).visibility for i in range(20)]
    assert all((visibility <= shown).all() for visibility in hidden)
    assert all(torch.equal(visibility[6:], shown[6:]) and visibility.diagonal().all() for visibility in hidden)
    assert all(visibility[0, 1] and visibility[3, 4] for visibility in hidden), "frames of one chunk see each other"
    assert 0.3 < torch.stack(hidden)[:, 3, 0].float().mean() < 0.7


def test_copies_in_one_pass_are_as_if_each_were_alone(task: CausalTask) -> None:
    layout = layout_at(3, keyframes=[False, True, False, False])
    context, noisy = torch.randn(1, 16, len(layout.context), 4, 4), torch.randn(1, 16, 4, 4, 4)
    sigmas, embeddings = torch.tensor([[0.2, 0.9]]), torch.randn(1, 8, 16)
    both = chunk_velocity(
        task.student,
        chunk_sequence(layout, num_slots=6, copies=2),
        context=context,
        noisy=noisy,
        sigmas=sigmas,
        embeddings=embeddings,
    )
    for copy, frames in enumerate((slice(0, 2), slice(2, 4))):
        alone = chunk_velocity(
            task.student,
            chunk_sequence(layout, num_slots=len(layout.context), copies=1),
            context=context,
            noisy=noisy[:, :, frames],
            sigmas=sigmas[:, copy : copy + 1],
            embeddings=embeddings,
        )
        torch.testing.assert_close(both[:, :, frames], alone)


def test_every_segment_of_a_long_clip_has_its_own_captions(donor_folder: str) -> None:
    donor = load_donor(donor_folder)
    bank = build_long_bank(donor.vae, donor.tokenizer, seeds=[12], num_frames=101)
    assert bank.segment_starts == (0, 96)
    assert bank.latents.shape == (1, 16, 26, 16, 16)
    assert (bank.latents.dtype, tuple(bank.tokens.shape)) == (torch.float16, (1, 2, 4, 32))
    scene = world.random_scene(12, num_frames=101)
    assert torch.equal(bank.tokens[0, 1, 0], caption_tokens(donor.tokenizer, [world.caption(scene, frame=96)])[0])
    assert len(set(segment_captions(scene, bank.segment_starts))) == 8
    assert [bank.segment_of(frames) for frames in ((0,), (21, 22, 23), (23, 24, 25), (24, 25))] == [0, 0, 0, 1]


def test_the_bank_holds_what_the_autoencoder_makes_of_whole_clips(donor_folder: str) -> None:
    donor = load_donor(donor_folder)
    scenes = [world.random_scene(seed, num_frames=NUM_FRAMES) for seed in (4, 5)]
    latents, coverage = encoded_scenes(donor.vae, scenes)
    in_pieces = encoded_scenes(donor.vae, scenes, piece_frames=8)
    torch.testing.assert_close(in_pieces[0], latents)
    torch.testing.assert_close(in_pieces[1], coverage)
    bank = build_long_bank(donor.vae, donor.tokenizer, seeds=[4, 5], num_frames=NUM_FRAMES)
    torch.testing.assert_close(bank.latents, ((latents.float() - 0.1) / 0.5).half(), rtol=1e-3, atol=1e-3)
    assert len(build_long_bank(donor.vae, donor.tokenizer, seeds=range(9), num_frames=5, seconds=0.0).latents) == 4


def test_in_some_scenes_the_camera_never_leaves() -> None:
    scenes = [long_scene(seed, num_frames=385, hold_share=0.3) for seed in range(200)]
    held = [scene for scene in scenes if scene.camera == "hold"]
    assert 40 < len(held) < 80
    for scene in held[:5]:
        assert len({scene.camera_x(frame) for frame in range(385)}) == 1
        assert all(scene.state(frame).objects[0].visible > 0.6 for frame in range(0, 385, 8))
        assert "pan" not in "".join(segment_captions(scene, (0, 96, 192, 288)))


def test_training_lowers_the_loss_on_the_same_batch(task: CausalTask) -> None:
    layout = layout_at(3, keyframes=[False, True, False, False])
    clips = torch.tensor([0, 1])

    def loss() -> Tensor:
        generator = torch.Generator().manual_seed(1)
        return task._flow_loss(task._batch(task.bank, layout, clips, generator), layout, generator)[0]

    start = {name: value.clone() for name, value in task.student.state_dict().items()}
    first = loss()
    for optimizer in task.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = 3e-3
    for _ in range(8):
        loss().backward()
        for optimizer in task.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    assert loss() < 0.95 * first
    task.student.load_state_dict(start)


def test_the_students_own_estimate_stands_for_the_chunk_before_and_nothing_else(task: CausalTask) -> None:
    earlier, layout = list(chunk_layouts(MEMORY, chunk_sizes=[2] * 4, keyframes=[False, True, False, False]))[-2:]
    batch = task._batch(task.bank, layout, torch.tensor([0, 2]), task.generator)
    changed = task._with_own_estimate(batch, layout, earlier)
    differs = (changed.context != batch.context).flatten(3).any(3).any(1).any(0)
    assert differs.tolist() == [frame in earlier.current for frame in layout.context]
    assert sum(differs.tolist()) == 2
    disturbed = task._disturbed(batch.context, layout.chunks) - batch.context
    assert 0 < disturbed.abs().mean() < 0.2


def test_the_same_seed_trains_the_same_student(donor_folder: str, trained: Path, tmp_path: Path) -> None:
    list(train_causal(causal_config(donor_folder, validation_clips=0), tmp_path / "again"))
    list(train_causal(causal_config(donor_folder, validation_clips=0, seed=1), tmp_path / "other"))
    assert same(weights(trained), weights(tmp_path / "again"))
    assert not same(weights(trained), weights(tmp_path / "other"))


def test_a_student_begins_as_the_kept_layers_of_its_donor(donor_folder: str) -> None:
    transformer = load_donor(donor_folder).transformer
    tensors, kept = transformer.state_dict(), student_tensors(transformer, layers=(2, 0))
    assert torch.equal(kept["blocks.0.ffn.net.2.weight"], tensors["blocks.2.ffn.net.2.weight"])
    assert torch.equal(kept["blocks.1.ffn.net.2.weight"], tensors["blocks.0.ffn.net.2.weight"])
    assert torch.equal(kept["proj_out.weight"], tensors["proj_out.weight"])
    assert not [name for name in kept if name.startswith("blocks.2.")]
    with pytest.raises(UserError, match="some of 0 to 2, got \\[3\\]"):
        student_tensors(transformer, layers=(3,))


def test_a_finished_round_is_followed_by_another_that_goes_on_from_its_weights(
    donor_folder: str, trained: Path, tmp_path: Path
) -> None:
    config = causal_config(donor_folder, schedule=replace(SCHEDULE, steps=1, learning_rate=1e-9))
    records = list(train_causal(config, tmp_path, resume=trained))
    state, tensors = load_checkpoint(tmp_path, kind="causal")
    assert (state.round, state.step, state.round_step) == (1, 5, 1)
    assert all(torch.allclose(value, tensors[name], atol=1e-5) for name, value in weights(trained).items())
    assert {"held_out_loss", "colour g1", "kept g3"} <= records[-1].keys()
    with pytest.raises(UserError, match="checkpoint of the causal, not of the transformer"):
        load_checkpoint(trained, kind="transformer")


def test_a_rollout_does_not_depend_on_how_long_it_becomes(task: CausalTask) -> None:
    memory = replace(MEMORY, keyframe_rule="uniform", keyframe_interval=4)
    embeddings, nothing = torch.randn(2, 1, 8, 16)
    noise = torch.randn(1, 16, 10, 4, 4)

    def latents(noise: Tensor, guidance_scale: float = 1.0, unconditional: Tensor = nothing) -> Tensor:
        options = {"memory": memory, "num_steps": 2, "guidance_scale": guidance_scale}
        return roll_out(task.student, embeddings, unconditional, noise=noise, **options)

    long = latents(noise)
    torch.testing.assert_close(long[:, :, :6], latents(noise[:, :, :6]))
    assert long.shape == noise.shape
    assert torch.equal(long, latents(noise, unconditional=nothing + 1))
    assert not torch.allclose(long, latents(noise, guidance_scale=3.0))
    torch.testing.assert_close(latents(noise, guidance_scale=3.0, unconditional=embeddings), long)
    assert euler_sigmas(2) == [1.0, 0.75, 0.0]


def test_the_export_holds_the_trained_weights_in_bf16(trained: Path, tmp_path: Path) -> None:
    output = export_student(tmp_path / "student", causal=trained, weights="toy")
    loaded = CausalWanTransformer3DModel.from_pretrained(output / "transformer", torch_dtype=torch.bfloat16)
    for name, value in trained_student(trained)[1].state_dict().items():
        assert torch.equal(loaded.state_dict()[name].bfloat16(), value.bfloat16()), name
    assert loaded.config.num_layers == 2
    index = json.loads((output / "model_index.json").read_text())
    assert index["_class_name"] == "ContextForcingWanPipeline"
    found = parse_memory(index["memory"], index["chunk_frames"])
    assert replace(found, similarity_threshold=MEMORY.similarity_threshold) == MEMORY
    assert index["transformer"] == ["vidaccel.models.causal_wan", "CausalWanTransformer3DModel"]
    scheduler = json.loads((output / "scheduler" / "scheduler_config.json").read_text())
    assert (scheduler["shift"], scheduler["stochastic_sampling"]) == (3.0, False)
    card = (output / "README.md").read_text()
    assert "| causal | 1 | 4 |" in card
    assert "layers 0, 2" in card
    assert (output / "transformer_curves.png").stat().st_size > 1000
    with pytest.raises(UserError, match="is there already"):
        export_student(output, causal=trained)
    with pytest.raises(UserError, match="not a complete checkpoint"):
        export_student(tmp_path / "other", causal=tmp_path / "missing")
    assert not (tmp_path / "other").exists()


def test_the_pipeline_of_the_rollout_loads_an_export_and_makes_a_clip(trained: Path, tmp_path: Path) -> None:
    output = export_student(tmp_path / "student", causal=trained, weights="toy")
    spec = spec_of(str(output))
    assert (spec.weights, spec.defaults.num_inference_steps, spec.defaults.guidance_scale) == ("toy", 4, 1.0)
    pipe = ContextForcingWanPipeline.from_pretrained(output)
    chunk = next(iter(pipe.stream("a red ball", num_chunks=1, height=32, width=32, num_inference_steps=1)))
    assert chunk.frames is not None
    assert chunk.frames.shape == (1, 5, 3, 32, 32)


def test_a_student_of_an_embedded_model_shares_its_networks(trained: Path, tmp_path: Path) -> None:
    state, tensors = load_checkpoint(trained, kind="causal")
    save_checkpoint(tmp_path / "copy", replace(state, recipe={**state.recipe, "init": "wan-tiny"}), tensors)
    output = export_student(tmp_path / "student", causal=tmp_path / "copy")
    assert json.loads((output / "vidaccel.json").read_text())["shares"] == "wan-tiny"
    assert {path.name for path in output.iterdir() if path.is_dir()} == {"transformer", "scheduler"}


def test_the_slow_rollout_is_the_fast_one_until_memory_holds_more_than_one_pass_sees(task: CausalTask) -> None:
    memory = replace(MEMORY, keyframe_rule="uniform")
    embeddings, nothing = torch.randn(2, 1, 8, 16)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    student = Student(transformer=task.student, scheduler=scheduler, num_inference_steps=3, guidance_scale=2.0)
    state = new_state(student, memory, height=4, width=4, seeds=(5,))
    shot = Shot(start_chunk=0, prompt="", embeddings=(embeddings, nothing))
    fast = [chunk.latents for chunk in rollout(student, state, [shot], num_chunks=3)]
    noise = [torch.randn(16, 2, 4, 4, generator=chunk_generators([5], chunk)[0]) for chunk in range(3)]
    slow = roll_out(
        task.student,
        embeddings,
        nothing,
        noise=torch.cat(noise, dim=1)[None],
        memory=memory,
        num_steps=3,
        guidance_scale=2.0,
    )
    torch.testing.assert_close(slow, torch.cat(fast, dim=2), rtol=1e-4, atol=1e-4)


def test_the_commands_train_and_export_and_refuse_bad_input(
    donor_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_app, "_toy_causal", lambda config: causal_config(config.init, validation_clips=0))
    student, exported = str(tmp_path / "student"), str(tmp_path / "exported")
    train = ["causal", "--toy", "--steps", "4", "--init", donor_folder, "--output", student]
    for arguments in (train, ["export-causal", "--causal", student, "--output", exported, "--weights", "toy"]):
        result = CliRunner().invoke(training_app.app, arguments)
        assert result.exit_code == 0, result.output
    assert (tmp_path / "student" / "curves.png").is_file()
    assert (tmp_path / "exported" / "transformer").is_dir()
    for changes, text in (
        (["--memory", "big"], "`memory` or `layers` cannot be read"),
        (["--layers", "first"], "`memory` or `layers` cannot be read"),
        (["--init", "nothing", "--output", str(tmp_path / "new")], "`model` must be a name that"),
        ([], "holds a checkpoint"),
    ):
        result = CliRunner().invoke(training_app.app, [*train, *changes])
        assert isinstance(result.exception, UserError)
        assert text in str(result.exception)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"copies": 0}, "`copies` must be at least 1, got 0"),
        ({"num_frames": 48}, "`num_frames` must be 4k \\+ 1"),
        ({"own_share": 1.5}, "`own_share` must be from 0 to 1, got 1.5"),
        ({"memory": replace(MEMORY, mode="official")}, "clean mode, got 'official'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes: dict[str, object], text: str) -> None:
    with pytest.raises(UserError, match=text):
        causal_config("wan-tiny", **changes)
