"""Delta fetch: chosen rows that are not resident replace the rows selected longest ago."""

import torch
from torch import Tensor

from kernels.paging import locate


def fetch(
    chosen: Tensor,
    lengths: Tensor,
    table: Tensor,
    arena: Tensor,
    resident: Tensor,
    members: Tensor,
    stamps: Tensor,
    first: int,
) -> tuple[Tensor, Tensor]:
    """Make the chosen rows resident, in place, moving only those that are not.

    Args:
        chosen: [B, kv_heads, k] int64 positions, distinct and ascending within a head, -1 for none; k <= C.
        lengths: [B] int64, the stamp of this step; 0 for a slot not in use, whose members may be anything.
        table: [B, max_blocks] int64.
        arena: [blocks, kv_heads, block_tokens, 2, head_dim], this layer of the arena.
        resident: [B, kv_heads, first + C, 2, head_dim]; the set starts at row ``first``.
        members, stamps: [B, kv_heads, C] int64.

    Returns:
        (selected, moved): [B, kv_heads] int64 counts of chosen rows and of rows read from the arena.
    """
    span = table.shape[1] * arena.shape[2]
    valid = chosen >= 0
    stamp = lengths[:, None, None]

    # slot_of[position]: where in the set a position is resident; the last column takes the empty entries
    slot_of = chosen.new_full((*members.shape[:2], span + 1), -1)
    slots = torch.arange(members.shape[2], device=members.device).expand_as(members)
    slot_of.scatter_(2, members.where((members >= 0) & (stamp > 0), span), slots)
    slot_of[..., span] = -1
    held = slot_of.gather(2, chosen.where(valid, span))
    stamps.scatter_reduce_(2, held.clamp_min(0), stamp.where(held >= 0, -1), "amax")

    missing = valid & (held < 0)
    age = stamps * members.shape[2] + slots  # of equally old rows the one in the lowest slot goes first
    victims = age.topk(chosen.shape[2], dim=2, largest=False).indices
    rank = missing.cumsum(2).sub_(1)  # the n-th missing row takes the n-th oldest slot
    batch, head, entry = missing.nonzero(as_tuple=True)
    slot = victims[batch, head, rank[batch, head, entry]]
    position = chosen[batch, head, entry]
    block, offset = locate(position.unsqueeze(1), table[batch], arena.shape[2])
    resident[batch, head, first + slot] = arena[block.squeeze(1), head, offset.squeeze(1)]
    members[batch, head, slot] = position
    stamps[batch, head, slot] = lengths[batch]
    return valid.sum(2), missing.sum(2)
