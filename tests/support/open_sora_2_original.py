"""Open-Sora 2.0's transformer written down once more, in plain torch on its published names, and random weights for it.

Only for tests: the converted `FluxTransformer2DModel` must compute the same. Half-split rotary positions, condition
with a projection of its own, fused rows of values and feed-forward, shift before scale.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

Weights = dict[str, Tensor]


def random_weights(*, heads: int, head_dim: int, double: int, single: int, text: int, pooled: int) -> Weights:
    """Random tensors under every published name, as large as those of a trained network are about."""
    generator = torch.Generator().manual_seed(0)
    shapes = dict(_shapes(heads * head_dim, head_dim, double, single, text, pooled))
    weights = {}
    for name, shape in shapes.items():
        value = torch.randn(shape, generator=generator)
        fan_in = shape[-1] if len(shape) > 1 else 25
        weights[name] = 1 + 0.3 * value if name.endswith(".scale") else 0.6 * value / math.sqrt(fan_in)
    return weights


def _shapes(
    size: int, head_dim: int, double: int, single: int, text: int, pooled: int
) -> Iterator[tuple[str, tuple[int, ...]]]:
    def linear(name: str, out: int, inside: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield f"{name}.weight", (out, inside)
        yield f"{name}.bias", (out,)

    yield from linear("img_in", size, 64)
    yield from linear("cond_in", size, 68)
    yield from linear("txt_in", size, text)
    for name, inside in (("time_in", 256), ("vector_in", pooled)):
        yield from linear(f"{name}.in_layer", size, inside)
        yield from linear(f"{name}.out_layer", size, size)
    for block in range(double):
        for stream in ("img", "txt"):
            start = f"double_blocks.{block}.{stream}"
            yield from linear(f"{start}_mod.lin", 6 * size, size)
            for name in ("q_proj", "k_proj", "v_proj", "proj"):
                yield from linear(f"{start}_attn.{name}", size, size)
            yield f"{start}_attn.norm.query_norm.scale", (head_dim,)
            yield f"{start}_attn.norm.key_norm.scale", (head_dim,)
            yield from linear(f"{start}_mlp.0", 4 * size, size)
            yield from linear(f"{start}_mlp.2", size, 4 * size)
    for block in range(single):
        start = f"single_blocks.{block}"
        yield from linear(f"{start}.modulation.lin", 3 * size, size)
        yield from linear(f"{start}.q_proj", size, size)
        yield from linear(f"{start}.k_proj", size, size)
        yield from linear(f"{start}.v_mlp", 5 * size, size)
        yield from linear(f"{start}.linear2", size, 5 * size)
        yield f"{start}.norm.query_norm.scale", (head_dim,)
        yield f"{start}.norm.key_norm.scale", (head_dim,)
    yield from linear("final_layer.adaLN_modulation.1", 2 * size, size)
    yield from linear("final_layer.linear", 64, size)


class Original:
    """The forward of the published network. axes: rotary channels of frame, row and column."""

    def __init__(self, weights: Weights, *, heads: int, axes: tuple[int, int, int]) -> None:
        self.weights = weights
        self.heads = heads
        self.axes = axes

    def __call__(
        self, image: Tensor, condition: Tensor, text: Tensor, pooled: Tensor, time: Tensor, positions: Tensor
    ) -> Tensor:
        """Velocity (B, L, 64) for latents (B, L, 64), condition (B, L, 68), text (B, T, D), time (B,) in [0, 1]."""
        image = self._linear("img_in", image) + self._linear("cond_in", condition)
        vector = self._embedder("time_in", _sinusoids(time * 1000)) + self._embedder("vector_in", pooled)
        text = self._linear("txt_in", text)
        places = torch.cat([torch.zeros(text.shape[1], 3), positions])
        angles = [
            places[:, axis, None] / 10000 ** (torch.arange(0, size, 2) / size) for axis, size in enumerate(self.axes)
        ]
        angle = torch.cat(angles, dim=1)
        for block in range(self._count("double_blocks")):
            image, text = self._double(f"double_blocks.{block}", image, text, vector, angle)
        both = torch.cat([text, image], dim=1)
        for block in range(self._count("single_blocks")):
            both = self._single(f"single_blocks.{block}", both, vector, angle)
        shift, scale = self._linear("final_layer.adaLN_modulation.1", F.silu(vector))[:, None].chunk(2, dim=-1)
        image = _normed(both[:, text.shape[1] :]) * (1 + scale) + shift
        return self._linear("final_layer.linear", image)

    def _double(self, name: str, image: Tensor, text: Tensor, vector: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
        streams = {"txt": text, "img": image}
        changes = {key: self._linear(f"{name}.{key}_mod.lin", F.silu(vector))[:, None].chunk(6, -1) for key in streams}
        triples = []
        for key, hidden in streams.items():
            hidden = _normed(hidden) * (1 + changes[key][1]) + changes[key][0]
            projected = [self._linear(f"{name}.{key}_attn.{part}_proj", hidden) for part in "qkv"]
            triples.append(self._split(f"{name}.{key}_attn", projected))
        attended = _attention([torch.cat(parts, dim=1) for parts in zip(*triples, strict=True)], angle)
        shares = attended.split([text.shape[1], image.shape[1]], dim=1)
        for (key, hidden), share in zip(streams.items(), shares, strict=True):
            hidden = hidden + changes[key][2] * self._linear(f"{name}.{key}_attn.proj", share)
            inner = self._linear(f"{name}.{key}_mlp.0", _normed(hidden) * (1 + changes[key][4]) + changes[key][3])
            inner = self._linear(f"{name}.{key}_mlp.2", F.gelu(inner, approximate="tanh"))
            streams[key] = hidden + changes[key][5] * inner
        return streams["img"], streams["txt"]

    def _single(self, name: str, both: Tensor, vector: Tensor, angle: Tensor) -> Tensor:
        shift, scale, gate = self._linear(f"{name}.modulation.lin", F.silu(vector))[:, None].chunk(3, dim=-1)
        hidden = _normed(both) * (1 + scale) + shift
        value, inner = self._linear(f"{name}.v_mlp", hidden).split([both.shape[-1], 4 * both.shape[-1]], dim=-1)
        projected = [self._linear(f"{name}.{part}_proj", hidden) for part in "qk"]
        attended = _attention(self._split(name, [*projected, value]), angle)
        joined = torch.cat([attended, F.gelu(inner, approximate="tanh")], dim=-1)
        return both + gate * self._linear(f"{name}.linear2", joined)

    def _split(self, name: str, projected: list[Tensor]) -> list[Tensor]:
        """Queries, keys and values as (B, L, heads, D), the first two with unit mean square and scaled."""
        query, key, value = (part.unflatten(-1, (self.heads, -1)) for part in projected)
        for scale, part in (("query_norm", query), ("key_norm", key)):
            part *= torch.rsqrt(part.square().mean(-1, keepdim=True) + 1e-6)
            part *= self.weights[f"{name}.norm.{scale}.scale"]
        return [query, key, value]

    def _linear(self, name: str, value: Tensor) -> Tensor:
        return value @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def _embedder(self, name: str, value: Tensor) -> Tensor:
        return self._linear(f"{name}.out_layer", F.silu(self._linear(f"{name}.in_layer", value)))

    def _count(self, blocks: str) -> int:
        return len({name.split(".")[1] for name in self.weights if name.startswith(blocks)})


def _sinusoids(time: Tensor) -> Tensor:
    angle = time[:, None] * 10000 ** (-torch.arange(128) / 128)
    return torch.cat([angle.cos(), angle.sin()], dim=1)


def _normed(hidden: Tensor) -> Tensor:
    return F.layer_norm(hidden, hidden.shape[-1:], eps=1e-6)


def _attention(parts: list[Tensor], angle: Tensor) -> Tensor:
    query, key, value = (part.transpose(1, 2) for part in parts)
    query, key = _turned(query, angle), _turned(key, angle)
    weights = (query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])).softmax(-1)
    return (weights @ value).transpose(1, 2).flatten(2)


def _turned(part: Tensor, angle: Tensor) -> Tensor:
    """Each first half turned against the second half of a head."""
    first, second = part.chunk(2, dim=-1)
    return torch.cat([first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], dim=-1)
