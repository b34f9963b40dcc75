"""Update the resident set: select the best rows of a head and list those that have to be fetched."""

from typing import NamedTuple

import torch
from torch import Tensor

from clo.kernels.launch import launch
from clo.kernels.resident import ResidentSet
from clo.kernels.score import NEVER

_THREADS = 512
_LOADS = 4  # loads of 8 scores on their way to a thread


class FetchList(NamedTuple):
    """Entries of resident sets whose rows have to be read from the arena; the positions say which rows."""

    entries: Tensor  # [B, kv_heads, k] int32, places in the set, ascending; the first ``counts`` are valid
    counts: Tensor  # [B, kv_heads] int32


def update_resident(
    scores: Tensor,
    reselect: Tensor,
    lengths: Tensor,
    tail: int,
    resident: ResidentSet,
    counters: Tensor,
    k: int,
) -> FetchList:
    """Put the k best rows of each head into its set, in place, without moving any row yet.

    Rows that are resident are only marked as used; each other row takes the place of the row selected longest
    ago. Among equal scores the lower position wins; among equally old rows the first in the set leaves.

    Args:
        scores: [B, kv_heads, T] int16, from ``clo.kernels.score``.
        reselect: [B, kv_heads] bool, heads that select.
        lengths: [B] int64, written to ``last_used``; 0 for a slot not in use, whose scores may be anything.
        tail: number of the latest tokens, whose scores are undefined.
        resident: of the B sequences, with a capacity of at least k.
        counters: [B, kv_heads, 4] int64; the third counts rows selected, the fourth counts rows to fetch.
        k: rows that a head selects.

    Returns:
        The rows to fetch.
    """
    positions, last_used = resident.positions, resident.last_used
    span, capacity = scores.shape[2], resident.capacity
    if scores.is_cuda:
        fetch_list = FetchList(
            torch.empty(*reselect.shape, k, dtype=torch.int32, device=scores.device),
            torch.empty(reselect.shape, dtype=torch.int32, device=scores.device),
        )
        launch(
            "update_resident.cu", "update_resident", (reselect.numel(),), _THREADS,
            [scores, span, tail, reselect, lengths, positions, last_used, counters, *fetch_list, k, capacity,
             reselect.shape[1]],
            shared=16 * max(2 * k, -(-span // 128)) + 7 * 1024 + 9 * (-(-k // 16) * 16) + 4 * capacity,
            THREADS=_THREADS, LOADS=_LOADS,
        )  # fmt: skip
        return fetch_list
    position = torch.arange(span, device=scores.device)
    selects = (reselect & (lengths > 0).unsqueeze(1)).unsqueeze(2)
    scores = scores.masked_fill(position >= (lengths - tail)[:, None, None], NEVER)
    order = scores.long() * span + (span - 1 - position)
    best, selected = order.masked_fill_(scores == NEVER, NEVER * span).topk(min(k, span), sorted=False)
    valid = (best >= 0) & selects
    selected = torch.nn.functional.pad(selected.where(valid, span), (0, k - selected.shape[2]), value=span)

    # column `span` of both maps stands for no position
    known = positions.long().where((positions >= 0) & selects, span)
    is_resident = torch.zeros(*positions.shape[:2], span + 1, dtype=torch.bool, device=scores.device)
    wanted = is_resident.scatter(2, selected, True)
    wanted[..., span] = False
    is_resident.scatter_(2, known, True)
    now = lengths[:, None, None].to(last_used.dtype)
    last_used.copy_(now.where(wanted.gather(2, known), last_used))
    is_resident[..., span] = True
    missing = selected.where(~is_resident.gather(2, selected), span).sort(2).values  # ascending, then `span`
    lacking = missing < span

    age = last_used.long() * capacity + torch.arange(capacity, device=scores.device)
    oldest = age.topk(k, dim=2, largest=False).indices
    oldest = oldest.where(lacking, capacity).sort(2).values  # as many as are missing, ascending
    for tensor, value in ((positions, missing), (last_used, now.expand_as(missing))):
        padded = torch.nn.functional.pad(tensor, (0, 1))
        tensor.copy_(padded.scatter_(2, oldest, value.to(tensor.dtype))[..., :capacity])
    count = lacking.sum(2)
    counters[..., 2] += (selected < span).sum(2)
    counters[..., 3] += count
    return FetchList(oldest.int(), count.int())
