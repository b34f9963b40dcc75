"""Update the resident set: select the best rows of a head and list those that have to be fetched."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

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
    entries, counts = np.zeros((*reselect.shape, k), np.int32), np.zeros(reselect.shape, np.int32)
    lower_first, lower_row_first = np.arange(span), np.arange(capacity)
    for sequence, head in reselect.nonzero().tolist():
        length = int(lengths[sequence])
        if length == 0:
            continue
        candidates = scores.numpy()[sequence, head, : max(length - tail, 0)]
        held, ages = positions.numpy()[sequence, head], last_used.numpy()[sequence, head]
        order = candidates.astype(np.int64) * span - lower_first[: len(candidates)]
        if k < len(candidates):
            order = np.partition(order, len(candidates) - k)[len(candidates) - k :]
        selected = np.sort(-order[order > NEVER * span] % span)

        row_of = np.full(span + 1, -1)  # by position; the last entry is what an empty row writes to
        row_of[held] = lower_row_first
        row_of[-1] = -1
        rows = row_of[selected]
        ages[rows[rows >= 0]] = length
        missing = selected[rows < 0]
        count = len(missing)
        if count:
            order = ages.astype(np.int64) * capacity + lower_row_first
            leaving = np.sort(np.partition(order, count - 1)[:count] % capacity)
            held[leaving], ages[leaving] = missing, length
            entries[sequence, head, :count], counts[sequence, head] = leaving, count
        counters.numpy()[sequence, head, 2:] += len(selected), count
    return FetchList(torch.from_numpy(entries), torch.from_numpy(counts))
