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

from clo.kernels.attend_prompt import attend_prompt
from clo.kernels.weigh_blocks import BLOCK, SAMPLED, weigh_blocks

DENSE_TOKENS = 16384  # before a chunk: up to so many are all attended, since choosing would cost more
OWN_TOKENS = 8192  # up to the end of a chunk, at least: attended as a chunk's own, however short it is
_BUDGET = 15
_SLOWER = 2.5  # what a chosen token costs, and a weighed one, in dense ones; on an H100
_SORTED = 2**21  # weights, about, that decide how much a chosen block weighs

Weigh = Callable[[Tensor, Tensor, Tensor, float], Tensor]
"""Estimates what each block of keys is worth to each block of queries, as ``weigh_blocks`` does."""

Budget = Callable[[int], float]
"""How many blocks of so many a block of queries attends to, averaged over blocks and heads."""


def default_budget(blocks: int) -> float:
    """Twice as many for sixteen times as many tokens: 8 % of 64K tokens, 1 % of a million."""
    return _BUDGET * math.sqrt(math.sqrt(blocks))


def equivalent_tokens(before: int) -> float:
    """How many earlier tokens of a dense chunk take about as long as ``before`` of a sparse one."""
    if before <= DENSE_TOKENS:
        return before
    blocks = before // BLOCK
    # weighing takes one product of the two, for some queries
    return _SLOWER * (BLOCK * default_budget(blocks) + before * SAMPLED / (2 * BLOCK))


class ChosenBlocks(NamedTuple):
    """Which blocks of keys each block of queries attends to, for each head."""

    numbers: Tensor  # [query_heads, Q, any] int32, ascending; undefined from ``counts`` on
    counts: Tensor  # [query_heads, Q] int32, at least 1


def attend_prompt_sparse(
    query: Tensor,
    rows: Tensor,
    scale: float,
    budget: Budget = default_budget,
    weigh: Weigh = weigh_blocks,
    dense_tokens: int = DENSE_TOKENS,
    own_tokens: int = OWN_TOKENS,
) -> tuple[Tensor, Tensor]:
    """Causal attention of a chunk of a prompt over the latest rows and over chosen blocks of the others.

    Nothing here waits for the device. On a GPU it takes 16-bit dtypes and the package nvidia-cudnn-frontend.

    Args:
        query: [N, query_heads, head_dim], the last N of T tokens.
        rows: [T, kv_heads, 2, head_dim].
        scale: factor of the scores.
        budget: how many blocks are chosen.
        weigh: in place of ``weigh_blocks``, to compare with.
        dense_tokens: with at most so many tokens before the chunk, all of them are attended.
        own_tokens: so many up to the chunk's end are always attended, and so is the chunk.

    Returns:
        Attended [N, query_heads, head_dim], and the log-sum-exp of the scores of all attended rows
        [N, query_heads] float32.
    """
    blocks = (len(rows) - max(len(query), own_tokens)) // BLOCK
    if len(rows) - len(query) <= dense_tokens or blocks < 1:
        return attend_prompt(query, rows, scale)
    past = rows[: blocks * BLOCK]
    own, own_lse = attend_prompt(query, rows[len(past) :], scale)
    weights = weigh(query, past[:, :, 0], own_lse, scale)
    chosen = choose_blocks(weights, budget(blocks))
    out, lse = attend_chosen(query, past, chosen, scale)
    share = torch.sigmoid(lse - own_lse).unsqueeze(-1).to(out.dtype)
    return torch.lerp(own, out, share), torch.logaddexp(own_lse, lse)


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
