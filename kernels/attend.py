"""Attention of a decode step over the resident rows or over the whole KV, and the sum of all its parts."""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from clo.kernels.append import append
from clo.kernels.arguments import ELEMENT, GROUPED, HEAD_DIM, Argument, Rule, Signature
from clo.kernels.blocks import gather_tokens
from clo.kernels.compiled import Array, compiled, floats
from clo.kernels.launch import ELEMENTS, launch
from clo.kernels.limits import parts_of_heads
from clo.kernels.resident import FIRST, LAST_USED, NEW_ROWS, POSITIONS, ROWS, ResidentSet
from clo.kernels.update_resident import COUNTS, ENTRIES, FetchList

_MASKING = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""Not cuDNN: PyTorch 2.11 masks there by adding -65504, which larger scores of stale rows survive."""

_SPLIT_BYTES = 32 * 1024, 128 * 1024  # rows that a block of threads attends to, at least and at most, about
_BLOCKS = 128  # of threads; a layer's other kernels fill the rest of a GPU
_THREADS = 128
_STAGES = 2  # batches of rows on their way to a warp
_MOST_BATCH = 16  # rows that a warp takes together
_QUERY_TILE = 8  # queries of a group that share one read of K and V

_QUERY = Argument("query", ELEMENT, "B query_heads head_dim", dense=2, chunks=True)
_LENGTHS = Argument("lengths", torch.int64, "B")
_FETCHED = ENTRIES._replace(optional=True), COUNTS._replace(optional=True)
_ATTEND = Signature(
    "attend_resident",
    (
        _QUERY,
        NEW_ROWS,
        ROWS, POSITIONS, LAST_USED, _LENGTHS, *_FETCHED,
    ),
    (HEAD_DIM, GROUPED, FIRST),
)  # fmt: skip
_MERGE = Signature(
    "merge_fetched",
    (
        Argument("state.out", torch.float32, "B kv_heads S query_heads//kv_heads head_dim", chunks=True),
        Argument("state.sum", torch.float32, "B kv_heads S query_heads//kv_heads"),
        Argument("state.max", torch.float32, "B kv_heads S query_heads//kv_heads"),
        _QUERY, ROWS, _LENGTHS, *_FETCHED,
        Argument("lse", torch.float32, "B query_heads"),
        Argument("counters", torch.int64, "B kv_heads 6", optional=True),
    ),
    (HEAD_DIM, GROUPED, FIRST, Rule("S >= splits + tail", "the parts of the tail come after the others")),
)  # fmt: skip


class AttentionState(NamedTuple):
    """Attention over some of the rows in S parts, before normalisation."""

    out: Tensor  # [B, kv_heads, S, group, head_dim] float32, sum of exp(score - max) * value
    sum: Tensor  # [B, kv_heads, S, group] float32, sum of exp(score - max)
    max: Tensor  # [B, kv_heads, S, group] float32, largest score, -inf where there was no row


def empty_state(query: Tensor, resident: ResidentSet, others: int = 0) -> AttentionState:
    """Memory for attention to resident rows, and for ``others`` parts behind theirs that others fill."""
    parts = others + (1 if query.is_cpu else _splits(resident))
    shape = (len(query), resident.kv_heads, parts, query.shape[1] // resident.kv_heads)
    return AttentionState(
        torch.empty(*shape, query.shape[2], dtype=torch.float32, device=query.device),
        torch.empty(shape, dtype=torch.float32, device=query.device),
        torch.empty(shape, dtype=torch.float32, device=query.device),
    )


def attend_resident(
    query: Tensor,
    kv: Tensor,
    resident: ResidentSet,
    lengths: Tensor,
    fetch_list: FetchList | None,
    scale: float,
    state: AttentionState | None = None,
) -> AttentionState:
    """Attention over all resident rows, as they are once ``append`` has taken ``kv``, except those that are
    still on their way.

    The kernel reads the new rows where they are, so that a decode step need not wait for ``append``. Whether
    that was called before makes no difference; the reference calls it.

    Args:
        query: [B, query_heads, head_dim]; those of a sequence contiguous, also below.
        kv: [B, kv_heads, 2, head_dim], the new rows, as for ``append``.
        resident: of the B sequences; rows from a sequence's length on do not count.
        lengths: [B] int64, tokens with the current one; 0 for a slot not in use, whose result is undefined.
        fetch_list: the rows to leave out; None where all have arrived.
        scale: factor of the scores.
        state: from ``empty_state``, whose first parts are filled; None for a new one without others.

    Returns:
        The state.
    """
    positions, first = resident.positions, resident.first
    _ATTEND.check(
        query, kv, resident.rows, positions, resident.last_used, lengths, *_pointers(fetch_list),
        sinks=resident.sinks, recent=resident.recent,
    )  # fmt: skip
    if state is None:
        state = empty_state(query, resident)
    if not query.is_cpu:
        _launch(
            "attend_resident", _splits(resident), state.sum.shape[2], query, resident,
            [query, query.stride(0), kv, kv.stride(0) * kv.itemsize, resident.rows, positions, lengths,
             *_pointers(fetch_list), *state, resident.kv_heads, resident.sinks, resident.recent,
             resident.capacity, _width(fetch_list), scale],
        )  # fmt: skip
        return state
    append(kv, lengths, resident)
    absent = np.zeros(resident.rows.shape[:3], np.bool_)
    absent[..., first:] = positions.numpy() < 0
    for sequence, length in enumerate(lengths.tolist()):
        absent[sequence, :, max(length, 1) :] = True
    if fetch_list is not None:
        np.put_along_axis(absent, _places(fetch_list, first)[0].numpy(), True, 2)
        absent[..., 0] = False
    return _attend(query, resident.rows, absent, scale, state)


def merge_fetched(
    state: AttentionState,
    query: Tensor,
    resident: ResidentSet,
    lengths: Tensor,
    fetch_list: FetchList | None,
    lse: Tensor,
    scale: float,
    counters: Tensor | None = None,
    tail: int = 0,
) -> Tensor:
    """Attend to the rows that have arrived meanwhile too, and normalise.

    Args:
        state: what ``attend_resident`` returned.
        query, resident, lengths, scale: as for ``attend_resident``.
        fetch_list: the rows that ``attend_resident`` left out.
        lse: [B, query_heads] float32; becomes the log-sum-exp of the scores.
        counters: [B, kv_heads, 6] int64, to whose fifth is added what the tail weighs, in millionths of the
            whole, averaged over the queries of a group; None where nobody counts.
        tail: the last parts of the state, those of the tail.

    Returns:
        [B, query_heads, head_dim], dtype of ``query``.
    """
    _MERGE.check(
        *state, query, resident.rows, lengths, *_pointers(fetch_list), lse, counters, sinks=resident.sinks,
        recent=resident.recent, capacity=resident.capacity, splits=1 if query.is_cpu else _splits(resident),
        tail=tail,
    )  # fmt: skip
    if not query.is_cpu:
        result = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        _launch(
            "merge_fetched", 1, state.sum.shape[2], query, resident,
            [*state, query, query.stride(0), resident.rows, lengths, *_pointers(fetch_list), lse, result,
             counters, tail, resident.kv_heads, resident.first, resident.capacity, _width(fetch_list), scale],
        )  # fmt: skip
        return result
    parts_before = state.sum.shape[2] - tail
    if fetch_list is not None:
        places, coming = _places(fetch_list, resident.first)
        rows = resident.rows.gather(2, places[..., None, None].expand(-1, -1, -1, *resident.rows.shape[3:]))
        arrived = _attend(query, rows, ~coming.numpy(), scale, empty_state(query, resident))
        state = AttentionState(*(torch.cat(parts, dim=2) for parts in zip(state, arrived, strict=True)))
    attended = torch.zeros(query.shape)
    out, sums, maxima = (part.numpy() for part in state)
    _merge(out, sums, maxima, lengths.numpy(), lse.numpy(), attended.numpy())
    if counters is not None:
        parts = slice(parts_before, parts_before + tail)
        grouped = lse.view(len(lse), 1, -1).unflatten(2, (resident.kv_heads, -1)).transpose(1, 2)
        weighs = state.sum[:, :, parts] * (state.max[:, :, parts] - grouped).exp()
        used = weighs.sum(2).mean(2).where(lengths.unsqueeze(1) > 0, 0)
        counters[..., 4] += (1e6 * used).long()
    return attended.to(query.dtype)


def _places(fetch_list: FetchList, first: int) -> tuple[Tensor, Tensor]:
    """Resident rows that are on their way, [B, kv_heads, any] int64, and which of them are, bool; row 0,
    which is always there, stands for those that are not."""
    entries = torch.arange(max(1, int(fetch_list.counts.max())))
    coming = entries < fetch_list.counts.unsqueeze(2)
    return (fetch_list.entries[..., : len(entries)].long() + first).where(coming, 0), coming


def _attend(
    query: Tensor, rows: Tensor, absent: NDArray[np.bool_], scale: float, state: AttentionState
) -> AttentionState:
    """Attention over the rows [B, kv_heads, R, 2, head_dim] as the first part of a state, without those where
    ``absent`` [B, kv_heads, R] is true."""
    batch, kv_heads, count = absent.shape
    group, dim = query.shape[1] // kv_heads, query.shape[2]
    grouped, held = floats(query.reshape(batch, kv_heads, group, dim)), floats(rows)
    weights = np.empty((batch, kv_heads, group, count), np.float32)
    out, sums, maxima = (part.numpy() for part in state)
    _scores(grouped, held, absent, scale, maxima, weights)
    np.exp(weights, out=weights)
    _values(weights, held, sums, out)
    return state


def _scores_loop(
    query: Array, rows: Array, absent: Array, scale: float, maxima: Array, scores: Array
) -> None:
    batch, kv_heads, group, count = scores.shape
    for sequence in range(batch):
        for head in range(kv_heads):
            peak = np.full(group, -np.inf, np.float32)
            for row in range(count):
                if absent[sequence, head, row]:
                    for member in range(group):
                        scores[sequence, head, member, row] = -np.inf
                    continue
                key = rows[sequence, head, row, 0]
                for member in range(group):
                    product = np.float32(0)
                    for entry in range(len(key)):
                        product += query[sequence, head, member, entry] * key[entry]
                    score = product * np.float32(scale)
                    scores[sequence, head, member, row] = score
                    peak[member] = max(peak[member], score)
            for member in range(group):
                maxima[sequence, head, 0, member] = peak[member]
                zero = max(peak[member], np.float32(-1e30))  # infinity less infinity is no number
                for row in range(count):
                    scores[sequence, head, member, row] -= zero


def _values_loop(weights: Array, rows: Array, sums: Array, out: Array) -> None:
    batch, kv_heads, group, count = weights.shape
    out[:, :, 0], sums[:, :, 0] = 0, 0
    for sequence in range(batch):
        for head in range(kv_heads):
            for row in range(count):
                value = rows[sequence, head, row, 1]
                for member in range(group):
                    weight, total = weights[sequence, head, member, row], out[sequence, head, 0, member]
                    sums[sequence, head, 0, member] += weight
                    for entry in range(len(value)):
                        total[entry] += weight * value[entry]


def _merge_loop(out: Array, sums: Array, maxima: Array, lengths: Array, lse: Array, attended: Array) -> None:
    batch, kv_heads, parts, group = sums.shape
    for sequence in range(batch):
        if lengths[sequence] == 0:
            continue
        for head in range(kv_heads):
            for member in range(group):
                number, peak, total = head * group + member, np.float32(-np.inf), np.float32(0)
                for part in range(parts):
                    peak = max(peak, maxima[sequence, head, part, member])
                for part in range(parts):
                    weight = np.exp(maxima[sequence, head, part, member] - peak)
                    total += sums[sequence, head, part, member] * weight
                    for entry in range(out.shape[4]):
                        attended[sequence, number, entry] += out[sequence, head, part, member, entry] * weight
                for entry in range(out.shape[4]):
                    attended[sequence, number, entry] /= total
                lse[sequence, number] = peak + np.log(total)


_scores = compiled(_scores_loop, any_order=True)
_values = compiled(_values_loop, any_order=True)
_merge = compiled(_merge_loop)


def _width(fetch_list: FetchList | None) -> int:
    return 0 if fetch_list is None else fetch_list.entries.shape[2]


def _pointers(fetch_list: FetchList | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if fetch_list is None else (fetch_list.entries, fetch_list.counts)


def _splits(resident: ResidentSet) -> int:
    """Parts of about equal size: more where there are few heads, as a GPU would idle otherwise."""
    heads, of_head = resident.rows.shape[0] * resident.kv_heads, resident.rows[0, 0].nbytes
    fewest, most = (max(1, round(of_head / size)) for size in reversed(_SPLIT_BYTES))
    return max(fewest, min(most, parts_of_heads(heads, _BLOCKS)))


def _launch(
    name: str,
    blocks: int,
    parts: int,
    query: Tensor,
    resident: ResidentSet,
    args: list[Tensor | int | float | None],
) -> None:
    batch, kv_heads, count = resident.rows.shape[:3]
    group = query.shape[1] // kv_heads
    dim, tile, splits = query.shape[2], min(group, _QUERY_TILE), _splits(resident)
    rows, row_bytes = -(-count // splits), resident.rows[0, 0, 0].nbytes
    chunks = row_bytes // 32  # 16-byte chunks of a key
    lanes = next((lanes for lanes in (8, 16) if chunks <= lanes), 32)
    per_lane = -(-chunks // lanes)
    stage_bytes = {1: 4, 2: 2}.get(per_lane, 1) * per_lane * 2 * 32 * 16
    launch(
        "attend.cu", name, (blocks * -(-group // tile), kv_heads, batch), _THREADS, args,
        shared=_THREADS // 32 * _STAGES * stage_bytes + -(-rows // _MOST_BATCH) * _MOST_BATCH,
        ELEMENT=ELEMENTS[query.dtype], DIM=dim, GROUP=group, ROWS=rows, ROW_BYTES=row_bytes, THREADS=_THREADS,
        TILE=tile, SPLITS=parts, STAGES=_STAGES,
    )  # fmt: skip


def attend_all(query: Tensor, arena: Tensor, block_table: Tensor, lengths: Tensor, scale: float) -> Tensor:
    """Full attention, reading every row of the arena.

    Args:
        query: [B, query_heads, head_dim].
        arena: [blocks, kv_heads, block_tokens, 2, head_dim], this layer.
        block_table: [B, max_blocks] int64.
        lengths: [B] int64.

    Returns:
        [B, query_heads, head_dim].
    """
    rows = gather_tokens(arena, block_table)  # [B, kv_heads, T, 2, D]
    mask = torch.arange(rows.shape[2], device=lengths.device) < lengths.clamp_min(1).unsqueeze(1)
    grouped = query.view(query.shape[0], rows.shape[1], -1, query.shape[2])
    with sdpa_kernel(_MASKING):
        out = scaled_dot_product_attention(
            grouped, rows[:, :, :, 0], rows[:, :, :, 1], attn_mask=mask[:, None, None], scale=scale
        )
    return out.flatten(1, 2)
