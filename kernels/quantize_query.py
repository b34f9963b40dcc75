"""Quantise queries for the index: the part of a score that can be computed without the codes."""

from typing import NamedTuple

import torch
from torch import Tensor

from clo.kernels.arguments import ELEMENT, GROUPED, HEAD_DIM, Argument, Rule, Signature
from clo.kernels.blocks import gather_blocks
from clo.kernels.encode import CENTRES, PAGE_TABLE, ROTATION, CodePages
from clo.kernels.launch import ELEMENTS, launch
from clo.kernels.limits import GROUP_ENTRIES_MOST, quantize_parts

LOG2E = 1.4426950408889634

_SIGNATURE = Signature(
    "quantize_query",
    (
        Argument("query", ELEMENT, "B query_heads head_dim", dense=2),
        CENTRES, ROTATION,
        Argument("lse", torch.float32, "B query_heads"),
        Argument("lengths", torch.int64, "B"),
        PAGE_TABLE,
    ),
    (
        HEAD_DIM, GROUPED,
        Rule(f"query_heads // kv_heads * head_dim <= {GROUP_ENTRIES_MOST}",
             "the sums of a group lie in shared memory", gpu=True),
    ),
)  # fmt: skip


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
    _SIGNATURE.check(query, pages.centres, rotation, lse, lengths, page_table)
    batch, query_heads, dim = query.shape
    kv_heads, max_blocks = pages.centres.shape[1], page_table.shape[1]
    group = query_heads // kv_heads
    if not query.is_cpu:
        quantized = QuantizedQuery(
            torch.empty(query.shape, dtype=torch.int8, device=query.device),
            torch.empty(query.shape[:2], dtype=torch.float32, device=query.device),
            torch.empty(batch, kv_heads, max_blocks, group, dtype=torch.float32, device=query.device),
        )
        parts = quantize_parts(group, dim)
        threads = -(-parts * dim // 32) * 32
        launch(
            "quantize_query.cu", "quantize_query",
            (kv_heads, batch, 1 + -(-max_blocks // (threads // 32))), threads,
            [query, query.stride(0), rotation, pages.centres, lse, lengths, page_table, max_blocks,
             page_table.stride(0), *quantized, scale], ELEMENT=ELEMENTS[query.dtype], DIM=dim, GROUP=group,
            BLOCK_TOKENS=pages.block_tokens, PARTS=parts,
        )  # fmt: skip
        return quantized
    exact = query.float()
    rotated = (exact.flatten(0, 1) @ rotation).view(query.shape)
    steps = rotated.abs().amax(-1).clamp_min_(1e-20).div_(127)
    centres = gather_blocks(pages.centres, page_table).transpose(1, 2)  # [B, kv_heads, max_blocks, D]
    products = centres @ exact.view(batch, kv_heads, group, dim).transpose(-1, -2)
    offsets = products.mul_(scale).sub_(lse.view(batch, kv_heads, 1, group)).mul_(LOG2E)
    return QuantizedQuery(rotated.div_(steps.unsqueeze(-1)).round_().to(torch.int8), steps, offsets)
