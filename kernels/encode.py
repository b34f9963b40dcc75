"""Encode: 2-bit codes of keys for the index.

A key is centred on the mean of its block, rotated by a fixed random rotation so that its entries are close
to Gaussian, and each entry rounded to the four levels (-1.5, -0.5, 0.5, 1.5) x step, the optimal uniform
quantiser of a Gaussian (Max 1960); the scale is the least-squares fit of the levels to the key. Rotation
before scalar quantisation follows RaBitQ (Gao and Long 2024). Centring on the block keeps a block's codes
independent of the rest of the sequence. At 2 bits an entry, head_dim 64 takes 16 bytes and a float16 scale.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from clo.kernels.blocks import locate
from clo.kernels.launch import ELEMENTS, launch

STEP = 0.9957  # step of the optimal uniform 2-bit quantiser of N(0, 1)
CODES_PER_BYTE = 4


class CodePages(NamedTuple):
    """One layer of an index: pages of ``block_tokens`` tokens each, addressed by a page table."""

    codes: Tensor  # [pages, kv_heads, block_tokens, head_dim // 4] uint8, see ``encode``
    scales: Tensor  # [pages, kv_heads, block_tokens] float16
    centres: Tensor  # [pages, kv_heads, head_dim] float32, subtracted from the keys of a page

    @property
    def block_tokens(self) -> int:
        return self.codes.shape[2]


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
    sigma = rotated.square().mean(-1, keepdim=True).sqrt().clamp_min_(1e-12)
    levels = (torch.floor(rotated / (STEP * sigma)) + 2).clamp_(0, 3)
    values = levels - 1.5
    scales = (rotated * values).sum(-1) / values.square().sum(-1)
    planes = levels.to(torch.uint8).view(*levels.shape[:-1], CODES_PER_BYTE, -1)  # [..., 4, D/4]
    codes = planes[..., 0, :].clone()
    for plane in range(1, CODES_PER_BYTE):
        codes |= planes[..., plane, :] << (2 * plane)
    return codes, scales.to(torch.float16)


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
    if keys.is_cuda:
        dim = keys.shape[2]
        launch(
            "encode.cu", "encode_new", (keys.shape[1], len(keys)), -(-dim // 32) * 32,
            [keys, keys.stride(0), keys.stride(1), lengths, page_table, page_table.stride(0), *pages,
             rotation, STEP],
            ELEMENT=ELEMENTS[keys.dtype], DIM=dim, BLOCK_TOKENS=pages.block_tokens,
        )  # fmt: skip
        return
    active = (lengths > 0).nonzero().squeeze(1)
    at = (lengths[active] - 1).unsqueeze(1)
    written, offsets = (found.squeeze(1) for found in locate(at, page_table[active], pages.block_tokens))
    before, _ = locate((at - 1).clamp_min(0), page_table[active], pages.block_tokens)
    keys, at = keys[active].float(), at.unsqueeze(2)
    centre = torch.where(at == 0, keys, pages.centres[before.squeeze(1)])
    pages.centres[written] = centre
    pages.codes[written, :, offsets], pages.scales[written, :, offsets] = encode(keys, centre, rotation)


def unpack(codes: Tensor) -> Tensor:
    """Levels 0 to 3 of packed codes: [..., D/4] uint8 to [..., D] uint8."""
    return torch.cat([(codes >> (2 * plane)) & 3 for plane in range(CODES_PER_BYTE)], dim=-1)
