"""A worker's connection to its KV store."""

from typing import Any, TypeVar

import zmq

from clo.runtime.wire.errors import ProtocolError, WorkerDied, error_from
from clo.runtime.wire.liveness import STARTING_S
from clo.runtime.wire.messages import (
    Attach,
    Attached,
    Denied,
    FromStore,
    OpenStaging,
    StagingOpened,
    ToStore,
)
from clo.runtime.wire.sockets import DealerSocket

_Answer = TypeVar("_Answer", Attached, StagingOpened)


class StoreClient(DealerSocket[ToStore, FromStore]):
    """A ``DealerSocket`` that knows how a worker begins; all else is ``send`` and ``receive``."""

    def __init__(self, context: zmq.Context[Any], endpoint: str, key: str) -> None:
        super().__init__(context, endpoint, FromStore, key, encrypted=True)

    def attach(self, message: Attach, timeout_s: float = STARTING_S) -> Attached:
        """Make this worker known to the store and wait for the answer, which comes once the store has touched
        its whole arena.

        Raises:
            CLOError: the store denies it.
            WorkerDied: nothing answers within ``timeout_s``.
        """
        return self._ask(message, Attached, timeout_s)

    def open_staging(self, message: OpenStaging, timeout_s: float) -> None:
        """Open pushes to this worker; the first to a GPU waits until the store has registered its arena.

        Raises:
            CLOError: the store denies it, such as ``ConfigError`` where CUDA does not let it in.
            WorkerDied: nothing answers within ``timeout_s``.
        """
        self._ask(message, StagingOpened, timeout_s)

    def _ask(self, message: ToStore, expected: type[_Answer], timeout_s: float) -> _Answer:
        self.send(message)
        answer = self.receive(timeout_ms=int(1000 * timeout_s))
        match answer:
            case expected():
                return answer
            case Denied():
                raise error_from(answer.code, answer.text)
            case None:
                raise WorkerDied(
                    f"The KV store did not answer {type(message).__name__} within {timeout_s:g} s; "
                    "see its messages above."
                )
            case _:
                raise ProtocolError(
                    f"The KV store answered {type(message).__name__} with {type(answer).__name__}."
                )
