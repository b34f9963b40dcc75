"""Take: drawn tokens become those that the next step reads."""

import torch
from torch import Tensor

from clo.kernels.arguments import Argument, Rule, Signature
from clo.kernels.launch import launch
from clo.kernels.sample import ACTIVE, LENGTHS, MARKS, MOST_COUNTED, SLOTS, Adjustments

_SIGNATURE = Signature(
    "take",
    (
        Argument("drawn", torch.int64, "B"),
        SLOTS, LENGTHS,
        Argument("tokens", torch.int64, "S"),
        ACTIVE, MARKS,
    ),
    (Rule("B <= S", "a slot draws one token"),),
)  # fmt: skip


def take(drawn: Tensor, slots: Tensor, lengths: Tensor, tokens: Tensor, adjustments: Adjustments) -> None:
    """Take the tokens that ``sample`` has drawn, in place; rows of slots that are not in use count for
    nothing. A slot that has drawn ``LATE`` becomes one token shorter again, so that the next step repeats
    this one.

    Args:
        drawn: [B] int64.
        slots: [B] int64, the slot of each row, each once.
        lengths: [S] int64, tokens of each slot's sequence; 0 for a slot not in use.
        tokens: [S] int64, the latest token of each slot.
        adjustments: of S slots; the marks of active ones count the tokens.
    """
    active, marks = adjustments.active, adjustments.marks
    _SIGNATURE.check(drawn, slots, lengths, tokens, active, marks)
    if not drawn.is_cpu:
        launch(
            "take.cu", "take", (1,), 256,
            [drawn, len(drawn), slots, lengths, tokens, active, marks, marks.shape[1], MOST_COUNTED],
        )  # fmt: skip
        return
    for token, slot in zip(drawn.tolist(), slots.tolist(), strict=True):
        if lengths[slot] == 0:
            continue
        if token < 0:
            lengths[slot] -= 1
            continue
        tokens[slot] = token
        if active[slot] and marks[slot, token] & MOST_COUNTED < MOST_COUNTED:
            marks[slot, token] += 1
