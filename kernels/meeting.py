"""Where the ranks of a group meet on the device, to read what each of them has left for all."""

import ctypes
import time
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clo.kernels.arguments import Argument, Rule

MOST_BLOCKS = 128
"""Blocks that wait for those of other ranks. A GPU with fewer multiprocessors gets fewer, so that all of them
run at the same time."""

MOST_THREADS = 1024
"""Of a block: each rank has one that meets it."""

_PAUSE_SECONDS = 5e-5  # between two looks at the flags, in the reference


class Meeting(NamedTuple):
    """Memory that all ranks of a group read and write. Several of these may have the same flags, where all
    ranks use them in the same order, on one stream."""

    shares: Tensor
    """[ranks] int64, the address of what each rank leaves for the others."""
    flags: Tensor
    """[ranks] int64, the address of each rank's flags [blocks, ranks] int32: how often the block of each
    other one has come to meet; zero at first."""
    met: Tensor
    """[blocks] int32, how often those of this rank have; zero at first."""


MEETING = (
    Argument("meeting.shares", torch.int64, "ranks"),
    Argument("meeting.flags", torch.int64, "ranks"),
    Argument("meeting.met", torch.int32, "blocks"),
)
MEETING_RULES = (
    Rule("0 <= rank < ranks", "it is one of them"),
    Rule(f"ranks <= {MOST_THREADS}", "each has a thread that meets it", gpu=True),
    Rule("blocks >= 1", "somebody has to meet"),
    Rule(f"blocks <= {MOST_BLOCKS}", "blocks that wait for one another run at the same time", gpu=True),
)
"""A ``Meeting`` as arguments of operations, of which ``rank`` is a size."""


def meet(meeting: Meeting, rank: int, blocks: int) -> None:
    """What the first ``blocks`` blocks of a kernel do, on the CPU: wait until all ranks have come."""
    flag_bytes = 4 * len(meeting.flags) * blocks
    flags = [memory_at(address, flag_bytes).view(np.int32).reshape(blocks, -1) for address in meeting.flags]
    number = meeting.met[:blocks] + 1
    meeting.met[:blocks] = number
    for theirs in flags:
        theirs[:, rank] = number
    while (flags[rank] - number.numpy()[:, None] < 0).any():  # also where the numbers begin anew
        time.sleep(_PAUSE_SECONDS)


def memory_at(address: Tensor, size: int) -> NDArray[np.uint8]:
    """Bytes at an address of this process."""
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(int(address)))
