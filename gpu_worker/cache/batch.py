"""What every layer of one decode step shares."""

from typing import NamedTuple

from torch import Tensor


class Batch(NamedTuple):
    """Slots 0 .. B-1 of a decode step."""

    lengths: Tensor  # [B] int64, with the new token; 0 for a slot not in use
    blocks: Tensor  # [B, max_blocks] int64, block table: blocks of the arena
    pages: Tensor  # [B, max_blocks] int64, page table: pages of the index that belong to these blocks
