"""The transformer of the Llama, Mistral, Qwen2 and Qwen3 families, in plain PyTorch and without a cache.

Every function takes a flat batch of N tokens, which may belong to different sequences. None of them waits for
the device or has a shape that depends on data, so a CUDA graph can capture a whole decode step.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from clo.gpu_worker.group import Group, Sum
from clo.gpu_worker.model import eager
from clo.gpu_worker.model.fused import fused
from clo.gpu_worker.model.mlp import gated
from clo.gpu_worker.model.weights import Linear, Weights, load_weights
from clo.kernels.quantize_query import Rope
from clo.runtime.config import ResolvedModel
from clo.runtime.model.kv_shape import KVShape, kv_shape
from clo.runtime.model.ranks import ALONE


class Decoder:
    """The model as functions of hidden states; attention itself is the caller's.

    As a rank of a group it has the group's share of heads alone, and hidden states and logits of the whole
    model: ``embed``, ``add_attention``, ``add_mlp``, ``complete`` and ``logits`` are to be called by all
    ranks together.

    Args:
        weights: the weights; their device and dtype are the model's.
        shape: shape of the KV cache, for a rank that of its share.
        norm_eps: epsilon of every RMSNorm.
        group: the group that this process is a rank of; None where it is alone. Also an attribute.
        vocab: tokens of the model; None for as many as ``weights`` has.
    """

    def __init__(
        self,
        weights: Weights,
        shape: KVShape,
        norm_eps: float,
        group: Group | None = None,
        vocab: int | None = None,
    ) -> None:
        self._weights = weights
        self._norm_eps = norm_eps
        self.shape, self.group = shape, group
        self.vocab = vocab or weights.head.shape[0]
        self.scale = shape.head_dim**-0.5  # factor of the attention scores
        self.device = weights.embedding.device
        pair = torch.arange(2 * shape.kv_heads, device=self.device) % 2 == 1
        query = torch.zeros(shape.query_heads, dtype=torch.bool, device=self.device)
        self._is_value = torch.cat((query, pair)).unsqueeze(1)  # [heads, 1], in the order of ``qkv``
        self._gated: Callable[..., Tensor] = eager.gated
        self._rotate: Callable[..., Tensor] = eager.rotate
        self._rotate_into: Callable[..., Tensor] = eager.rotate_into
        self._norm: Callable[..., Tensor] = eager.norm
        self._add_and_norm: Callable[..., tuple[Tensor, Tensor]] = eager.add_and_norm
        self._add_in_place: Callable[..., Tensor] = eager.add_in_place
        if self.device.type != "cpu":  # everything between two matrix products becomes one kernel
            self._gated, self._norm = fused(gated, 0), fused(_norm, 0)
            self._rotate, self._rotate_into = fused(_rotate, 0, 1, 2), fused(_rotate_into, 0, 1, 2, 3)
            self._add_and_norm, self._add_in_place = fused(_add_and_norm, 0, 1), fused(_add_in_place, 0, 1)

    def differentiate(self) -> None:
        """Let gradients flow from now on, on the CPU without operations in place."""
        if self.device.type == "cpu":
            self._gated, self._rotate, self._norm = gated, _rotate, _norm
            self._add_and_norm = _add_and_norm

    @property
    def norms_heads(self) -> bool:
        """Whether the family norms queries and keys before RoPE."""
        return self._weights.layers[0].qk_norm is not None

    def layer_flops(self, tokens: int, before: float) -> float:
        """Floating-point operations of a layer on some tokens of a prompt that follow ``before`` others, or
        attend to as much; those of this rank, as are the others."""
        layer = self._weights.layers[0]
        products = (layer.qkv, layer.output, layer.gate_up, layer.down)
        width = self.shape.query_heads * self.shape.head_dim
        attention = 4 * tokens * (before + tokens / 2) * width
        return 2 * tokens * sum(linear.weight.numel() for linear in products) + attention

    def last_layer_flops(self, tokens: int) -> float:
        """The same of the last layer, where all tokens but the last few need only their keys and values."""
        return 2.0 * tokens * self._weights.layers[-1].qkv.weight.numel()

    def logits_flops(self, tokens: int) -> float:
        """Floating-point operations of the logits of some tokens."""
        return 2 * tokens * self._weights.head.numel()

    def embed(self, tokens: Tensor) -> Tensor:
        """Hidden states [N, hidden] of token ids [N] int64."""
        if self.group is None:
            return F.embedding(tokens, self._weights.embedding)
        rows = len(self._weights.embedding)
        places = tokens - self.group.rank.number * rows
        elsewhere = (places < 0) | (places >= rows)
        own = F.embedding(places.clamp(0, rows - 1), self._weights.embedding)
        return self.group.sum(own.masked_fill_(elsewhere.unsqueeze(1), 0))

    def rope(self, positions: Tensor) -> Rope:
        """Cosines and sines [N, head_dim] of positions [N] int64; the same for all layers.

        They are computed in float32 and then rounded: bfloat16 cannot represent every whole number above 256.
        """
        angles = positions[:, None].float() * self._weights.rope_frequencies
        angles = torch.cat((angles, angles), dim=-1)
        scale, dtype = self._weights.rope_scale, self.shape.dtype
        return Rope((angles.cos() * scale).to(dtype), (angles.sin() * scale).to(dtype))

    def input_norm(self, layer: int, hidden: Tensor) -> Tensor:
        """Hidden states [N, hidden] as a layer's projections take them; as ``logits`` does after the last."""
        return self._norm(hidden, self._norm_of(layer), self._norm_eps)

    def qkv(
        self, layer: int, normed: Tensor, rope: Rope, into: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Queries, and the rows for the cache.

        Args:
            layer: number of the layer.
            normed: hidden states [N, hidden] that enter the layer, after ``input_norm``.
            rope: ``rope(positions)`` of the tokens.
            into: [N, kv_heads, 2, head_dim], contiguous, becomes the rows; new memory if None.

        Returns:
            Queries [N, query_heads, head_dim] and rows [N, kv_heads, 2, head_dim] (K, then V), with RoPE
            applied to queries and keys; those of a token are contiguous.
        """
        return self.rotate(layer, self.project(layer, normed), rope, into)

    def project(self, layer: int, normed: Tensor) -> Tensor:
        """The heads of ``qkv`` before q/k norm and RoPE: [N, query_heads + 2 * kv_heads, head_dim], in that
        order."""
        return self._project(layer, normed, len(self._is_value))

    def rotate(
        self, layer: int, heads: Tensor, rope: Rope, into: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The rest of ``qkv``, given what ``project`` returned, which on the CPU is changed in place."""
        queries, pairs = self.shape.query_heads, self.shape.kv_heads
        arguments = *rope, self._weights.layers[layer].qk_norm, self._is_value, self._norm_eps
        if into is not None:
            return self._rotate_into(heads, *rope, into, *arguments[2:]), into
        rotated = self._rotate(heads, *arguments)
        return rotated[:, :queries], rotated[:, queries:].unflatten(1, (pairs, 2))

    def query(self, layer: int, normed: Tensor, rope: Rope) -> Tensor:
        """The queries of ``qkv`` alone: [N, query_heads, head_dim].

        Given the hidden states of an earlier layer, they predict the layer's real queries.
        """
        count = self.shape.query_heads
        heads, qk_norm = self._project(layer, normed, count), self._weights.layers[layer].qk_norm
        return self._rotate(heads, *rope, qk_norm, self._is_value[:count], self._norm_eps)

    def add_attention(self, layer: int, hidden: Tensor, attended: Tensor) -> tuple[Tensor, Tensor]:
        """From the output of a layer's attention to its MLP.

        Args:
            layer: number of the layer.
            hidden: hidden states [N, hidden] that entered the layer.
            attended: output of attention [N, query_heads, head_dim].

        Returns:
            Hidden states [N, hidden] between attention and MLP, and the same after the MLP's norm.
        """
        weights = self._weights.layers[layer]
        norm = weights.mlp_norm
        return self._add(Sum.ATTENTION, hidden, weights.output, attended.flatten(1), norm)

    def add_mlp(self, layer: int, hidden: Tensor, normed: Tensor) -> tuple[Tensor, Tensor]:
        """The rest of a layer, given what ``add_attention`` returned.

        Returns:
            Hidden states [N, hidden] that enter the next layer, and the same after ``input_norm`` for it.
        """
        weights = self._weights.layers[layer]
        gated, norm = self._gated(weights.gate_up(normed)), self._norm_of(layer + 1)
        return self._add(Sum.MLP, hidden, weights.down, gated, norm)

    def complete(self, layer: int, hidden: Tensor, attended: Tensor) -> None:
        """Both of these for many tokens: ``hidden`` becomes what enters the next layer."""
        weights, flat = self._weights.layers[layer], attended.flatten(1)
        _, normed = self._add(Sum.ATTENTION, hidden, weights.output, flat, weights.mlp_norm, in_place=True)
        gated = self._gated(weights.gate_up(normed))
        if self._share(Sum.MLP, hidden) is None:  # then no norm need be computed with the sum
            hidden += self._whole(weights.down(gated))
        else:
            self._add(Sum.MLP, hidden, weights.down, gated, self._norm_of(layer + 1), in_place=True)

    def logits(self, normed: Tensor) -> Tensor:
        """Logits [N, vocab] float32 of the last layer's hidden states [N, hidden], after ``input_norm``."""
        logits = F.linear(normed, self._weights.head)
        if self.group is None:
            return logits.float()
        parts = self.group.join(logits).transpose(0, 1)  # [N, ranks, any]
        return (
            parts.to(torch.float32, memory_format=torch.contiguous_format)
            .flatten(1)[:, : self.vocab]
            .contiguous()
        )

    def _norm_of(self, layer: int) -> Tensor:
        layers = self._weights.layers
        return layers[layer].attention_norm if layer < len(layers) else self._weights.norm

    def _share(self, which: Sum, hidden: Tensor) -> Tensor | None:
        """Where a rank leaves its share of a sum for the others; None where it does not."""
        return None if self.group is None else self.group.share(which, hidden)

    def _whole(self, share: Tensor) -> Tensor:
        """The sum of all ranks' shares."""
        return share if self.group is None else self.group.sum(share)

    def _add(
        self, which: Sum, hidden: Tensor, product: Linear, x: Tensor, norm: Tensor, *, in_place: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Hidden states plus a product, of which a rank computes its share, and the RMSNorm of that; with
        ``in_place`` they become the sum."""
        share, eps = self._share(which, hidden), self._norm_eps
        if share is None:
            whole = self._whole(product(x))
            if in_place:
                return hidden, self._add_in_place(hidden, whole, norm, eps)
            return self._add_and_norm(hidden, whole, norm, eps)
        assert self.group is not None, "who has a share is in a group"
        product(x, into=share)
        return self.group.add_shares(which, hidden, norm, eps, in_place=in_place)

    def _project(self, layer: int, normed: Tensor, heads: int) -> Tensor:
        """The first ``heads`` heads of the fused projection: [N, heads, head_dim]."""
        flat = self._weights.layers[layer].qkv.first(heads * self.shape.head_dim)(normed)
        return flat.view(len(normed), heads, -1)


def load_decoder(model: ResolvedModel, group: Group | None = None) -> Decoder:
    """The decoder of a model, with its weights on the model's device, or a rank's share of it.

    Raises:
        ConfigError: see ``load_weights``.
    """
    config = model.architecture
    whole, rank = kv_shape(config, model.dtype), ALONE if group is None else group.rank
    weights = load_weights(model, whole, rank)
    return Decoder(weights, rank.shape(whole), config.rms_norm_eps, group, config.vocab_size)


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def _add_and_norm(total: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = total + x
    return total, F.rms_norm(total, (total.shape[-1],), weight, eps)


def _add_in_place(total: Tensor, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    total.add_(x)
    return F.rms_norm(total, (total.shape[-1],), weight, eps)


def _rotate(
    heads: Tensor, cos: Tensor, sin: Tensor, qk_norm: Tensor | None, is_value: Tensor, eps: float
) -> Tensor:
    """q/k norm, where the family has one, and RoPE on heads [N, any, head_dim]; those where ``is_value``
    [any, 1] bool stay as they are."""
    rotated = heads
    if qk_norm is not None:
        rotated = F.rms_norm(heads, (heads.shape[-1],), None, eps) * qk_norm[: heads.shape[1]]
    first, second = rotated.chunk(2, dim=-1)
    rotated = rotated * cos[:, None] + torch.cat((-second, first), dim=-1) * sin[:, None]
    return torch.where(is_value, heads, rotated)


def _rotate_into(
    heads: Tensor,
    cos: Tensor,
    sin: Tensor,
    rows: Tensor,
    qk_norm: Tensor | None,
    is_value: Tensor,
    eps: float,
) -> Tensor:
    """``_rotate``, of which ``rows`` [N, kv_heads, 2, head_dim] become the last heads; returns the others."""
    rotated = _rotate(heads, cos, sin, qk_norm, is_value, eps)
    queries = heads.shape[1] - 2 * rows.shape[1]
    rows.copy_(rotated[:, queries:].unflatten(1, (rows.shape[1], 2)))
    return rotated[:, :queries]
