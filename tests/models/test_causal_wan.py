"""The causal Wan transformer: equal to diffusers' where all is seen, and its cached way equal to its full pass."""

from __future__ import annotations

import pytest
import torch
from diffusers import WanTransformer3DModel

from tests.support.tiny_causal import CONFIG, HEIGHT, WIDTH, causal_model, memory_of, text, video
from vidaccel.memory import MemoryConfig
from vidaccel.memory.rotary import rotate
from vidaccel.models.causal_wan import CausalWanTransformer3DModel

ATOL = 1e-5


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def test_it_takes_diffusers_weights_and_config_and_gives_the_same_where_every_frame_is_seen():
    original = WanTransformer3DModel(**CONFIG)
    model = CausalWanTransformer3DModel.from_config(original.config)
    model.load_state_dict(original.state_dict())
    latents, times = video(5, batch_size=2), torch.tensor([500.0, 300.0])
    expected = original(latents, times, text(2), return_dict=False)[0]
    assert torch.equal(model(latents, times, text(2), return_dict=False)[0], expected)
    assert torch.equal(model(latents, times, text(2), chunk_frames=5).sample, expected)


def test_a_timestep_a_frame_is_diffusers_timestep_a_token():
    original, model = WanTransformer3DModel(**CONFIG), causal_model()
    model.load_state_dict(original.state_dict())
    times = torch.tensor([[0.0, 250.0, 900.0]])
    tokens = times.repeat_interleave(HEIGHT * WIDTH // 4, dim=1)
    expected = original(video(3), tokens, text(), return_dict=False)[0]
    torch.testing.assert_close(model(video(3), times, text(), return_dict=False)[0], expected, atol=ATOL, rtol=0)


@pytest.mark.parametrize("chunk_frames", [1, 3, 4])
def test_a_chunk_does_not_see_later_chunks(chunk_frames: int):
    model, latents = causal_model(), video(12)
    full = model(latents, torch.zeros(1), text(), chunk_frames=chunk_frames).sample
    begin = model(latents[:, :, :chunk_frames], torch.zeros(1), text(), chunk_frames=chunk_frames).sample
    torch.testing.assert_close(full[:, :, :chunk_frames], begin, atol=ATOL, rtol=0)
    changed = latents.clone()
    changed[:, :, -1] += 1
    after = model(changed, torch.zeros(1), text(), chunk_frames=chunk_frames).sample
    assert torch.equal(after[:, :, :-chunk_frames], full[:, :, :-chunk_frames])
    assert not torch.allclose(after[:, :, -chunk_frames:], full[:, :, -chunk_frames:])


@pytest.mark.parametrize(
    ("config", "num_frames"),
    [
        (MemoryConfig(keyframe_rule="none", prefill="linear"), 21),
        (MemoryConfig.full(24), 24),
        (MemoryConfig.sliding_window(21), 21),
        (MemoryConfig(sink_frames=4, slow_frames=4, fast_frames=8, chunk_frames=4, prefill="linear"), 16),
        (MemoryConfig(sink_frames=1, slow_frames=2, fast_frames=3, chunk_frames=1, prefill="linear"), 6),
        (MemoryConfig(keyframe_rule="none", mode="official"), 21),
    ],
)
def test_the_cached_passes_equal_one_full_pass_while_nothing_was_evicted(config: MemoryConfig, num_frames: int):
    """Behaviours 11, 13, 16: rotation at read is rotation before storage, for any chunk size."""
    model, latents = causal_model(), video(num_frames, batch_size=2)
    memory, prompt = memory_of(model, config, batch_size=2), model.cache_prompt(text(2))
    outputs = []
    for chunk in latents.split(config.chunk_frames, dim=2):
        memory.begin_chunk()
        model(torch.randn_like(chunk), torch.full((2,), 700.0), prompt, memory=memory)
        outputs.append(model(chunk, torch.zeros(2), prompt, memory=memory).sample)
        memory.commit()
    full = model(latents, torch.zeros(2), text(2), chunk_frames=config.chunk_frames).sample
    torch.testing.assert_close(torch.cat(outputs, dim=2), full, atol=1e-4, rtol=0)


def test_a_cached_chunk_equals_a_full_pass_over_what_is_attended():
    """After evictions: the slow twin is one pass whose rows and positions are the memory's index."""
    config = MemoryConfig(sink_frames=3, slow_frames=3, fast_frames=6, keyframe_rule="uniform")
    model = causal_model(num_layers=1)  # with one block, keys depend on a frame alone
    memory, latents = memory_of(model, config), video(45)
    for chunk in latents.split(3, dim=2):
        memory.begin_chunk()
        cached = model(chunk, torch.zeros(1), text(), memory=memory).sample
        frames = [entry.frame for entry in memory.indexes[0].entries]
        twin = model(
            latents[:, :, frames], torch.zeros(1), text(), frame_positions=torch.tensor(memory.indexes[0].positions)
        ).sample
        torch.testing.assert_close(cached, twin[:, :, -3:], atol=ATOL, rtol=0)
        memory.commit()


def test_only_distances_between_positions_matter():
    """Behaviour 12: a shift of all positions changes nothing, a shift of the first frame alone does."""
    model, latents = causal_model(), video(6)

    def at(positions: list[int]) -> torch.Tensor:
        return model(latents, torch.zeros(1), text(), frame_positions=torch.tensor(positions)).sample

    plain = at([0, 1, 2, 3, 4, 5])
    torch.testing.assert_close(at([40, 41, 42, 43, 44, 45]), plain, atol=ATOL, rtol=0)
    assert not torch.allclose(at([0, 11, 12, 13, 14, 15]), plain, atol=1e-3)


def test_visibility_is_obeyed_frame_by_frame():
    model, latents = causal_model(), video(4)
    sees = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [1, 0, 0, 1]], dtype=torch.bool)
    output = model(latents, torch.zeros(1), text(), visibility=sees).sample
    positions = torch.tensor([0, 3])
    pair = model(latents[:, :, [0, 3]], torch.zeros(1), text(), chunk_frames=1, frame_positions=positions).sample
    torch.testing.assert_close(output[:, :, [0, 3]], pair, atol=ATOL, rtol=0)
    alone = model(latents[:, :, 2:3], torch.zeros(1), text(), frame_positions=torch.tensor([2])).sample
    torch.testing.assert_close(output[:, :, 2:3], alone, atol=ATOL, rtol=0)


