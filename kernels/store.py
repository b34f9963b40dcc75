"""Store: rows of one layer go to the arena."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from clo.kernels.arguments import ELEMENT, HEAD_DIM, Argument, Rule, Signature
from clo.kernels.blocks import ARENA, BLOCK_TABLE, PROMPT_BLOCKS, PromptBlocks
from clo.kernels.launch import launch
from clo.kernels.limits import REGISTERED_BYTES
from clo.kernels.resident import NEW_ROWS

_BLOCKS, _THREADS = 12, 512  # few fill PCIe, and leave the multiprocessors to the next layer

_STORE_PROMPT = Signature(
    "store_prompt",
    (Argument("rows", ELEMENT, "T kv_heads 2 head_dim", chunks=True), ARENA),
    (HEAD_DIM, Rule("1 <= T <= given * block_tokens", "the blocks must hold the prompt")),
)
_STORE_PROMPTS = Signature(
    "store_prompts",
    (Argument("rows", ELEMENT, "N kv_heads 2 head_dim", chunks=True), *PROMPT_BLOCKS, ARENA),
    (HEAD_DIM,),
)
_STORE_NEW = Signature(
    "store_new",
    (
        NEW_ROWS,
        Argument("lengths", torch.int64, "B"),
        BLOCK_TABLE, ARENA,
    ),
    (HEAD_DIM,),
)  # fmt: skip


def store_prompt(rows: Tensor, blocks: Sequence[int], arena: Tensor) -> None:
    """Write the rows of one whole prompt, in place, through the copy engine of a GPU.

    It leaves the multiprocessors to the next layer, whose matrix products wait for the slowest of them.

    Args:
        rows: [T, kv_heads, 2, head_dim], contiguous.
        blocks: the sequence's blocks, enough for T tokens.
        arena: [blocks, kv_heads, block_tokens, 2, head_dim], this layer of the arena.

    Raises:
        ValueError: there are too few blocks, or an argument is not what it should be.
    """
    _STORE_PROMPT.check(rows, arena, given=len(blocks))
    total, block_tokens = len(rows), arena.shape[2]
    if rows.is_cpu:
        for start, block in zip(range(0, total, block_tokens), blocks, strict=False):
            part = rows[start : start + block_tokens]
            arena[block, :, : len(part)] = part.transpose(0, 1)
        return
    from cupy.cuda import runtime

    by_head = rows.transpose(0, 1).contiguous()
    row_bytes, stream = rows[0, 0].nbytes, torch.cuda.current_stream().cuda_stream
    base, source = arena.untyped_storage().data_ptr(), by_head.data_ptr()
    in_order = arena.stride(0) == arena[0, 0].numel()  # a head's part of the next block follows
    for first, count in _runs(blocks[: -(-total // block_tokens)], together=in_order):
        start = first * block_tokens
        size = min(count * block_tokens, total - start) * row_bytes
        target = arena[blocks[first]].data_ptr() - base
        for head in range(len(by_head)):
            begin = target + head * arena.stride(1) * arena.itemsize
            rest = source + (head * total + start) * row_bytes - begin
            for piece, end in _registered(begin, begin + size):
                runtime.memcpyAsync(base + piece, rest + piece, end - piece, runtime.memcpyDefault, stream)


def _registered(begin: int, end: int) -> Iterator[tuple[int, int]]:
    """A range of bytes of the arena in pieces that CUDA copies: each is within one registered range."""
    while begin < end:
        piece = min(end, (begin // REGISTERED_BYTES + 1) * REGISTERED_BYTES)
        yield begin, piece
        begin = piece


def _runs(blocks: Sequence[int], *, together: bool) -> Iterator[tuple[int, int]]:
    """Blocks to copy together, those that follow one another if ``together``: number of the first one in the
    list, and how many."""
    first = 0
    for number in range(1, len(blocks) + 1):
        if not together or number == len(blocks) or blocks[number] != blocks[number - 1] + 1:
            yield first, number - first
            first = number


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
