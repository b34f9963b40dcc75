"""Update the resident set: select the best rows of a head, list those that have to be fetched, and list the
tail, the tokens that are attended from their codes."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from clo.kernels.arguments import Argument, Rule, Signature
from clo.kernels.compiled import Array, compiled
from clo.kernels.launch import launch
from clo.kernels.limits import RUN, SHARED_BYTES, update_shared_bytes
from clo.kernels.resident import LAST_USED, POSITIONS, ResidentSet
from clo.kernels.score import Scores

_THREADS = 512, 1024  # of a block, for spans up to _SHORT tokens and for longer ones, where heads are few
_SHORT = 131_072
_MAP_SHARED_BYTES = 32 * 1024  # of the map and the sums; larger ones lie in global memory
_MOST = 1e6  # times its own weight that the tail stands for, at most, beside itself

SUCCESSOR_BITS = 5 * 128
"""What is taken off a score to get what the row after it counts as at least: of a bfloat16, 1/32.

Attention that copies, lists or quotes moves on by one token with each step. Selected by this share of the
weight of the row before it, the next row is resident before it is asked for.
"""


class FetchList(NamedTuple):
    """Entries of resident sets whose rows have to be read from the arena; the positions say which rows."""

    entries: Tensor  # [B, kv_heads, k] int32, places in the set, ascending; the first ``counts`` are valid
    counts: Tensor  # [B, kv_heads] int32


class TailList(NamedTuple):
    """Tokens that are not resident and weigh most, in runs of 16 neighbours, by the latest selection."""

    runs: Tensor  # [B, kv_heads, R] int32, numbers of runs, ascending; the first ``counts`` are valid
    masks: Tensor  # [B, kv_heads, R] int32, bit i: whether token i of the run is in the tail
    counts: Tensor  # [B, kv_heads] int32
    boosts: Tensor  # [B, kv_heads] float32, base-2 log of the weight of all not resident over the tail's own

    def slots(self, count: int) -> "TailList":
        """The part of the first ``count`` sequences, without a copy."""
        return TailList(*(part[:count] for part in self))


ENTRIES = Argument("fetch_list.entries", torch.int32, "B kv_heads k")
COUNTS = Argument("fetch_list.counts", torch.int32, "B kv_heads")
"""The tensors of a ``FetchList`` as arguments of operations."""

TAIL_RUNS = Argument("tail.runs", torch.int32, "B kv_heads R")
TAIL_MASKS = Argument("tail.masks", torch.int32, "B kv_heads R")
TAIL_COUNTS = Argument("tail.counts", torch.int32, "B kv_heads")
TAIL_BOOSTS = Argument("tail.boosts", torch.float32, "B kv_heads")
"""The tensors of a ``TailList`` as arguments of operations."""

_SIGNATURE = Signature(
    "update_resident",
    (
        Argument("scores.rows", torch.int16, "B kv_heads T", chunks=True),
        Argument("scores.runs", torch.int16, f"B kv_heads -(-T//{RUN}) 2", chunks=True),
        Argument("reselect", torch.bool, "B kv_heads"),
        Argument("lengths", torch.int64, "B"),
        POSITIONS, LAST_USED,
        Argument("counters", torch.int64, "B kv_heads 6"),
        *(part._replace(optional=True) for part in (TAIL_RUNS, TAIL_MASKS, TAIL_COUNTS, TAIL_BOOSTS)),
    ),
    (
        Rule("1 <= k <= capacity", "a head keeps what it selects"),
        Rule("latest >= 0", "it counts tokens"),
        Rule("T % 64 == 0", "a thread reads four runs of scores at a time", gpu=True),
    ),
)  # fmt: skip


def update_resident(
    scores: Scores,
    reselect: Tensor,
    lengths: Tensor,
    latest: int,
    resident: ResidentSet,
    counters: Tensor,
    k: int,
    tail: TailList | None = None,
    *,
    successors: bool,
) -> FetchList:
    """Put the k best rows of each head into its set, in place, without moving any row yet, and list the tail.

    Rows that are resident are only marked as used; each other row takes the place of the row selected longest
    ago. Among equal scores the lower position wins; among equally old rows the first in the set leaves.

    With ``successors`` a row is selected as if it weighed at least 1/32 of the row before it, where both are
    candidates of one run of 16: by the larger of its score and that of the row before less
    ``SUCCESSOR_BITS``. A raised score raises no other, and the largest of a run stays what it is. The tail is
    listed by the scores as they are.

    The tail has the runs whose tokens weigh most in all. Only tokens count that were not resident before, and
    none that ``scores`` says nothing of; but of a run that is listed, all tokens are in the tail that are
    neither resident now, nor of the sinks or the recent ones.

    Args:
        scores: from ``clo.kernels.score``. Its runs are trusted to be those of its rows: with others a kernel
            would write past its memory.
        reselect: [B, kv_heads] bool, heads that select.
        lengths: [B] int64, written to ``last_used``; 0 for a slot not in use, whose scores may be anything.
        latest: number of the latest tokens, whose scores are undefined.
        resident: of the B sequences, with a capacity of at least k.
        counters: [B, kv_heads, 6] int64; the third counts rows selected, the fourth counts rows to fetch, and
            where there is a tail the sixth adds up what all runs weigh that are not in it, in millionths of
            what all weigh.
        k: rows that a head selects.
        tail: becomes the tail of the heads that select, of up to R runs; None where there is none.
        successors: whether rows are selected by a part of the weight of those before them as well. It helps
            sets that keep their rows for later steps; one that is used for a single step it costs good rows.

    Returns:
        The rows to fetch.
    """
    positions, last_used = resident.positions, resident.last_used
    of_tail = (None,) * 4 if tail is None else tail
    _SIGNATURE.check(*scores, reselect, lengths, positions, last_used, counters, *of_tail, k=k, latest=latest)
    span, capacity, device = scores.rows.shape[2], resident.capacity, lengths.device
    if device.type != "cpu":
        shared, map_units = update_shared_bytes(k, capacity, span), 0 if tail is None else 2 * -(-span // 128)
        near = shared + 16 * (map_units + 1) if map_units else shared
        room = None
        if 16 * map_units > _MAP_SHARED_BYTES or near > min(SHARED_BYTES.values()):
            room = torch.empty(reselect.numel() * map_units, 4, dtype=torch.int32, device=device)
        threads = _THREADS[span > _SHORT]
        fetch_list = FetchList(
            torch.empty(*reselect.shape, k, dtype=torch.int32, device=device),
            torch.empty(reselect.shape, dtype=torch.int32, device=device),
        )
        launch(
            "update_resident.cu", "update_resident", (reselect.numel(),), threads,
            [*scores, span, latest, reselect, lengths, positions, last_used, counters, *fetch_list, k,
             capacity, reselect.shape[1], *of_tail, 0 if tail is None else tail.runs.shape[2],
             resident.sinks, resident.recent, room],
            shared=near if room is None else shared, THREADS=threads,
            SUCCESSOR_BITS=SUCCESSOR_BITS if successors else 0,
        )  # fmt: skip
        return fetch_list
    fetch_list = FetchList(
        torch.empty(*reselect.shape, k, dtype=torch.int32), torch.zeros(reselect.shape, dtype=torch.int32)
    )
    arrays = (
        *scores, reselect, lengths, positions, last_used, counters, *fetch_list,
        *(tail or _no_tail(*reselect.shape)),
    )  # fmt: skip
    _update(latest, k, resident.sinks, resident.recent, successors, *(part.numpy() for part in arrays))
    return fetch_list


def _no_tail(batch: int, kv_heads: int) -> TailList:
    none = torch.empty(batch, kv_heads, 0, dtype=torch.int32)
    counts = none.sum(2, dtype=torch.int32)
    return TailList(none, none, counts, counts.float())


def _raised(scores: Array) -> Array:
    """The scores [T] by which rows are selected where successors are: those below 0 stay what they are."""
    raised = scores.copy()
    for position in range(1, len(scores)):
        before = scores[position - 1]
        if position % RUN > 0 and scores[position] >= 0 and before >= SUCCESSOR_BITS:
            raised[position] = max(scores[position], before - SUCCESSOR_BITS)
    return raised


_raised = compiled(_raised)


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


def _sum_absent(candidates: Array, held: Array, row_of: Array, of_runs: Array, sums: Array) -> None:
    """What the tokens of each run weigh that are not resident, high 16 bits of float32; -1 for nothing.

    Args:
        held: positions of resident rows.
        of_runs: [any, 2], ``Scores.runs``, which counts all tokens.
    """
    weights = np.empty(RUN, np.float32)
    bits = weights.view(np.int32)
    there = -(-len(candidates) // RUN)
    for run in range(len(sums)):
        sums[run] = of_runs[run, 1] if run < there and of_runs[run, 1] > 0 else -1
    for row in range(len(held)):
        if not 0 <= held[row] < len(candidates):
            continue
        run = held[row] // RUN
        for place in range(RUN):
            position = run * RUN + place
            counts = position < len(candidates) and candidates[position] > 0 and row_of[position] < 0
            bits[place] = np.int32(candidates[position]) << 16 if counts else 0
        width = RUN
        while width > 1:  # in the order in which the kernels add
            width //= 2
            for place in range(width):
                weights[place] = weights[2 * place] + weights[2 * place + 1]
        sums[run] = bits[0] >> 16 if bits[0] >> 16 > 0 else -1


_sum_absent = compiled(_sum_absent)


def _loop(
    latest: int, k: int, sinks: int, recent: int, successors: bool, scores: Array, of_runs: Array,
    reselect: Array, lengths: Array, positions: Array, last_used: Array, counters: Array, entries: Array,
    counts: Array, runs: Array, masks: Array, tail_counts: Array, boosts: Array,
) -> None:  # fmt: skip
    batch, kv_heads, span = scores.shape
    capacity, most = positions.shape[2], runs.shape[2]
    sums = np.empty(-(-span // RUN) if most else 0, np.int16)
    weight = np.zeros(1, np.float32)
    bits = weight.view(np.int32)
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
            candidates = scores[sequence, head, : max(length - latest, 0)]
            if most:
                _sum_absent(candidates, held, row_of, of_runs[sequence, head], sums)
            ranked = _raised(candidates) if successors else candidates
            bound, equal = _best(ranked, k)
            selected = count = 0
            for position in range(len(ranked)):
                score = ranked[position]
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
            if most == 0:
                continue
            for row in range(capacity):
                if 0 <= held[row] < span:
                    row_of[held[row]] = row
            bound, equal = _best(sums, most)
            listed, weigh, others, within = 0, np.float32(0), np.float32(0), np.float32(0)
            for run in range(len(sums)):
                if sums[run] <= 0:
                    continue
                bits[0] = np.int32(sums[run]) << 16
                if sums[run] < bound or (sums[run] == bound and equal == 0):
                    others += weight[0]
                    continue
                weigh += weight[0]
                equal -= sums[run] == bound
                mask = 0
                for place in range(RUN):
                    position = run * RUN + place
                    if sinks <= position < length - recent and row_of[position] < 0:
                        mask |= 1 << place
                        if position < len(candidates) and candidates[position] > 0:
                            bits[0] = np.int32(candidates[position]) << 16
                            within += weight[0]
                runs[sequence, head, listed], masks[sequence, head, listed] = run, mask
                listed += 1
            tail_counts[sequence, head] = listed
            boosts[sequence, head] = np.log2(1 + min(others / within, np.float32(_MOST))) if within > 0 else 0
            if weigh > 0:
                counters[sequence, head, 5] += np.int64(np.float32(1e6) * (others / (weigh + others)))
            for row in range(capacity):
                if 0 <= held[row] < span:
                    row_of[held[row]] = -1


_update = compiled(_loop)
