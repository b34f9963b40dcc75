"""Typed ZeroMQ sockets: messages go in and out, and are checked on receipt."""

import asyncio
import time
from collections.abc import AsyncIterator
from enum import Enum
from typing import Any, Generic, TypeVar

import msgspec
import zmq

from clo.runtime.wire.errors import ProtocolError
from clo.runtime.wire.messages import MAX_MESSAGE_BYTES, Message

TURN_S = 0.002  # that messages of one socket are handled before the event loop's other tasks have their turn

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


def is_ipv6(endpoint: str) -> bool:
    """Whether an address is IPv6. For all others ZeroMQ has to be told that it is not, or it would look up
    names as IPv6 first."""
    return endpoint.startswith("tcp://[")


def has_message(socket: zmq.Socket[Any]) -> bool:
    """Whether a message can be received at once."""
    events: Any = socket.get(zmq.EVENTS)
    return bool(events & zmq.POLLIN)


class Arrivals:
    """What arrives at a plain socket, in an event loop. A wake-up covers all messages that are there, where
    ``zmq.asyncio`` makes several futures for each one.

    ZeroMQ's descriptor becomes readable when something has happened to the socket, and stops being so once
    the socket was asked or used, be it for sending. So it is looked at after each of these.
    """

    def __init__(self, socket: zmq.Socket[Any]) -> None:
        self._socket = socket
        self._descriptor: Any = socket.get(zmq.FD)
        self._loop: asyncio.AbstractEventLoop | None = None  # known once somebody listens
        self._waiting: asyncio.Future[None] | None = None
        self._will_look = False

    async def messages(self) -> AsyncIterator[list[bytes]]:
        """The frames of each message, for one listener. Other tasks have their turn every ``TURN_S`` seconds
        and whenever no message is left."""
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
            self._loop.add_reader(self._descriptor, self._look)
        while True:
            turn_ends = time.monotonic() + TURN_S
            while arrived := has_message(self._socket):
                yield self._socket.recv_multipart(zmq.NOBLOCK)
                if time.monotonic() >= turn_ends:
                    break
            if arrived:
                await asyncio.sleep(0)
            else:
                self._waiting = self._loop.create_future()
                await self._waiting

    def after_send(self) -> None:
        """To be called when something was sent, which may have taken the descriptor's sign of an arrival."""
        if self._loop is not None and not self._will_look:
            self._will_look = True
            self._loop.call_soon(self._look)

    def close(self) -> None:
        """Stop listening, before the socket is closed."""
        if self._loop is not None:
            self._loop.remove_reader(self._descriptor)
            self._loop = None

    def _look(self) -> None:
        self._will_look = False
        if self._loop is None:  # closed meanwhile
            return
        arrived = has_message(self._socket)  # asked in any case, or the descriptor would stay readable
        if arrived and self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)


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
    """A ROUTER that sends ``Sent`` to its peers and receives ``Received`` from them, in one event loop.

    Args:
        endpoint: address to bind.
        received: the union of messages that may arrive.
        queue: the most messages that may wait for one peer; 0 means no limit.

    Attributes:
        endpoint: the address bound, with the port that was chosen for port 0.

    Raises:
        zmq.ZMQError: the address cannot be bound.
    """

    def __init__(self, context: zmq.Context[Any], endpoint: str, received: Any, queue: int) -> None:
        self._decode: Decoder[Received] = Decoder(received)
        self._socket: zmq.Socket[Any] = context.socket(zmq.ROUTER)
        configure(self._socket)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._socket.setsockopt(zmq.SNDHWM, queue)
        self._socket.setsockopt(zmq.IPV6, is_ipv6(endpoint))
        self._socket.bind(endpoint)
        self._arrivals = Arrivals(self._socket)
        self.endpoint: str = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)

    async def messages(self) -> AsyncIterator[tuple[bytes, Received | ProtocolError]]:
        """Each message, or an error if it is not valid, with the name of the peer that sent it; see
        ``Arrivals.messages``."""
        async for peer, *frames in self._arrivals.messages():
            if len(frames) != 1:
                yield peer, ProtocolError(f"A message has one frame, not {len(frames)}.")
                continue
            try:
                message: Received | ProtocolError = self._decode(frames[0])
            except ProtocolError as error:
                message = error
            yield peer, message

    def send(self, peer: bytes, message: Sent) -> Delivery:
        data = encode(message)
        try:
            self._socket.send(peer, zmq.SNDMORE | zmq.NOBLOCK)
            self._socket.send(data, zmq.NOBLOCK)
        except zmq.Again:
            return Delivery.FULL
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            return Delivery.GONE
        finally:
            self._arrivals.after_send()
        return Delivery.SENT

    def close(self, linger_ms: int) -> None:
        """What was sent gets up to ``linger_ms`` to leave, for which the end of the context waits."""
        self._arrivals.close()
        self._socket.close(linger_ms)
