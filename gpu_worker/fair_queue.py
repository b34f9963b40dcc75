"""Requests that wait for a slot of the batch: clients take turns."""

from collections import OrderedDict, deque
from collections.abc import Callable, Iterator

from clo.gpu_worker.sequence import Sequence


class FairQueue:
    """Sequences by client. Those of one client keep their order, and each client is next in its turn, so that
    whoever sends thousands of requests delays nobody's by more than one of them."""

    def __init__(self) -> None:
        self._queues: OrderedDict[int, deque[Sequence]] = OrderedDict()  # by client; the first one is next

    def __bool__(self) -> bool:
        return bool(self._queues)

    def __iter__(self) -> Iterator[Sequence]:
        for queue in self._queues.values():
            yield from queue

    def append(self, sequence: Sequence) -> None:
        """The last of its client's; a client of whom nobody waited comes after all others."""
        self._queues.setdefault(sequence.run.client, deque()).append(sequence)

    def prepend(self, sequence: Sequence) -> None:
        """The first of its client's, whose turn it is next."""
        client = sequence.run.client
        self._queues.setdefault(client, deque()).appendleft(sequence)
        self._queues.move_to_end(client, last=False)

    def pop(self, may_run: Callable[[Sequence], bool]) -> Sequence | None:
        """Take the first one that may run, of each client's first ones; then it is the next client's turn."""
        for client, queue in self._queues.items():
            if may_run(queue[0]):
                sequence = queue.popleft()
                self._queues.move_to_end(client)
                self._tidy(client)
                return sequence
        return None

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out that ends before its turn."""
        self._queues[sequence.run.client].remove(sequence)
        self._tidy(sequence.run.client)

    def _tidy(self, client: int) -> None:
        if not self._queues[client]:
            del self._queues[client]
