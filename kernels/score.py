"""Score: the softmax weight of every row for a query group, from its key or from the key's 2-bit code."""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from clo.kernels.arguments import GROUPED, HEAD_DIM, Argument, Rule, Signature
from clo.kernels.blocks import gather_tokens
from clo.kernels.compiled import Array, compiled
from clo.kernels.encode import CODES, CODES_PER_BYTE, PACKED, PAGE_TABLE, SCALES, CodePages
from clo.kernels.launch import launch
from clo.kernels.limits import BLOCK_TOKENS_STEP, RUN
from clo.kernels.quantize_query import LOG2E, QuantizedQuery

NEVER = -1  # score of a row that is not a candidate


class Scores(NamedTuple):
    """Scores of the rows, and what they come to in runs of 16."""

    rows: Tensor  # [B, kv_heads, T] int16, as from ``score_products``
    runs: Tensor  # [B, kv_heads, ceil(T / 16), 2] int16, as from ``sum_runs``


_UNIT = BLOCK_TOKENS_STEP  # tokens that a warp scores at a time
_WARPS, _STAGES = 4, 3  # warps of a block; units on their way to a warp
_FEW_LINES = 128  # of heads and sequences, up to which blocks are shorter
_UNITS = 4, 8  # of a warp, up to there and beyond: long blocks hold up what is urgent beside them

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
        Rule("sinks >= 0 and latest >= 0", "they count tokens"),
    ),
)  # fmt: skip


def score_exact(
    query: Tensor,
    arena: Tensor,
    block_table: Tensor,
    lse: Tensor,
    lengths: Tensor,
    sinks: int,
    latest: int,
    scale: float,
) -> Scores:
    """Scores from the keys in the arena themselves.

    Args:
        query: [B, query_heads, head_dim].
        arena: [blocks, kv_heads, block_tokens, 2, head_dim], this layer.
        block_table: [B, max_blocks] int64.

    The others are those of ``score_products``.
    """
    keys = gather_tokens(arena[:, :, :, 0], block_table).float()
    grouped = query.float().view(query.shape[0], keys.shape[1], -1, query.shape[2])
    rows = score_products(grouped @ keys.transpose(-1, -2), lse, lengths, sinks, latest, scale)
    return Scores(rows, sum_runs(rows))


def score_products(
    products: Tensor, lse: Tensor, lengths: Tensor, sinks: int, latest: int, scale: float
) -> Tensor:
    """The score of a row: its softmax weight, summed over the query group.

    The softmax is normalised with the log-sum-exp of the step before, which attention has left behind. On
    real text that selects as well as the exact sums do.

    Args:
        products: [B, kv_heads, group, T] float32, query times key.
        lse: [B, query_heads] float32, log-sum-exp of the last attention.
        lengths: [B] int64; candidates are all positions but the first ``sinks`` and the last ``latest``.
        scale: factor of the products in the softmax.

    Returns:
        [B, kv_heads, T] int16, the high 16 bits of the weight as float32, which order as integers do;
        ``NEVER`` for a row that is not a candidate.
    """
    weight = (products * scale - lse.view(*products.shape[:3], 1)).exp().sum(2)
    scores = weight.view(torch.int16)[..., 1::2].contiguous()  # the high half of each
    scores[..., :sinks] = NEVER
    places = torch.arange(scores.shape[2], device=scores.device)
    return scores.masked_fill_((places >= lengths.unsqueeze(1) - latest).unsqueeze(1), NEVER)


def sum_runs(rows: Tensor) -> Tensor:
    """Of each run of 16 rows the largest score, and the sum of its scores as weights.

    Args:
        rows: [B, kv_heads, T] int16, from ``score_products``.

    Returns:
        [B, kv_heads, ceil(T / 16), 2] int16; the sum as its high 16 bits in float32, added pair by pair. A
        run of which no row is a candidate has ``NEVER`` and 0.
    """
    runs = torch.nn.functional.pad(rows, (0, -rows.shape[2] % RUN), value=NEVER).unflatten(2, (-1, RUN))
    weights = (runs.clamp_min(0).int() << 16).view(torch.float32)
    while weights.shape[3] > 1:
        weights = weights[..., ::2] + weights[..., 1::2]
    return torch.stack((runs.amax(3), (weights.view(torch.int32) >> 16)[..., 0].short()), 3)


