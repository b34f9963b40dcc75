"""Update the resident set: take the best rows of a head and list those that have to be fetched."""

from typing import NamedTuple

import torch
from torch import Tensor

from clo.kernels.launch import launch
from clo.kernels.resident import ResidentSet
from clo.kernels.score import NEVER

_THREADS = 512
_LOADS = 4  # of 8 scores, on their way to a thread


class FetchList(NamedTuple):
    """Rows of a resident set that have to be read from the arena; its positions say which token each is of."""

    entries: Tensor  # [B, kv_heads, k] int32, rows of the set, ascending; the first ``counts`` are valid
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

    Rows that are resident are only marked; each other one takes the place of a row selected longest ago. Of
    equal scores the lower position wins, of equally old rows the one that stands first in the set leaves.

    Args:
        scores: [B, kv_heads, T] int16, from ``clo.kernels.score``.
        reselect: [B, kv_heads] bool, heads that select.
        lengths: [B] int64, written to ``last_used``; 0 for a slot not in use, whose positions may be anything.
        tail: number of the latest tokens, whose scores are undefined.
        resident: of the B sequences, with a capacity of at least k.
        counters: [B, kv_heads, 4] int64; the third grows by rows chosen, the fourth by rows to move.
        k: rows that a head selects.

    Returns:
        The rows to move.
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
    best, chosen = order.masked_fill_(scores == NEVER, NEVER * span).topk(min(k, span), sorted=False)
    valid = (best >= 0) & selects
    chosen = torch.nn.functional.pad(chosen.where(valid, span), (0, k - chosen.shape[2]), value=span)

    # column `span` of both maps takes what is not there
    known = positions.long().where((positions >= 0) & selects, span)
    is_resident = torch.zeros(*positions.shape[:2], span + 1, dtype=torch.bool, device=scores.device)
    wanted = is_resident.scatter(2, chosen, True)
    wanted[..., span] = False
    is_resident.scatter_(2, known, True)
    stamp = lengths[:, None, None].to(last_used.dtype)
    last_used.copy_(stamp.where(wanted.gather(2, known), last_used))
    is_resident[..., span] = True
    missing = chosen.where(~is_resident.gather(2, chosen), span).sort(2).values  # ascending, then `span`
    lacking = missing < span

    places = torch.arange(capacity, device=scores.device)
    age = last_used.long() * capacity + places
    oldest = age.topk(k, dim=2, largest=False).indices
    oldest = oldest.where(lacking, capacity).sort(2).values  # as many as are missing, ascending
    for tensor, value in ((positions, missing), (last_used, stamp.expand_as(missing))):
        padded = torch.nn.functional.pad(tensor, (0, 1))
        tensor.copy_(padded.scatter_(2, oldest, value.to(tensor.dtype))[..., :capacity])
    count = lacking.sum(2)
    counters[..., 2] += (chosen < span).sum(2)
    counters[..., 3] += count
    return FetchList(oldest.int(), count.int())
