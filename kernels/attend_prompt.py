"""Attention of prompts: of a chunk over everything up to its end, and of several short prompts at once.

Nothing here is a kernel of this project. On a GPU it is FlashAttention 4 (package flash-attn-4), the fastest
there is on the GPUs that it supports, or else the FlashAttention 2 that comes with torch; in float32 it is
torch's memory-efficient attention. On the CPU it is torch's flash attention.
"""

import logging
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

_SQUARE = 256  # tokens, on the CPU
_LAST_ALIGNED = 2  # the causal mask in which the last query sees all keys

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
    if query.is_cpu:
        return _on_cpu(query, rows, scale)
    if query.dtype == torch.float32:
        return _in_float32(query, rows, scale)
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


def attend_suffix(
    query: Tensor, rows: Tensor, pieces: Tensor, own: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Causal attention of a sequence's last tokens, of which only the device knows how many there are.

    The launches depend on shapes alone, so that CUDA graphs can hold them. A few queries over many rows leave
    most of a GPU idle, so the rows before them are attended in S pieces, which are merged by log-sum-exp.

    Args:
        query: [N, query_heads, head_dim]; the first ``own[1] - own[0]`` count.
        rows: [R, kv_heads, 2, head_dim], the first ``own[1]`` are the sequence's.
        pieces: [S + 1] int32, from 0 to ``own[0]``; piece s has the rows ``pieces[s]`` to ``pieces[s + 1]``,
            perhaps none.
        own: [2] int32, the rows of the queries' own tokens.
        scale: factor of the scores.

    Returns:
        As ``attend_prompt``; undefined for queries that do not count.
    """
    if query.is_cpu:
        begin, end = own.tolist()
        attended, sums = torch.zeros_like(query), torch.zeros(query.shape[:2])
        attended[: end - begin], sums[: end - begin] = _on_cpu(query[: end - begin], rows[:end], scale)
        return attended, sums
    count = len(query)
    past, past_lse = _attend_pieces(query, rows, pieces, scale)
    latest, lse, *_ = torch.ops.aten._flash_attention_forward(
        query, rows[:, :, 0], rows[:, :, 1], own - own[:1], own, count, count, 0.0, True, False, scale=scale
    )
    all_lse = torch.cat((past_lse, lse.t().unsqueeze(0)))  # [S + 1, N, query_heads]
    total = all_lse.logsumexp(0)
    shares = (all_lse - total).exp().unsqueeze(-1)
    attended = torch.cat((past, latest.unsqueeze(0)))
    return (attended * shares).sum(0).to(query.dtype), total


def suffix_lse(
    query: Tensor, asking: Tensor, own_rows: Tensor, rows: Tensor, pieces: Tensor, scale: float
) -> Tensor:
    """The log-sum-exp that ``attend_suffix`` returns, of some of its queries alone, which takes a part of its
    time.

    Args:
        query: [W, query_heads, head_dim].
        asking: [W] int64, which of the last tokens they are.
        own_rows: [N, kv_heads, 2, head_dim], of all the last tokens.
        rows: [R, kv_heads, 2, head_dim], those of the tokens before them first.
        pieces: [S + 1] int32, as for ``attend_suffix``.
        scale: factor of the scores.

    Returns:
        [W, query_heads] float32.
    """
    count, kv_heads = len(query), rows.shape[1]
    keys, queries = own_rows[:, :, 0].permute(1, 2, 0), _by_kv_head(query, kv_heads).transpose(0, 1)
    products = torch.bmm(queries, keys, out_dtype=torch.float32) if query.is_cuda else queries @ keys
    scores = products.float().unflatten(1, (count, -1)) * scale  # [kv_heads, W, group, N]
    later = torch.arange(len(own_rows), device=query.device) > asking[:, None, None]
    latest = scores.masked_fill_(later, -torch.inf).logsumexp(-1).permute(1, 0, 2).flatten(1)
    if query.is_cpu:
        past = torch.full((1, *query.shape[:2]), -torch.inf)
        if pieces[-1]:
            queries = query.transpose(0, 1)
            past[0] = _flash_on_cpu(queries, rows[: pieces[-1]], scale, causal=False)[1].t()
    else:
        _, past = _attend_pieces(query, rows, pieces, scale)
    return torch.cat((past, latest.unsqueeze(0))).logsumexp(0)


def _attend_pieces(query: Tensor, rows: Tensor, pieces: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of all queries to each piece of the rows, without a mask.

    So queries may come in any order, and those of a group of heads are neighbours: they fill the kernel's
    tiles of 128 queries and share what it reads.

    Returns:
        [S, N, query_heads, head_dim], and log-sum-exps [S, N, query_heads] float32, -inf for no rows.
    """
    parts, (count, heads, dim), kv_heads = len(pieces) - 1, query.shape, rows.shape[1]
    tall = count * heads // kv_heads
    bounds = torch.arange(0, tall * (parts + 1), tall, dtype=torch.int32, device=query.device)
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        _by_kv_head(query, kv_heads).repeat(parts, 1, 1), rows[:, :, 0], rows[:, :, 1], bounds, pieces, tall,
        len(rows), 0.0, False, False, scale=scale,
    )  # fmt: skip
    out = out.view(parts, count, -1, kv_heads, dim).transpose(2, 3).flatten(2, 3)
    lse = lse.view(kv_heads, parts, count, -1).permute(1, 2, 0, 3).flatten(2)
    return out, lse.masked_fill((pieces.diff() == 0)[:, None, None], -torch.inf)


