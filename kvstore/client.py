"""A worker's connection to its KV store."""

from typing import Any

import zmq

from runtime.channel import Dealer
from runtime.errors import ProtocolError, WorkerDied, error_from
from runtime.messages import Attach, Attached, Denied, FromStore, ToStore


class StoreClient(Dealer[ToStore, FromStore]):
    """A ``Dealer`` that knows how a worker begins; all else is ``send`` and ``receive``."""

    def __init__(self, context: zmq.Context[Any], endpoint: str) -> None:
        super().__init__(context, endpoint, FromStore)

    def attach(self, message: Attach, timeout_s: float) -> Attached:
        """Make this worker known to the store and wait for the answer, which comes once the store has touched
        its whole arena.

        Raises:
            CLOError: the store denies it, such as ``ConfigError`` where the blocks do not fit.
            WorkerDied: nothing answers within ``timeout_s``.
        """
        self.send(message)
        answer = self.receive(timeout_ms=int(1000 * timeout_s))
        match answer:
            case Attached():
                return answer
            case Denied():
                raise error_from(answer.code, answer.text)
            case None:
                raise WorkerDied(
                    f"The KV store did not answer worker {message.worker} within {timeout_s:g} s; "
                    "see its messages above and start the server again."
                )
            case _:
                raise ProtocolError(f"The KV store answered Attach with {type(answer).__name__}.")
