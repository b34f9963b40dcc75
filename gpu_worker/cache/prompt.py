"""Whole prompts on their way into the cache."""

from typing import NamedTuple

import torch
from torch import Tensor

from clo.kernels.blocks import PromptBlocks
from clo.kernels.fill_resident import PromptSequences


class Prompts(NamedTuple):
    """A flat batch of prompts: which of its tokens go where."""

    sequences: PromptSequences
    blocks: PromptBlocks


def one_prompt(slot: int, total: int, block_table: Tensor, page_table: Tensor, block_tokens: int) -> Prompts:
    """A batch of one prompt.

    Args:
        slot: the sequence's slot.
        total: tokens of the prompt.
        block_table, page_table: [max_blocks] int64, those of the sequence.
        block_tokens: tokens of a block.
    """
    count, device = -(-total // block_tokens), block_table.device
    starts = torch.arange(0, total, block_tokens, device=device)
    # full: a number that is copied from the host would wait for the device
    sequences = (torch.full((1,), value, dtype=torch.int64, device=device) for value in (0, total, slot))
    return Prompts(
        PromptSequences(*sequences),
        PromptBlocks(
            starts, (total - starts).clamp_max_(block_tokens), block_table[:count], page_table[:count]
        ),
    )
