"""Add shares: hidden states plus what all ranks of a group have computed, and the RMSNorm of that."""

import ctypes
import time
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clo.kernels.arguments import ELEMENT, Argument, Rule, Signature
from clo.kernels.launch import ELEMENTS, launch

MOST_BLOCKS = 128
"""Blocks that wait for those of other ranks: few enough that a GPU runs them all at the same time."""

_PAUSE_SECONDS = 5e-5  # between two looks at the flags, in the reference
_CHUNK_BYTES, _THREADS = 16, 1024


class Meeting(NamedTuple):
    """Memory that all ranks of a group read and write, for one of the sums that take turns."""

    shares: Tensor
    """[ranks] int64, the address of each rank's share [B, hidden] of the sum."""
    flags: Tensor
    """[ranks] int64, the address of each rank's flags [blocks, ranks] int32: how many sums the block of each
    other one has begun; zero at first."""
    sums: Tensor
    """[blocks] int32, how many those of this rank have begun; zero at first."""


_SIGNATURE = Signature(
    "add_shares",
    (
        Argument("hidden", ELEMENT, "B hidden", chunks=True),
        Argument("weight", ELEMENT, "hidden", chunks=True),
        Argument("meeting.shares", torch.int64, "ranks"),
        Argument("meeting.flags", torch.int64, "ranks"),
        Argument("meeting.sums", torch.int32, "blocks"),
    ),
    (
        Rule("hidden % 8 == 0", "it moves 16 bytes at a time", gpu=True),
        Rule("0 <= rank < ranks", "it is one of them"),
        Rule(f"ranks <= {_THREADS}", "each has a thread that meets it", gpu=True),
        Rule("blocks >= 1", "somebody has to add up"),
        Rule(f"blocks <= {MOST_BLOCKS}", "blocks that wait for one another run at the same time", gpu=True),
    ),
)  # fmt: skip


def add_shares(
    hidden: Tensor, weight: Tensor, meeting: Meeting, rank: int, eps: float, *, in_place: bool = False
) -> tuple[Tensor, Tensor]:
    """Wait until all ranks have left their shares, and add these up.

    Nothing but the beginning of a sum is waited for, and a rank may overwrite its share once all have begun
    the next sum. So sums that follow one another need two places for shares, which take turns; they can have
    the same flags.

    Args:
        hidden: [B, hidden], in bfloat16, float16 or float32; the same at all ranks.
        weight: [hidden], of the norm.
        meeting: where the shares are, which are of the type of ``hidden``; this rank's has been written on
            this stream.
        rank: this one.
        eps: of the norm.
        in_place: whether ``hidden`` becomes the sum.

    Returns:
        ``hidden`` plus all shares, [B, hidden], and its RMSNorm. They are the same at all ranks.
    """
    _SIGNATURE.check(hidden, weight, *meeting, rank=rank)
    ranks = len(meeting.shares)
    blocks = min(len(hidden), len(meeting.sums))
    if not hidden.is_cpu:
        total, normed = hidden if in_place else torch.empty_like(hidden), torch.empty_like(hidden)
        chunks = hidden.shape[1] * hidden.itemsize // _CHUNK_BYTES
        threads = min(_THREADS, -(-max(chunks, ranks) // 32) * 32)  # each rank has one that meets it
        launch(
            "add_shares.cu", "add_shares", (blocks,), threads,
            [hidden, weight, total, normed, len(hidden), chunks, *meeting, rank, eps],
            ELEMENT=ELEMENTS[hidden.dtype], RANKS=ranks, CHUNKS=-(-chunks // threads),
        )  # fmt: skip
        return total, normed
    flag_bytes = 4 * ranks * blocks
    flags = [_memory(address, flag_bytes).view(np.int32).reshape(blocks, ranks) for address in meeting.flags]
    number = meeting.sums[:blocks] + 1
    meeting.sums[:blocks] = number
    for theirs in flags:
        theirs[:, rank] = number
    while (flags[rank] < number.numpy()[:, None]).any():
        time.sleep(_PAUSE_SECONDS)
    shares = [
        torch.from_numpy(_memory(address, hidden.nbytes)).view(hidden.dtype).view_as(hidden).float()
        for address in meeting.shares
    ]
    total = (hidden.float() + torch.stack(shares).sum(0)).to(hidden.dtype)
    if in_place:
        total = hidden.copy_(total)
    return total, torch.nn.functional.rms_norm(total, total.shape[1:], weight, eps)


def _memory(address: Tensor, size: int) -> NDArray[np.uint8]:
    """Bytes at an address of this process."""
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(int(address)))
