"""Select: weigh every row of a head through the index, take the best, and say which of them have to move."""

from math import log
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.cuda import ELEMENTS, launch
from kernels.encode import unpack
from kernels.paging import gather_tokens

NEVER = -1  # key of a row that is no candidate

_LOG2E = 1 / log(2)

_UNIT = 64  # tokens that a warp weighs at a time
_WARPS, _UNITS, _STAGES = 4, 8, 3  # of a block that weighs; units of a warp, and of these on their way here
_CHOOSE_THREADS = 512
_CHOOSE_LOADS = 4  # of 8 keys, on their way to a thread
_STATIC_BYTES = 48 * 1024  # of shared memory, at most


class Fresh(NamedTuple):
    """Rows of the set that have to be read from the arena: ``members`` says which position each one takes."""

    slots: Tensor  # [B, kv_heads, k] int32, ascending; only the first ``counts`` of a head mean anything
    counts: Tensor  # [B, kv_heads] int32


class Prepared(NamedTuple):
    """The part of a weighing that needs no code: queries as integers, and what the centres are worth."""

    integers: Tensor  # [B, query_heads, head_dim] int8
    steps: Tensor  # [B, query_heads] float32; their product is the rotated query
    offsets: Tensor  # [B, kv_heads, max_blocks, group] float32, base-2 logarithms


