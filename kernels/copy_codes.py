"""Copy codes: those of whole blocks of one layer, from the pages of the index to the arena, and back.

A prompt that begins with blocks that are there already has their codes for an eighth of what their rows take
on the way (``clo.gpu_worker.prefill``). In the arena the codes of a block, for each KV head, are the
keys' codes, their scales, their centre, the values' codes and their scales, as in the pages, one behind the
other.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from clo.kernels.arguments import HEAD_DIM, Argument, Rule, Signature
from clo.kernels.blocks import PROMPT_BLOCKS, PromptBlocks
from clo.kernels.encode import CENTRES, CODES, PACKED, SCALES, CodePages
from clo.kernels.encode_values import VALUE_CODES, VALUE_SCALES, WHOLE_CHUNKS, WHOLE_RUNS, ValuePages
from clo.kernels.launch import launch
from clo.kernels.limits import CHUNK, CODES_PER_BYTE

_STORE_BLOCKS, _LOAD_BLOCKS, _THREADS, _READS = 12, 32, 512, 4  # as those of rows in store.py and load.py

_PARTS = (
    CODES, SCALES, CENTRES._replace(chunks=True), VALUE_CODES, VALUE_SCALES, *PROMPT_BLOCKS,
    Argument("arena", torch.uint8, "blocks kv_heads code_bytes", dense=1, chunks=True),
)  # fmt: skip
_RULES = (
    HEAD_DIM,
    PACKED,
    WHOLE_RUNS,
    WHOLE_CHUNKS,
    Rule(
        f"code_bytes >= block_tokens * (head_dim // {CODES_PER_BYTE} + 16 * -(-head_dim // {8 * CHUNK}) + 4)"
        " + 4 * head_dim",
        "a block's codes must fit",
    ),
    Rule("P >= 1", "a launch needs a part, if only one that is not in use"),
)
_STORE = Signature("store_codes", _PARTS, _RULES)
_LOAD = Signature("load_codes", _PARTS, _RULES)


def store_codes(pages: CodePages, values: ValuePages, prompt_blocks: PromptBlocks, arena: Tensor) -> None:
    """Write the codes of pages to the blocks that they belong to, in place.

    Args:
        pages, values: this layer of the index.
        prompt_blocks: which pages and blocks; of a part in use the whole page is written, also where the
            part does not fill it.
        arena: [blocks, kv_heads, code_bytes] uint8, the codes of this layer in the arena.
    """
    _STORE.check(*pages, *values, *prompt_blocks, arena)
    if not arena.is_cpu:
        _launch("store_codes", _STORE_BLOCKS, pages, values, prompt_blocks, arena)
        return
    used = prompt_blocks.counts > 0
    blocks, numbers = prompt_blocks.blocks[used], prompt_blocks.pages[used]
    for part, place in _places(pages, values):
        arena[blocks, :, place] = part[numbers].flatten(2).view(torch.uint8)


def load_codes(pages: CodePages, values: ValuePages, prompt_blocks: PromptBlocks, arena: Tensor) -> None:
    """Fill pages with the codes of the blocks that they belong to, in place; see ``store_codes``."""
    _LOAD.check(*pages, *values, *prompt_blocks, arena)
    if not arena.is_cpu:
        _launch("load_codes", _LOAD_BLOCKS, pages, values, prompt_blocks, arena)
        return
    used = prompt_blocks.counts > 0
    blocks, numbers = prompt_blocks.blocks[used], prompt_blocks.pages[used]
    for part, place in _places(pages, values):
        found = arena[blocks, :, place].contiguous()
        part[numbers] = found.view(part.dtype).view(len(numbers), *part.shape[1:])


def _places(pages: CodePages, values: ValuePages) -> Iterator[tuple[Tensor, slice]]:
    """The parts of a page, and the bytes of the arena in which each of them lies."""
    begin = 0
    for part in (*pages, *values):
        end = begin + part[0, 0].nbytes
        yield part, slice(begin, end)
        begin = end


def _launch(
    name: str, blocks: int, pages: CodePages, values: ValuePages, prompt_blocks: PromptBlocks, arena: Tensor
) -> None:
    counts = prompt_blocks.counts
    launch(
        "copy_codes.cu", name, (blocks,), _THREADS,
        [*pages, *values, arena.shape[1], counts, prompt_blocks.blocks, prompt_blocks.pages, len(counts),
         arena, arena.stride(0), arena.stride(1)],
        DIM=pages.centres.shape[2], BLOCK_TOKENS=pages.block_tokens, READS=_READS,
    )  # fmt: skip
