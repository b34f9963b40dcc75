"""Ways to estimate which blocks of earlier keys matter to a block of queries.

Each says, for every head and block of queries, which share of the attention each block of keys has. They are
written to be compared, with all scores in memory, not to be fast.
"""

import math
from functools import partial

import torch
from torch import Tensor

from clo.gpu_worker.cache.index import random_rotation
from clo.kernels.encode import encode, unpack
from clo.kernels.sparse_prompt import Weigh
from clo.kernels.weigh_blocks import BLOCK, weigh_blocks

_PAGE = 64  # keys that share a centre


def exact(per_block: int, query: Tensor, keys: Tensor, own_lse: Tensor, scale: float) -> Tensor:
    """So many real queries of a block attend to all keys, and each block of keys has its mean share; with
    ``BLOCK`` that is the truth which the others estimate.

    Args:
        per_block: queries, evenly spaced; the last one of a block is one of them.
        query: [N, query_heads, head_dim].
        keys: [K * BLOCK, kv_heads, head_dim].
        own_lse: [N, query_heads] float32, log-sum-exp of the scores of each query's other keys.
        scale: factor of the scores.

    Returns:
        [query_heads, Q, K] float32; so do the others.
    """
    queries, own = in_blocks(query, own_lse)
    every = BLOCK // per_block
    return _weights(queries[:, every - 1 :: every], own[:, every - 1 :: every], keys, scale)


def pooled_queries(query: Tensor, keys: Tensor, own_lse: Tensor, scale: float) -> Tensor:
    """The mean of a block's queries attends to all keys."""
    queries, own = in_blocks(query, own_lse)
    return _weights(queries.mean(1, keepdim=True), _mean_lse(own), keys, scale)


def pooled_keys(query: Tensor, keys: Tensor, own_lse: Tensor, scale: float) -> Tensor:
    """All queries attend to the means of blocks of keys (FlashPrefill, Fan et al. 2026)."""
    return _weights(*in_blocks(query, own_lse), _block_means(keys), scale, BLOCK)


def pooled_both(query: Tensor, keys: Tensor, own_lse: Tensor, scale: float) -> Tensor:
    """The mean of a block's queries attends to the means of blocks of keys, as in the block-sparse heads of
    MInference (Jiang et al. 2024) and FlexPrefill (Lai et al. 2025)."""
    queries, own = in_blocks(query, own_lse)
    means = _block_means(keys)
    return _weights(queries.mean(1, keepdim=True), _mean_lse(own), means, scale, BLOCK)


def antidiagonal(stride: int, query: Tensor, keys: Tensor, own_lse: Tensor, scale: float) -> Tensor:
    """Sums of scores along antidiagonals of squares of ``stride`` queries and keys (XAttention, Xu et al.
    2025): queries in falling order and keys in rising order side by side as one long query and one long key,
    whose product is such a sum."""
    queries, own = in_blocks(query, own_lse)
    falling = queries.unflatten(1, (-1, stride)).flip(2).transpose(2, 3).flatten(3)  # [Q, any, heads, any]
    rising = keys.unflatten(0, (-1, stride)).transpose(1, 2).flatten(2)
    sums = own.unflatten(1, (-1, stride)).logsumexp(2) - math.log(stride)
    return _weights(falling, sums, rising, scale / stride, stride)


def codes(per_block: int, query: Tensor, keys: Tensor, own_lse: Tensor, scale: float) -> Tensor:
    """As ``exact``, with the index's 2-bit codes in place of the keys, after SALE (Ji et al. 2025), which has
    4 bits and looks at all queries."""
    rotation = random_rotation(keys.shape[2], keys.device)
    centres = keys.float().unflatten(0, (-1, _PAGE)).mean(1).repeat_interleave(_PAGE, 0)
    packed, scales = encode(keys, centres, rotation)
    levels = (unpack(packed).float() - 1.5) * scales.float().unsqueeze(-1)
    return exact(per_block, query, centres + levels @ rotation.T, own_lse, scale)


ESTIMATORS: dict[str, Weigh] = {
    "most of 4 queries, keys": weigh_blocks,
    "all queries, keys": partial(exact, BLOCK),
    "8 queries, keys": partial(exact, 8),
    "4 queries, keys": partial(exact, 4),
    "2 queries, keys": partial(exact, 2),
    "1 query, keys": partial(exact, 1),
    "4 queries, 2-bit keys": partial(codes, 4),
    "mean query, keys": pooled_queries,
    "all queries, mean keys": pooled_keys,
    "mean query, mean keys": pooled_both,
    "antidiagonals of 8": partial(antidiagonal, 8),
    "antidiagonals of 16": partial(antidiagonal, 16),
}


def in_blocks(query: Tensor, own_lse: Tensor) -> tuple[Tensor, Tensor]:
    """[Q, BLOCK, query_heads, ...] of both; the last query fills up the last block."""
    count = len(query)
    places = torch.arange(-(-count // BLOCK) * BLOCK, device=query.device).clamp_max(count - 1)
    return query[places].unflatten(0, (-1, BLOCK)), own_lse[places].unflatten(0, (-1, BLOCK))


def _mean_lse(own: Tensor) -> Tensor:
    return own.logsumexp(1, keepdim=True) - math.log(own.shape[1])


def _block_means(keys: Tensor) -> Tensor:
    means: Tensor = keys.float().unflatten(0, (-1, BLOCK)).mean(1)
    return means


def _weights(queries: Tensor, own: Tensor, keys: Tensor, scale: float, tokens: int = 1) -> Tensor:
    """The mean shares of blocks of keys.

    Args:
        queries: [Q, any, query_heads, E], those that stand for a block of queries.
        own: [Q, any, query_heads], log-sum-exp of their scores of other keys.
        keys: [K * BLOCK / tokens, kv_heads, E].
        scale: factor of the scores.
        tokens: real keys that each of ``keys`` stands for.
    """
    blocks, per_block, _, _ = queries.shape
    by_head = queries.float().flatten(0, 1).unflatten(1, (keys.shape[1], -1)).permute(1, 2, 0, 3)
    scores = by_head @ keys.float().permute(1, 2, 0).unsqueeze(1) * scale + math.log(tokens)
    scores = scores.flatten(0, 1)  # [query_heads, Q * any, any]
    total = torch.logaddexp(scores.logsumexp(-1), own.flatten(0, 1).T)
    shares = scores.sub_(total.unsqueeze(-1)).exp_().unflatten(2, (-1, BLOCK // tokens)).sum(3)
    means: Tensor = shares.unflatten(1, (blocks, per_block)).mean(2)
    return means