def prepare(
    query: Tensor,
    centres: Tensor,
    rotation: Tensor,
    norm: Tensor,
    lengths: Tensor,
    table: Tensor,
    block_tokens: int,
    scale: float,
) -> Prepared:
    """Rotate and round the queries, and multiply them with the centre of each block.

    Args:
        query: [B, query_heads, head_dim], those of a sequence contiguous.
        centres: [blocks, kv_heads, head_dim] float32, this layer of the index.
        rotation: [head_dim, head_dim] float32.
        norm: [B, query_heads] float32, log-sum-exp of the last attention.
        lengths: [B] int64; 0 for a slot not in use, whose result is undefined, as is that of blocks past
            a sequence's end.
        table: [B, max_blocks] int64.
        block_tokens: tokens of a block.
        scale: of the softmax.
    """
    batch, query_heads, dim = query.shape
    kv_heads, pages = centres.shape[1], table.shape[1]
    group = query_heads // kv_heads
    if query.is_cuda:
        prepared = Prepared(
            torch.empty(query.shape, dtype=torch.int8, device=query.device),
            torch.empty(query.shape[:2], dtype=torch.float32, device=query.device),
            torch.empty(batch, kv_heads, pages, group, dtype=torch.float32, device=query.device),
        )
        parts = next(parts for parts in (4, 2, 1) if parts * group * dim * 4 <= _STATIC_BYTES)
        threads = -(-parts * dim // 32) * 32
        launch(
            "prepare.cu", "prepare", (kv_heads, batch, 1 + -(-pages // (threads // 32))), threads,
            [query, query.stride(0), rotation, centres, norm, lengths, table, pages, table.stride(0),
             *prepared, scale], ELEMENT=ELEMENTS[query.dtype], DIM=dim, GROUP=group,
            BLOCK_TOKENS=block_tokens, PARTS=parts,
        )  # fmt: skip
        return prepared
    grouped = query.float().view(batch, kv_heads, group, dim)
    rotated = query.float() @ rotation
    steps = rotated.abs().amax(-1).clamp_min_(1e-20) / 127
    products = centres[table].transpose(1, 2) @ grouped.transpose(-1, -2)  # [B, kv_heads, max_blocks, group]
    offsets = (products * scale - norm.view(batch, kv_heads, 1, group)) * _LOG2E
    return Prepared((rotated / steps.unsqueeze(-1)).round_().to(torch.int8), steps, offsets)


def scan_exact(query: Tensor, arena: Tensor, table: Tensor) -> Tensor:
    """The exact products, with the keys of the arena.

    Args:
        query: [B, query_heads, head_dim].
        arena: [blocks, kv_heads, block_tokens, 2, head_dim], this layer.
        table: [B, max_blocks] int64.

    Returns:
        [B, kv_heads, group, T] float32.
    """
    keys = gather_tokens(arena[:, :, :, 0], table).float()
    grouped = query.float().view(query.shape[0], keys.shape[1], -1, query.shape[2])
    return grouped @ keys.transpose(-1, -2)


def weigh(products: Tensor, norm: Tensor, lengths: Tensor, sinks: int, tail: int, scale: float) -> Tensor:
    """What each row is worth to its query group: its softmax weight, summed over the group.

    The softmax is normalised with the sums of the step before, which cost nothing: attention has just left
    them. On real text that chooses as well as exact sums do.

    Args:
        products: [B, kv_heads, group, T] float32, query times key.
        norm: [B, query_heads] float32, log-sum-exp of the last attention.
        lengths: [B] int64; candidates are all positions but the first ``sinks`` and the last ``tail``.
        scale: of the softmax.

    Returns:
        [B, kv_heads, T] int16, the high bits of the weight as float32, which order as integers do; ``NEVER``
        for what is no candidate.
    """
    weight = (products * scale - norm.view(*products.shape[:3], 1)).exp().sum(2)
    return _keys(weight, lengths, sinks, tail)


def _keys(weight: Tensor, lengths: Tensor, sinks: int, tail: int) -> Tensor:
    keys = (weight.view(torch.int32) >> 16).to(torch.int16)
    position = torch.arange(weight.shape[-1], device=weight.device)
    candidate = (position >= sinks) & (position < (lengths - tail).unsqueeze(1))
    return keys.masked_fill_(~candidate.unsqueeze(1), NEVER)


def weigh_codes(
    prepared: Prepared,
    codes: Tensor,
    scales: Tensor,
    miss: Tensor,
    lengths: Tensor,
    table: Tensor,
    sinks: int,
    tail: int,
    scale: float,
) -> Tensor:
    """``weigh`` with the products that 2-bit codes give.

    Args:
        prepared: of the same table and scale.
        codes: [blocks, kv_heads, block_tokens, head_dim // 4] uint8, this layer of the index.
        scales: [blocks, kv_heads, block_tokens] float16.
        miss: [B, kv_heads] bool; the keys of other heads are undefined.
        lengths: [B] int64.
        table: [B, max_blocks] int64.

    Returns:
        [B, kv_heads, T] int16, T = max_blocks * block_tokens; undefined from ``lengths - tail`` on.
    """
    integers, steps, offsets = prepared
    batch, kv_heads, pages, group = offsets.shape
    dim, block_tokens = integers.shape[2], codes.shape[2]
    if integers.is_cuda:
        span = pages * block_tokens
        keys = torch.empty(batch, kv_heads, span, dtype=torch.int16, device=integers.device)
        columns = -(-group // 8) * (4 if group <= 4 else 8)
        stage_bytes = _UNIT * dim // 4 + _UNIT * 2 + -(-columns * 4 // 16) * 16
        launch(
            "weigh.cu", "weigh_codes", (-(-span // (_WARPS * _UNITS * _UNIT)), kv_heads, batch), 32 * _WARPS,
            [*prepared, codes, scales, miss, lengths, table, pages, table.stride(0), keys, sinks, tail,
             scale], shared=_WARPS * _STAGES * stage_bytes, DIM=dim, GROUP=group, BLOCK_TOKENS=block_tokens,
            WARPS=_WARPS, UNITS=_UNITS, STAGES=_STAGES,
        )  # fmt: skip
        return keys
    rounded = integers.float().view(batch, kv_heads, group, dim)
    levels = unpack(gather_tokens(codes, table)).float()  # [B, kv_heads, T, D]
    products = rounded @ levels.transpose(-1, -2) - 1.5 * rounded.sum(-1, keepdim=True)
    products *= steps.view(batch, kv_heads, group, 1) * (scale * _LOG2E)
    products *= gather_tokens(scales, table).float().unsqueeze(2)
    paged = products.view(batch, kv_heads, group, pages, block_tokens)
    paged += offsets.transpose(2, 3).unsqueeze(-1)
    return _keys(products.exp2_().sum(2), lengths, sinks, tail)


def choose(
    keys: Tensor,
    miss: Tensor,
    lengths: Tensor,
    tail: int,
    members: Tensor,
    stamps: Tensor,
    tally: Tensor,
    k: int,
) -> Fresh:
    """Put the k best rows of each head into its set, in place, without moving any row yet.

    Rows that are resident are only marked; each other one takes the place of a row selected longest ago. Of
    equal keys the lower position wins, of equally old rows the one in the lower slot leaves.

    Args:
        keys: [B, kv_heads, T] int16, from ``weigh``.
        miss: [B, kv_heads] bool, heads that select.
        lengths: [B] int64, the stamp of this step; 0 for a slot not in use, whose members may be anything.
        tail: the last positions, whose keys are undefined.
        members: [B, kv_heads, C] int32, the position that each row of the set holds, -1 where empty; C >= k.
        stamps: [B, kv_heads, C] int32, length of the sequence when the row was last selected.
        tally: [B, kv_heads, 4] int64; the third grows by rows chosen, the fourth by rows to move.

    Returns:
        The rows to move.
    """
    span, capacity = keys.shape[2], members.shape[2]
    if keys.is_cuda:
        fresh = Fresh(
            torch.empty(*miss.shape, k, dtype=torch.int32, device=keys.device),
            torch.empty(miss.shape, dtype=torch.int32, device=keys.device),
        )
        launch(
            "choose.cu", "choose", (miss.numel(),), _CHOOSE_THREADS,
            [keys, span, tail, miss, lengths, members, stamps, tally, *fresh, k, capacity, miss.shape[1]],
            shared=16 * max(2 * k, -(-span // 128)) + 7 * 1024 + 9 * (-(-k // 16) * 16) + 4 * capacity,
            THREADS=_CHOOSE_THREADS, LOADS=_CHOOSE_LOADS,
        )  # fmt: skip
        return fresh
    position = torch.arange(span, device=keys.device)
    selects = (miss & (lengths > 0).unsqueeze(1)).unsqueeze(2)
    keys = keys.masked_fill(position >= (lengths - tail)[:, None, None], NEVER)
    order = keys.long() * span + (span - 1 - position)
    best, chosen = order.masked_fill_(keys == NEVER, NEVER * span).topk(min(k, span), sorted=False)
    valid = (best >= 0) & selects
    chosen = torch.nn.functional.pad(chosen.where(valid, span), (0, k - chosen.shape[2]), value=span)

    # column `span` of both maps takes what is not there
    known = members.long().where((members >= 0) & selects, span)
    resident = torch.zeros(*members.shape[:2], span + 1, dtype=torch.bool, device=keys.device)
    wanted = resident.scatter(2, chosen, True)
    wanted[..., span] = False
    resident.scatter_(2, known, True)
    stamp = lengths[:, None, None].to(stamps.dtype)
    stamps.copy_(stamp.where(wanted.gather(2, known), stamps))
    resident[..., span] = True
    missing = chosen.where(~resident.gather(2, chosen), span).sort(2).values  # ascending, then `span`
    lacking = missing < span

    slots = torch.arange(capacity, device=keys.device)
    age = stamps.long() * capacity + slots
    oldest = age.topk(k, dim=2, largest=False).indices
    oldest = oldest.where(lacking, capacity).sort(2).values  # as many as are missing, ascending
    for tensor, value in ((members, missing), (stamps, stamp.expand_as(missing))):
        padded = torch.nn.functional.pad(tensor, (0, 1))
        tensor.copy_(padded.scatter_(2, oldest, value.to(tensor.dtype))[..., :capacity])
    count = lacking.sum(2)
    tally[..., 2] += (chosen < span).sum(2)
    tally[..., 3] += count
    return Fresh(oldest.int(), count.int())
