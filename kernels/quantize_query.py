"""Quantise queries for the index: the part of a score that can be computed without the codes."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from clo.kernels.arguments import ELEMENT, GROUPED, HEAD_DIM, Argument, Rule, Signature
from clo.kernels.compiled import Array, compiled, floats
from clo.kernels.encode import CENTRES, PAGE_TABLE, ROTATION, CodePages
from clo.kernels.launch import ELEMENTS, launch
from clo.kernels.limits import GROUP_ENTRIES_MOST, quantize_parts

LOG2E = 1.4426950408889634

_SIGNATURE = Signature(
    "quantize_query",
    (
        Argument("query", ELEMENT, "B query_heads head_dim", dense=2),
        Argument("rope.cosines", ELEMENT, "B head_dim", optional=True),
        Argument("rope.sines", ELEMENT, "B head_dim", optional=True),
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


class Rope(NamedTuple):
    """What RoPE turns the heads of N tokens with; both halves of a row are alike."""

    cosines: Tensor  # [N, head_dim]
    sines: Tensor  # [N, head_dim]


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
    rope: Rope | None = None,
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
        rope: of the queries' positions, if it is still to be applied to them. What comes of that is not
            rounded to their dtype.
    """
    cosines, sines = rope or (None, None)
    _SIGNATURE.check(query, cosines, sines, pages.centres, rotation, lse, lengths, page_table)
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
            [query, query.stride(0), cosines, sines, rotation, pages.centres, lse, lengths, page_table,
             max_blocks, page_table.stride(0), *quantized, scale], ELEMENT=ELEMENTS[query.dtype], DIM=dim,
            GROUP=group, BLOCK_TOKENS=pages.block_tokens, PARTS=parts, ROPE=int(rope is not None),
        )  # fmt: skip
        return quantized
    integers = torch.empty(query.shape, dtype=torch.int8)
    steps = torch.empty(batch, query_heads)
    offsets = torch.empty(batch, kv_heads, max_blocks, group)
    quantized = QuantizedQuery(integers, steps, offsets)
    _quantize(
        floats(query if rope is None else _turned(query, rope)), rotation.numpy(), pages.centres.numpy(),
        lse.numpy(), lengths.numpy(), page_table.contiguous().numpy(), pages.block_tokens, scale,
        *(part.numpy() for part in quantized),
    )  # fmt: skip
    return quantized


def _turned(query: Tensor, rope: Rope) -> Tensor:
    """The queries after RoPE, in float32."""
    cosines, sines = (part.float().unsqueeze(1) for part in rope)
    first, second = query.float().chunk(2, dim=-1)
    return query * cosines + torch.cat((-second, first), dim=-1) * sines


def _loop(
    query: Array, rotation: Array, centres: Array, lse: Array, lengths: Array, page_table: Array,
    block_tokens: int, scale: float, integers: Array, steps: Array, offsets: Array,
) -> None:  # fmt: skip
    batch, query_heads, dim = query.shape
    group = offsets.shape[3]
    rotated = np.empty(dim, np.float32)
    for sequence in range(batch):
        for number in range(query_heads):
            exact = query[sequence, number]
            rotated[:] = 0
            for entry in range(dim):
                for column in range(dim):
                    rotated[column] += exact[entry] * rotation[entry, column]
            largest = np.float32(1e-20)
            for entry in range(dim):
                largest = max(largest, abs(rotated[entry]))
            step = largest / np.float32(127)
            steps[sequence, number] = step
            for entry in range(dim):
                integers[sequence, number, entry] = np.rint(rotated[entry] / step)
            head, member = divmod(number, group)
            for block in range(min(-(-lengths[sequence] // block_tokens), page_table.shape[1])):
                centre = centres[page_table[sequence, block], head]
                product = np.float32(0)
                for entry in range(dim):
                    product += exact[entry] * centre[entry]
                offset = product * np.float32(scale) - lse[sequence, number]
                offsets[sequence, head, block, member] = offset * np.float32(LOG2E)


_quantize = compiled(_loop, any_order=True)
