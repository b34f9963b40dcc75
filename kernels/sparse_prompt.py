"""Attention of a chunk of a prompt to those blocks of earlier keys that matter to it, and to all of its own.

For each block of queries and each head some of its queries attend to every key. The blocks of keys that have
the most weight with one of them are attended by all queries of the block, the others by none; a head whose
attention is spread out takes more of a layer's budget than one that looks at little. Blocks of queries and of
keys that are chosen for each other, and budgets that follow the estimated weight, are those of FlexPrefill
(Lai et al. 2025) and XAttention (Xu et al. 2025). Both estimate weights from pooled or summed keys and
queries, and so does FlashPrefill (Fan et al. 2026); real queries and keys find more, as SALE (Ji et al. 2025)
says of a scan of all keys: ``benchmarks.sparse_prefill`` compares them.
"""

import math
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from clo.kernels.attend_prompt import attend_prompt, flash_attention

BLOCK = 64  # keys, and queries, that are chosen together
SAMPLED = 4  # queries of a block that choose for it
DENSE_TOKENS = 16384  # before a chunk: up to so many are all attended, since choosing would cost more
_BUDGET = 2.5
_SORTED = 2**21  # weights, about, that decide how much a chosen block weighs

Weigh = Callable[[Tensor, Tensor, Tensor, float], Tensor]
"""Estimates what each block of keys is worth to each block of queries, as ``weigh_blocks`` does."""

Budget = Callable[[int], float]
"""How many blocks of so many a block of queries attends to, averaged over blocks and heads."""


def default_budget(blocks: int) -> float:
    """Twice as many for four times as many tokens: 8 % of 64K tokens, 2 % of a million."""
    return _BUDGET * math.sqrt(blocks)


class ChosenBlocks(NamedTuple):
    """Which blocks of keys each block of queries attends to, for each head."""

    numbers: Tensor  # [query_heads, Q, any] int32, ascending; undefined from ``counts`` on
    counts: Tensor  # [query_heads, Q] int32, at least 1


