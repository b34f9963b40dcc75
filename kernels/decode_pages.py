"""Decode pages: rows from their 2-bit codes, for a prompt that attends to what it begins with from codes.

The inverse of ``clo.kernels.encode`` and ``clo.kernels.encode_values``: what was rotated is turned back, and
keys get their page's centre again.
"""

import torch
from torch import Tensor

from clo.kernels.arguments import ELEMENT, HEAD_DIM, Argument, Rule, Signature
from clo.kernels.encode import CENTRES, CODES, PACKED, ROTATION, SCALES, CodePages, unpack
from clo.kernels.encode_values import (
    MIX,
    VALUE_CODES,
    VALUE_SCALES,
    WHOLE_CHUNKS,
    WHOLE_RUNS,
    ValuePages,
    decode_values,
    unpack_values,
)
from clo.kernels.launch import ELEMENTS, launch

TOKENS = 16384
"""Tokens whose keys are turned back at a time: what is between the two steps stays in the L2 cache, about."""

_THREADS = 256

_SIGNATURE = Signature(
    "decode_pages",
    (
        Argument("rows", ELEMENT, "N kv_heads 2 head_dim", chunks=True),
        Argument("numbers", torch.int64, "P"),
        CODES, SCALES, CENTRES, VALUE_CODES, VALUE_SCALES, ROTATION,
    ),
    (
        HEAD_DIM, PACKED, WHOLE_RUNS, WHOLE_CHUNKS,
        Rule("N == P * block_tokens", "the pages are whole"),
        Rule("P >= 1", "a launch needs a page"),
    ),
)  # fmt: skip


def decode_pages(
    rows: Tensor, numbers: Tensor, pages: CodePages, values: ValuePages, rotation: Tensor
) -> None:
    """Compute the rows of whole pages from their codes.

    On a GPU a kernel unpacks keys into the rotated space, in the rows' dtype and with the centre turned
    likewise, and a matrix product turns them back; both are bound by memory, and the rounding of 16 bits is
    small beside that of the codes. Values are turned back by additions.

    Args:
        rows: [N, kv_heads, 2, head_dim], contiguous, to be filled.
        numbers: [N / block_tokens] int64, pages, in the order of the tokens; the rows of one below 0 are
            undefined.
        pages, values: this layer of the index.
        rotation: [head_dim, head_dim] float32, with which the keys were encoded.
    """
    _SIGNATURE.check(rows, numbers, *pages, *values, rotation)
    _, kv_heads, _, dim = rows.shape
    block_tokens, most = pages.block_tokens, max(1, TOKENS // pages.block_tokens)
    if not rows.is_cpu:
        back = rotation.t().to(rows.dtype)
        for first in range(0, len(numbers), most):
            part = numbers[first : first + most]
            piece = rows[first * block_tokens : (first + len(part)) * block_tokens]
            centres = pages.centres[part] @ rotation  # [P', kv_heads, head_dim]
            turned = rows.new_empty(len(piece), kv_heads, dim)
            launch(
                "decode_pages.cu", "decode_keys",
                (-(-block_tokens // (_THREADS // (dim // 16))), kv_heads, len(part)), _THREADS,
                [turned, part, pages.codes, pages.scales, centres],
                ELEMENT=ELEMENTS[rows.dtype], DIM=dim, BLOCK_TOKENS=block_tokens, THREADS=_THREADS, MIX=MIX,
            )  # fmt: skip
            launch(
                "decode_pages.cu", "decode_values",
                (block_tokens // (_THREADS // 8), kv_heads, len(part)), _THREADS,
                [piece, part, *values],
                ELEMENT=ELEMENTS[rows.dtype], DIM=dim, BLOCK_TOKENS=block_tokens, THREADS=_THREADS, MIX=MIX,
            )  # fmt: skip
            torch.mm(turned.flatten(0, 1), back, out=piece.flatten(0, 1)[:, 0])
        return
    by_token = rows.unflatten(0, (len(numbers), block_tokens)).transpose(1, 2)  # [P, kv_heads, tokens, 2, D]
    levels = unpack(pages.codes[numbers]).float().sub_(1.5)
    rotated = levels.mul_(pages.scales[numbers].float().unsqueeze(-1))
    by_token[..., 0, :] = (rotated @ rotation.t()).add_(pages.centres[numbers].unsqueeze(2)).to(rows.dtype)
    codes = unpack_values(values.codes[numbers], dim)
    by_token[..., 1, :] = decode_values(codes, values.scales[numbers]).to(rows.dtype)
