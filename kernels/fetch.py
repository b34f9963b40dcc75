"""Fetch: rows that are selected and not yet resident, from the arena into the set."""

from torch import Tensor

from clo.kernels.arguments import HEAD_DIM, Signature
from clo.kernels.blocks import ARENA, BLOCK_TABLE
from clo.kernels.compiled import Array, bits, compiled
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
    entries, counts = (part.numpy() for part in fetch_list)
    _fetch(
        entries,
        counts,
        positions.numpy(),
        block_table.contiguous().numpy(),
        bits(arena),
        resident.first,
        bits(rows),
    )


def _loop(
    entries: Array, counts: Array, positions: Array, block_table: Array, arena: Array, first: int, rows: Array
) -> None:
    batch, kv_heads, _ = entries.shape
    for sequence in range(batch):
        for head in range(kv_heads):
            for entry in entries[sequence, head, : counts[sequence, head]]:
                number, offset = divmod(positions[sequence, head, entry], arena.shape[2])
                if number < 0 or number >= block_table.shape[1]:  # no row of this sequence
                    continue
                source, target = (
                    arena[block_table[sequence, number], head, offset],
                    rows[sequence, head, first + entry],
                )
                for part in range(2):
                    for element in range(source.shape[1]):
                        target[part, element] = source[part, element]


_fetch = compiled(_loop)
