"""Typed ZeroMQ sockets: messages go in and out, and are checked on receipt."""

import asyncio
import hashlib
import os
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Generic, TypeVar

import msgspec
import zmq
from zmq.utils import z85

from clo.runtime.wire.errors import ProtocolError
from clo.runtime.wire.messages import MAX_MESSAGE_BYTES, Message

KEEPALIVE_S = 10  # a TCP peer that has been silent is asked so often; three times without an answer end it
TURN_S = 0.002  # that messages of one socket are handled before the event loop's other tasks have their turn

Sent = TypeVar("Sent", bound=Message)
Received = TypeVar("Received", bound=Message)

# As numbers: what operators make of pyzmq's enums takes microseconds.
_EVENTS, _READABLE = int(zmq.EVENTS), int(zmq.POLLIN)
_NOW, _MORE = int(zmq.NOBLOCK), int(zmq.NOBLOCK | zmq.SNDMORE)

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


def configure(socket: zmq.Socket[Any], key: str | None = None, *, listens: bool = False) -> None:
    """Options of every CLO socket, to be set before it is bound or connected.

    ZeroMQ has no heartbeats of its own here. They take a process that was stopped for a while for dead, and
    one that falls due at a full queue whose peer has gone aborts the process (libzmq 4.3.5). The kernel does
    better: it answers for a stopped process, and tells at once when one on this machine ends.

    Args:
        key: only those who know it can connect, and what passes is encrypted; None for no key.
        listens: whether the socket is going to be bound. It then takes no other user of this machine where
            its address is a file.
    """
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
    socket.setsockopt(zmq.TCP_KEEPALIVE, 1)
    socket.setsockopt(zmq.TCP_KEEPALIVE_IDLE, KEEPALIVE_S)
    socket.setsockopt(zmq.TCP_KEEPALIVE_INTVL, KEEPALIVE_S)
    socket.setsockopt(zmq.TCP_MAXRT, 3_000 * KEEPALIVE_S)
    if listens:
        socket.setsockopt(zmq.IPC_FILTER_UID, os.geteuid())
    if key is not None:
        public, secret = _key_pair(key)
        if listens:
            socket.curve_server = True
            socket.curve_secretkey = secret
        else:
            socket.curve_serverkey = public
            socket.curve_publickey, socket.curve_secretkey = zmq.curve_keypair()


def present(socket: zmq.Socket[Any], key: str) -> None:
    """Have a socket show the key of the ``Port`` to which it is going to be connected."""
    socket.plain_username, socket.plain_password = b"clo", key.encode()


@lru_cache
def _key_pair(key: str) -> tuple[bytes, bytes]:
    """The listening end's CURVE keys. Its public one never crosses the wire, and nobody can begin a handshake
    without it, so that to know ``key`` is to be let in. Slow on purpose: guesses should be."""
    secret = z85.encode(hashlib.scrypt(key.encode(), salt=b"clo", n=2**14, r=8, p=1, dklen=32))
    return zmq.curve_public(secret), secret


def has_message(socket: zmq.Socket[Any]) -> bool:
    """Whether a message can be received at once."""
    events: Any = socket.get(_EVENTS)
    return bool(events & _READABLE)


@dataclass(eq=False)
class _Source:
    """A socket of ``Arrivals``."""

    socket: zmq.Socket[Any]
    descriptor: Any
    handle: Callable[[list[bytes]], None]
    turn_s: float

    def drain(self) -> bool:
        """Handle messages until none is left, or else until the turn is over; returns which of both."""
        turn_ends = time.monotonic() + self.turn_s
        while has_message(self.socket):
            self.handle(self.socket.recv_multipart(_NOW))
            if time.monotonic() >= turn_ends:
                return False
        return True


class Arrivals:
    """What arrives at plain sockets, in an event loop. The loop calls once for all messages that are there,
    where ``zmq.asyncio`` makes several futures for each one.

    ZeroMQ's descriptor becomes readable when something has happened to its socket, and stops being so once
    the socket was asked or used, be it for sending. So the socket is looked at after each of these; if it was
    a handler that sent something, in the same call of the loop.
    """

    def __init__(self) -> None:
        self._sources: list[_Source] = []
        self._due: deque[_Source] = deque()  # those to look at
        self._will_look = False
        self._loop: asyncio.AbstractEventLoop | None = None  # while somebody listens

    def add(
        self, socket: zmq.Socket[Any], handle: Callable[[list[bytes]], None], turn_s: float = TURN_S
    ) -> Callable[[], None]:
        """Take a socket, before anybody listens.

        Args:
            handle: gets the frames of each message. What it raises ends ``listen``.
            turn_s: seconds after which the event loop's other tasks have their turn although messages are
                left; 0 for one message at a time.

        Returns:
            What is to be called when something was sent through the socket.
        """
        source = _Source(socket, socket.get(zmq.FD), handle, turn_s)
        self._sources.append(source)
        return partial(self._look_soon, source)

    async def listen(self) -> None:
        """Have messages handled until this is cancelled."""
        self._loop = asyncio.get_running_loop()
        self._failure = self._loop.create_future()
        try:
            for source in self._sources:
                self._loop.add_reader(source.descriptor, self._look_now, source)
                self._look_soon(source)
            await self._failure
        finally:
            self.close()

    def close(self) -> None:
        """Stop listening, before the sockets are closed."""
        if self._loop is not None:
            for source in self._sources:
                self._loop.remove_reader(source.descriptor)
            self._loop = None

    def _look_now(self, source: _Source) -> None:
        if source not in self._due:
            self._due.append(source)
        if not self._will_look:
            self._look()

    def _look_soon(self, source: _Source) -> None:
        if source not in self._due:
            self._due.append(source)
        if self._loop is not None and not self._will_look:
            self._will_look = True
            self._loop.call_soon(self._look)

    def _look(self) -> None:
        if self._loop is None or self._failure.done():
            return
        self._will_look = True  # at what becomes due meanwhile, too
        try:
            while self._due:
                source = self._due.popleft()
                if not source.drain():
                    self._due.append(source)
                    self._loop.call_soon(self._look)
                    return
        except Exception as error:
            self._failure.set_exception(error)
        self._will_look = False


class DealerSocket(Generic[Sent, Received]):
    """The connecting end of a control channel: a DEALER that sends ``Sent`` and receives ``Received``.

    Args:
        endpoint: address to connect to.
        received: the union of messages that may arrive.
        key: the other end's, None where it has none.
        identity: name under which the other end knows this one, or None for one chosen by ZeroMQ.
        encrypted: whether the other end is a socket that was made with ``configure``; else it is a ``Port``.
    """

    def __init__(
        self,
        context: zmq.Context[Any],
        endpoint: str,
        received: Any,
        key: str | None,
        identity: bytes | None = None,
        *,
        encrypted: bool = False,
    ) -> None:
        self._decode: Decoder[Received] = Decoder(received)
        self.socket: zmq.Socket[Any] = context.socket(zmq.DEALER)
        configure(self.socket, key if encrypted else None)
        if key is not None and not encrypted:
            present(self.socket, key)
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
