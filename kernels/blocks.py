"""Reading a paged tensor of one layer through a block block_table."""

import torch
from torch import Tensor


def gather_tokens(paged: Tensor, block_table: Tensor) -> Tensor:
    """All tokens of each sequence, in order.

    Args:
        paged: [blocks, kv_heads, block_tokens, ...], one layer of a pool addressed by block id.
        block_table: [B, max_blocks] int64, block ids; entries past a sequence's end may be any valid id.

    Returns:
        [B, kv_heads, max_blocks * block_tokens, ...]; tokens past a sequence's end are undefined.
    """
    pages = paged[block_table].transpose(1, 2)  # [B, kv_heads, max_blocks, block_tokens, ...]
    return pages.flatten(2, 3)


def locate(positions: Tensor, block_table: Tensor, block_tokens: int) -> tuple[Tensor, Tensor]:
    """Block ids and offsets of tokens.

    Args:
        positions: [B, ...] int64 token positions; block_table: [B, max_blocks] int64.

    Returns:
        (blocks, offsets), each of the shape of ``positions``.
    """
    page = (positions // block_tokens).clamp_(0, block_table.shape[1] - 1)
    blocks = block_table.gather(1, page.flatten(1)).view_as(positions)
    return blocks, torch.remainder(positions, block_tokens)
