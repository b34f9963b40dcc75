"""Attention of a decode step over the tail: tokens that are not resident, from the codes of the index.

Their keys' codes give their weights, as they give the scores of a selection, but for each query by itself;
their values' codes give what they add. Where other caches of this kind drop what they do not fetch, this one
attends to it a little less exactly. Values in 2 bits follow KIVI (Liu et al. 2024); a coarse remainder beside
exact rows, RetroInfer (Chen et al. 2025).
"""

from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from torch import Tensor

from clo.kernels.arguments import GROUPED, HEAD_DIM, Argument, Rule, Signature
from clo.kernels.attend import AttentionState
from clo.kernels.compiled import Array, compiled
from clo.kernels.encode import CODES, CODES_PER_BYTE, PACKED, PAGE_TABLE, SCALES, CodePages
from clo.kernels.encode_values import (
    MIX,
    VALUE_CODES,
    VALUE_SCALES,
    WHOLE_CHUNKS,
    WHOLE_RUNS,
    ValuePages,
    halves_of,
    signs,
)
from clo.kernels.launch import launch
from clo.kernels.limits import RUN, parts_of_heads
from clo.kernels.quantize_query import QuantizedQuery
from clo.kernels.update_resident import TAIL_BOOSTS, TAIL_COUNTS, TAIL_MASKS, TAIL_RUNS, TailList

_THREADS = 128
_BLOCKS = 256  # of threads that fill a GPU, about
_RUNS = 8, 128  # of a part, at least and at most; a lane of each warp looks up one
_USUAL = 4, 16  # parts, and runs of each: where there are many heads, fewer parts took longer
_STAGES = 3  # pairs of runs on their way to a warp, or with it
_MOST = 69.0  # logarithm of a weight: sums of more would be infinite

_SIGNATURE = Signature(
    "attend_tail",
    (
        Argument("quantized.integers", torch.int8, "B query_heads head_dim", chunks=True),
        Argument("quantized.steps", torch.float32, "B query_heads"),
        Argument("quantized.offsets", torch.float32, "B kv_heads max_blocks query_heads//kv_heads"),
        CODES, SCALES, VALUE_CODES, VALUE_SCALES, TAIL_RUNS, TAIL_MASKS, TAIL_COUNTS, TAIL_BOOSTS,
        Argument("lengths", torch.int64, "B"),
        PAGE_TABLE,
        Argument("lse", torch.float32, "B query_heads"),
        Argument("state.out", torch.float32, "B kv_heads S query_heads//kv_heads head_dim", chunks=True),
        Argument("state.sum", torch.float32, "B kv_heads S query_heads//kv_heads"),
        Argument("state.max", torch.float32, "B kv_heads S query_heads//kv_heads"),
    ),
    (
        HEAD_DIM, PACKED, GROUPED, WHOLE_RUNS, WHOLE_CHUNKS,
        Rule("R >= 1", "where there is no tail nothing attends to it"),
    ),
)  # fmt: skip


