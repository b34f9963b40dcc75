"""Weigh blocks: what each block of earlier keys is worth to each block of a chunk's queries."""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from clo.kernels.arguments import ELEMENT, GROUPED, Argument, Rule, Signature

BLOCK = 64  # keys, and queries, that are chosen together
SAMPLED = 4  # queries of a block that choose for it

_M, _N, _TILES = (128, 256), 128, 16  # samples of a program, keys that it takes at a time, and how often
_LOG2E = 1.4426950408889634

_SIGNATURE = Signature(
    "weigh_blocks",
    (
        Argument("query", ELEMENT, "N query_heads head_dim", dense=1),
        Argument("keys", ELEMENT, "T kv_heads head_dim", dense=1),
        Argument("own_lse", torch.float32, "N query_heads", dense=0),
    ),
    (GROUPED, Rule(f"T % {BLOCK} == 0 and T > 0", "the keys are whole blocks")),
)


def weigh_blocks(query: Tensor, keys: Tensor, own_lse: Tensor, scale: float) -> Tensor:
    """The share of attention that each block of keys has with some queries of a block of queries: the largest
    of them, which loses less than their mean.

    Args:
        query: [N, query_heads, head_dim].
        keys: [K * BLOCK, kv_heads, head_dim], all of them before the queries.
        own_lse: [N, query_heads] float32, log-sum-exp of the scores of each query's other keys.
        scale: factor of the scores.

    Returns:
        [query_heads, Q, K] float32; Q is N / BLOCK, rounded up.
    """
    _SIGNATURE.check(query, keys, own_lse)
    count, heads, dim = query.shape
    step, lines, blocks = BLOCK // SAMPLED, -(-count // BLOCK), len(keys) // BLOCK
    places = torch.arange(step - 1, lines * BLOCK, step, device=query.device).clamp_max_(count - 1)
    samples, own = query[places], own_lse[places].t().contiguous()
    if query.is_cpu:
        grouped = samples.float().unflatten(1, (keys.shape[1], -1)).permute(1, 2, 0, 3)
        products = (grouped @ keys.float().permute(1, 2, 0).unsqueeze(1)).flatten(0, 1)
        weights = (products * scale - own.unsqueeze(2)).clamp_max_(100 / _LOG2E).exp_()
        sums = weights.unflatten(2, (blocks, BLOCK)).sum(3)
    else:
        sums = torch.empty(heads, len(places), blocks, device=query.device)
        most = _M[len(places) > _M[0]]
        grid = (-(-len(keys) // (_N * _TILES)), -(-len(places) // most), heads)
        _kernel()[grid](
            samples, keys, own * _LOG2E, sums, len(places), blocks, scale * _LOG2E,
            samples.stride(0), samples.stride(1), keys.stride(0), keys.stride(1),
            GROUP=heads // keys.shape[1], DIM=dim, WIDTH=max(16, 1 << (dim - 1).bit_length()), BLOCK=BLOCK,
            M=most, N=_N, TILES=_TILES, num_warps=8, num_stages=3,
        )  # fmt: skip
    shares = sums / (1 + sums.sum(2, keepdim=True))  # the queries' other keys together weigh 1
    largest: Tensor = shares.unflatten(1, (lines, SAMPLED)).amax(2)
    return largest


@cache
def _kernel() -> Any:
    from clo.kernels.weigh_blocks_kernel import weigh  # Triton is there only where there is a GPU

    return weigh
