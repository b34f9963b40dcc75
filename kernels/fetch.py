"""Fetch: rows that are selected and not yet resident, from the arena into the set."""

import numpy as np
import torch
from torch import Tensor

from clo.kernels.arguments import HEAD_DIM, Signature
from clo.kernels.blocks import ARENA, BLOCK_TABLE
from clo.kernels.launch import launch
from clo.kernels.resident import FIRST, POSITIONS, ROWS, ResidentSet
from clo.kernels.update_resident import COUNTS, ENTRIES, FetchList

_BLOCKS, _THREADS = 32, 1024  # more blocks are slower, since their addresses lie too far apart
_ROWS_PER_BLOCK, _PATIENT_ROWS_PER_BLOCK = 256, 1024
_MANY = 32768  # from so many rows in one launch they come by bulk copies
_STAGES, _STAGE_BYTES = 2, 16 * 1024  # of a block's bulk copies

_SIGNATURE = Signature("fetch", (ENTRIES, COUNTS, ROWS, POSITIONS, BLOCK_TABLE, ARENA), (HEAD_DIM, FIRST))


def fetch(
    fetch_list: FetchList,
    resident: ResidentSet,
    block_table: Tensor,
    arena: Tensor,
    *,
    patient: bool = False,
) -> None:
    """Copy rows from the arena into the set, in place.

    Args:
        fetch_list: which rows of the set to copy.
        resident: of the B sequences; its positions say which token each of these rows belongs to.
        block_table: [B, max_blocks] int64.
        arena: [blocks, kv_heads, block_tokens, 2, head_dim], this layer of the arena.
        patient: there is time; leave multiprocessors and bandwidth to the kernels that run beside this one.
    """
    rows, positions = resident.rows, resident.positions
    _SIGNATURE.check(
        *fetch_list, rows, positions, block_table, arena, sinks=resident.sinks, recent=resident.recent
    )
    if not rows.is_cpu:
        lines, k = fetch_list.counts.numel(), fetch_list.entries.shape[2]
        row_bytes = rows[0, 0, 0].nbytes
        stages = _STAGES if lines * k >= _MANY else 0
        lanes = min(32, _STAGE_BYTES // row_bytes)
        shared = stages * lanes * row_bytes + 4 * (lines + 1)
        launch(
            "fetch.cu", "fetch", (_BLOCKS,), _THREADS,
            [*fetch_list, positions, block_table, block_table.stride(0), arena,
             arena.stride(0) * arena.itemsize, arena.stride(1) * arena.itemsize, rows, k, resident.capacity,
             resident.first, lines, resident.kv_heads,
             _PATIENT_ROWS_PER_BLOCK if patient else _ROWS_PER_BLOCK, _MANY],
            shared=shared, BLOCK_TOKENS=arena.shape[2], ROW_BYTES=row_bytes, THREADS=_THREADS,
            STAGES=stages, LANES=lanes,
        )  # fmt: skip
        return
    entries, counts = (tensor.numpy() for tensor in fetch_list)
    source, target = (part.view(torch.uint8).numpy() for part in (arena, rows))
    batch, head, entry = np.nonzero(np.arange(entries.shape[2]) < counts[..., None])
    row = entries[batch, head, entry]
    position = positions.numpy()[batch, head, row]
    block = block_table.numpy()[batch, position // arena.shape[2]]
    target[batch, head, resident.first + row] = source[block, head, position % arena.shape[2]]
