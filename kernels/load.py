"""Load: rows of one layer that are in the arena already come back for a prompt that begins with them, those
of whole blocks or some of each KV head."""

import torch
from torch import Tensor

from clo.kernels.arguments import ELEMENT, HEAD_DIM, Argument, Rule, Signature
from clo.kernels.blocks import ARENA, gather_tokens
from clo.kernels.launch import launch

_BLOCKS, _THREADS, _READS = 32, 512, 4  # reads of a thread that are on their way

_LOAD_BLOCKS = Signature(
    "load_blocks",
    (
        Argument("rows", ELEMENT, "N kv_heads 2 head_dim", chunks=True),
        Argument("blocks", torch.int64, "P"),
        ARENA,
    ),
    (
        HEAD_DIM,
        Rule("N == P * block_tokens", "the blocks are whole"),
        Rule(f"N * head_dim <= {2**30}", "a thread counts chunks of rows in 32 bits", gpu=True),
    ),
)

_LOAD_ROWS = Signature(
    "load_rows",
    (
        Argument("rows", ELEMENT, "N kv_heads 2 head_dim", chunks=True),
        Argument("positions", torch.int32, "kv_heads R"),
        Argument("blocks", torch.int64, "P"),
        ARENA,
    ),
    (
        HEAD_DIM,
        Rule("N <= P * block_tokens", "the blocks must hold the rows"),
        Rule(f"R * kv_heads * head_dim <= {2**30}", "a thread counts chunks of rows in 32 bits", gpu=True),
    ),
)


def load_blocks(rows: Tensor, blocks: Tensor, arena: Tensor) -> None:
    """Read whole blocks.

    Args:
        rows: [N, kv_heads, 2, head_dim], contiguous, to be filled.
        blocks: [N / block_tokens] int64, block ids, in the order of the tokens; from the first one below 0 on
            nothing is read, and the rows are undefined.
        arena: [blocks, kv_heads, block_tokens, 2, head_dim], this layer of the arena.
    """
    _LOAD_BLOCKS.check(rows, blocks, arena)
    if rows.is_cpu:
        read = int((blocks >= 0).cumprod(0).sum())
        found = gather_tokens(arena, blocks[:read].unsqueeze(0))[0].transpose(0, 1)
        rows[: len(found)] = found
        return
    launch(
        "load.cu", "load_blocks", (_BLOCKS,), _THREADS,
        [rows, rows.shape[1], blocks, len(blocks), arena, arena.stride(0) * arena.itemsize,
         arena.stride(1) * arena.itemsize],
        BLOCK_TOKENS=arena.shape[2], CHUNKS=arena[0, 0, 0].nbytes // 16, READS=_READS,
    )  # fmt: skip


def load_rows(rows: Tensor, positions: Tensor, blocks: Tensor, arena: Tensor) -> None:
    """Read some rows of each KV head, in place.

    Args:
        rows: [N, kv_heads, 2, head_dim], contiguous, of which those at ``positions`` are replaced.
        positions: [kv_heads, R] int32, below N; one below 0 is none. A row that is there twice is read twice.
        blocks: [P] int64, block ids, in the order of the tokens.
        arena: [blocks, kv_heads, block_tokens, 2, head_dim], this layer of the arena.
    """
    _LOAD_ROWS.check(rows, positions, blocks, arena)
    if rows.is_cpu:
        heads, entries = (positions >= 0).nonzero(as_tuple=True)
        wanted = positions[heads, entries].long()
        rows[wanted, heads] = arena[blocks[wanted // arena.shape[2]], heads, wanted % arena.shape[2]]
        return
    launch(
        "load.cu", "load_rows", (_BLOCKS,), _THREADS,
        [rows, rows.shape[1], positions, positions.shape[1], blocks, arena, arena.stride(0) * arena.itemsize,
         arena.stride(1) * arena.itemsize],
        BLOCK_TOKENS=arena.shape[2], CHUNKS=arena[0, 0, 0].nbytes // 16, READS=_READS,
    )  # fmt: skip
