"""The transformer of the Llama, Mistral, Qwen2 and Qwen3 families, in plain PyTorch and without a cache.

Every function takes a flat batch of N tokens, which may belong to different sequences. None of them waits for
the device or has a shape that depends on data, so a CUDA graph can capture a whole decode step.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clo.runtime.model.kv_shape import KVShape

Rope = tuple[Tensor, Tensor]  # cosines and sines, each [N, head_dim]


@dataclass(frozen=True)
class Linear:
    """``x @ weight.T + bias``; weight [out, in], bias [out] or None."""

    weight: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def first(self, rows: int) -> "Linear":
        """The part that computes the first ``rows`` outputs, without a copy."""
        return Linear(self.weight[:rows], None if self.bias is None else self.bias[:rows])


@dataclass(frozen=True)
class Layer:
    """Weights of one layer. ``qkv`` yields all query heads, then key and value of each KV head in turn."""

    attention_norm: Tensor  # [hidden]
    qkv: Linear  # [(query_heads + 2 * kv_heads) * head_dim, hidden]
    qk_norm: Tensor | None  # [query_heads + 2 * kv_heads, head_dim], of which the values' rows are not used
    output: Linear  # [hidden, query_heads * head_dim]
    mlp_norm: Tensor  # [hidden]
    gate_up: Linear  # [2 * intermediate, hidden]
    down: Linear  # [hidden, intermediate]


@dataclass(frozen=True)
class Weights:
    """All weights of a model, on one device. ``head`` is ``embedding`` itself where the model ties them."""

    embedding: Tensor  # [vocab, hidden]
    layers: tuple[Layer, ...]
    norm: Tensor  # [hidden]
    head: Tensor  # [vocab, hidden]
    rope_frequencies: Tensor  # [head_dim / 2], float32
    rope_scale: float  # factor of cosines and sines; 1 unless the RoPE scaling asks for another


class Decoder:
    """The model as functions of hidden states; attention itself is the caller's.

    Args:
        weights: the weights; their device and dtype are the model's.
        shape: shape of the KV cache.
        norm_eps: epsilon of every RMSNorm.
        max_positions: positions that the model was made for.
    """

    def __init__(self, weights: Weights, shape: KVShape, norm_eps: float, max_positions: int) -> None:
        self._weights = weights
        self._norm_eps = norm_eps
        self.shape = shape
        self.max_positions = max_positions
        self.vocab = weights.head.shape[0]
        self.scale = shape.head_dim**-0.5  # of the attention scores
        self.device = weights.embedding.device
        # on a GPU, what lies between two matrix products becomes one kernel
        fused: Callable[[Any], Any] = partial(
            torch.compile, dynamic=True, fullgraph=True, disable=self.device.type == "cpu"
        )
        self._gated: Callable[..., Tensor] = fused(_gated)
        self._rotate: Callable[..., Tensor] = fused(_rotate)
        self._norm: Callable[..., Tensor] = fused(_norm)
        self._add_and_norm: Callable[..., tuple[Tensor, Tensor]] = fused(_add_and_norm)

    def embed(self, tokens: Tensor) -> Tensor:
        """Hidden states [N, hidden] of token ids [N] int64."""
        return F.embedding(tokens, self._weights.embedding)

    def rope(self, positions: Tensor) -> Rope:
        """Cosines and sines [N, head_dim] of positions [N] int64; the same for all layers.

        They are computed in float32 and then rounded: bfloat16 cannot count beyond 256.
        """
        angles = positions[:, None].float() * self._weights.rope_frequencies
        angles = torch.cat((angles, angles), dim=-1)
        scale, dtype = self._weights.rope_scale, self.shape.dtype
        return (angles.cos() * scale).to(dtype), (angles.sin() * scale).to(dtype)

    def input_norm(self, layer: int, hidden: Tensor) -> Tensor:
        """Hidden states [N, hidden] as a layer's projections take them; as ``logits`` does after the last."""
        return self._norm(hidden, self._norm_of(layer), self._norm_eps)

    def qkv(self, layer: int, normal: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
        """Queries, and the rows for the cache.

        Args:
            layer: number of the layer.
            normal: ``input_norm``d hidden states [N, hidden] that enter the layer.
            rope: ``rope(positions)`` of the tokens.

        Returns:
            Queries [N, query_heads, head_dim] and rows [N, kv_heads, 2, head_dim] (K, then V), with RoPE
            applied to queries and keys; those of a token are contiguous.
        """
        queries, pairs = self.shape.query_heads, self.shape.kv_heads
        heads = self._project(layer, normed, queries + 2 * pairs, rope)
        return heads[:, :queries], heads[:, queries:].unflatten(1, (pairs, 2))

    def query(self, layer: int, normal: Tensor, rope: Rope) -> Tensor:
        """The queries of ``qkv`` alone: [N, query_heads, head_dim].

        Given the hidden states of an earlier layer, they predict the layer's real queries.
        """
        return self._project(layer, normed, self.shape.query_heads, rope)

    def add_attention(self, layer: int, hidden: Tensor, attended: Tensor) -> tuple[Tensor, Tensor]:
        """From the output of a layer's attention to its MLP.

        Args:
            layer: number of the layer.
            hidden: hidden states [N, hidden] that entered the layer.
            attended: output of attention [N, query_heads, head_dim].

        Returns:
            Hidden states [N, hidden] between attention and MLP, and the same normalised for the MLP.
        """
        weights = self._weights.layers[layer]
        projected = weights.output(attended.flatten(1))
        return self._add_and_norm(hidden, projected, weights.mlp_norm, self._norm_eps)

    def add_mlp(self, layer: int, hidden: Tensor, normal: Tensor) -> tuple[Tensor, Tensor]:
        """The rest of a layer, given what ``add_attention`` returned.

        Returns:
            Hidden states [N, hidden] that enter the next layer, and the same ``input_norm``d for it.
        """
        weights = self._weights.layers[layer]
        out = weights.down(self._gated(weights.gate_up(normed)))
        return self._add_and_norm(hidden, out, self._norm_of(layer + 1), self._norm_eps)

    def logits(self, normal: Tensor) -> Tensor:
        """Logits [N, vocab] float32 of ``input_norm``d hidden states [N, hidden] that left the last layer."""
        return F.linear(normed, self._weights.head).float()

    def _norm_of(self, layer: int) -> Tensor:
        layers = self._weights.layers
        return layers[layer].attention_norm if layer < len(layers) else self._weights.norm

    def _project(self, layer: int, normal: Tensor, heads: int, rope: Rope) -> Tensor:
        """The first ``heads`` heads of the fused projection, with RoPE: [N, heads, head_dim]."""
        weights = self._weights.layers[layer]
        flat = weights.qkv.first(heads * self.shape.head_dim)(normed)
        return self._rotate(
            flat.view(len(normed), heads, -1), weights.qk_norm, *rope, self.shape.query_heads, self._norm_eps
        )


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def _add_and_norm(total: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = total + x
    return total, F.rms_norm(total, (total.shape[-1],), weight, eps)


def _gated(gate_up: Tensor) -> Tensor:
    """SwiGLU: [N, 2 * intermediate] to [N, intermediate]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def _rotate(
    heads: Tensor, qk_norm: Tensor | None, cos: Tensor, sin: Tensor, queries: int, eps: float
) -> Tensor:
    """q/k norm, where the family has one, and RoPE on heads [N, any, head_dim], the first ``queries`` of
    them queries and the others keys and values in turn; values stay as they are."""
    number = torch.arange(heads.shape[1], device=heads.device)
    is_value = ((number >= queries) & ((number - queries) % 2 == 1))[:, None]
    rotated = heads
    if qk_norm is not None:
        rotated = F.rms_norm(heads, (heads.shape[-1],), None, eps) * qk_norm[: heads.shape[1]]
    first, second = rotated.chunk(2, dim=-1)
    rotated = rotated * cos[:, None] + torch.cat((-second, first), dim=-1) * sin[:, None]
    return torch.where(is_value, heads, rotated)
