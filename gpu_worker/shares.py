"""What one client may hold of a worker while others have asked for something, too."""

import time
from collections import Counter, OrderedDict

LATELY_S = 30.0  # so long a client counts as one that may ask again
KEPT_BLOCKS = 16  # of so many blocks one is kept for others


class Shares:
    """Slots of the batch and blocks by client.

    Nothing that runs is interrupted for another request. So while others have asked lately, one client gets
    all slots but one and all blocks but a sixteenth, and its long answers keep nobody waiting until one of
    them ends. A client that is alone gets everything, and one that holds nothing gets whatever its request
    needs.

    Args:
        slots: of the batch.
        blocks: of the store; where other workers use it too, this one counts only its own.
    """

    def __init__(self, slots: int, blocks: int) -> None:
        self._most_slots = slots - 1
        self._most_blocks = blocks - -(-blocks // KEPT_BLOCKS)
        self._slots: Counter[int] = Counter()
        self._blocks: Counter[int] = Counter()
        # When each client last asked, the latest at the end.
        self._asked: OrderedDict[int, float] = OrderedDict()

    @property
    def slots(self) -> int:
        """Slots that clients hold."""
        return self._slots.total()

    def ask(self, client: int) -> None:
        """A request of a client has come."""
        self._asked[client] = time.monotonic()
        self._asked.move_to_end(client)
        self._forget_old()

    def may_take(self, client: int, blocks: int) -> bool:
        """Whether a client may have another slot and so many blocks."""
        self._forget_old()
        others = len(self._asked) - (client in self._asked)
        if not self._slots[client] or not others:
            return True
        return self._slots[client] < self._most_slots and self._blocks[client] + blocks <= self._most_blocks

    def take(self, client: int, blocks: int) -> None:
        """A client gets a slot and so many blocks, or will get them."""
        self._slots[client] += 1
        self._blocks[client] += blocks

    def grow(self, client: int, blocks: int) -> None:
        """A client gets so many blocks more for what has a slot already."""
        self._blocks[client] += blocks

    def give_back(self, client: int, blocks: int) -> None:
        """A client no longer has a slot and so many blocks."""
        self._slots[client] -= 1
        self._blocks[client] -= blocks
        if not self._slots[client]:
            del self._slots[client], self._blocks[client]

    def _forget_old(self) -> None:
        oldest = time.monotonic() - LATELY_S
        while self._asked and next(iter(self._asked.values())) < oldest:
            self._asked.popitem(last=False)
