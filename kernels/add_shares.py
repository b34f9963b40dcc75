"""Add shares: hidden states plus what all ranks of a group have computed, and the RMSNorm of that."""

import torch
from torch import Tensor

from clo.kernels.arguments import ELEMENT, Argument, Rule, Signature
from clo.kernels.launch import ELEMENTS, launch
from clo.kernels.meeting import MEETING, MEETING_RULES, MOST_THREADS, Meeting, meet, memory_at

_CHUNK_BYTES = 16

_SIGNATURE = Signature(
    "add_shares",
    (
        Argument("hidden", ELEMENT, "B hidden", chunks=True),
        Argument("weight", ELEMENT, "hidden", chunks=True),
        *MEETING,
    ),
    (Rule("hidden % 8 == 0", "it moves 16 bytes at a time", gpu=True), *MEETING_RULES),
)


def add_shares(
    hidden: Tensor, weight: Tensor, meeting: Meeting, rank: int, eps: float, *, in_place: bool = False
) -> tuple[Tensor, Tensor]:
    """Wait until all ranks have left their shares, and add these up.

    Nothing but the beginning of a sum is waited for, and a rank may overwrite its share once all have begun
    the next sum. So sums that follow one another need two places for shares, which take turns.

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
    blocks = min(len(hidden), len(meeting.met))
    if not hidden.is_cpu:
        total, normed = hidden if in_place else torch.empty_like(hidden), torch.empty_like(hidden)
        chunks = hidden.shape[1] * hidden.itemsize // _CHUNK_BYTES
        threads = min(MOST_THREADS, -(-max(chunks, ranks) // 32) * 32)  # each rank has one that meets it
        launch(
            "add_shares.cu", "add_shares", (blocks,), threads,
            [hidden, weight, total, normed, len(hidden), chunks, *meeting, rank, eps],
            ELEMENT=ELEMENTS[hidden.dtype], RANKS=ranks, CHUNKS=-(-chunks // threads), THREADS=threads,
        )  # fmt: skip
        return total, normed
    meet(meeting, rank, blocks)
    shares = [
        torch.from_numpy(memory_at(address, hidden.nbytes)).view(hidden.dtype).view_as(hidden).float()
        for address in meeting.shares
    ]
    total = (hidden.float() + torch.stack(shares).sum(0)).to(hidden.dtype)
    if in_place:
        total = hidden.copy_(total)
    return total, torch.nn.functional.rms_norm(total, total.shape[1:], weight, eps)
