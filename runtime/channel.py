"""Typed ZeroMQ sockets: what goes in and out are messages, checked on receipt."""

from typing import Any, Generic, TypeVar

import msgspec
import zmq

from runtime.errors import ProtocolError
from runtime.messages import MAX_MESSAGE_BYTES, Message

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
    """Options of every CLO socket: bounded messages, no wait at close, dead peers noticed within 10 s."""
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
    socket.setsockopt(zmq.HEARTBEAT_IVL, 3_000)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, 10_000)


class Dealer(Generic[Sent, Received]):
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
