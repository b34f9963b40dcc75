"""The binding end of a typed socket: a ROUTER that knows its peers and never waits for them."""

from enum import Enum
from typing import Any, Generic

import zmq
import zmq.asyncio

from runtime.channel import Decoder, Received, Sent, configure, encode
from runtime.errors import ProtocolError


class Delivery(Enum):
    """What became of a message to a peer."""

    SENT = "sent"
    FULL = "full"  # the peer has not read for long and its queue is full
    GONE = "gone"  # no peer of this name is connected


class Peers(Generic[Sent, Received]):
    """A ROUTER that sends ``Sent`` to its peers and receives ``Received`` from them.

    Args:
        endpoint: address to bind.
        received: the union of messages that may arrive.
        queue: messages that wait for one peer at most; 0 is without limit.

    Attributes:
        endpoint: the address bound, with the port that was chosen for port 0.

    Raises:
        zmq.ZMQError: the address cannot be bound.
    """

    def __init__(self, context: zmq.asyncio.Context, endpoint: str, received: Any, queue: int) -> None:
        self._decode: Decoder[Received] = Decoder(received)
        self._socket = context.socket(zmq.ROUTER)
        configure(self._socket)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._socket.setsockopt(zmq.SNDHWM, queue)
        self._socket.bind(endpoint)
        self.endpoint: str = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)

    async def receive(self) -> tuple[bytes, Received | ProtocolError]:
        """The next message and the name of the peer that sent it; the error where it is not valid."""
        peer, *frames = await self._socket.recv_multipart()
        if len(frames) != 1:
            return peer, ProtocolError(f"A message has one frame, not {len(frames)}.")
        try:
            return peer, self._decode(frames[0])
        except ProtocolError as error:
            return peer, error

    def send(self, peer: bytes, message: Sent) -> Delivery:
        # Not with a plain socket beside this one: it would take the wake-up that a waiting receive needs.
        sent: Any = self._socket.send_multipart([peer, encode(message)], zmq.NOBLOCK)  # always done already
        error = sent.exception()
        if error is None:
            return Delivery.SENT
        if isinstance(error, zmq.Again):
            return Delivery.FULL
        if isinstance(error, zmq.ZMQError) and error.errno == zmq.EHOSTUNREACH:
            return Delivery.GONE
        raise error