def score_codes(
    quantized: QuantizedQuery,
    pages: CodePages,
    reselect: Tensor,
    lengths: Tensor,
    page_table: Tensor,
    sinks: int,
    latest: int,
    scale: float,
) -> Scores:
    """Scores from the 2-bit codes of the keys (``clo.kernels.encode``).

    Args:
        quantized: from ``quantize_query`` with the same page table and scale.
        pages: this layer of the index.
        reselect: [B, kv_heads] bool; the scores of other heads are undefined.
        lengths: [B] int64.
        page_table: [B, max_blocks] int64.
        sinks, latest, scale: see ``score_products``.

    Returns:
        Of T = max_blocks * block_tokens rows; undefined for those from ``lengths - latest`` on, and for runs
        of them alone.
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
        latest=latest,
    )
    batch, kv_heads, max_blocks, group = offsets.shape
    dim, block_tokens = integers.shape[2], pages.block_tokens
    if not integers.is_cpu:
        span = max_blocks * block_tokens
        scores = Scores(
            torch.empty(batch, kv_heads, span, dtype=torch.int16, device=integers.device),
            torch.empty(batch, kv_heads, span // RUN, 2, dtype=torch.int16, device=integers.device),
        )
        units = _UNITS[batch * kv_heads > _FEW_LINES]
        columns = -(-group // 8) * (4 if group <= 4 else 8)
        stage_bytes = _UNIT * dim // 4 + _UNIT * 2 + -(-columns * 4 // 16) * 16
        launch(
            "score.cu", "score_codes", (-(-span // (_WARPS * units * _UNIT)), kv_heads, batch), 32 * _WARPS,
            [*quantized, pages.codes, pages.scales, reselect, lengths, page_table, max_blocks,
             page_table.stride(0), *scores, sinks, latest, scale],
            shared=_WARPS * _STAGES * stage_bytes, DIM=dim, GROUP=group, BLOCK_TOKENS=block_tokens,
            WARPS=_WARPS, UNITS=units, STAGES=_STAGES,
        )  # fmt: skip
        return scores
    codes = pages.codes.numpy(), pages.scales.view(torch.int16).numpy()
    logarithms = np.empty((group, max_blocks * block_tokens), np.float32)
    rows = torch.full((batch, kv_heads, max_blocks * block_tokens), NEVER, dtype=torch.int16)
    for sequence, head in reselect.nonzero().tolist():
        end = min(int(lengths[sequence]) - latest, rows.shape[2])
        if end <= sinks:
            continue
        query = (part.numpy()[sequence] for part in (integers, steps, offsets[:, head]))
        of_head = logarithms[:, :end]
        _logarithms(group, dim // CODES_PER_BYTE)(
            *query, *codes, page_table[sequence].contiguous().numpy(), head, scale, of_head
        )
        with np.errstate(over="ignore"):
            np.exp(of_head, out=of_head)
        _sum(of_head, sinks, rows.numpy()[sequence, head])
    return Scores(rows, sum_runs(rows))


@cache
def _logarithms(group: int, quarter: int) -> Callable[..., None]:
    """A loop for the logarithm of each weight [group, T]; sizes that are known in advance make it faster.

    Args:
        group: queries of a group.
        quarter: bytes of a row's code, a quarter of its entries.
    """

    def loop(
        integers: Array, steps: Array, offsets: Array, codes: Array, scale_bits: Array, pages: Array,
        head: int, scale: float, logarithms: Array,
    ) -> None:  # fmt: skip
        count, block_tokens = logarithms.shape[1], codes.shape[2]
        query = integers[head * group : (head + 1) * group].astype(np.int16).reshape((group, 4, quarter))
        products, scales = np.empty(block_tokens, np.int32), np.empty(block_tokens, np.float32)
        whole_bits = scales.view(np.int32)
        for block in range(-(-count // block_tokens)):
            rows, row_bits = codes[pages[block], head], scale_bits[pages[block], head]
            # float16 to float32: the bits of the exponent move to their new place, and it gets its new bias
            for token in range(block_tokens):
                whole_bits[token] = (np.int32(row_bits[token]) & 0x7FFF) << 13
                scales[token] *= np.float32(2.0**112)
            start = block * block_tokens
            for member in range(group):
                first, second, third, fourth = (
                    query[member, 0], query[member, 1], query[member, 2], query[member, 3],
                )  # fmt: skip
                for token in range(block_tokens):
                    product = np.int32(0)
                    for place in range(quarter):
                        byte = np.int32(rows[token, place])
                        product += (
                            (byte & 3) * first[place]
                            + (byte >> 2 & 3) * second[place]
                            + (byte >> 4 & 3) * third[place]
                            + (byte >> 6) * fourth[place]
                        )
                    products[token] = product
                middle = np.float32(1.5) * np.float32(query[member].sum())
                factor = steps[head * group + member] * np.float32(scale)
                offset = offsets[block, member] * np.float32(1 / LOG2E)
                for token in range(min(block_tokens, count - start)):
                    value = (np.float32(products[token]) - middle) * factor * scales[token]
                    logarithms[member, start + token] = value + offset

    return compiled(loop)


def _sum_loop(weights: Array, sinks: int, scores: Array) -> None:
    group, count = weights.shape
    total = np.zeros(count, np.float32)
    for member in range(group):
        total += weights[member]
    whole = total.view(np.int32)
    for token in range(sinks, count):
        scores[token] = whole[token] >> 16


_sum = compiled(_sum_loop)
