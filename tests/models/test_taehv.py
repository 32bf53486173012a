"""The small decoder: the published network under its published names, and chunk by chunk what it makes at once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.nn import functional as F

from tests.rollout.test_decode import random_vae
from vidaccel.errors import UserError
from vidaccel.models.taehv import StreamingTinyDecoder, TinyWanDecoder
from vidaccel.rollout.decode import StreamingDecoder
from vidaccel.video.frames import rounded_to_uint8

SIZES = {"channels": (8, 6, 4, 4), "latent_channels": 4}
FORMS = {"wan2.1": {}, "wan2.2": {"latent_channels": 6, "patch_size": 2}, "more time": {"time_factors": (2, 2, 2)}}


def tiny_decoder(seed: int = 0, **changes: object) -> TinyWanDecoder:
    """Random weights large enough that frames differ, few enough for a test."""
    torch.manual_seed(seed)
    model = TinyWanDecoder(**(SIZES | changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.0)
        model.decoder[-1].bias.fill_(0.5)
    return model


def random_latents(num_frames: int = 7, *, batch: int = 1, channels: int = 4, seed: int = 0) -> Tensor:
    return torch.randn(batch, channels, num_frames, 3, 4, generator=torch.Generator().manual_seed(seed))


def decoded_slowly(model: TinyWanDecoder, latents: Tensor) -> Tensor:
    """One sample frame by frame in the published order, from the names of the weights alone: (f, 3, H, W)."""
    weights = model.state_dict()

    def convolved(x: Tensor, name: str) -> Tensor:
        weight = weights[f"{name}.weight"]
        return F.conv2d(x, weight, weights.get(f"{name}.bias"), padding=weight.shape[-1] // 2)

    frames = [F.relu(convolved(3 * torch.tanh(frame / 3), "decoder.1"))[None] for frame in latents.unbind(1)]
    for start in (3, 9, 15):
        for block in range(start, start + 3):
            before = [torch.zeros_like(frames[0]), *frames[:-1]]
            pairs = [torch.cat(pair, dim=1) for pair in zip(frames, before, strict=True)]
            inner = [F.relu(convolved(pair, f"decoder.{block}.conv.0")) for pair in pairs]
            inner = [F.relu(convolved(x, f"decoder.{block}.conv.2")) for x in inner]
            frames = [F.relu(convolved(x, f"decoder.{block}.conv.4") + y) for x, y in zip(inner, frames, strict=True)]
        larger = [frame.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3) for frame in frames]
        grown = [convolved(frame, f"decoder.{start + 4}.conv").split(frame.shape[1], dim=1) for frame in larger]
        frames = [convolved(frame, f"decoder.{start + 5}") for both in grown for frame in both]
    pixels = F.pixel_shuffle(torch.cat([convolved(F.relu(frame), "decoder.22") for frame in frames]), model.patch_size)
    return pixels[len(frames) // latents.shape[1] - 1 :].clamp(0, 1)


@torch.no_grad()
@pytest.mark.parametrize("form", list(FORMS))
def test_the_batched_network_is_the_published_one_frame_by_frame(form: str) -> None:
    model = tiny_decoder(**FORMS[form])
    latents = random_latents(4, batch=2, channels=model.latent_channels)
    frames = model.decode(latents)
    for sample in range(2):
        torch.testing.assert_close(frames[sample], decoded_slowly(model, latents[sample]), atol=1e-5, rtol=1e-5)
    assert frames.min() >= 0
    assert frames.max() <= 1
    assert frames.std() > 0.05
    assert (frames[:, 1:] - frames[:, :-1]).abs().mean() > 0.01


def test_the_default_is_as_large_as_the_published_one_and_enlarges_as_wans_autoencoder() -> None:
    with torch.device("meta"):
        model = TinyWanDecoder()
        frames, _ = model(torch.empty(1, 16, 3, 60, 104), model.initial_past(torch.empty(1, 16, 3, 60, 104)))
    assert frames.shape == (1, 12, 3, 480, 832)
    assert sum(parameter.numel() for parameter in model.parameters()) == 9_844_611


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", list(FORMS))
def test_any_split_decodes_to_what_decoding_at_once_gives(form: str, dtype: torch.dtype) -> None:
    model = tiny_decoder(**FORMS[form]).to(dtype)
    latents = random_latents(batch=2, channels=model.latent_channels)
    expected = rounded_to_uint8(model.decode(latents)).int()
    for sizes in ([1] * 7, [3, 3, 1], [1, 4, 2], [7]):
        decoder = StreamingTinyDecoder(model)
        frames = torch.cat([decoder.decode(piece) for piece in latents.split(sizes, dim=2)], dim=1)
        assert frames.dtype == torch.uint8
        torch.testing.assert_close(frames.int(), expected, atol=1, rtol=0)


def test_frames_are_of_the_number_and_size_that_the_full_autoencoder_gives() -> None:
    full, small = StreamingDecoder(random_vae()), StreamingTinyDecoder(tiny_decoder())
    for latents in random_latents(8, batch=2).split(3, dim=2):
        frames = small.decode(latents)
        assert frames.shape == full.decode(latents).shape
        assert frames.is_contiguous()


def test_two_rollouts_share_a_model_and_a_reset_begins_a_video() -> None:
    model = tiny_decoder()
    videos = [random_latents(6, seed=seed) for seed in (1, 2)]
    alone = [[StreamingTinyDecoder(model).decode(latents)] for latents in videos]
    decoders = [StreamingTinyDecoder(model) for _ in videos]
    pieces: list[list[Tensor]] = [[], []]
    for chunk in range(3):
        for decoder, latents, made in zip(decoders, videos, pieces, strict=True):
            made.append(decoder.decode(latents[:, :, 2 * chunk : 2 * chunk + 2]))
    for made, whole in zip(pieces, alone, strict=True):
        torch.testing.assert_close(torch.cat(made, dim=1).int(), whole[0].int(), atol=1, rtol=0)
    decoders[0].reset()
    assert torch.equal(decoders[0].decode(videos[1]), alone[1][0])


@pytest.mark.parametrize("before", [0, 1, 3])
def test_a_decoder_goes_on_exactly_from_a_saved_state(before: int) -> None:
    model, latents = tiny_decoder(), random_latents()
    first, second = StreamingTinyDecoder(model), StreamingTinyDecoder(model)
    if before:
        first.decode(latents[:, :, :before])
    tensors, values = first.save_state()
    expected = first.decode(latents[:, :, before:])
    first.decode(random_latents(seed=9))  # a saved state does not change with its decoder
    second.decode(random_latents(2, seed=5))
    second.load_state(tensors, json.loads(json.dumps(values)))
    assert torch.equal(second.decode(latents[:, :, before:]), expected)
    first.load_state(tensors, values)  # nor with those that took it
    assert torch.equal(first.decode(latents[:, :, before:]), expected)


def test_a_chunk_that_failed_can_be_decoded_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model, latents = tiny_decoder(), random_latents(4)
    decoder, other = StreamingTinyDecoder(model), StreamingTinyDecoder(model)
    for one in (decoder, other):
        one.decode(latents[:, :, :2])

    def failing(*_: object) -> Tensor:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(model.decoder[-1], "forward", failing)
    with pytest.raises(torch.OutOfMemoryError):
        decoder.decode(latents[:, :, 2:])
    monkeypatch.undo()
    assert torch.equal(decoder.decode(latents[:, :, 2:]), other.decode(latents[:, :, 2:]))


def test_one_graph_decodes_every_chunk_and_the_state_stays_where_it_is() -> None:
    model, plain = tiny_decoder(), StreamingTinyDecoder(tiny_decoder())
    counter = CompileCounter()
    model.compile(backend=counter, fullgraph=True, dynamic=False)
    decoder = StreamingTinyDecoder(model)
    places = set()
    for latents in random_latents(12).split(3, dim=2):
        assert torch.equal(decoder.decode(latents), plain.decode(latents))
        places.add(tuple(tensor.data_ptr() for tensor in decoder._past))
    assert counter.frame_count == 1
    assert len(places) == 1


def test_channels_last_changes_the_layout_and_not_the_frames() -> None:
    latents = random_latents(batch=2)
    expected = tiny_decoder().decode(latents)
    model = tiny_decoder().to(memory_format=torch.channels_last)
    torch.testing.assert_close(model.decode(latents), expected, atol=1e-5, rtol=1e-5)
    decoder = StreamingTinyDecoder(model)
    decoder.decode(latents)
    tensors, values = decoder.save_state()
    decoder.load_state({name: tensor.contiguous() for name, tensor in tensors.items()}, values)
    assert all(tensor.is_contiguous(memory_format=torch.channels_last) for tensor in decoder._past)


def published_names() -> set[str]:
    """The names in the decoder's half of `taew2_1.safetensors`."""
    blocks = [
        f"decoder.{i}.conv.{j}.{kind}" for i in (3, 4, 5, 9, 10, 11, 15, 16, 17) for j in (0, 2, 4) for kind in KINDS
    ]
    growths = [f"decoder.{i}.conv.weight" for i in (7, 13, 19)]
    ends = [f"decoder.{i}.{kind}" for i in (1, 22) for kind in KINDS]
    return {*blocks, *growths, *ends, *(f"decoder.{i}.weight" for i in (8, 14, 20))}


