"""Encode: 2-bit codes of keys for the index.

A key is centred on the mean of its block, rotated by a fixed random rotation so that its entries are close
to Gaussian, and each entry rounded to the four levels (-1.5, -0.5, 0.5, 1.5) x step, the optimal uniform
quantiser of a Gaussian (Max 1960). The scale makes the product of key and code that of the key with itself,
so that the code is neither too long nor too short along the key (RaBitQ, Gao and Long 2024, whose estimate is
unbiased for the same reason, and whose rotation this is); a least-squares fit would shrink all products by an
eighth. Centring on the block keeps a block's codes independent of the rest of the sequence. At 2 bits an
entry, head_dim 64 takes 16 bytes and a float16 scale.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from clo.kernels.arguments import ELEMENT, HEAD_DIM, Argument, Rule, Signature
from clo.kernels.compiled import Array, compiled, floats
from clo.kernels.launch import ELEMENTS, launch
from clo.kernels.limits import CODES_PER_BYTE as CODES_PER_BYTE

STEP = 0.9957  # step of the optimal uniform 2-bit quantiser of N(0, 1)
SMALLEST = 1e-30  # in place of zero below a fraction bar, where a vector is zero


class CodePages(NamedTuple):
    """One layer of an index: pages of ``block_tokens`` tokens each, addressed by a page table."""

    codes: Tensor  # [pages, kv_heads, block_tokens, head_dim // 4] uint8, see ``encode``
    scales: Tensor  # [pages, kv_heads, block_tokens] float16
    centres: Tensor  # [pages, kv_heads, head_dim] float32, subtracted from the keys of a page

    @property
    def block_tokens(self) -> int:
        return self.codes.shape[2]


CODES = Argument(
    "pages.codes", torch.uint8, f"pages kv_heads block_tokens head_dim//{CODES_PER_BYTE}", chunks=True
)
SCALES = Argument("pages.scales", torch.float16, "pages kv_heads block_tokens", chunks=True)
CENTRES = Argument("pages.centres", torch.float32, "pages kv_heads head_dim")
PAGE_TABLE = Argument("page_table", torch.int64, "B max_blocks", dense=1)
ROTATION = Argument("rotation", torch.float32, "head_dim head_dim")
PACKED = Rule(f"head_dim % {CODES_PER_BYTE} == 0", "a byte of the index holds as many codes")
"""``CodePages`` and what goes with them as arguments of operations."""

_SIGNATURE = Signature(
    "encode_new",
    (
        Argument("keys", ELEMENT, "B kv_heads head_dim", dense=1),
        Argument("lengths", torch.int64, "B"),
        PAGE_TABLE, CODES, SCALES, CENTRES, ROTATION,
    ),
    (HEAD_DIM, PACKED),
)  # fmt: skip


def encode(keys: Tensor, centre: Tensor, rotation: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales of keys.

    Args:
        keys: [..., head_dim], any float dtype; head_dim divisible by 4.
        centre: broadcastable to ``keys``, float32, in the unrotated space.
        rotation: [head_dim, head_dim] float32, orthogonal.

    Returns:
        codes [..., D/4] uint8: byte i holds entries i, i + D/4, i + 2D/4 and i + 3D/4, low bits first;
        scales [...] float16.
    """
    rotated = (keys.float() - centre) @ rotation
    sigma = rotated.square().mean(-1, keepdim=True).sqrt_().clamp_min_(1e-12)
    levels = (rotated / sigma.mul_(STEP)).floor_().add_(2).clamp_(0, 3)
    values = levels - 1.5
    along = values.mul_(rotated).sum(-1)
    scales = rotated.square_().sum(-1) / along.clamp_min_(SMALLEST)
    codes, *planes = levels.unflatten(-1, (CODES_PER_BYTE, -1)).unbind(-2)
    for number, plane in enumerate(planes, 1):
        codes = torch.add(codes, plane, alpha=CODES_PER_BYTE**number)
    return codes.to(torch.uint8), scales.to(torch.float16)


def encode_new(keys: Tensor, lengths: Tensor, page_table: Tensor, pages: CodePages, rotation: Tensor) -> None:
    """Index the newest key of each sequence, in place.

    A page that decoding opens takes over the centre of the page before it, since its own mean is not known
    yet; the first key of a sequence is its own centre.

    Args:
        keys: [B, kv_heads, head_dim].
        lengths: [B] int64, tokens of each sequence with the new one; 0 for a slot not in use.
        page_table: [B, max_blocks] int64.
        pages: this layer of the index.
        rotation: [head_dim, head_dim] float32.
    """
    _SIGNATURE.check(keys, lengths, page_table, *pages, rotation)
    if not keys.is_cpu:
        dim = keys.shape[2]
        launch(
            "encode.cu", "encode_new", (keys.shape[1], len(keys)), -(-dim // 32) * 32,
            [keys, keys.stride(0), keys.stride(1), lengths, page_table, page_table.stride(0), *pages,
             rotation, STEP],
            ELEMENT=ELEMENTS[keys.dtype], DIM=dim, BLOCK_TOKENS=pages.block_tokens,
        )  # fmt: skip
        return
    scales = torch.empty(keys.shape[:2])
    _encode(
        floats(keys), lengths.numpy(), page_table.contiguous().numpy(), pages.centres.numpy(),
        rotation.numpy(), pages.codes.numpy(), scales.numpy(),
    )  # fmt: skip
    for sequence, length in enumerate(lengths.tolist()):
        if length > 0:
            number, offset = divmod(length - 1, pages.block_tokens)
            pages.scales[int(page_table[sequence, number]), :, offset] = scales[sequence]


def _loop(
    keys: Array, lengths: Array, page_table: Array, centres: Array, rotation: Array, codes: Array,
    scales: Array,
) -> None:  # fmt: skip
    batch, kv_heads, dim = keys.shape
    rotated, quarter = np.empty(dim, np.float32), codes.shape[3]
    for sequence in range(batch):
        number, offset = divmod(lengths[sequence] - 1, codes.shape[2])
        if number < 0 or number >= page_table.shape[1]:  # a slot not in use, or the caller hears of it
            continue
        page = page_table[sequence, number]
        for head in range(kv_heads):
            key, centre, code = keys[sequence, head], centres[page, head], codes[page, head, offset]
            for entry in range(dim):
                if number == 0 and offset == 0:
                    centre[entry] = key[entry]
                elif offset == 0:
                    centre[entry] = centres[page_table[sequence, number - 1], head, entry]
            rotated[:] = 0
            for entry in range(dim):
                for column in range(dim):
                    rotated[column] += (key[entry] - centre[entry]) * rotation[entry, column]
            squares = np.float32(0)
            for entry in range(dim):
                squares += rotated[entry] * rotated[entry]
            step = max(np.sqrt(squares / np.float32(dim)), np.float32(1e-12)) * np.float32(STEP)
            code[:] = 0
            along = np.float32(0)
            for entry in range(dim):
                level = min(
                    max(np.floor(rotated[entry] / step) + np.float32(2), np.float32(0)), np.float32(3)
                )
                along += rotated[entry] * (level - np.float32(1.5))
                code[entry % quarter] |= np.uint8(level) << np.uint8(2 * (entry // quarter))
            scales[sequence, head] = squares / max(along, np.float32(SMALLEST))


_encode = compiled(_loop, any_order=True)


def unpack(codes: Tensor) -> Tensor:
    """Levels 0 to 3 of packed codes: [..., D/4] uint8 to [..., D] uint8."""
    return torch.cat([codes >> shift & 3 for shift in (0, 2, 4, 6)], -1)
