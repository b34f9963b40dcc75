"""Typed ZeroMQ sockets: messages go in and out, and are checked on receipt."""

from enum import Enum
from typing import Any, Generic, TypeVar

import msgspec
import zmq
import zmq.asyncio

from clo.runtime.wire.errors import ProtocolError
from clo.runtime.wire.messages import MAX_MESSAGE_BYTES, Message

Sent = TypeVar("Sent", bound=Message)
Received = TypeVar("Received", bound=Message)

_encoder = msgspec.msgpack.Encoder()


def encode(message: Message) -> bytes:
    return _encoder.encode(message)


class Decoder(Generic[Received]):
    """Decodes one union of messages.

    Args:
        union: the union type, such as ``ToRouter``.
    """

    def __init__(self, union: Any) -> None:
        self._decoder: msgspec.msgpack.Decoder[Received] = msgspec.msgpack.Decoder(union)

    def __call__(self, data: bytes) -> Received:
        """Raises ``ProtocolError`` where ``data`` is not a valid message of the union."""
        try:
            return self._decoder.decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ProtocolError(f"The message could not be read: {error}.") from None


def configure(socket: zmq.Socket[Any]) -> None:
    """Options of every CLO socket: bounded messages, no wait on close, dead peers noticed within 10 s."""
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
    socket.setsockopt(zmq.HEARTBEAT_IVL, 3_000)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, 10_000)


class DealerSocket(Generic[Sent, Received]):
    """The connecting end of a control channel: a DEALER that sends ``Sent`` and receives ``Received``.

    Args:
        endpoint: address to connect to.
        received: the union of messages that may arrive.
        identity: name under which the other end knows this one, or None for one chosen by ZeroMQ.
    """

    def __init__(
        self, context: zmq.Context[Any], endpoint: str, received: Any, identity: bytes | None = None
    ) -> None:
        self._decode: Decoder[Received] = Decoder(received)
        self.socket: zmq.Socket[Any] = context.socket(zmq.DEALER)
        configure(self.socket)
        if identity is not None:
            self.socket.setsockopt(zmq.IDENTITY, identity)
        self.socket.connect(endpoint)

    def send(self, message: Sent) -> None:
        self.socket.send(encode(message))

    def receive(self, timeout_ms: int | None = 0) -> Received | None:
        """The next message, or None when none comes within ``timeout_ms`` (None waits for ever)."""
        if not self.socket.poll(timeout_ms):
            return None
        return self._decode(self.socket.recv())

    def close(self) -> None:
        self.socket.close()


class Delivery(Enum):
    """What became of a message to a peer."""

    SENT = "sent"
    FULL = "full"  # the peer has not read for long and its queue is full
    GONE = "gone"  # no peer of this name is connected


class RouterSocket(Generic[Sent, Received]):
    """A ROUTER that sends ``Sent`` to its peers and receives ``Received`` from them.

    Args:
        endpoint: address to bind.
        received: the union of messages that may arrive.
        queue: the most messages that may wait for one peer; 0 means no limit.

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
        """The next message and the name of the peer that sent it, or an error if it is not valid."""
        peer, *frames = await self._socket.recv_multipart()
        if len(frames) != 1:
            return peer, ProtocolError(f"A message has one frame, not {len(frames)}.")
        try:
            return peer, self._decode(frames[0])
        except ProtocolError as error:
            return peer, error

    def send(self, peer: bytes, message: Sent) -> Delivery:
        # A second, plain socket would not do: it would take the wake-up that a waiting receive needs.
        sent: Any = self._socket.send_multipart([peer, encode(message)], zmq.NOBLOCK)  # always done already
        error = sent.exception()
        if error is None:
            return Delivery.SENT
        if isinstance(error, zmq.Again):
            return Delivery.FULL
        if isinstance(error, zmq.ZMQError) and error.errno == zmq.EHOSTUNREACH:
            return Delivery.GONE
        raise error
