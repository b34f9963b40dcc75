"""Update the resident set: select the best rows of a head and list those that have to be fetched."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from clo.kernels.arguments import Argument, Rule, Signature
from clo.kernels.launch import launch
from clo.kernels.limits import update_shared_bytes
from clo.kernels.resident import LAST_USED, POSITIONS, ResidentSet
from clo.kernels.score import NEVER

_THREADS = 512
_LOADS = 4  # loads of 8 scores on their way to a thread


class FetchList(NamedTuple):
    """Entries of resident sets whose rows have to be read from the arena; the positions say which rows."""

    entries: Tensor  # [B, kv_heads, k] int32, places in the set, ascending; the first ``counts`` are valid
    counts: Tensor  # [B, kv_heads] int32


ENTRIES = Argument("fetch_list.entries", torch.int32, "B kv_heads k")
COUNTS = Argument("fetch_list.counts", torch.int32, "B kv_heads")
"""The tensors of a ``FetchList`` as arguments of operations."""

_SIGNATURE = Signature(
    "update_resident",
    (
        Argument("scores", torch.int16, "B kv_heads T", chunks=True),
        Argument("reselect", torch.bool, "B kv_heads"),
        Argument("lengths", torch.int64, "B"),
        POSITIONS, LAST_USED,
        Argument("counters", torch.int64, "B kv_heads 4"),
    ),
    (
        Rule("1 <= k <= capacity", "a head keeps what it selects"),
        Rule("tail >= 0", "it counts tokens"),
        Rule("T % 16 == 0", "scores are read 16 at a time", gpu=True),
    ),
)  # fmt: skip


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
    _SIGNATURE.check(scores, reselect, lengths, positions, last_used, counters, k=k, tail=tail)
    span, capacity = scores.shape[2], resident.capacity
    if not scores.is_cpu:
        fetch_list = FetchList(
            torch.empty(*reselect.shape, k, dtype=torch.int32, device=scores.device),
            torch.empty(reselect.shape, dtype=torch.int32, device=scores.device),
        )
        launch(
            "update_resident.cu", "update_resident", (reselect.numel(),), _THREADS,
            [scores, span, tail, reselect, lengths, positions, last_used, counters, *fetch_list, k, capacity,
             reselect.shape[1]],
            shared=update_shared_bytes(k, capacity, span), THREADS=_THREADS, LOADS=_LOADS,
        )  # fmt: skip
        return fetch_list
    # the score first, then the lower position; below 1 - span a row that is no candidate
    order = torch.arange(0, -span, -1).add(scores, alpha=span)
    for sequence, length in enumerate(lengths.tolist()):
        order[sequence, :, max(length - tail, 0) :] = NEVER * span
    best, chosen = order.topk(min(k, span), sorted=False)
    chosen = chosen.where((best > NEVER * span) & reselect.unsqueeze(2), span)

    # position `span` and row `capacity` stand for what is not there
    rows = torch.arange(capacity)
    known = positions.where((positions >= 0) & (positions < span), span).long()
    home = torch.full((*reselect.shape, span + 1), capacity)
    home.scatter_(2, known, rows.expand_as(known))
    home[..., span] = capacity
    place = home.gather(2, chosen)
    stamp = lengths[:, None, None].to(last_used.dtype).expand_as(place)
    ages = pad(last_used, (0, 1)).scatter_(2, place, stamp)[..., :capacity]
    missing = chosen.where(place == capacity, span).sort(2).values  # ascending, then `span`
    count = (missing < span).sum(2)
    counters[..., 2].add_((chosen < span).sum(2))
    counters[..., 3].add_(count)

    most = int(count.max())
    missing = missing[..., :most]
    lacking = missing < span
    oldest = torch.add(rows, ages, alpha=capacity).topk(most, largest=False).indices
    # as many as are missing, ascending; those past `capacity` stay where they are
    oldest = oldest.add_(~lacking, alpha=capacity).sort(2).values.remainder_(capacity)
    positions.scatter_(2, oldest, missing.int().where(lacking, positions.gather(2, oldest)))
    last_used.copy_(ages)
    last_used.scatter_(2, oldest, stamp[..., :most].where(lacking, last_used.gather(2, oldest)))
    return FetchList(pad(oldest.int(), (0, k - most)), count.int())
