"""Fill the resident sets: the first rows that sequences attend to, from the rows of their prompts."""

from typing import NamedTuple

import torch
from torch import Tensor

from clo.kernels.arguments import ELEMENT, HEAD_DIM, Argument, Rule, Signature
from clo.kernels.launch import launch
from clo.kernels.resident import FIRST, LAST_USED, POSITIONS, ROWS, ResidentSet

_THREADS, _ROWS_PER_BLOCK = 256, 32


class PromptSequences(NamedTuple):
    """S sequences whose whole prompts lie in a flat batch."""

    starts: Tensor  # [S] int64, first token in the batch
    lengths: Tensor  # [S] int64, tokens, at least 1
    slots: Tensor  # [S] int64; the same sequence may be there several times, and fills its slot each time


_SIGNATURE = Signature(
    "fill_resident",
    (
        Argument("rows", ELEMENT, "N kv_heads 2 head_dim", chunks=True),
        *(Argument(f"sequences.{field}", torch.int64, "S") for field in PromptSequences._fields),
        Argument("chosen", torch.int32, "S kv_heads capacity", optional=True),
        ROWS, POSITIONS, LAST_USED,
    ),
    (HEAD_DIM, FIRST, Rule("S >= 1", "a launch needs a sequence")),
)  # fmt: skip


def fill_resident(
    rows: Tensor, sequences: PromptSequences, chosen: Tensor | None, resident: ResidentSet
) -> None:
    """Replace what the slots of some sequences hold by the first resident rows of their prompts, in place.

    Candidates of the set are all tokens but the sinks and the latest ``recent``. While all of them fit, each
    is in the row that ``append`` expects, ``position - sinks``; else those that are chosen are there in their
    order, and the first counts as used last. Rows without a token keep what they hold, and their positions
    become -1.

    Args:
        rows: [N, kv_heads, 2, head_dim], contiguous; rows of tokens of no sequence are not read.
        sequences: which tokens are whose.
        chosen: [S, kv_heads, C] int32, positions of candidates of a sequence that has more of them than the
            set has rows, best first; for other sequences it is not read. None takes the first candidates.
        resident: of all slots.
    """
    held, positions, last_used, sinks, recent = resident
    _SIGNATURE.check(rows, *sequences, chosen, held, positions, last_used, sinks=sinks, recent=recent)
    if not rows.is_cpu:
        count, groups = len(sequences.starts), -(-held.shape[2] // _ROWS_PER_BLOCK)
        launch(
            "fill_resident.cu", "fill_resident", (groups, resident.kv_heads, count), _THREADS,
            [rows, rows.shape[2] * rows.shape[3] * rows.itemsize // 16, *sequences, chosen, held, positions,
             last_used, sinks, recent, resident.capacity, _ROWS_PER_BLOCK],
        )  # fmt: skip
        return
    for number, (start, length, slot) in enumerate(zip(*(part.tolist() for part in sequences), strict=True)):
        by_head = rows[start : start + length].transpose(0, 1)  # [kv_heads, length, 2, head_dim]
        head = min(sinks, length)
        held[slot, :, :head] = by_head[:, :head]
        latest = torch.arange(max(head, length - recent), length)
        held[slot, :, sinks + (latest - sinks) % recent] = by_head[:, latest]

        candidates = max(0, length - resident.first)
        taken = min(candidates, resident.capacity)
        positions[slot, :, taken:] = -1
        last_used[slot, :, taken:] = -1
        last_used[slot, :, :taken] = torch.arange(taken - 1, -1, -1, dtype=torch.int32)
        set_rows = held[slot, :, resident.first : resident.first + taken]
        if chosen is None or candidates <= resident.capacity:
            positions[slot, :, :taken] = torch.arange(sinks, sinks + taken, dtype=torch.int32)
            set_rows.copy_(by_head[:, sinks : sinks + taken])
        else:
            positions[slot] = chosen[number]
            set_rows.copy_(by_head[torch.arange(resident.kv_heads).unsqueeze(1), chosen[number].long()])