KINDS = ("weight", "bias")


@pytest.mark.parametrize("form", list(FORMS))
def test_published_weights_load_whatever_their_sizes_and_the_encoders_are_left_out(tmp_path: Path, form: str) -> None:
    model = tiny_decoder(**FORMS[form])
    weights = {name: weight.half() for name, weight in model.state_dict().items()}
    assert set(weights) == published_names()
    save_file(weights | {"encoder.0.weight": torch.zeros(3)}, tmp_path / "taew.safetensors")
    latents = random_latents(channels=model.latent_channels)
    loaded = TinyWanDecoder.from_single_file(tmp_path / "taew.safetensors")
    assert loaded.dtype == torch.float32
    torch.testing.assert_close(loaded.decode(latents), model.half().float().decode(latents))
    assert (
        TinyWanDecoder.from_single_file(tmp_path / "taew.safetensors", torch_dtype=torch.bfloat16).dtype
        == torch.bfloat16
    )
    loaded.save_pretrained(tmp_path / "folder")
    again = TinyWanDecoder.from_pretrained(tmp_path / "folder")
    assert torch.equal(again.decode(latents), loaded.decode(latents))


def test_other_files_are_refused_in_one_line(tmp_path: Path) -> None:
    weights = tiny_decoder().state_dict()
    files = {
        "can run any code": ("taew2_1.pth", b"PK"),
        "truncated": ("cut.safetensors", b"\x20\x00"),
        "`super`": ("taew2_2_super.safetensors", {"decoder.0.weight": torch.zeros(8, 4, 1, 1)}),
        r"decoder.9.conv.2.bias has shape none .it is not there., wanted .6,.": (
            "missing.safetensors",
            {name: weight for name, weight in weights.items() if name != "decoder.9.conv.2.bias"},
        ),
        r"decoder.4.conv.0.weight has shape .8, 8, 3, 3., wanted .8, 16, 3, 3.": (
            "narrow.safetensors",
            weights | {"decoder.4.conv.0.weight": torch.zeros(8, 8, 3, 3)},
        ),
        "decoder.23.weight": ("more.safetensors", weights | {"decoder.23.weight": torch.zeros(1)}),
        "There is no file": ("nowhere.safetensors", None),
    }
    for message, (name, content) in files.items():
        if isinstance(content, bytes):
            (tmp_path / name).write_bytes(content)
        elif content is not None:
            save_file(content, tmp_path / name)
        with pytest.raises(UserError, match=message) as caught:
            TinyWanDecoder.from_single_file(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_wrong_latents_states_and_sizes_are_refused_in_one_line_and_change_nothing() -> None:
    model, latents = tiny_decoder(), random_latents(4)
    decoder, other = StreamingTinyDecoder(model), StreamingTinyDecoder(model)
    for one in (decoder, other):
        one.decode(latents[:, :, :2])
    tensors, values = decoder.save_state()
    wider = StreamingTinyDecoder(tiny_decoder(channels=(8, 8, 4, 4)))
    wider.decode(random_latents())
    wrong = {
        "must be .B, 4, F": lambda: decoder.decode(random_latents(channels=3)),
        "call `reset": lambda: decoder.decode(random_latents(batch=2)),
        "3 x 4": lambda: decoder.decode(random_latents()[..., :2]),
        "not of this model": lambda: decoder.load_state(*wider.save_state()),
        "resume with": lambda: decoder.load_state(tensors, {}),
        "state is not": lambda: decoder.load_state({}, values),
        "one entry more": lambda: TinyWanDecoder(channels=(8, 8)),
    }
    for message, request in wrong.items():
        with pytest.raises(ValueError, match=message) as caught:
            request()
        assert "\n" not in str(caught.value)
    assert torch.equal(decoder.decode(latents[:, :, 2:]), other.decode(latents[:, :, 2:]))
