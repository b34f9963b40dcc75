"""Score: the softmax weight of every row for a query group, from its key or from the key's 2-bit code."""

import torch
from torch import Tensor

from clo.kernels.arguments import GROUPED, HEAD_DIM, Argument, Rule, Signature
from clo.kernels.blocks import gather_blocks, gather_tokens
from clo.kernels.encode import CODES, CODES_PER_BYTE, PACKED, PAGE_TABLE, SCALES, CodePages, spread
from clo.kernels.launch import launch
from clo.kernels.limits import BLOCK_TOKENS_STEP
from clo.kernels.quantize_query import LOG2E, QuantizedQuery

NEVER = -1  # score of a row that is not a candidate

_UNIT = BLOCK_TOKENS_STEP  # tokens that a warp scores at a time
_WARPS, _UNITS, _STAGES = 4, 8, 3  # warps of a block; units of a warp; units on their way to it

_SIGNATURE = Signature(
    "score_codes",
    (
        Argument("quantized.integers", torch.int8, "B query_heads head_dim", chunks=True),
        Argument("quantized.steps", torch.float32, "B query_heads"),
        Argument("quantized.offsets", torch.float32, "B kv_heads max_blocks query_heads//kv_heads"),
        CODES, SCALES,
        Argument("reselect", torch.bool, "B kv_heads"),
        Argument("lengths", torch.int64, "B"),
        PAGE_TABLE,
    ),
    (
        HEAD_DIM, PACKED, GROUPED,
        Rule(f"block_tokens % {_UNIT} == 0", "a warp scores so many tokens of a page at a time", gpu=True),
        Rule("sinks >= 0 and tail >= 0", "they count tokens"),
    ),
)  # fmt: skip


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
    scores = weight.view(torch.int16)[..., 1::2].contiguous()  # the high half of each
    scores[..., :sinks] = NEVER
    for sequence, length in enumerate(lengths.tolist()):
        scores[sequence, :, max(length - tail, 0) :] = NEVER
    return scores


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
    _SIGNATURE.check(
        integers,
        steps,
        offsets,
        pages.codes,
        pages.scales,
        reselect,
        lengths,
        page_table,
        sinks=sinks,
        tail=tail,
    )
    batch, kv_heads, max_blocks, group = offsets.shape
    dim, block_tokens = integers.shape[2], pages.block_tokens
    if not integers.is_cpu:
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
    # by page, [B, max_blocks, kv_heads, ...], as they lie in memory; the products are integers, and exact
    rounded = integers.float().view(batch, 1, kv_heads, group, dim)
    interleaved = rounded.unflatten(-1, (CODES_PER_BYTE, -1)).transpose(-1, -2).flatten(-2)
    levels = spread(gather_blocks(pages.codes, page_table)).float()
    products = interleaved @ levels.transpose(-1, -2)
    products -= 1.5 * rounded.sum(-1, keepdim=True)
    products *= steps.view(batch, 1, kv_heads, group, 1) * (scale * LOG2E)
    products *= gather_blocks(pages.scales, page_table).float().unsqueeze(3)
    products += offsets.transpose(1, 2).unsqueeze(-1)
    weight = products.exp2_().sum(3)
    return _rounded(weight.transpose(1, 2).flatten(2), lengths, sinks, tail)
