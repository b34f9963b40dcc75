"""Store: rows of one layer go to the arena."""

import torch
from torch import Tensor

from clo.kernels.arguments import ELEMENT, HEAD_DIM, Argument, Rule, Signature
from clo.kernels.blocks import ARENA, BLOCK_TABLE, PROMPT_BLOCKS, PromptBlocks
from clo.kernels.launch import launch

_BLOCKS, _THREADS = 12, 512  # few fill PCIe, and leave the multiprocessors to the next layer

_STORE = Signature(
    "store",
    (
        Argument("rows", ELEMENT, "T kv_heads 2 head_dim", chunks=True),
        Argument("block_table", torch.int64, "max_blocks"),
        ARENA,
    ),
    (HEAD_DIM, Rule("1 <= T <= max_blocks * block_tokens", "the blocks must hold the prompt")),
)
_STORE_PROMPTS = Signature(
    "store_prompts",
    (Argument("rows", ELEMENT, "N kv_heads 2 head_dim", chunks=True), *PROMPT_BLOCKS, ARENA),
    (HEAD_DIM,),
)
_STORE_NEW = Signature(
    "store_new",
    (
        Argument("kv", ELEMENT, "B kv_heads 2 head_dim", dense=3, chunks=True),
        Argument("lengths", torch.int64, "B"),
        BLOCK_TABLE, ARENA,
    ),
    (HEAD_DIM,),
)  # fmt: skip


def store(rows: Tensor, block_table: Tensor, arena: Tensor) -> None:
    """Write the rows of a whole prompt, in place.

    Args:
        rows: [T, kv_heads, 2, head_dim], contiguous.
        block_table: [max_blocks] int64, the sequence's blocks.
        arena: [blocks, kv_heads, block_tokens, 2, head_dim], this layer of the arena.
    """
    _STORE.check(rows, block_table, arena)
    total, kv_heads = rows.shape[:2]
    block_tokens = arena.shape[2]
    if not rows.is_cpu:
        launch(
            "store.cu", "store", (_BLOCKS,), _THREADS,
            [rows, total, kv_heads, rows[0, 0].nbytes // 16, block_table, arena,
             arena.stride(0) * arena.itemsize, arena.stride(1) * arena.itemsize], BLOCK_TOKENS=block_tokens,
        )  # fmt: skip
        return
    for start in range(0, total, block_tokens):
        part = rows[start : start + block_tokens]
        arena[block_table[start // block_tokens], :, : len(part)] = part.transpose(0, 1)


def store_prompts(rows: Tensor, prompt_blocks: PromptBlocks, arena: Tensor) -> None:
    """Write the rows of a batch of whole prompts, in place.

    Args:
        rows: [N, kv_heads, 2, head_dim], contiguous; rows of tokens that are in no part are not read.
        prompt_blocks: which tokens go to which block of the arena.
        arena: [blocks, kv_heads, block_tokens, 2, head_dim], this layer of the arena.
    """
    _STORE_PROMPTS.check(rows, *prompt_blocks, arena)
    starts, counts, blocks, _ = prompt_blocks
    if not rows.is_cpu:
        launch(
            "store.cu", "store_prompts", (_BLOCKS,), _THREADS,
            [rows, rows.shape[1], rows.shape[2] * rows.shape[3] * rows.itemsize // 16, starts, counts, blocks,
             len(starts), arena, arena.stride(0) * arena.itemsize, arena.stride(1) * arena.itemsize],
            BLOCK_TOKENS=arena.shape[2],
        )  # fmt: skip
        return
    for start, count, block in zip(starts.tolist(), counts.tolist(), blocks.tolist(), strict=True):
        if count > 0:
            arena[block, :, :count] = rows[start : start + count].transpose(0, 1)


def store_new(kv: Tensor, lengths: Tensor, block_table: Tensor, arena: Tensor) -> None:
    """Write the newest row of each sequence and KV head, in place.

    Args:
        kv: [B, kv_heads, 2, head_dim]; the rows of a sequence contiguous.
        lengths: [B] int64, tokens of each sequence with the new one; 0 for a slot not in use.
        block_table: [B, max_blocks] int64.
        arena: [blocks, kv_heads, block_tokens, 2, head_dim], this layer of the arena.
    """
    _STORE_NEW.check(kv, lengths, block_table, arena)
    if not kv.is_cpu:
        launch(
            "store.cu", "store_new", (kv.shape[1], len(kv)), kv[0, 0].nbytes // 16,
            [kv, kv.stride(0) * kv.itemsize // 16, lengths, block_table, block_table.stride(0), arena,
             arena.stride(0) * arena.itemsize, arena.stride(1) * arena.itemsize],
            BLOCK_TOKENS=arena.shape[2],
        )  # fmt: skip
        return
    for sequence, length in enumerate(lengths.tolist()):
        if length > 0:
            block, offset = divmod(length - 1, arena.shape[2])
            arena[int(block_table[sequence, block]), :, offset] = kv[sequence]
