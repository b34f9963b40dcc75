"""Fetch: the rows that a selection lacks, from the arena into the set."""

import torch
from torch import Tensor

from kernels.cuda import launch
from kernels.paging import locate
from kernels.select import Fresh

_BLOCKS, _THREADS = 32, 1024  # at most; more are slower, since their addresses lie too far apart
_ROWS_PER_BLOCK, _PATIENT_ROWS_PER_BLOCK = 256, 1024
_MANY = 32768  # rows of one launch, from which on they come in bulk
_STAGES, _STAGE_BYTES = 2, 16 * 1024  # of a block


def fetch(
    fresh: Fresh,
    members: Tensor,
    table: Tensor,
    arena: Tensor,
    resident: Tensor,
    first: int,
    *,
    patient: bool = False,
) -> None:
    """Copy rows, in place.

    Args:
        fresh: which rows of the set.
        members: [B, kv_heads, C] int32, the position of each.
        table: [B, max_blocks] int64.
        arena: [blocks, kv_heads, block_tokens, 2, head_dim], this layer of the arena.
        resident: [B, kv_heads, first + C, 2, head_dim]; the set starts at row ``first``.
        patient: leave multiprocessors and memory to what runs beside it, for there is time.
    """
    if resident.is_cuda:
        lines, k = fresh.counts.numel(), fresh.slots.shape[2]
        row_bytes = resident[0, 0, 0].nbytes
        stages = _STAGES if lines * k >= _MANY else 0
        lanes = min(32, _STAGE_BYTES // row_bytes)
        shared = stages * lanes * row_bytes + 4 * (lines + 1)
        launch(
            "fetch.cu", "fetch", (_BLOCKS,), _THREADS,
            [fresh.slots, fresh.counts, members, table, table.stride(0), arena,
             arena.stride(0) * arena.itemsize,
             arena.stride(1) * arena.itemsize, resident, k, members.shape[2], first, lines,
             members.shape[1], _PATIENT_ROWS_PER_BLOCK if patient else _ROWS_PER_BLOCK, _MANY],
            shared=shared, BLOCK_TOKENS=arena.shape[2], ROW_BYTES=row_bytes, THREADS=_THREADS,
            STAGES=stages, LANES=lanes,
        )  # fmt: skip
        return
    entries = torch.arange(fresh.slots.shape[2], device=fresh.counts.device)
    batch, head, entry = (entries < fresh.counts.unsqueeze(2)).nonzero(as_tuple=True)
    slot = fresh.slots[batch, head, entry].long()
    position = members[batch, head, slot].long()
    block, offset = locate(position.unsqueeze(1), table[batch], arena.shape[2])
    resident[batch, head, first + slot] = arena[block.squeeze(1), head, offset.squeeze(1)]