def tail_parts(tail: TailList) -> int:
    """Parts of an ``AttentionState`` that the tail fills: more where there are few heads, as a GPU would idle
    otherwise."""
    if tail.runs.is_cpu:
        return 1
    batch, kv_heads, runs = tail.runs.shape
    most, fewest = (-(-runs // size) for size in _RUNS)
    usual = min(_USUAL[0], -(-runs // _USUAL[1]))
    return max(fewest, usual, min(most, parts_of_heads(batch * kv_heads, _BLOCKS)))


def attend_tail(
    state: AttentionState,
    quantized: QuantizedQuery,
    pages: CodePages,
    values: ValuePages,
    tail: TailList,
    lengths: Tensor,
    page_table: Tensor,
    lse: Tensor,
    scale: float,
    *,
    early: bool = False,
) -> None:
    """Attend to the tail from its codes.

    It stands for all that is not resident: its weights are those of its tokens times a factor for each head,
    ``TailList.boosts``.

    Args:
        state: of which the last ``tail_parts`` parts are filled.
        quantized: the query that attends, from ``quantize_query`` with the same page table, scale, ``lse``.
        pages, values: this layer of the index.
        tail: from ``update_resident``.
        lengths: [B] int64, tokens with the current one; 0 for a slot not in use, whose result is undefined.
        page_table: [B, max_blocks] int64.
        lse: [B, query_heads] float32, log-sum-exp of the last attention.
        scale: factor of the scores.
        early: whether ``quantize_query`` was what the stream got last, and what else the tail is attended
            with is older: then the kernel begins to read the codes before that one has ended.
    """
    _SIGNATURE.check(
        *quantized, pages.codes, pages.scales, *values, *tail,
        lengths, page_table, lse, *state,
    )  # fmt: skip
    runs, parts = tail.runs.shape[2], state.sum.shape[2]
    own = tail_parts(tail)
    if own >= parts:
        raise ValueError(
            f"attend_tail: the state has {parts} parts, and those of the tail are the last {own}."
        )
    batch, kv_heads, max_blocks, group = quantized.offsets.shape
    dim, block_tokens = quantized.integers.shape[2], pages.block_tokens
    if not lengths.is_cpu:
        pair_bytes = 2 * (RUN * (dim // CODES_PER_BYTE + 16 * halves_of(dim) + 4) + 32)
        launch(
            "attend_tail.cu", "attend_tail", (own * -(-group // 8), kv_heads, batch), _THREADS,
            [*quantized, pages.codes, pages.scales, *values, *tail, runs, lengths, page_table, max_blocks,
             page_table.stride(0), lse, *state, parts, parts - own, scale],
            shared=max(_THREADS * halves_of(dim) * 16 * 4, _THREADS // 32 * _STAGES * pair_bytes), DIM=dim,
            GROUP=group, BLOCK_TOKENS=block_tokens, THREADS=_THREADS, RUNS=-(-runs // (8 * own)) * 8,
            STAGES=_STAGES, MIX=MIX, early=early,
        )  # fmt: skip
        return
    arrays = (
        *quantized, pages.codes, pages.scales.view(torch.int16), values.codes,
        values.scales.view(torch.int16), *tail, lengths, page_table.contiguous(), lse, *state,
        _levels_of_bytes(), signs(dim),
    )  # fmt: skip
    _attention(group, dim)(scale, *(part.numpy() for part in arrays))


@cache
def _levels_of_bytes() -> Tensor:
    """[256, 4] float32: the levels of the four codes in a byte."""
    return (torch.arange(256).unsqueeze(1) >> torch.arange(0, 8, 2) & 3) - 1.5


@cache
def _attention(group: int, dim: int) -> Callable[..., None]:
    """A loop for queries of one shape; sizes that are known in advance make it faster."""
    quarter = dim // CODES_PER_BYTE

    def loop(
        scale: float, integers: Array, steps: Array, offsets: Array, codes: Array,
        scales: Array, value_codes: Array, value_scales: Array, runs: Array, masks: Array, counts: Array,
        boosts: Array, lengths: Array, pages: Array, lse: Array, outs: Array, all_sums: Array,
        maxima: Array, table: Array, flips: Array,
    ) -> None:  # fmt: skip
        batch, kv_heads, parts = all_sums.shape[:3]
        width, part = dim & -dim, parts - 1
        block_tokens = codes.shape[2]
        factors = np.empty(2, np.float32)
        bits, levels = factors.view(np.int32), np.empty(dim, np.float32)
        query = np.empty((group, 4, quarter), np.int16)
        middles, weights = np.empty(group, np.float32), np.empty(group, np.float32)
        products = np.empty((group, RUN), np.int32)
        for sequence in range(batch):
            if lengths[sequence] == 0:
                continue
            for head in range(kv_heads):
                out, sums = outs[sequence, head, part], all_sums[sequence, head, part]
                out[:], sums[:] = 0, 0
                for member in range(group):
                    middle = np.float32(0)
                    for entry in range(dim):
                        value = integers[sequence, head * group + member, entry]
                        query[member, entry // quarter, entry % quarter] = value
                        middle += value
                    middles[member] = np.float32(1.5) * middle
                for number in range(counts[sequence, head]):
                    run, mask = runs[sequence, head, number], masks[sequence, head, number]
                    block, within = divmod(run * RUN, block_tokens)
                    page = pages[sequence, block]
                    rows = codes[page, head, within : within + RUN]
                    for member in range(group):
                        first, second, third, fourth = (
                            query[member, 0], query[member, 1], query[member, 2], query[member, 3],
                        )  # fmt: skip
                        for token in range(RUN):
                            product = np.int32(0)
                            for place in range(quarter):
                                byte = np.int32(rows[token, place])
                                product += (
                                    (byte & 3) * first[place]
                                    + (byte >> 2 & 3) * second[place]
                                    + (byte >> 4 & 3) * third[place]
                                    + (byte >> 6) * fourth[place]
                                )
                            products[member, token] = product
                    for token in range(RUN):
                        if not mask >> token & 1:
                            continue
                        # float16 to float32: the exponent's bits move, and it gets its new bias
                        bits[0] = (np.int32(scales[page, head, within + token]) & 0x7FFF) << 13
                        bits[1] = (np.int32(value_scales[page, head, within + token]) & 0x7FFF) << 13
                        key_scale = factors[0] * np.float32(2.0**112)
                        value_scale = factors[1] * np.float32(2.0**112)
                        for member in range(group):
                            factor = steps[sequence, head * group + member] * np.float32(scale) * key_scale
                            score = (np.float32(products[member, token]) - middles[member]) * factor
                            score += offsets[sequence, head, block, member] * np.float32(0.6931471805599453)
                            weights[member] = np.exp(min(score, np.float32(_MOST)))
                            sums[member] += weights[member]
                        lane, slot = token % 8 // 2, token % 2 + 2 * (token // 8)
                        at = (within + token) // RUN
                        for chunk in range(dim // 8):
                            word = np.int32(
                                value_codes[page, head, at, chunk // 8, 4 * (chunk % 8) + lane, slot]
                            )
                            low, high = word & 255, word >> 8 & 255
                            for place in range(4):
                                levels[chunk * 8 + place] = table[low, place]
                            for place in range(4):
                                levels[chunk * 8 + 4 + place] = table[high, place]
                        for member in range(group):
                            weight = weights[member] * value_scale
                            for entry in range(dim):
                                out[member, entry] += weight * levels[entry]
                for member in range(group):
                    maxima[sequence, head, part, member] = -np.inf
                    if sums[member] == 0:
                        continue
                    maxima[sequence, head, part, member] = (
                        lse[sequence, head * group + member]
                        + np.log(sums[member])
                        + boosts[sequence, head] * np.float32(0.6931471805599453)
                    )
                    turned = out[member]
                    step = 1
                    while step < width:
                        for start in range(0, dim, 2 * step):
                            for entry in range(start, start + step):
                                low, high = turned[entry], turned[entry + step]
                                turned[entry] = low + high
                                turned[entry + step] = low - high
                        step *= 2
                    share = np.float32(1) / (sums[member] * np.sqrt(np.float32(width)))
                    for entry in range(dim):
                        turned[entry] *= flips[entry] * share
                    sums[member] = 1

    return compiled(loop, any_order=True)
