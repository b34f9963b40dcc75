"""Select: score every key of a head through the index and take the best rows."""

import torch
from torch import Tensor

from kernels.encode import unpack
from kernels.paging import gather_tokens


def scan(
    query: Tensor, codes: Tensor, scales: Tensor, centres: Tensor, rotation: Tensor, table: Tensor
) -> Tensor:
    """Estimated products of queries and keys from the 2-bit codes of ``kernels.encode``.

    Args:
        query: [B, query_heads, head_dim].
        codes: [blocks, kv_heads, block_tokens, head_dim // 4] uint8, this layer of the index.
        scales: [blocks, kv_heads, block_tokens] float16.
        centres: [blocks, kv_heads, head_dim] float32.
        rotation: [head_dim, head_dim] float32.
        table: [B, max_blocks] int64.

    Returns:
        [B, kv_heads, group, T] float32, T = max_blocks * block_tokens; undefined past a sequence's end.
    """
    batch, _, dim = query.shape
    kv_heads, block_tokens = codes.shape[1], codes.shape[2]
    grouped = query.float().view(batch, kv_heads, -1, dim)
    rotated = grouped @ rotation
    levels = unpack(gather_tokens(codes, table)).float()  # [B, kv_heads, T, D]
    products = rotated @ levels.transpose(-1, -2) - 1.5 * rotated.sum(-1, keepdim=True)
    products *= gather_tokens(scales, table).float().unsqueeze(2)
    offsets = grouped @ centres[table].transpose(1, 2).transpose(-1, -2)  # [B, kv_heads, group, max_blocks]
    paged = products.view(*offsets.shape, block_tokens)
    return paged.add_(offsets.unsqueeze(-1)).flatten(-2)


def scan_exact(query: Tensor, arena: Tensor, table: Tensor) -> Tensor:
    """The exact products, with the keys of the arena.

    Args:
        query: [B, query_heads, head_dim].
        arena: [blocks, kv_heads, block_tokens, 2, head_dim], this layer.
        table: [B, max_blocks] int64.

    Returns:
        [B, kv_heads, group, T] float32.
    """
    keys = gather_tokens(arena[:, :, :, 0], table).float()
    grouped = query.float().view(query.shape[0], keys.shape[1], -1, query.shape[2])
    return grouped @ keys.transpose(-1, -2)


def choose(
    products: Tensor, miss: Tensor, lengths: Tensor, k: int, sinks: int, recent: int, scale: float
) -> Tensor:
    """The k rows with the largest softmax weight, averaged over the query group.

    Sinks and the recent ring are attended anyway and never chosen.

    Args:
        products: [B, kv_heads, group, T] float32, query times key.
        miss: [B, kv_heads] bool, heads that select.
        lengths: [B] int64.
        scale: of the softmax.

    Returns:
        [B, kv_heads, k] int64 positions, -1 where a head does not select or has no more candidates;
        ascending, so that what follows does not depend on the other sequences of the batch.
    """
    position = torch.arange(products.shape[-1], device=products.device)
    candidate = (position >= sinks) & (position < (lengths - recent).unsqueeze(1))  # [B, T]
    masked = products.mul(scale).masked_fill_(~candidate[:, None, None], -torch.inf)
    weight = masked.softmax(-1).mean(2).masked_fill_(~candidate[:, None], -1.0)  # [B, kv_heads, T]
    best, chosen = weight.topk(min(k, weight.shape[-1]), sorted=False)
    chosen = chosen.masked_fill_((best < 0) | ~miss.unsqueeze(-1), -1)
    return torch.nn.functional.pad(chosen, (k - chosen.shape[-1], 0), value=-1).sort(-1).values
