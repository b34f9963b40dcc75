"""The drift check: how far a step is from full attention, seen in production.

Once in so many steps one sequence's token also goes through the model with full attention over the arena,
just before the decode step itself. On a GPU that is launched kernel by kernel between two graphs, on their
stream: it finds tokens, lengths and rows as the step will, however many steps are on their way, and the host
waits for nothing. The batch does wait, for the rows of a whole context to cross PCIe.

The comparison is of one step over the history that the cache has left: rows of earlier tokens were computed
without full attention, and it does not show what that changed.
"""

import torch
from torch import Tensor

from clo.gpu_worker.engine import Engine
from clo.gpu_worker.outputs import StepHandle
from clo.runtime.config import CacheConfig
from clo.runtime.model.kv_shape import KVShape
from clo.runtime.wire.messages import Compare, DriftStats


def drift_check_bytes(shape: KVShape, tokens: int) -> int:
    """GPU memory that a comparison takes for a sequence of that many tokens: a layer's rows, a few times."""
    return 3 * tokens * shape.kv_heads * shape.row_bytes


class DriftCheck:
    """Chooses which sequence to compare, and keeps the sums.

    Args:
        engine: does the steps.
        arena: the engine's arena.
        every: steps of a slot from one comparison to the next. A step compares at most one sequence, the one
            that has waited longest.
        max_tokens: longest sequence.
    """

    def __init__(self, engine: Engine, arena: Tensor, every: int, max_tokens: int) -> None:
        self._engine, self._every = engine, every
        self._full = Engine(engine.decoder, arena, CacheConfig(attention="full"), 1, max_tokens)
        self._since = [0] * engine.slots  # steps since the slot was compared, also those of former sequences
        self._expected: tuple[int, Tensor] | None = None  # slot and logits [vocab] of the step to come
        device = engine.decoder.device
        self._sums = torch.zeros(3, dtype=torch.float64, device=device)  # checks, KL in nats, same tokens
        self._seen = torch.zeros(3, dtype=torch.float64, pin_memory=device.type == "cuda")

    def before(self, lengths: dict[int, int]) -> None:
        """A step is about to be launched.

        Args:
            lengths: lengths of its sequences by slot, including the new token.
        """
        for slot in lengths:
            self._since[slot] += 1
        slot = max(lengths, key=lambda slot: self._since[slot])
        if self._since[slot] < self._every:
            return
        self._since[slot] = 0
        self._engine.tell(Compare(slot, lengths[slot]))
        self._expected = slot, self.attend_fully(slot, lengths[slot])

    def attend_fully(self, slot: int, length: int) -> Tensor:
        """Logits [vocab] of the step to come with full attention.

        Args:
            length: of the slot's sequence, the new token included.
        """
        self._full.mirror(self._engine, slot)
        # The token's own row goes to its place in the arena, where the step then writes its own.
        return self._full.forward(1, length)[0]

    @torch.inference_mode()
    def after(self, handle: StepHandle) -> None:
        """The step was launched."""
        if self._expected is None:
            return
        slot, expected = self._expected
        self._expected = None
        found = handle.logits[slot]
        reference = expected.log_softmax(-1)
        divergence = (reference.exp() * (reference - found.log_softmax(-1))).sum()
        same = expected.argmax() == found.argmax()
        self._sums += torch.stack([torch.ones_like(divergence), divergence, same.to(divergence.dtype)])
        self._seen.copy_(self._sums, non_blocking=True)

    def stats(self) -> DriftStats:
        """The results of the comparisons that are over."""
        checks, divergence, same = self._seen.tolist()
        return DriftStats(int(checks), divergence / max(1.0, checks), same / max(1.0, checks))
