"""Attention of one decode step: over the resident rows, or over the whole KV for reference."""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from kernels.paging import gather_tokens


def attend(
    query: Tensor, resident: Tensor, members: Tensor, lengths: Tensor, sinks: int, recent: int, scale: float
) -> Tensor:
    """Dense attention over ``[sinks | recent ring | set]``; keys carry RoPE, so their order does not matter.

    Args:
        query: [B, query_heads, head_dim].
        resident: [B, kv_heads, sinks + recent + C, 2, head_dim].
        members: [B, kv_heads, C] int64, -1 where a row of the set is empty.
        lengths: [B] int64, tokens with the current one; 0 for a slot not in use, whose result is undefined.

    Returns:
        [B, query_heads, head_dim], dtype of ``query``.
    """
    always = torch.arange(sinks + recent, device=lengths.device) < lengths.clamp_min(1).unsqueeze(1)
    held = torch.cat([always.unsqueeze(1).expand(-1, members.shape[1], -1), members >= 0], dim=2)
    grouped = query.view(
        query.shape[0], members.shape[1], -1, query.shape[2]
    )  # the group stands where SDPA has query positions
    out = scaled_dot_product_attention(
        grouped, resident[:, :, :, 0], resident[:, :, :, 1], attn_mask=held.unsqueeze(2), scale=scale
    )
    return out.flatten(1, 2)


def attend_all(query: Tensor, arena: Tensor, table: Tensor, lengths: Tensor, scale: float) -> Tensor:
    """Full attention, reading every row of the arena.

    Args:
        query: [B, query_heads, head_dim].
        arena: [blocks, kv_heads, block_tokens, 2, head_dim], this layer.
        table: [B, max_blocks] int64.
        lengths: [B] int64.

    Returns:
        [B, query_heads, head_dim].
    """
    rows = gather_tokens(arena, table)  # [B, kv_heads, T, 2, D]
    mask = torch.arange(rows.shape[2], device=lengths.device) < lengths.clamp_min(1).unsqueeze(1)
    grouped = query.view(query.shape[0], rows.shape[1], -1, query.shape[2])
    out = scaled_dot_product_attention(
        grouped, rows[:, :, :, 0], rows[:, :, :, 1], attn_mask=mask[:, None, None], scale=scale
    )
    return out.flatten(1, 2)


def attend_prompt(query: Tensor, rows: Tensor, scale: float) -> Tensor:
    """Causal attention of a chunk of a prompt over everything up to the chunk's end.

    Args:
        query: [N, query_heads, head_dim], the last N of T tokens.
        rows: [T, kv_heads, 2, head_dim].

    Returns:
        [N, query_heads, head_dim].
    """
    count, total = query.shape[0], rows.shape[0]
    keys, values = rows.permute(2, 1, 0, 3).unsqueeze(1)  # each [1, kv_heads, T, D]
    mask = torch.ones(count, total, dtype=torch.bool, device=query.device).tril_(total - count)
    out = scaled_dot_product_attention(
        query.transpose(0, 1).unsqueeze(0), keys, values, attn_mask=mask, scale=scale, enable_gqa=True
    )
    return out.squeeze(0).transpose(0, 1)
