"""Whole prompts on their way into the cache."""

from typing import NamedTuple

import torch
from torch import Tensor

from clo.kernels.blocks import PromptBlocks
from clo.kernels.fill_resident import PromptSequences
from clo.kernels.store import store_prompt, store_prompts


class Prompts(NamedTuple):
    """A flat batch of prompts: which of its tokens go where."""

    sequences: PromptSequences
    blocks: PromptBlocks
    listed: list[int] | None  # the blocks of a single prompt, for the host

    def store(self, rows: Tensor, arena: Tensor) -> None:
        """Write one layer's rows [N, kv_heads, 2, head_dim] to its part of the arena."""
        if self.listed is None:
            store_prompts(rows, self.blocks, arena)
        else:
            store_prompt(rows, self.listed, arena)

    def part(self, first: int, last: int) -> "Prompts":
        """Blocks ``first`` to ``last`` - 1 of a single prompt, for rows of which the first one is theirs."""
        assert self.listed is not None, "there are several prompts"
        starts, *others = self.blocks
        blocks = PromptBlocks(starts[: last - first], *(part[first:last] for part in others))
        return self._replace(blocks=blocks, listed=self.listed[first:last])


class ExactRows(NamedTuple):
    """Which rows of a prompt are as they were computed, where the others come from codes."""

    positions: Tensor  # [kv_heads, R] int32, of the first ``cached`` tokens, in any order
    cached: int  # all rows from this position on are exact


class LastTokens(NamedTuple):
    """What a layer's attention knows of the last W tokens of a prompt."""

    queries: Tensor  # [W, query_heads, head_dim]
    lse: Tensor  # [W, query_heads] float32, log-sum-exp of their scores


def one_prompt(
    slot: int, total: int, blocks: list[int], block_table: Tensor, page_table: Tensor, block_tokens: int
) -> Prompts:
    """A batch of one prompt.

    Args:
        slot: the sequence's slot.
        total: tokens of the prompt.
        blocks: those of the sequence.
        block_table, page_table: [max_blocks] int64, those of the sequence, on the device.
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
        blocks[:count],
    )
