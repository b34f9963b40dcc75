"""Load: rows of one layer that are in the arena already come back for a prompt that begins with them."""

import torch
from torch import Tensor

from clo.kernels.arguments import ELEMENT, HEAD_DIM, Argument, Rule, Signature
from clo.kernels.blocks import ARENA, gather_tokens
from clo.kernels.launch import launch

_BLOCKS, _THREADS = 32, 512  # with four reads of each thread on their way they fill PCIe

_LOAD_BLOCKS = Signature(
    "load_blocks",
    (
        Argument("rows", ELEMENT, "N kv_heads 2 head_dim", chunks=True),
        Argument("blocks", torch.int64, "P"),
        ARENA,
    ),
    (HEAD_DIM, Rule("N == P * block_tokens", "the blocks are whole")),
)


def load_blocks(rows: Tensor, blocks: Tensor, arena: Tensor) -> None:
    """Read whole blocks.

    Args:
        rows: [N, kv_heads, 2, head_dim], contiguous, to be filled.
        blocks: [N / block_tokens] int64, block ids, in the order of the tokens.
        arena: [blocks, kv_heads, block_tokens, 2, head_dim], this layer of the arena.
    """
    _LOAD_BLOCKS.check(rows, blocks, arena)
    if rows.is_cpu:
        rows.copy_(gather_tokens(arena, blocks.unsqueeze(0))[0].transpose(0, 1))
        return
    launch(
        "load.cu", "load_blocks", (_BLOCKS,), _THREADS,
        [rows, rows.shape[1], rows[0, 0].nbytes // 16, blocks, len(blocks), arena,
         arena.stride(0) * arena.itemsize, arena.stride(1) * arena.itemsize],
        BLOCK_TOKENS=arena.shape[2],
    )  # fmt: skip
