"""Score: the softmax weight of every row for a query group, from its key or from the key's 2-bit code."""

import torch
from torch import Tensor

from clo.kernels.blocks import gather_tokens
from clo.kernels.encode import CodePages, unpack
from clo.kernels.launch import launch
from clo.kernels.quantize_query import LOG2E, QuantizedQuery

NEVER = -1  # score of a row that is not a candidate

_UNIT = 64  # tokens that a warp scores at a time
_WARPS, _UNITS, _STAGES = 4, 8, 3  # warps of a block; units of a warp; units on their way to it


def score_exact(
    query: Tensor,
    arena: Tensor,
    block_table: Tensor,
    lse: Tensor,
    lengths: Tensor,
    sinks: int,
    tail: int,
    scale: float,
) -> Tensor:
    """Scores from the keys in the arena themselves.

    Args:
        query: [B, query_heads, head_dim].
        arena: [blocks, kv_heads, block_tokens, 2, head_dim], this layer.
        block_table: [B, max_blocks] int64.

    The others, and the result, are those of ``score_products``.
    """
    keys = gather_tokens(arena[:, :, :, 0], block_table).float()
    grouped = query.float().view(query.shape[0], keys.shape[1], -1, query.shape[2])
    return score_products(grouped @ keys.transpose(-1, -2), lse, lengths, sinks, tail, scale)


def score_products(
    products: Tensor, lse: Tensor, lengths: Tensor, sinks: int, tail: int, scale: float
) -> Tensor:
    """The score of a row: its softmax weight, summed over the query group.

    The softmax is normalised with the log-sum-exp of the step before, which attention has left behind. On
    real text that selects as well as the exact sums do.

    Args:
        products: [B, kv_heads, group, T] float32, query times key.
        lse: [B, query_heads] float32, log-sum-exp of the last attention.
        lengths: [B] int64; candidates are all positions but the first ``sinks`` and the last ``tail``.
        scale: factor of the products in the softmax.

    Returns:
        [B, kv_heads, T] int16, the high 16 bits of the weight as float32, which order as integers do;
        ``NEVER`` for a row that is not a candidate.
    """
    weight = (products * scale - lse.view(*products.shape[:3], 1)).exp().sum(2)
    return _rounded(weight, lengths, sinks, tail)


def _rounded(weight: Tensor, lengths: Tensor, sinks: int, tail: int) -> Tensor:
    scores = (weight.view(torch.int32) >> 16).to(torch.int16)
    position = torch.arange(weight.shape[-1], device=weight.device)
    candidate = (position >= sinks) & (position < (lengths - tail).unsqueeze(1))
    return scores.masked_fill_(~candidate.unsqueeze(1), NEVER)


def score_codes(
    quantized: QuantizedQuery,
    pages: CodePages,
    reselect: Tensor,
    lengths: Tensor,
    page_table: Tensor,
    sinks: int,
    tail: int,
    scale: float,
) -> Tensor:
    """Scores from the 2-bit codes of the keys (``clo.kernels.encode``).

    Args:
        quantized: from ``quantize_query`` with the same page table and scale.
        pages: this layer of the index.
        reselect: [B, kv_heads] bool; the scores of other heads are undefined.
        lengths: [B] int64.
        page_table: [B, max_blocks] int64.
        sinks, tail, scale: see ``score_products``.

    Returns:
        [B, kv_heads, T] int16, T = max_blocks * block_tokens, as from ``score_products``; undefined from
        ``lengths - tail`` on.
    """
    integers, steps, offsets = quantized
    batch, kv_heads, max_blocks, group = offsets.shape
    dim, block_tokens = integers.shape[2], pages.block_tokens
    if integers.is_cuda:
        span = max_blocks * block_tokens
        scores = torch.empty(batch, kv_heads, span, dtype=torch.int16, device=integers.device)
        columns = -(-group // 8) * (4 if group <= 4 else 8)
        stage_bytes = _UNIT * dim // 4 + _UNIT * 2 + -(-columns * 4 // 16) * 16
        launch(
            "score.cu", "score_codes", (-(-span // (_WARPS * _UNITS * _UNIT)), kv_heads, batch), 32 * _WARPS,
            [*quantized, pages.codes, pages.scales, reselect, lengths, page_table, max_blocks,
             page_table.stride(0), scores, sinks, tail, scale],
            shared=_WARPS * _STAGES * stage_bytes, DIM=dim, GROUP=group, BLOCK_TOKENS=block_tokens,
            WARPS=_WARPS, UNITS=_UNITS, STAGES=_STAGES,
        )  # fmt: skip
        return scores
    rounded = integers.float().view(batch, kv_heads, group, dim)
    levels = unpack(gather_tokens(pages.codes, page_table)).float()  # [B, kv_heads, T, D]
    products = rounded @ levels.transpose(-1, -2) - 1.5 * rounded.sum(-1, keepdim=True)
    products *= steps.view(batch, kv_heads, group, 1) * (scale * LOG2E)
    products *= gather_tokens(pages.scales, page_table).float().unsqueeze(2)
    by_page = products.view(batch, kv_heads, group, max_blocks, block_tokens)
    by_page += offsets.transpose(2, 3).unsqueeze(-1)
    return _rounded(products.exp2_().sum(2), lengths, sinks, tail)
