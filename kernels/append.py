"""Append: the new token's row goes to the recent ring."""

import torch
from torch import Tensor

from clo.kernels.arguments import HEAD_DIM, Argument, Signature
from clo.kernels.launch import launch
from clo.kernels.resident import FIRST, LAST_USED, NEW_ROWS, POSITIONS, ROWS, ResidentSet

_SIGNATURE = Signature(
    "append",
    (
        NEW_ROWS,
        Argument("lengths", torch.int64, "B"),
        ROWS, POSITIONS, LAST_USED,
    ),
    (HEAD_DIM, FIRST),
)  # fmt: skip


def append(kv: Tensor, lengths: Tensor, resident: ResidentSet) -> None:
    """Write one new row per sequence and KV head, in place.

    The token that the new one displaces from the ring moves into the set while the set still has room for the
    whole context (into row ``position - sinks``), so that rows 0 to length - 1 are those in use; later it is
    left to the selection, since its row is in the arena. To append a row a second time changes nothing.

    Args:
        kv: [B, kv_heads, 2, head_dim], the new rows; those of a sequence contiguous.
        lengths: [B] int64, tokens of each sequence with the new one; 0 for a slot not in use.
        resident: of the B sequences.
    """
    rows, positions, last_used, sinks, recent = resident
    _SIGNATURE.check(kv, lengths, rows, positions, last_used, sinks=sinks, recent=recent)
    if not kv.is_cpu:
        chunks = kv[0, 0].nbytes // 16
        launch(
            "append.cu", "append", (kv.shape[1], len(kv)), chunks,
            [kv, kv.stride(0) * kv.itemsize // 16, lengths, rows, positions, last_used, sinks, recent,
             resident.capacity],
        )  # fmt: skip
        return
    for sequence, length in enumerate(lengths.tolist()):
        if length == 0:
            continue
        at = length - 1  # position of the new token
        ring = at if at < sinks else sinks + (at - sinks) % recent
        oldest = at - recent  # position that the ring holds in this place
        home = oldest - sinks
        if 0 <= home < resident.capacity:
            heads = positions[sequence, :, home] != oldest  # where it has moved, this step is repeated
            rows[sequence, heads, resident.first + home] = rows[sequence, heads, ring]
            positions[sequence, :, home] = oldest
            last_used[sequence, heads, home] = at
        rows[sequence, :, ring] = kv[sequence]
