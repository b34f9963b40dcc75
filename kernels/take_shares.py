"""Take shares: what some ranks of a group have left for all."""

import torch
from torch import Tensor

from clo.kernels.arguments import Argument, Rule, Signature
from clo.kernels.launch import launch
from clo.kernels.meeting import MEETING, MEETING_RULES, MOST_THREADS, Meeting, meet, memory_at

_SIGNATURE = Signature(
    "take_shares",
    (Argument("taken", torch.int64, "sources words"), *MEETING),
    (*MEETING_RULES, Rule("sources <= ranks", "each of them is a rank")),
)


def take_shares(taken: Tensor, meeting: Meeting, rank: int) -> None:
    """Wait until all ranks have left their shares, take those of the first ones, and wait for all to do so.

    After it a rank may overwrite its share.

    Args:
        taken: [sources, words] int64, becomes the shares of so many ranks, in words of 8 bytes.
        meeting: where the shares are; this rank's has been written on this stream.
        rank: this one.
    """
    _SIGNATURE.check(taken, *meeting, rank=rank)
    sources, words = taken.shape
    blocks = min(len(meeting.met), -(-words // MOST_THREADS))
    if not taken.is_cpu:
        launch(
            "take_shares.cu", "take_shares", (blocks,), MOST_THREADS,
            [taken, sources, words, *meeting, rank], RANKS=len(meeting.shares),
        )  # fmt: skip
        return
    meet(meeting, rank, blocks)
    for share, address in zip(taken, meeting.shares, strict=False):
        share.view(torch.uint8).copy_(torch.from_numpy(memory_at(address, share.nbytes)))
    meet(meeting, rank, blocks)
