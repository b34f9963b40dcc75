"""Append: the new token's row goes to the recent ring."""

import torch
from torch import Tensor

from clo.kernels.launch import launch
from clo.kernels.resident import ResidentSet


def append(kv: Tensor, lengths: Tensor, resident: ResidentSet) -> None:
    """Write one new row per sequence and KV head, in place.

    The token that the new one displaces from the ring moves into the set while the set still has room for the
    whole context (into row ``position - sinks``); later it is left to the selection, since its row is in the
    arena.

    Args:
        kv: [B, kv_heads, 2, head_dim], the new rows; those of a sequence contiguous.
        lengths: [B] int64, tokens of each sequence with the new one; 0 for a slot not in use.
        resident: of the B sequences.
    """
    rows, positions, last_used, sinks, recent = resident
    if kv.is_cuda:
        chunks = kv[0, 0].nbytes // 16
        launch(
            "append.cu", "append", (kv.shape[1], len(kv)), chunks,
            [kv, kv.stride(0) * kv.itemsize // 16, lengths, rows, positions, last_used, sinks, recent,
             resident.capacity],
        )  # fmt: skip
        return
    active = (lengths > 0).nonzero().squeeze(1)
    at = lengths[active] - 1  # position of the new token
    ring = torch.where(at < sinks, at, sinks + torch.remainder(at - sinks, recent))
    oldest = at - recent  # position that the ring holds in this place
    home = oldest - sinks
    moves = (home >= 0) & (home < resident.capacity)
    sequences, home = active[moves], home[moves]
    rows[sequences, :, resident.first + home] = rows[sequences, :, ring[moves]]
    positions[sequences, :, home] = oldest[moves].unsqueeze(1).int()
    last_used[sequences, :, home] = at[moves].unsqueeze(1).int()
    rows[active, :, ring] = kv[active]