def test_a_prompt_is_projected_once_for_any_number_of_passes(monkeypatch: pytest.MonkeyPatch):
    """Behaviour 25: the cross-attention's keys are computed once a prompt, and the output is that without a cache."""
    model, calls = causal_model(), []
    for block in model.blocks:
        block.attn2.to_k.register_forward_hook(lambda *_: calls.append(1))
    prompt = model.cache_prompt(text())
    outputs = [model(video(3, seed=seed), torch.zeros(1), prompt).sample for seed in range(4)]
    assert len(calls) == CONFIG["num_layers"]
    for seed, output in enumerate(outputs):
        assert torch.equal(output, model(video(3, seed=seed), torch.zeros(1), text()).sample)
    other = model(video(3, seed=0), torch.zeros(1), model.cache_prompt(text(seed=9))).sample
    assert not torch.allclose(other, outputs[0], atol=1e-4)


def test_fused_projections_change_nothing():
    model, latents = causal_model(), video(3)
    before = model(latents, torch.zeros(1), text()).sample
    model.fuse_qkv_projections()
    torch.testing.assert_close(model(latents, torch.zeros(1), text()).sample, before, atol=ATOL, rtol=0)


def test_checkpointed_gradients_of_a_full_pass_are_the_gradients():
    model, gradients = causal_model().train(), []
    with torch.enable_grad():
        for checkpointing in (False, True):
            (model.enable_gradient_checkpointing if checkpointing else model.disable_gradient_checkpointing)()
            model.zero_grad()
            model(video(6), torch.zeros(1), text(), chunk_frames=3).sample.square().mean().backward()
            gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(checkpointed, plain, rtol=1e-5, atol=1e-8)


def test_what_cannot_be_is_refused():
    model = causal_model()
    memory = memory_of(model, MemoryConfig())
    memory.begin_chunk()
    with pytest.raises(ValueError, match="memory"):
        model(video(3), torch.zeros(1), text(), memory=memory, chunk_frames=3)
    with torch.enable_grad(), pytest.raises(ValueError, match="no_grad"):
        model(video(3), torch.zeros(1), text(), memory=memory)
    with pytest.raises(ValueError, match="visibility"):
        model(video(3), torch.zeros(1), text(), visibility=torch.ones(2, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="one of"):
        model(video(3), torch.zeros(1), text(), chunk_frames=1, visibility=torch.ones(3, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="image"):
        causal_model(image_dim=8, added_kv_proj_dim=24)
    with pytest.raises(ValueError, match="patch_size"):
        causal_model(patch_size=(2, 2, 2))
    with pytest.raises(ValueError, match="multiple of the patch"):
        model.memory_shape(5, 6)
    with pytest.raises(ValueError, match="rope_max_seq_len"):
        memory_of(causal_model(rope_max_seq_len=12), MemoryConfig())
    for height, width in ((26, 6), (4, 26)):
        with pytest.raises(ValueError, match=f"{height} x {width} .* smaller size"):
            causal_model(rope_max_seq_len=12).rotary_table(height, width)
    assert causal_model(rope_max_seq_len=13).rotary_table(26, 26).spatial.shape[1] == 13 * 13


def test_rotation_keeps_lengths_and_turns_by_the_position():
    states = torch.randn(1, 2, 3, 4, dtype=torch.float64)
    angle = torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.3, 0.3, 1.1, 1.1]], dtype=torch.float64)
    turned = rotate(states, angle.cos()[None, :, None], angle.sin()[None, :, None])
    twin = torch.view_as_complex(states.unflatten(-1, (2, 2)).contiguous())
    twin = torch.view_as_real(twin * torch.exp(1j * angle[:, ::2])[None, :, None]).flatten(-2)
    torch.testing.assert_close(turned, twin)
