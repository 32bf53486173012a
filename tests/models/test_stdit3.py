"""STDiT3 against the original Open-Sora 1.2 transformer: same weights, same numbers; and what diffusers asks of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.support.open_sora_fixtures import (
    PIXELS,
    largest_difference,
    recorded_stdit3,
    relative_distance,
    small_stdit3,
    tensors,
    values,
)
from vidaccel.machine.attention import set_attention_backend
from vidaccel.models import stdit3, stdit3_blocks
from vidaccel.models.stdit3 import STDiT3
from vidaccel.models.stdit3_positions import STDiT3TemporalPositions, spatial_positions

CASES = ("basic", "nomask", "xmask", "xmask_alltrue", "batch2")
TOLERANCE = 2e-5  # the outputs are of magnitude 6


def inputs(case: str) -> dict[str, Any]:
    recorded = tensors("stdit3_io")
    return {
        "hidden_states": recorded[f"{case}.x"],
        "timestep": recorded[f"{case}.timestep"],
        "encoder_hidden_states": recorded[f"{case}.y"],
        "encoder_attention_mask": recorded.get(f"{case}.mask"),
        "x_mask": recorded.get(f"{case}.x_mask"),
        **PIXELS,
    }


@torch.no_grad()
def output(model: nn.Module, case: str, **changes: Any) -> Tensor:
    return model(**(inputs(case) | changes), return_dict=False)[0]


def distance(model: nn.Module, case: str) -> float:
    return largest_difference(output(model, case), tensors("stdit3_io")[f"{case}.out"])


@pytest.mark.parametrize("case", CASES)
def test_outputs_are_those_of_the_original(case: str) -> None:
    assert distance(recorded_stdit3(), case) <= TOLERANCE


@pytest.mark.parametrize("case", ["basic", "xmask"])
def test_every_part_computes_what_the_original_computes(case: str) -> None:
    model, seen = recorded_stdit3(), {}

    def listen(name: str, module: nn.Module) -> None:
        def keep_the_last(_: Any, __: Any, result: Tensor) -> None:  # with a frame mask the one for t = 0
            seen[name] = result

        module.register_forward_hook(keep_the_last)

    for name in ("x_embedder", "t_embedder", "fps_embedder", "y_embedder", "t_block", "final_layer"):
        listen(name, getattr(model, name))
    for index in range(2):
        listen(f"spatial_{index}", model.spatial_blocks[index])
        listen(f"temporal_{index}", model.temporal_blocks[index])
    output(model, case)
    taps = {name: tensor for name, tensor in tensors("stdit3_io").items() if name.startswith(f"{case}.tap.")}
    assert len(taps) == len(seen) == 10
    for name, tap in taps.items():
        assert largest_difference(seen[name.rpartition(".")[2]].reshape(tap.shape), tap) <= TOLERANCE, name


def test_an_all_true_frame_mask_changes_nothing() -> None:
    model = recorded_stdit3()
    assert largest_difference(output(model, "xmask_alltrue"), output(model, "xmask_alltrue", x_mask=None)) <= 1e-6


def test_spatial_positions_are_those_of_the_original() -> None:
    scale = (PIXELS["height"] * PIXELS["width"]) ** 0.5 / 512
    found = spatial_positions(
        (5, 7), channels=96, scale=scale, frequency_dtype=torch.float32, device=torch.device("cpu")
    )
    assert largest_difference(found, tensors("stdit3_io")["pos_emb"][0]) <= 1e-6


def test_bfloat16_is_that_of_the_original() -> None:
    found = output(recorded_stdit3().to(torch.bfloat16), "basic")
    assert found.dtype == torch.float32
    assert relative_distance(found, tensors("stdit3_io")["basic_bf16.out"]) <= 0.015
    assert relative_distance(found, output(recorded_stdit3(), "basic")) > 0.03  # also the timestep is rounded


def test_positions_are_rounded_as_far_as_the_original_rounds_them() -> None:
    """At 480x854 and 51 frames; in bfloat16 the original also takes 854 for 856."""
    cpu = torch.device("cpu")
    exact, rounded = (
        spatial_positions((30, 53), channels=1152, scale=(480 * width) ** 0.5 / 512, frequency_dtype=kind, device=cpu)
        for width, kind in ((854, torch.float32), (856, torch.bfloat16))
    )
    assert 0.07 < largest_difference(rounded, exact) < 0.085
    exact_turn, rounded_turn = (
        STDiT3TemporalPositions(72, rounded=rounded).to(torch.bfloat16)(15)[0] for rounded in (False, True)
    )
    assert exact_turn.dtype == torch.float32
    assert rounded_turn.dtype == torch.bfloat16
    assert largest_difference(rounded_turn.float(), exact_turn) == pytest.approx(0.026, abs=1e-3)


def test_the_flag_for_rounded_positions_counts_in_bfloat16_alone() -> None:
    full, half = (
        [recorded_stdit3(round_positions=flag).to(kind) for flag in (True, False)]
        for kind in (torch.float32, torch.bfloat16)
    )
    assert torch.equal(*(output(model, "basic") for model in full))
    assert not torch.equal(*(output(model, "basic") for model in half))


def swap_halves(grid: Any, **settings: Any) -> Tensor:
    return torch.cat(spatial_positions(grid, **settings).chunk(2, dim=-1)[::-1], dim=-1)


def rotate_half_split(tokens: Tensor, rotary_emb: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = (part[None, :, None, :] for part in rotary_emb)
    first, second = tokens.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def modulate_once(self: Any, tokens: Tensor, temb: Tensor, clean_temb: Tensor | None, x_mask: Tensor | None) -> Tensor:
    noisy = self._modulated(tokens, temb)
    if x_mask is None:
        return self.linear(noisy)
    return self.linear(torch.where(x_mask[:, :, None, None], noisy, self._modulated(tokens, clean_temb)))


def gate_the_other_way(modulation: Tensor) -> Tensor:
    return modulation[:, :, [0, 1, 5, 3, 4, 2]]


@pytest.mark.parametrize(
    ("case", "owner", "name", "wrong"),
    [
        ("basic", stdit3, "spatial_positions", swap_halves),
        ("basic", stdit3_blocks, "rotated", rotate_half_split),
        ("basic", stdit3_blocks, "rotated", lambda tokens, rotary_emb: tokens),
        ("xmask", stdit3_blocks.STDiT3FinalLayer, "forward", modulate_once),
    ],
    ids=["position halves", "half-split rotation", "no rotation", "final layer"],
)
def test_a_wrong_detail_shows(
    case: str, owner: Any, name: str, wrong: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner, name, wrong)
    assert distance(recorded_stdit3(), case) > 100 * TOLERANCE


def test_a_wrong_order_of_the_gates_shows() -> None:
    model = recorded_stdit3()
    for block in (*model.spatial_blocks, *model.temporal_blocks):
        block.register_forward_pre_hook(lambda _, given: (*given[:2], gate_the_other_way(given[2]), *given[3:]))
        block.scale_shift_table.data = gate_the_other_way(block.scale_shift_table.data[None, None])[0, 0]
    assert distance(model, "basic") > 100 * TOLERANCE


def test_the_full_size_has_the_keys_and_shapes_of_the_published_file() -> None:
    with torch.device("meta"):
        model = STDiT3()
    found = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    assert found == values("stdit3_xl2_keys")
    assert sum(tensor.numel() for tensor in model.state_dict().values()) == 1_208_872_772


def test_padding_of_the_text_and_its_absence_give_the_same() -> None:
    model, given = recorded_stdit3(), inputs("basic")
    length = int(given["encoder_attention_mask"].sum())
    assert length < 12
    short = given["encoder_hidden_states"][:, 0, :length]
    cut = output(model, "basic", encoder_hidden_states=short, encoder_attention_mask=None)
    assert largest_difference(cut, output(model, "basic")) <= TOLERANCE


def test_sizes_may_be_numbers_tensors_or_follow_from_the_latents() -> None:
    model = recorded_stdit3()
    plain = output(model, "basic", height=72, width=112)
    assert torch.equal(plain, output(model, "basic", height=None, width=None))
    assert torch.equal(plain, output(model, "basic", height=torch.tensor([72.0]), width=torch.tensor([112.0])))
    assert torch.equal(plain, output(model, "basic", height=72, width=112, fps=torch.tensor([24.0])))
    assert not torch.equal(plain, output(model, "basic", height=72, width=112, fps=120))


@pytest.mark.parametrize(
    ("config", "message"), [({"patch_size": (2, 2, 2)}, "patch_size"), ({"num_heads": 5}, "hidden_size")]
)
def test_sizes_that_cannot_work_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_stdit3(**config)


def test_it_saves_and_loads(tmp_path: Path) -> None:
    model = recorded_stdit3(round_positions=False)
    model.save_pretrained(tmp_path)
    loaded = STDiT3.from_pretrained(tmp_path)
    assert loaded.config.round_positions is False
    assert torch.equal(output(loaded.eval(), "basic"), output(model, "basic"))


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    gradients = []
    for checkpointed in (False, True):
        model = recorded_stdit3().train()
        if checkpointed:
            model.enable_gradient_checkpointing()
        model(**inputs("xmask")).sample.square().mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert gradients[0].norm() > 0
    assert torch.equal(*gradients)


def test_an_attention_backend_reaches_every_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    model, used = recorded_stdit3(), []
    plain, dispatch = output(model, "basic"), stdit3_blocks.dispatch_attention_fn

    def watched(*args: Any, **kwargs: Any) -> Tensor:
        used.append(kwargs["backend"])
        return dispatch(*args, **kwargs)

    monkeypatch.setattr(stdit3_blocks, "dispatch_attention_fn", watched)
    set_attention_backend(model, "_native_math")
    assert largest_difference(output(model, "basic"), plain) <= TOLERANCE
    assert {backend.value for backend in used} == {"_native_math"}
    assert len(used) == 2 * 2 * 2


def test_repeated_blocks_compile_as_whole_graphs() -> None:
    torch.compiler.reset()
    graphs, model = [], recorded_stdit3()
    plain = {case: output(model, case) for case in ("basic", "xmask")}

    def counting_backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    model.compile_repeated_blocks(fullgraph=True, backend=counting_backend)
    for case, expected in plain.items():
        assert torch.equal(output(model, case), expected)
    assert 2 <= len(graphs) <= 4  # one each for space and time, with and without conditions per frame


def test_layerwise_casting_keeps_what_must_be_exact() -> None:
    model = recorded_stdit3()
    plain = output(model, "basic")
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    kinds = {name: parameter.dtype for name, parameter in model.named_parameters()}
    assert kinds["spatial_blocks.0.mlp.fc1.weight"] == torch.float8_e4m3fn
    assert kinds["final_layer.linear.weight"] == kinds["rope.freqs"] == torch.float32
    assert relative_distance(output(model, "basic"), plain) < 0.2


def test_group_offloading_changes_nothing() -> None:
    model = recorded_stdit3()
    plain = output(model, "basic")
    cpu = torch.device("cpu")
    model.enable_group_offload(
        onload_device=cpu, offload_device=cpu, offload_type="block_level", num_blocks_per_group=1
    )
    assert torch.equal(output(model, "basic"), plain)


def test_a_lora_is_added_and_taken_away() -> None:
    from peft import LoraConfig

    model = recorded_stdit3()
    plain = output(model, "basic")
    model.add_adapter(LoraConfig(r=2, target_modules=["qkv", "q_linear", "fc1"], init_lora_weights=False))
    assert largest_difference(output(model, "basic"), plain) > 100 * TOLERANCE
    model.delete_adapters("default")
    assert torch.equal(output(model, "basic"), plain)


def test_pyramid_attention_broadcast_of_diffusers_finds_the_blocks() -> None:
    from diffusers import PyramidAttentionBroadcastConfig

    model, calls = recorded_stdit3(), []
    model.temporal_blocks[0].attn.q_norm.register_forward_pre_hook(lambda *_: calls.append(1))
    model.enable_cache(
        PyramidAttentionBroadcastConfig(
            temporal_attention_block_skip_range=2,
            temporal_attention_timestep_skip_range=(100, 999),
            temporal_attention_block_identifiers=("temporal_blocks",),
            current_timestep_callback=lambda: 500,
        )
    )
    for _ in range(4):
        output(model, "basic")
    assert len(calls) == 2
    model.disable_cache()
