"""The resident set: the rows that each KV head of a layer attends to, and their positions."""

from typing import NamedTuple

import torch
from torch import Tensor

from clo.kernels.arguments import ELEMENT, Argument, Rule


class ResidentSet(NamedTuple):
    """Resident rows of one layer for B sequences, in the order ``[sinks | recent ring | set of C rows]``.

    Keys carry RoPE, so that attention does not depend on the order of the rows.
    """

    rows: Tensor  # [B, kv_heads, sinks + recent + C, 2, head_dim]
    positions: Tensor  # [B, kv_heads, C] int32, position of the token in each row of the set, -1 where empty
    last_used: Tensor  # [B, kv_heads, C] int32, length of the sequence when the row was last selected
    sinks: int  # first tokens of a sequence, always attended
    recent: int  # latest tokens, always attended

    @property
    def first(self) -> int:
        """The row at which the set starts."""
        return self.sinks + self.recent

    @property
    def capacity(self) -> int:
        """C, rows of the set."""
        return self.positions.shape[2]

    @property
    def whole(self) -> int:
        """Tokens of the longest sequence whose rows are all resident: ``append`` keeps them so."""
        return self.first + self.capacity

    @property
    def kv_heads(self) -> int:
        return self.positions.shape[1]

    def slots(self, count: int) -> "ResidentSet":
        """The part of the first ``count`` sequences, without a copy."""
        return self._replace(
            rows=self.rows[:count], positions=self.positions[:count], last_used=self.last_used[:count]
        )

    def tokens(self, slot: int, length: int) -> Tensor:
        """Which tokens of a sequence are resident, between two steps: for tests and pictures.

        Args:
            slot: of the sequence.
            length: its tokens, the latest of which is in the ring.

        Returns:
            [kv_heads, sinks + recent + C] int64: the position of the token in each row, -1 where empty.
        """
        device = self.positions.device
        sinks = torch.arange(self.sinks, device=device)
        ring = torch.arange(self.recent, device=device)
        ring = length - 1 - torch.remainder(length - 1 - self.sinks - ring, self.recent)
        always = torch.cat((sinks.where(sinks < length, -1), ring.where(ring >= self.sinks, -1)))
        return torch.cat((always.expand(self.kv_heads, -1), self.positions[slot].long()), 1)


ROWS = Argument("resident.rows", ELEMENT, "B kv_heads sinks+recent+capacity 2 head_dim", chunks=True)
POSITIONS = Argument("resident.positions", torch.int32, "B kv_heads capacity")
LAST_USED = Argument("resident.last_used", torch.int32, "B kv_heads capacity")
"""The tensors of a ``ResidentSet`` as arguments of operations."""

NEW_ROWS = Argument("kv", ELEMENT, "B kv_heads 2 head_dim", dense=3, chunks=True)
"""The row of each sequence's new token, as the projection leaves it."""

FIRST = Rule("sinks >= 0 and recent >= 1", "the latest token always has a row")
