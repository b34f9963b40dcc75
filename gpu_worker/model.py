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

from gpu_worker.shape import KVShape

Rope = tuple[Tensor, Tensor]  # cosines and sines, each [N, head_dim]


@dataclass(frozen=True)
class Linear:
    """``x @ weight.T + bias``; weight [out, in], bias [out] or None."""

    weight: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def add_to(self, total: Tensor, x: Tensor) -> Tensor:
        """``total + self(x)``; for two dimensions in one kernel."""
        if self.bias is not None:
            return total + self(x)
        return torch.addmm(total, x, self.weight.t())

    def first(self, rows: int) -> "Linear":
        """The part that computes the first ``rows`` outputs, without a copy."""
        return Linear(self.weight[:rows], None if self.bias is None else self.bias[:rows])


@dataclass(frozen=True)
class Layer:
    """Weights of one layer. ``qkv`` yields all query heads, then all key heads, then all value heads."""

    attention_norm: Tensor  # [hidden]
    qkv: Linear  # [(query_heads + 2 * kv_heads) * head_dim, hidden]
    qk_norm: Tensor | None  # [query_heads + kv_heads, head_dim]
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
        self._split: Callable[..., tuple[Tensor, Tensor]] = fused(_split)

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

    def qkv(self, layer: int, hidden: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
        """Queries, and the rows for the cache.

        Args:
            layer: number of the layer.
            hidden: hidden states [N, hidden] that enter the layer.
            rope: ``rope(positions)`` of the tokens.

        Returns:
            Queries [N, query_heads, head_dim] and rows [N, kv_heads, 2, head_dim] (K, then V), both
            contiguous, and with RoPE applied to queries and keys.
        """
        queries, keys = self.shape.query_heads, self.shape.kv_heads
        heads = self._project(layer, hidden, queries + 2 * keys)
        return self._split(heads, self._weights.layers[layer].qk_norm, *rope, queries, keys, self._norm_eps)

    def query(self, layer: int, hidden: Tensor, rope: Rope) -> Tensor:
        """The queries of ``qkv`` alone: [N, query_heads, head_dim].

        Given the hidden states of an earlier layer, they predict the layer's real queries.
        """
        heads = self._project(layer, hidden, self.shape.query_heads)
        return self._rotate(heads, self._weights.layers[layer].qk_norm, *rope, self._norm_eps)

    def finish(self, layer: int, hidden: Tensor, attended: Tensor) -> Tensor:
        """The rest of a layer after attention.

        Args:
            layer: number of the layer.
            hidden: hidden states [N, hidden] that entered the layer.
            attended: output of attention [N, query_heads, head_dim].

        Returns:
            Hidden states [N, hidden] that enter the next layer.
        """
        weights = self._weights.layers[layer]
        hidden = weights.output.add_to(hidden, attended.flatten(1))
        return weights.down.add_to(hidden, self._gated(weights.gate_up(self._norm(hidden, weights.mlp_norm))))

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [N, vocab] float32 of the hidden states [N, hidden] that left the last layer."""
        return F.linear(self._norm(hidden, self._weights.norm), self._weights.head).float()

    def _norm(self, x: Tensor, weight: Tensor | None) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), weight, self._norm_eps)

    def _project(self, layer: int, hidden: Tensor, heads: int) -> Tensor:
        """The first ``heads`` heads of the fused projection: [N, heads, head_dim]."""
        weights = self._weights.layers[layer]
        projection = weights.qkv.first(heads * self.shape.head_dim)
        return projection(self._norm(hidden, weights.attention_norm)).view(len(hidden), heads, -1)


def _gated(gate_up: Tensor) -> Tensor:
    """SwiGLU: [N, 2 * intermediate] to [N, intermediate]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def _rotate(heads: Tensor, qk_norm: Tensor | None, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    """q/k norm, where the family has one, and RoPE on heads [N, any, head_dim], query heads first."""
    if qk_norm is not None:
        heads = F.rms_norm(heads, (heads.shape[-1],), None, eps) * qk_norm[: heads.shape[1]]
    first, second = heads.chunk(2, dim=-1)
    return heads * cos[:, None] + torch.cat((-second, first), dim=-1) * sin[:, None]


def _split(
    heads: Tensor, qk_norm: Tensor | None, cos: Tensor, sin: Tensor, queries: int, keys: int, eps: float
) -> tuple[Tensor, Tensor]:
    """Heads [N, queries + 2 * keys, head_dim] to queries and rows, as ``Decoder.qkv`` returns them."""
    rotated = _rotate(heads[:, : queries + keys], qk_norm, cos, sin, eps)
    rows = torch.stack((rotated[:, queries:], heads[:, queries + keys :]), dim=2)
    return rotated[:, :queries].contiguous(), rows
