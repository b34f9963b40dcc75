"""Attention of prompts: of a chunk over everything up to its end, and of several short prompts at once.

Nothing here is a kernel of this project. On a GPU it is FlashAttention 4 (package flash-attn-4), the fastest
there is on the GPUs that it supports, or else the FlashAttention 2 that comes with torch.
"""

import logging
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

_MATH_BYTES = 2**28  # of the scores in float32 that are held at a time

_logger = logging.getLogger(__name__)


def attend_prompt(query: Tensor, rows: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Causal attention of a chunk of a prompt over everything up to the chunk's end.

    Args:
        query: [N, query_heads, head_dim], the last N of T tokens.
        rows: [T, kv_heads, 2, head_dim].
        scale: factor of the scores.

    Returns:
        Attended [N, query_heads, head_dim], and the log-sum-exp of the scores [N, query_heads] float32.
    """
    if query.is_cpu or query.dtype == torch.float32:
        return _math(query, rows, scale)
    keys, values = rows[None, :, :, 0], rows[None, :, :, 1]
    flash = flash_attention()
    if flash is not None:
        out, lse = flash(query[None], keys, values, softmax_scale=scale, causal=True, return_lse=True)
        return out[0], lse[0].t()
    # Its causal mask is aligned with the last key.
    out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
        query.transpose(0, 1)[None], keys.transpose(1, 2), values.transpose(1, 2), 0.0, True, False,
        scale=scale,
    )  # fmt: skip
    return out[0].transpose(0, 1), lse[0].t()


def attend_prompts(query: Tensor, rows: Tensor, bounds: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Causal attention of whole prompts that lie one behind the other; only on a GPU, in 16-bit dtypes.

    The launch depends on shapes alone, so that a CUDA graph can hold it.

    Args:
        query: [N, query_heads, head_dim].
        rows: [N, kv_heads, 2, head_dim].
        bounds: [S + 1] int32; prompt s has the tokens ``bounds[s]`` to ``bounds[s + 1]``, perhaps none.
        scale: factor of the scores.

    Returns:
        As ``attend_prompt``; undefined for tokens past ``bounds[S]``.
    """
    count = len(query)
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        query, rows[:, :, 0], rows[:, :, 1], bounds, bounds, count, count, 0.0, True, False, scale=scale
    )
    return out, lse.t()


@cache
def flash_attention() -> Callable[..., Any] | None:
    """``flash_attn_func`` of flash-attn-4, or None where it is not installed. Importing it takes seconds."""
    try:
        from flash_attn.cute import flash_attn_func
    except ImportError as error:
        _logger.info(
            "Prompts take torch's attention, about half as fast on Hopper and Blackwell as that of "
            "flash-attn-4 (%s); pip install 'clo[cuda]' installs it.",
            error,
        )
        return None
    function: Callable[..., Any] = flash_attn_func
    return function


def _math(query: Tensor, rows: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Plain matrix products, some queries at a time."""
    count, heads, dim = query.shape
    total, kv_heads = rows.shape[:2]
    keys, values = rows.float().permute(2, 1, 0, 3)  # each [kv_heads, T, D]
    out = torch.empty_like(query)
    lse = torch.empty(count, heads, dtype=torch.float32, device=query.device)
    step = max(1, _MATH_BYTES // (4 * heads * total))
    place = torch.arange(total, device=query.device)
    for start in range(0, count, step):
        part = query[start : start + step].float()
        grouped = part.view(len(part), kv_heads, -1, dim).permute(1, 2, 0, 3)  # [kv_heads, group, n, D]
        scores = grouped @ keys.unsqueeze(1).transpose(2, 3) * scale
        last = total - count + start + torch.arange(len(part), device=query.device)
        scores.masked_fill_(place > last.unsqueeze(1), -torch.inf)
        sums = scores.logsumexp(-1)
        attended = (scores - sums.unsqueeze(-1)).exp_() @ values.unsqueeze(1)
        out[start : start + step] = attended.permute(2, 0, 1, 3).flatten(1, 2)
        lse[start : start + step] = sums.permute(2, 0, 1).flatten(1, 2)
    return out, lse