def _by_kv_head(query: Tensor, kv_heads: int) -> Tensor:
    """Queries [N, query_heads, D] as [N * group, kv_heads, D]."""
    grouped: Tensor = query.unflatten(1, (kv_heads, -1)).transpose(1, 2).flatten(0, 1)
    return grouped


@cache
def flash_attention() -> Callable[..., Any] | None:
    """``flash_attn_func`` of flash-attn-4, or None where it is not installed. Importing it takes seconds."""
    try:
        from flash_attn.cute import flash_attn_func
    except ImportError as error:
        _logger.warning(
            "Prompts take torch's attention, about half as fast on Hopper and Blackwell as that of "
            "flash-attn-4 (%s); pip install 'clo-llm[cuda]' installs it.",
            error,
        )
        return None
    function: Callable[..., Any] = flash_attn_func
    return function


def _on_cpu(query: Tensor, rows: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Torch's flash attention, but never with a mask as an argument: it would read the mask once for each
    head, and compute all that is masked."""
    before = len(rows) - len(query)
    out, lse = torch.empty(query.shape), torch.empty(query.shape[:2])
    _attend_square(query, rows[before:], scale, out, lse)
    if before:
        _add_past(query, rows[:before], scale, out, lse)
    return out.to(query.dtype), lse


def _attend_square(query: Tensor, rows: Tensor, scale: float, out: Tensor, lse: Tensor) -> None:
    """Causal attention of N tokens to themselves, into ``out`` [N, query_heads, D] and ``lse``, both float32.

    Flash attention computes blocks of keys as a whole and then masks what is later than the query, in a
    small square nearly half of it. So a square is two of half the size and the past of the second one.
    """
    if len(query) <= _SQUARE:
        attended, sums = _flash_on_cpu(query.transpose(0, 1), rows, scale, causal=True)
        out.copy_(attended.transpose(0, 1))
        lse.copy_(sums.t())
        return
    middle = len(query) // 2
    for part in (slice(middle), slice(middle, None)):
        _attend_square(query[part], rows[part], scale, out[part], lse[part])
    _add_past(query[middle:], rows[:middle], scale, out[middle:], lse[middle:])


def _add_past(query: Tensor, rows: Tensor, scale: float, out: Tensor, lse: Tensor) -> None:
    """Add rows that all queries may attend to, to what is in ``out`` and ``lse`` already."""
    count, kv_heads = len(query), rows.shape[1]
    # Without a mask queries may come in any order, and those of a group share each read of their KV head.
    grouped = query.unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3).flatten(1, 2)
    attended, sums = _flash_on_cpu(grouped, rows, scale, causal=False)
    attended = attended.unflatten(1, (-1, count)).permute(2, 0, 1, 3)  # [N, kv_heads, group, D]
    sums = sums.unflatten(1, (-1, count)).permute(2, 0, 1)
    total = lse.unflatten(1, (kv_heads, -1))
    out.unflatten(1, (kv_heads, -1)).lerp_(attended.float(), torch.sigmoid(sums - total).unsqueeze(-1))
    torch.logaddexp(total, sums, out=total)


def _flash_on_cpu(query: Tensor, rows: Tensor, scale: float, *, causal: bool) -> tuple[Tensor, Tensor]:
    """Attention of queries [heads, N, D] to rows [T, kv_heads, 2, D]: as ``attend_prompt``, by head."""
    keys, values = rows.permute(2, 1, 0, 3).unsqueeze(1)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query.unsqueeze(0), keys, values, is_causal=causal, scale=scale
    )
    return out[0], lse[0]


def _in_float32(query: Tensor, rows: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Torch's memory-efficient attention: no flash attention takes float32. Its products of three TF32 parts
    are nearly as exact as float32."""
    count, kv_heads = len(query), rows.shape[1]
    keys, values = rows[None, :, :, 0], rows[None, :, :, 1]
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    lse = torch.empty(query.shape[:2], device=query.device)
    by_group = (part.unflatten(1, (kv_heads, -1)).unbind(2) for part in (query, out, lse))
    # at once, keys and values would have to be copied
    for member, attended, sums in zip(*by_group, strict=True):
        found, logarithms, *_ = torch.ops.aten._efficient_attention_forward(
            member[None], keys, values, None, None, None, None, None, 0.0, _LAST_ALIGNED, True, scale=scale
        )
        attended.copy_(found[0])
        sums.copy_(logarithms[0, :, :count].t())
    return out, lse
