"""Append: the new token's row goes to the recent ring."""

import torch
from torch import Tensor

from kernels.cuda import launch


def append(
    kv: Tensor,
    lengths: Tensor,
    resident: Tensor,
    members: Tensor,
    stamps: Tensor,
    sinks: int,
    recent: int,
) -> None:
    """Write one new row per sequence and KV head, in place.

    The resident buffer is ``[sinks | recent ring | set]``. The token that the new one displaces from the ring
    moves into the set while the set still has room for the whole context (slot = position - sinks); later it
    is left to the selection, its row being in the arena since it was new.

    Args:
        kv: [B, kv_heads, 2, head_dim], the new rows; those of a sequence contiguous.
        lengths: [B] int64, tokens of each sequence with the new one; 0 for a slot not in use.
        resident: [B, kv_heads, sinks + recent + C, 2, head_dim].
        members: [B, kv_heads, C] int32, the position that each row of the set holds, -1 where empty.
        stamps: [B, kv_heads, C] int32, length of the sequence when the row was last selected.
    """
    if kv.is_cuda:
        chunks = kv[0, 0].nbytes // 16
        launch(
            "append.cu", "append", (kv.shape[1], len(kv)), chunks,
            [kv, kv.stride(0) * kv.itemsize // 16, lengths, resident, members, stamps, sinks, recent,
             members.shape[2]],
        )  # fmt: skip
        return
    active = (lengths > 0).nonzero().squeeze(1)
    at = lengths[active] - 1  # position of the new token
    ring = torch.where(at < sinks, at, sinks + torch.remainder(at - sinks, recent))
    oldest = at - recent  # position that the ring holds in this place
    home = oldest - sinks
    moves = (home >= 0) & (home < members.shape[2])
    rows, home = active[moves], home[moves]
    resident[rows, :, sinks + recent + home] = resident[rows, :, ring[moves]]
    members[rows, :, home] = oldest[moves].unsqueeze(1).int()
    stamps[rows, :, home] = at[moves].unsqueeze(1).int()
    resident[active, :, ring] = kv[active]
