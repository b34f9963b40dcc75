"""Store: a layer of a prompt, into the arena."""

from torch import Tensor

from kernels.cuda import launch

_BLOCKS, _THREADS = 32, 512


def store(rows: Tensor, table: Tensor, arena: Tensor) -> None:
    """Write the rows of a whole prompt, in place.

    Args:
        rows: [T, kv_heads, 2, head_dim], contiguous.
        table: [max_blocks] int64, the sequence's blocks.
        arena: [blocks, kv_heads, block_tokens, 2, head_dim], this layer of the arena.
    """
    total, kv_heads = rows.shape[:2]
    block_tokens = arena.shape[2]
    if rows.is_cuda:
        launch(
            "store.cu", "store", (_BLOCKS,), _THREADS,
            [rows, total, kv_heads, rows[0, 0].nbytes // 16, table, arena, arena.stride(0) * arena.itemsize,
             arena.stride(1) * arena.itemsize], BLOCK_TOKENS=block_tokens,
        )  # fmt: skip
        return
    for start in range(0, total, block_tokens):
        part = rows[start : start + block_tokens]
        arena[table[start // block_tokens], :, : len(part)] = part.transpose(0, 1)
