"""Quantise queries for the index: the part of a score that can be computed without the codes."""

from typing import NamedTuple

import torch
from torch import Tensor

from clo.kernels.encode import CodePages
from clo.kernels.launch import ELEMENTS, launch

LOG2E = 1.4426950408889634
_STATIC_BYTES = 48 * 1024  # of shared memory, at most


class QuantizedQuery(NamedTuple):
    """The part of a score that needs no codes: queries as integers, and the products with the centres."""

    integers: Tensor  # [B, query_heads, head_dim] int8
    steps: Tensor  # [B, query_heads] float32; integers * steps is the rotated query
    offsets: Tensor  # [B, kv_heads, max_blocks, group] float32, base-2 log of a weight with a code of zero


def quantize_query(
    query: Tensor,
    pages: CodePages,
    rotation: Tensor,
    lse: Tensor,
    lengths: Tensor,
    page_table: Tensor,
    scale: float,
) -> QuantizedQuery:
    """Rotate and round the queries, and multiply them with the centre of each page.

    Args:
        query: [B, query_heads, head_dim], those of a sequence contiguous.
        pages: this layer of the index.
        rotation: [head_dim, head_dim] float32.
        lse: [B, query_heads] float32, log-sum-exp of the last attention.
        lengths: [B] int64; 0 for a slot not in use, whose result is undefined, as is that of pages past
            a sequence's end.
        page_table: [B, max_blocks] int64.
        scale: factor of the scores.
    """
    batch, query_heads, dim = query.shape
    kv_heads, max_blocks = pages.centres.shape[1], page_table.shape[1]
    group = query_heads // kv_heads
    if query.is_cuda:
        quantized = QuantizedQuery(
            torch.empty(query.shape, dtype=torch.int8, device=query.device),
            torch.empty(query.shape[:2], dtype=torch.float32, device=query.device),
            torch.empty(batch, kv_heads, max_blocks, group, dtype=torch.float32, device=query.device),
        )
        parts = next(parts for parts in (4, 2, 1) if parts * group * dim * 4 <= _STATIC_BYTES)
        threads = -(-parts * dim // 32) * 32
        launch(
            "quantize_query.cu", "quantize_query",
            (kv_heads, batch, 1 + -(-max_blocks // (threads // 32))), threads,
            [query, query.stride(0), rotation, pages.centres, lse, lengths, page_table, max_blocks,
             page_table.stride(0), *quantized, scale], ELEMENT=ELEMENTS[query.dtype], DIM=dim, GROUP=group,
            BLOCK_TOKENS=pages.block_tokens, PARTS=parts,
        )  # fmt: skip
        return quantized
    grouped = query.float().view(batch, kv_heads, group, dim)
    rotated = query.float() @ rotation
    steps = rotated.abs().amax(-1).clamp_min_(1e-20) / 127
    centres = pages.centres[page_table].transpose(1, 2)  # [B, kv_heads, max_blocks, D]
    products = centres @ grouped.transpose(-1, -2)
    offsets = (products * scale - lse.view(batch, kv_heads, 1, group)) * LOG2E
    return QuantizedQuery((rotated / steps.unsqueeze(-1)).round_().to(torch.int8), steps, offsets)
