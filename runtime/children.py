"""What the launcher knows of its children: which process each one is, and when it answered last."""

from dataclasses import dataclass

from clo.runtime.wire.errors import WorkerDied
from clo.runtime.wire.liveness import SERVING_S, STALLED_S, STARTING_S


@dataclass
class _Child:
    name: str
    pid: int
    waited: float = 0.0  # seconds that it has owed its first message, or an answer
    ready: bool = False
    ended: bool = False
    asked: bool = False  # it owes an answer


class Children:
    """The workers and stores of a server, by the names of their connections. It has no clock: ``wait`` says
    how much time has passed, so that time in which the launcher itself stood still need not count."""

    def __init__(self) -> None:
        self._children: dict[bytes, _Child] = {}

    @property
    def ready(self) -> bool:
        """Whether each has sent its first message."""
        return all(child.ready for child in self._children.values())

    def expect(self, connection: bytes, name: str, pid: int) -> None:
        """A process was started, which users know as ``name``."""
        self._children[connection] = _Child(name, pid)

    def begin(self, connection: bytes, pid: int) -> bool:
        """Take the first message of a child; False where it is not from the process that was started."""
        child = self._children.get(connection)
        if child is None or child.pid != pid or child.ended:
            return False
        child.ready, child.waited = True, 0.0
        return True

    def has_begun(self, connection: bytes) -> bool:
        child = self._children.get(connection)
        return child is not None and child.ready

    def end(self, connection: bytes) -> None:
        """A child has ended, or is about to: it owes nothing more, and cannot begin any more."""
        self._children[connection].ended = True

    def ask(self) -> list[bytes]:
        """Those to be sent a ``Ping`` now: they are ready and have answered the last one."""
        free = [
            name for name, child in self._children.items() if child.ready and not child.asked | child.ended
        ]
        for name in free:
            self._children[name].asked = True
        return free

    def answered(self, connection: bytes) -> None:
        child = self._children[connection]
        child.asked, child.waited = False, 0.0

    def wait(self, seconds: float) -> list[tuple[bytes, WorkerDied]]:
        """So much time has passed, in which children could have answered. Returns those that have exceeded
        their budgets, which they are given once more."""
        silent = []
        for connection, child in self._children.items():
            if child.ended or (child.ready and not child.asked):
                continue
            child.waited += seconds
            budget = SERVING_S if child.ready else STARTING_S
            if child.waited >= budget:
                what = "has not answered for" if child.ready else "was not ready within"
                silent.append((connection, WorkerDied(f"{child.name} {what} {budget:g} s")))
                child.waited = 0.0
        return silent

    def is_stalled(self, connection: bytes) -> bool:
        """Whether a child has not answered for so long that clients should know."""
        child = self._children.get(connection)
        return child is not None and child.ready and child.waited >= STALLED_S
