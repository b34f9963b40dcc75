"""Blocks of the arena: reading them through a table of block ids, and how a batch of prompts fills them."""

from typing import NamedTuple

import torch
from torch import Tensor

from clo.kernels.arguments import ELEMENT, Argument

ARENA = Argument("arena", ELEMENT, "blocks kv_heads block_tokens 2 head_dim", dense=3, chunks=True)
"""One layer of the arena."""

BLOCK_TABLE = Argument("block_table", torch.int64, "B max_blocks", dense=1)


class PromptBlocks(NamedTuple):
    """Which tokens of a flat batch of prompts fill which block: P parts of up to ``block_tokens`` tokens.

    The tokens of a part follow each other, and go to the first places of its block and page.
    """

    starts: Tensor  # [P] int64, first token in the batch
    counts: Tensor  # [P] int64, tokens; 0 for a part not in use, of which nothing else is read
    blocks: Tensor  # [P] int64, block of the arena
    pages: Tensor  # [P] int64, page of the index


PROMPT_BLOCKS = tuple(Argument(f"prompt_blocks.{field}", torch.int64, "P") for field in PromptBlocks._fields)
"""``PromptBlocks`` as arguments of operations."""


def gather_tokens(pool: Tensor, block_table: Tensor) -> Tensor:
    """All tokens of each sequence, in order.

    Args:
        pool: [blocks, kv_heads, block_tokens, ...], one layer of the arena, or pages of an index.
        block_table: [B, max_blocks] int64, block ids; entries past a sequence's end may be any valid id.

    Returns:
        [B, kv_heads, max_blocks * block_tokens, ...]; tokens past a sequence's end are undefined.
    """
    blocks: Tensor = pool.index_select(0, block_table.flatten())
    return blocks.view(*block_table.shape, *pool.shape[1:]).transpose(1, 2).flatten(2, 3)
