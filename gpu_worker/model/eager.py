"""What the decoder computes between two matrix products, as the CPU runs it: one operation after the other.

There every operation reads and writes memory, so these are written for few of them, on few elements, and in
place where the memory comes from a matrix product and nobody else holds it. A GPU gets the definitions in
``clo.gpu_worker.model.decoder``, which torch.compile makes one kernel of.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def gated(gate_up: Tensor) -> Tensor:
    """SwiGLU: [N, 2 * intermediate] to [N, intermediate]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm of [N, any]."""
    lengths = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    factors = lengths.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    normed: Tensor = (x * factors).mul_(weight).to(x.dtype)
    return normed


def add_and_norm(total: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The sum of both, which ``x`` becomes, and its RMSNorm."""
    x += total
    return x, norm(x, weight, eps)


def add_in_place(total: Tensor, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The RMSNorm of the sum of both, which ``total`` becomes."""
    total += x
    return norm(total, weight, eps)


def rotate(
    heads: Tensor, cos: Tensor, sin: Tensor, qk_norm: Tensor | None, is_value: Tensor, eps: float
) -> Tensor:
    """q/k norm, where the family has one, and RoPE on ``heads`` [N, any, head_dim] in place; those where
    ``is_value`` [any, 1] is true stay as they are: of the pairs after the queries, every second one."""
    queries = len(is_value) - 2 * int(is_value.sum())
    half = heads.shape[2] // 2
    cos, sin = cos[:, None, :half], sin[:, None, :half]
    for part in (slice(queries), slice(queries, None, 2)):
        turned = heads[:, part]
        if qk_norm is not None:
            turned.copy_(
                F.rms_norm(turned, turned.shape[-1:], None, eps).mul_(qk_norm[: heads.shape[1]][part])
            )
        first, second = turned.chunk(2, dim=-1)
        before = first.clone()
        first.mul_(cos).addcmul_(second, sin, value=-1)
        second.mul_(cos).addcmul_(before, sin)
    return heads


def rotate_into(
    heads: Tensor,
    cos: Tensor,
    sin: Tensor,
    rows: Tensor,
    qk_norm: Tensor | None,
    is_value: Tensor,
    eps: float,
) -> Tensor:
    """``rotate``, of which ``rows`` [N, kv_heads, 2, head_dim] become the last heads; returns the others."""
    rotate(heads, cos, sin, qk_norm, is_value, eps)
    queries = heads.shape[1] - 2 * rows.shape[1]
    rows.copy_(heads[:, queries:].unflatten(1, (rows.shape[1], 2)))
    return heads[:, :queries]