def attend_prompt_sparse(
    query: Tensor,
    rows: Tensor,
    scale: float,
    budget: Budget = default_budget,
    weigh: Weigh | None = None,
    dense_tokens: int = DENSE_TOKENS,
) -> tuple[Tensor, Tensor]:
    """Causal attention of a chunk of a prompt over its own rows and over chosen blocks of those before it.

    Nothing here waits for the device. On a GPU it takes 16-bit dtypes and the package nvidia-cudnn-frontend.

    Args:
        query: [N, query_heads, head_dim], the last N of T tokens.
        rows: [T, kv_heads, 2, head_dim].
        scale: factor of the scores.
        budget: how many blocks are chosen.
        weigh: in place of ``weigh_blocks``, to compare with.
        dense_tokens: with at most so many tokens before the chunk, all of them are attended.

    Returns:
        Attended [N, query_heads, head_dim], and the log-sum-exp of the scores of all attended rows
        [N, query_heads] float32.
    """
    before = len(rows) - len(query)
    if before <= max(dense_tokens, BLOCK - 1):
        return attend_prompt(query, rows, scale)
    past = rows[: before // BLOCK * BLOCK]
    own, own_lse = attend_prompt(query, rows[len(past) :], scale)
    weights = (weigh or weigh_blocks)(query, past[:, :, 0], own_lse, scale)
    chosen = choose_blocks(weights, budget(before // BLOCK))
    out, lse = attend_chosen(query, past, chosen, scale)
    share = torch.sigmoid(lse - own_lse).unsqueeze(-1).to(out.dtype)
    return torch.lerp(own, out, share), torch.logaddexp(own_lse, lse)


def weigh_blocks(query: Tensor, keys: Tensor, own_lse: Tensor, scale: float) -> Tensor:
    """The share of attention that each block of keys has with some queries of a block of queries: the largest
    of them, which loses less than their mean.

    Args:
        query: [N, query_heads, head_dim].
        keys: [K * BLOCK, kv_heads, head_dim], all of them before the queries.
        own_lse: [N, query_heads] float32, log-sum-exp of the scores of each query's other keys.
        scale: factor of the scores.

    Returns:
        [query_heads, Q, K] float32; Q is N / BLOCK, rounded up.
    """
    count, _, dim = query.shape
    step = BLOCK // SAMPLED
    blocks = -(-count // BLOCK)
    places = torch.arange(step - 1, blocks * BLOCK, step, device=query.device).clamp_max_(count - 1)
    samples, own = query[places], own_lse[places]
    # Attention to values that say which block a key is of gives the weights of as many blocks as a value has
    # entries, without ever holding the scores.
    marks = _marks(dim, keys.shape[1], query.dtype, query.device)
    parts = [_attend(samples, part, marks[: len(part)], scale) for part in keys.split(dim * BLOCK)]
    lses = torch.stack([lse for _, lse in parts])  # [segments, Q * SAMPLED, query_heads]
    total = torch.logaddexp(lses.logsumexp(0), own)
    shares = (lses - total).exp_().to(query.dtype).unsqueeze(-1)
    weights = torch.stack([out for out, _ in parts]).mul_(shares)
    most = weights.unflatten(1, (blocks, SAMPLED)).amax(2)  # [segments, Q, heads, D]
    by_block: Tensor = most.permute(2, 1, 0, 3).flatten(2)[..., : len(keys) // BLOCK]
    return by_block


@cache
def _marks(dim: int, kv_heads: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[dim * BLOCK, kv_heads, dim], whose entry d is 1 for the tokens of block d, else 0."""
    marks = torch.eye(dim, dtype=dtype, device=device).repeat_interleave(BLOCK, 0)
    return marks.unsqueeze(1).expand(-1, kv_heads, -1).contiguous()


def choose_blocks(weights: Tensor, count: float) -> ChosenBlocks:
    """The blocks with the most weight of all heads and queries, the first block and the last one.

    A threshold decides, and where there are many lines of weights, some of them decide on the threshold.

    Args:
        weights: [query_heads, Q, K], as from ``weigh_blocks``.
        count: blocks for each head and block of queries, on average; fewer where no more have any weight.
    """
    heads, lines, blocks = weights.shape
    some = weights[:, :: min(lines, -(-weights.numel() // _SORTED))].flatten()
    rank = min(len(some), max(1, round(count / blocks * len(some))))
    chosen = (weights >= some.sort(descending=True).values[rank - 1]) & (weights > 0)
    chosen[..., 0] = chosen[..., -1] = True  # attention sinks, and what is nearest
    order = chosen.cumsum(-1, dtype=torch.int32)
    numbers = torch.empty(heads, lines, blocks + 1, dtype=torch.int32, device=weights.device)
    # those that are not chosen all go behind the others' last place
    places = torch.where(chosen, order - 1, blocks).long()
    every = torch.arange(blocks, dtype=torch.int32, device=weights.device).expand_as(places)
    return ChosenBlocks(numbers.scatter_(2, places, every), order[..., -1].contiguous())


def chosen_bytes(query_heads: int, queries: int, tokens: int) -> int:
    """About the most GPU memory that choosing blocks of so many tokens for a chunk of queries takes."""
    return query_heads * -(-queries // BLOCK) * -(-tokens // BLOCK) * 40


def attend_chosen(query: Tensor, rows: Tensor, chosen: ChosenBlocks, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of each block of queries to its blocks of keys, none of which is masked.

    Args:
        query: [N, query_heads, head_dim].
        rows: [K * BLOCK, kv_heads, 2, head_dim].
        chosen: for Q blocks of queries; Q is N / BLOCK, rounded up.
        scale: factor of the scores.

    Returns:
        As ``attend_prompt_sparse``.
    """
    if query.is_cpu or query.dtype == torch.float32:
        return _attend_masked(query, rows, chosen, scale)
    count = len(query)
    whole = pad(query, (0, 0, 0, 0, 0, -count % BLOCK)) if count % BLOCK else query
    out, lse = block_sparse_attention()(
        whole[None], rows[None, :, :, 0], rows[None, :, :, 1], chosen.numbers[None],
        q2k_block_nums=chosen.counts[None], sparse_block_size=BLOCK, layout="bshd", softmax_scale=scale,
    )  # fmt: skip
    return out[0, :count], lse[0, :, :count].t()


@cache
def block_sparse_attention() -> Callable[..., Any]:
    """The kernel of nvidia-cudnn-frontend. Importing it takes seconds.

    Raises:
        ImportError: the package is not installed.
    """
    from cudnn import BSA

    function: Callable[..., Any] = BSA.block_sparse_attention_forward
    return function


def _attend(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attention without a mask of queries [N, query_heads, D] to keys and values [T, kv_heads, D]: [N,
    query_heads, D] and the log-sum-exp of the scores [N, query_heads] float32."""
    if query.is_cpu or query.dtype == torch.float32:
        scores = _scores(query, keys, scale)
        lse = scores.logsumexp(-1)
        return _by_token((scores - lse.unsqueeze(-1)).exp_() @ _by_head(values)).to(query.dtype), _by_token(
            lse
        )
    flash = flash_attention()
    if flash is not None:
        out, lse = flash(
            query[None], keys[None], values[None], softmax_scale=scale, causal=False, return_lse=True
        )
        return out[0], lse[0].t()
    out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
        *(tensor.transpose(0, 1)[None] for tensor in (query, keys, values)), 0.0, False, False, scale=scale
    )
    return out[0].transpose(0, 1), lse[0].t()


def _attend_masked(query: Tensor, rows: Tensor, chosen: ChosenBlocks, scale: float) -> tuple[Tensor, Tensor]:
    """``attend_chosen`` by plain matrix products with all keys."""
    numbers, counts = chosen
    heads, blocks, width = numbers.shape
    listed = torch.arange(width, device=numbers.device) < counts.unsqueeze(2)
    seen = torch.zeros(heads, blocks, len(rows) // BLOCK + 1, dtype=torch.bool, device=numbers.device)
    seen.scatter_(2, torch.where(listed, numbers, seen.shape[2] - 1).long(), True)
    by_token = seen[..., :-1].repeat_interleave(BLOCK, 1).repeat_interleave(BLOCK, 2)[:, : len(query)]
    scores = _scores(query, rows[:, :, 0], scale)
    scores.masked_fill_(~by_token.view_as(scores), -torch.inf)
    lse = scores.logsumexp(-1)
    out = (scores - lse.unsqueeze(-1)).exp_() @ _by_head(rows[:, :, 1])
    return _by_token(out).to(query.dtype), _by_token(lse)


def _scores(query: Tensor, keys: Tensor, scale: float) -> Tensor:
    """Of queries [N, query_heads, D] and keys [T, kv_heads, D]: [kv_heads, group, N, T] float32."""
    grouped = query.float().unflatten(1, (keys.shape[1], -1)).permute(1, 2, 0, 3)
    scores: Tensor = grouped @ _by_head(keys).transpose(2, 3) * scale
    return scores


def _by_head(tensor: Tensor) -> Tensor:
    """[T, kv_heads, D] to [kv_heads, 1, T, D] float32."""
    return tensor.float().transpose(0, 1).unsqueeze(1)


def _by_token(tensor: Tensor) -> Tensor:
    """[kv_heads, group, N, ...] to [N, query_heads, ...]."""
    return tensor.flatten(0, 1).transpose(0, 1)
