"""Update the resident set: select the best rows of a head and list those that have to be fetched."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from clo.kernels.arguments import Argument, Rule, Signature
from clo.kernels.compiled import Array, compiled
from clo.kernels.launch import launch
from clo.kernels.limits import update_shared_bytes
from clo.kernels.resident import LAST_USED, POSITIONS, ResidentSet

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
    fetch_list = FetchList(
        torch.empty(*reselect.shape, k, dtype=torch.int32), torch.zeros(reselect.shape, dtype=torch.int32)
    )
    _update(
        scores.numpy(), reselect.numpy(), lengths.numpy(), tail, k, positions.numpy(), last_used.numpy(),
        counters.numpy(), *(part.numpy() for part in fetch_list),
    )  # fmt: skip
    return fetch_list


def _best(scores: Array, k: int) -> tuple[int, int]:
    """The k-th highest of the scores [T], and how many of those equal to it belong to the first k.

    Scores below 0 do not count: those of rows that are not candidates, and of numbers that are not numbers.

    It counts by the high bits of a score first, and then by the low ones.
    """
    counts, left = np.zeros(256, np.int64), k
    for score in scores:
        if score >= 0:
            counts[score >> 7] += 1
    high = 255
    while high > 0 and counts[high] < left:
        left -= counts[high]
        high -= 1
    if counts[high] < left:  # there are not so many
        return 0, len(scores)
    counts[:] = 0
    for score in scores:
        if score >= 0 and score >> 7 == high:
            counts[score & 127] += 1
    low = 127
    while low > 0 and counts[low] < left:
        left -= counts[low]
        low -= 1
    return high << 7 | low, left


_best = compiled(_best)


def _oldest(ages: Array, count: int) -> tuple[int, int]:
    """The ``count``-th lowest of the ages [C], and how many of those equal to it belong to the first."""
    low, high = -1, -1
    for age in ages:
        high = max(high, age)
    while low < high:
        middle = (low + high) // 2
        if (ages <= middle).sum() < count:
            low = middle + 1
        else:
            high = middle
    return low, count - (ages < low).sum()


_oldest = compiled(_oldest)


def _loop(
    scores: Array, reselect: Array, lengths: Array, tail: int, k: int, positions: Array, last_used: Array,
    counters: Array, entries: Array, counts: Array,
) -> None:  # fmt: skip
    batch, kv_heads, span = scores.shape
    capacity = positions.shape[2]
    row_of, missing = np.full(span, -1, np.int32), np.empty(k, np.int32)
    for sequence in range(batch):
        length = lengths[sequence]
        for head in range(kv_heads):
            if length == 0 or not reselect[sequence, head]:
                continue
            held, ages = positions[sequence, head], last_used[sequence, head]
            for row in range(capacity):
                if 0 <= held[row] < span:
                    row_of[held[row]] = row
            candidates = scores[sequence, head, : max(length - tail, 0)]
            bound, equal = _best(candidates, k)
            selected = count = 0
            for position in range(len(candidates)):
                score = candidates[position]
                if score < bound or (score == bound and equal == 0):
                    continue
                if score == bound:
                    equal -= 1
                selected += 1
                row = row_of[position]
                if row >= 0:
                    ages[row] = length
                else:
                    missing[count] = position
                    count += 1
            for row in range(capacity):
                if 0 <= held[row] < span:
                    row_of[held[row]] = -1
            bound, equal = _oldest(ages, count)
            entry = 0
            for row in range(capacity):
                if ages[row] < bound or (ages[row] == bound and equal > 0):
                    equal -= ages[row] == bound
                    held[row], ages[row] = missing[entry], length
                    entries[sequence, head, entry] = row
                    entry += 1
            counts[sequence, head] = count
            counters[sequence, head, 2] += selected
            counters[sequence, head, 3] += count


_update = compiled(_loop)
