"""What each client of the router has open. It is bounded, and so is the router's memory."""

from dataclasses import dataclass

from clo.runtime.wire.errors import Overloaded
from clo.runtime.wire.messages import MAX_MESSAGE_BYTES

OPEN_REQUESTS, OPEN_BYTES = 10_000, MAX_MESSAGE_BYTES  # of one client at a time


@dataclass
class _Account:
    requests: int = 0
    bytes: int = 0  # of the messages that opened them


class Accounts:
    """Counts what clients have open, or have closed while it is still being tokenised. A client is identified
    by its connection; one that has nothing open takes no memory."""

    def __init__(self) -> None:
        self._accounts: dict[bytes, _Account] = {}

    def __len__(self) -> int:
        """Clients that have something open."""
        return len(self._accounts)

    def charge(self, client: bytes, size: int) -> None:
        """Count a request of a client, in a message of ``size`` bytes, as open.

        Raises:
            Overloaded: the client has too many; nothing is counted.
        """
        account = self._accounts.get(client) or _Account()
        if account.requests >= OPEN_REQUESTS or account.bytes + size > OPEN_BYTES:
            raise Overloaded(
                f"A client may have {OPEN_REQUESTS} requests with {OPEN_BYTES} bytes in all open at a time; "
                "wait for answers before sending more."
            )
        account.requests += 1
        account.bytes += size
        self._accounts[client] = account

    def discharge(self, client: bytes, size: int) -> None:
        """The same request is not open any more."""
        account = self._accounts[client]
        account.requests -= 1
        account.bytes -= size
        if not account.requests:
            del self._accounts[client]
