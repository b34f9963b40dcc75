"""Ranks that add up their shares within one process: each with memory of its own, which all of them know."""

from itertools import cycle
from typing import NamedTuple

import torch
from torch import Tensor

from clo.kernels.add_shares import add_shares
from clo.kernels.meeting import MOST_BLOCKS, Meeting
from clo.kernels.take_shares import take_shares

EPS = 1e-5
_MET = 2**31 - 5  # that often ranks have met before, so that the numbers of meetings wrap round


class Place(NamedTuple):
    """A rank's memory for its shares, and where all ranks' is, for one of two sums that take turns."""

    share: Tensor
    meeting: Meeting


def places(
    ranks: int, rows: int, width: int, dtype: torch.dtype, device: str, blocks: int = MOST_BLOCKS
) -> list[list[Place]]:
    """Both places of each rank; ``blocks`` at most share the rows of a sum, on a GPU so many that those of
    all ranks run at the same time."""
    if device == "cuda":
        blocks = min(blocks, torch.cuda.get_device_properties(0).multi_processor_count // ranks)

    def addresses(tensors: list[Tensor]) -> Tensor:
        return torch.tensor([tensor.data_ptr() for tensor in tensors], device=device)

    shares = [
        [torch.full((rows, width), float("nan"), dtype=dtype, device=device) for _ in range(ranks)]
        for _ in range(2)
    ]
    flags = [torch.full((blocks, ranks), _MET, dtype=torch.int32, device=device) for _ in range(ranks)]
    sums = [torch.full((blocks,), _MET, dtype=torch.int32, device=device) for _ in range(ranks)]
    known = addresses(flags), *map(addresses, shares)
    _kept.append((shares, flags))
    return [
        [Place(shares[turn][rank], Meeting(known[1 + turn], known[0], sums[rank])) for turn in range(2)]
        for rank in range(ranks)
    ]


_kept: list[object] = []  # of whose memory only addresses are known


def add_up(rank: int, mine: list[Place], hidden: Tensor, weight: Tensor, given: list[Tensor]) -> list[Tensor]:
    """Several sums one behind the other, each of which begins with the total of the one before, of which
    every second one has fewer rows, and takes the place of what it begins with; the norms of all.

    Args:
        given: this rank's share of each.
    """
    found = []
    for place, share in zip(cycle(mine), given, strict=False):
        rows = len(share)
        place.share[:rows].copy_(share)
        fewer = rows < len(hidden)
        total, normed = add_shares(hidden[:rows], weight, place.meeting, rank, EPS, in_place=fewer)
        if not fewer:
            hidden.copy_(total)
        found.append(normed)
    return found


def take_all(rank: int, place: Place, share: Tensor, ranks: int) -> Tensor:
    """What the first ``ranks`` ranks leave, where this one leaves ``share``: [ranks, *share.shape]."""
    count = share.numel()
    place.share.view(-1)[:count].view(share.shape).copy_(share)
    taken = share.new_empty(ranks, *share.shape)
    take_shares(taken.flatten(1).view(torch.int64), place.meeting, rank)
    return taken


def expected(hidden: Tensor, weight: Tensor, given: list[list[Tensor]]) -> list[Tensor]:
    """The same, given the shares of all ranks; the norms in float32."""
    dtype, hidden, found = hidden.dtype, hidden.float().clone(), []
    for shares in zip(*given, strict=True):
        rows = len(shares[0])
        total = hidden[:rows] + sum(share.float() for share in shares)
        hidden[:rows] = total.to(dtype).float()  # as what follows begins with
        norm = torch.nn.functional.rms_norm(hidden[:rows], hidden.shape[1:], weight.float(), EPS)
        found.append(norm)
    return found
