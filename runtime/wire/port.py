"""A port of the router: what a ROUTER of ZeroMQ is, with a bound on all that a peer can make it do or keep.

It speaks ZMTP 3.0 (rfc.zeromq.org/spec/23) in the router's event loop, and peers connect a DEALER. libzmq's
own ROUTER will not do: any peer can abort its process, by sending a PING behind a full queue and going away
(4.3.5, ``Assertion failed: !_io_error``), and its queues are bounded by messages, of any size. Nor does a
message have to pass through another thread here, which takes more time than all else that is done with it.
"""

import asyncio
import hmac
import logging
import os
import resource
import socket
import struct
import time
from collections import deque
from collections.abc import Callable
from enum import Enum
from typing import Any, Generic, Literal, NamedTuple, TypeVar

from clo.runtime.wire.errors import ProtocolError, ServerUnreachable
from clo.runtime.wire.messages import MAX_MESSAGE_BYTES, Message
from clo.runtime.wire.sockets import KEEPALIVE_S, Decoder, encode
from clo.runtime.wire.strangers import Strangers

HANDSHAKE_S = 30.0  # for a new connection to say who it is
_GREETING_BYTES = 64
_COMMAND_BYTES = 1024  # of the longest command that is read
_HEAD_BYTES = 1024  # that are kept of a message too large to be read
_MORE, _LONG, _COMMAND = 1, 2, 4  # flags of a frame
_ERROR = b"\x05ERROR\x03400"
_SPARE_DESCRIPTORS = 128  # that connections leave to all else, and to those that are about to be closed
_ACCEPTED = 8  # connections in a turn of the event loop: it takes some turns to close one
_WAITING = 1024  # connections that the kernel holds meanwhile
_FULL = "All connections that the limit of open files leaves are taken; further ones are closed at once."

_logger = logging.getLogger(__name__)


class TooLarge(NamedTuple):
    """A message that was not read: the request that it names, or "", and its size in bytes."""

    request: str
    size: int


class Delivery(Enum):
    """What became of a message to a peer."""

    SENT = "sent"
    FULL = "full"  # the peer has not read for long
    GONE = "gone"  # no peer of this name is connected


Sent = TypeVar("Sent", bound=Message)
Received = TypeVar("Received", bound=Message)


def listen_tcp(host: str, port: int) -> socket.socket:
    """A socket for a ``Port``: the host as a number, port 0 for a free one. Raises ``OSError``."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=_WAITING)


def listen_unix(endpoint: str) -> socket.socket:
    """A socket for a ``Port``: at an address such as ``ipc:///tmp/x``, or ``ipc://@x`` for one that is no
    file. Raises ``OSError``."""
    listener = socket.socket(socket.AF_UNIX)
    try:
        listener.bind(_unix_name(endpoint))
        listener.listen(_WAITING)
    except OSError:
        listener.close()
        raise
    return listener


def _unix_name(endpoint: str) -> str:
    """The kernel's name for an address such as ``ipc:///tmp/x`` or ``ipc://@x``."""
    path = endpoint.removeprefix("ipc://")
    return "\0" + path[1:] if path.startswith("@") else path


def _greeting(mechanism: bytes) -> bytes:
    signature = b"\xff\x00\x00\x00\x00\x00\x00\x00\x00\x7f"
    return signature + b"\x03\x00" + mechanism.ljust(20, b"\0") + b"\x01" + bytes(31)


def _ready(role: str) -> bytes:
    kind = len(role).to_bytes(4, "big") + role.encode()
    return b"\x05READY\x0bSocket-Type" + kind + b"\x08Identity\x00\x00\x00\x00"


def _frame(body: bytes, flags: int = 0) -> bytes:
    if len(body) < 256:
        return bytes((flags, len(body))) + body
    return struct.pack(">BQ", flags | _LONG, len(body)) + body


def _request_of(head: bytes) -> str:
    """The name of the request in the beginning of a message, or "" where there is none."""
    _, found, rest = head.partition(b"\xa7request")
    if not found or not rest:
        return ""
    start, length = (2, rest[1]) if rest[0] == 0xD9 and len(rest) > 1 else (1, rest[0] & 0x1F)
    if rest[0] != 0xD9 and rest[0] & 0xE0 != 0xA0:
        return ""
    return rest[start : start + length].decode(errors="replace")[:64]


class _Refused(Exception):
    """The peer does not speak as it should; its connection ends."""


class _Peer(asyncio.Protocol):
    """One connection. It reads no more while it has a whole message that waits to be handled."""

    def __init__(self, port: "Port[Any, Any]", name: bytes) -> None:
        self.name = name  # or else it says it itself
        self._port = port
        self._arrived = bytearray()
        self._greeted = self._authenticated = self.open = False
        self._skip = 0  # bytes to come of a message that is too large
        self._frames: list[bytes | TooLarge] = []  # of the message that is being read; one of several is kept
        self._count = 0
        self._deadline: asyncio.TimerHandle | None = None
        self.transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        if self._port.is_full():
            self._port.surplus.turned_away()
            transport.abort()
            return
        connection: socket.socket = transport.get_extra_info("socket")
        if connection.family == socket.AF_UNIX:
            if _user_of(connection) != os.geteuid():
                self._port.refuse()
                transport.abort()
                return
        else:
            # asyncio does so only where a socket was made for TCP by name. Otherwise what follows another
            # message would wait until the peer acknowledges that, up to 40 ms.
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_S)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_S)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 3_000 * KEEPALIVE_S)
        self._deadline = asyncio.get_running_loop().call_later(HANDSHAKE_S, transport.abort)
        transport.write(_greeting(b"NULL" if self._port.key is None else b"PLAIN"))

    def connection_lost(self, error: Exception | None) -> None:
        self.open = False
        if self._deadline is not None:
            self._deadline.cancel()
        self._port.forget(self)

    def data_received(self, data: bytes) -> None:
        if self._skip:
            skipped = min(self._skip, len(data))
            self._skip -= skipped
            data = data[skipped:]
        self._arrived += data
        if self.is_due():
            self._port.look_at(self)

    def take(self) -> tuple[bytes | TooLarge | ProtocolError, int] | None:
        """Read one frame; returns the message that it completes, with its size, if it does."""
        try:
            return self._read()
        except _Refused:
            self.transport.close()
            self.drop()
            return None

    def drop(self) -> None:
        """Forget what has arrived."""
        self._arrived.clear()

    def wait(self) -> None:
        """Read no more from the connection until ``go_on``."""
        self.transport.pause_reading()

    def go_on(self) -> None:
        if not self.transport.is_closing():
            self.transport.resume_reading()

    def send(self, data: bytes) -> None:
        self.transport.write(_frame(data))

    def is_due(self) -> bool:
        """Whether there is something to take: a greeting, a frame, or enough of one that is too large."""
        if not self._greeted:
            return len(self._arrived) >= _GREETING_BYTES
        if (head := self._head()) is None:
            return False
        _, start, size = head
        return len(self._arrived) - start >= (size if size <= self._largest else _HEAD_BYTES)

    @property
    def _largest(self) -> int:
        return self._port.largest if self.open else _COMMAND_BYTES

    def _head(self) -> tuple[int, int, int] | None:
        """Flags of the next frame, where its body begins, and its size."""
        arrived = self._arrived
        if len(arrived) < 2:
            return None
        if not arrived[0] & _LONG:
            return arrived[0], 2, arrived[1]
        if len(arrived) < 9:
            return None
        return arrived[0], 9, int.from_bytes(arrived[1:9], "big")

    def _read(self) -> tuple[bytes | TooLarge | ProtocolError, int] | None:
        """Take in what ``is_due`` has found."""
        if not self._greeted:
            self._greet(bytes(self._arrived[:_GREETING_BYTES]))
            del self._arrived[:_GREETING_BYTES]
            return None
        head = self._head()
        assert head is not None
        flags, start, size = head
        if size > MAX_MESSAGE_BYTES or (size > self._largest and (flags & _COMMAND or not self.open)):
            raise _Refused
        body = bytes(self._arrived[start : start + min(size, self._largest)])
        self._skip = max(0, start + size - len(self._arrived))
        del self._arrived[: start + size]
        if flags & _COMMAND:
            self._obey(body)
            return None
        if not self.open:
            raise _Refused
        self._count += 1
        if self._count == 1:
            self._frames = [body if size <= self._port.largest else TooLarge(_request_of(body), size)]
        if flags & _MORE:
            return None
        (message,), count = self._frames, self._count
        self._frames, self._count = [], 0
        if count > 1:
            return ProtocolError(f"A message has one frame, not {count}."), size
        return message, size

    def _greet(self, greeting: bytes) -> None:
        mechanism = b"NULL" if self._port.key is None else b"PLAIN"
        ours = greeting[0] == 0xFF and greeting[9] == 0x7F and greeting[10] >= 3
        if not ours:
            raise _Refused
        if greeting[12:32].rstrip(b"\0") != mechanism:
            self._port.refuse()
            raise _Refused
        self._greeted = True
        if self._port.key is None:
            self.transport.write(_frame(_ready(self._port.role), _COMMAND))

    def _obey(self, command: bytes) -> None:
        """Take a command, which is about the connection and not for the router."""
        end = 1 + command[0] if command else 0
        name, rest = command[1:end], command[end:]
        if self.open:
            if name == b"PING" and self.transport.get_write_buffer_size() == 0:
                self.transport.write(_frame(b"\x04PONG" + rest[2:18], _COMMAND))
        elif self._port.key is None and name == b"READY":
            self._open(rest)
        elif self._port.key is not None and name == b"HELLO" and not self._authenticated:
            if not hmac.compare_digest(_password(rest), self._port.key.encode()):
                self.transport.write(_frame(_ERROR, _COMMAND))
                self._port.refuse()
                raise _Refused
            self._authenticated = True
            self.transport.write(_frame(b"\x07WELCOME", _COMMAND))
        elif self._authenticated and name == b"INITIATE":
            self._open(rest)
            self.transport.write(_frame(_ready(self._port.role), _COMMAND))
        else:
            raise _Refused

    def _open(self, metadata: bytes) -> None:
        if not self.name:
            self.name = _identity(metadata)
        if not self._port.admit(self):
            raise _Refused
        self.open = True
        if self._deadline is not None:
            self._deadline.cancel()


def _password(hello: bytes) -> bytes:
    """The second of two strings, each behind a byte with its length."""
    rest = hello[1 + hello[0] :] if hello else b""
    return rest[1 : 1 + rest[0]] if rest else b""


def _identity(metadata: bytes) -> bytes:
    """The peer's name, or nothing."""
    while metadata:
        name_end = 1 + metadata[0]
        value_start = name_end + 4
        value_end = value_start + int.from_bytes(metadata[name_end:value_start], "big")
        if metadata[1:name_end].lower() == b"identity":
            return metadata[value_start:value_end]
        metadata = metadata[value_end:]
    return b""


def _user_of(connection: socket.socket) -> int:
    """Whose process is at the other end of a local connection."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    _, user, _ = struct.unpack("3i", credentials)
    return int(user)


class Port(Generic[Sent, Received]):
    """Listens for peers, in one event loop. A local socket lets in no other user's processes. Connections
    that the limit of open files leaves no room for are closed at once.

    Args:
        listener: from ``listen_tcp`` or ``listen_unix``.
        received: the union of messages that may arrive.
        key: only peers that know it can connect; None for all.
        named: whether peers have names of their own, their identities; each can be there once. Else they are
            numbered.
        largest: bytes of a message that is read; of larger ones only the beginning is.
        unread: bytes that a peer may leave unread.
        handle: gets the name of a peer, what it sent, and how many bytes that were. Peers take turns, and so
            do the event loop's other tasks, after each message.
        refuse: is called when a peer does not know the key, or has one where none is wanted, or is another
            user's.
        role: what it is to peers of ZeroMQ.

    Attributes:
        surplus: is told of connections for which there is no room.
        endpoint: the address bound, such as ``tcp://127.0.0.1:5555`` or ``tcp://[::1]:5555``.
    """

    def __init__(
        self,
        listener: socket.socket,
        received: Any,
        key: str | None,
        named: bool,
        largest: int,
        unread: float,
        handle: Callable[[bytes, Received | ProtocolError | TooLarge, int], None],
        refuse: Callable[[], None],
        role: Literal["ROUTER", "PUB"] = "ROUTER",
    ) -> None:
        self.key, self.largest, self.refuse, self.role = key, largest, refuse, role
        self._named, self._unread, self._handle = named, unread, handle
        self._decode: Decoder[Received] = Decoder(received)
        self._connections: set[_Peer] = set()
        self._peers: dict[bytes, _Peer] = {}  # those that may send, by name
        self._lost = asyncio.Event()  # set whenever a connection ends
        self._due: deque[_Peer] = deque()  # those with a message that waits
        self._will_look = False
        self._count = 0
        self._failure: asyncio.Future[None] | None = None  # while somebody listens
        self._most = 0  # connections
        self.surplus = Strangers(_logger, _FULL)
        self._listener = listener
        self.endpoint = _endpoint(listener)

    async def listen(self) -> None:
        """Have messages handled until this is cancelled. What ``handle`` raises ends it."""
        loop = asyncio.get_running_loop()
        self._failure = loop.create_future()
        most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._most = max(1, most - len(os.listdir("/proc/self/fd")) - _SPARE_DESCRIPTORS)
        server = await loop.create_server(self._connect, sock=self._listener, backlog=_ACCEPTED)
        self._listener.listen(_WAITING)  # asyncio has made that as few as it accepts in a turn
        try:
            await self._failure
        finally:
            server.close()

    async def listen_also(self, listener: socket.socket) -> asyncio.Server:
        """Let peers connect at another address, too, until what is returned is closed."""
        loop = asyncio.get_running_loop()
        return await loop.create_server(self._connect, sock=listener, backlog=_ACCEPTED)

    def send(self, name: bytes, message: Sent) -> Delivery:
        peer = self._peers.get(name)
        if peer is None:
            return Delivery.GONE
        if peer.transport.get_write_buffer_size() >= self._unread:
            return Delivery.FULL
        peer.send(encode(message))
        return Delivery.SENT

    def publish(self, *frames: bytes) -> None:
        """Send a message of several frames to all peers, but those that have not read for long."""
        *first, last = frames
        data = b"".join([*(_frame(frame, _MORE) for frame in first), _frame(last)])
        for peer in self._peers.values():
            if peer.transport.get_write_buffer_size() < self._unread:
                peer.transport.write(data)

    async def close(self, linger_s: float) -> None:
        """What was sent gets up to ``linger_s`` seconds to leave."""
        self._listener.close()
        self._failure = None
        for peer in self._connections:
            peer.transport.close()
        try:
            async with asyncio.timeout(linger_s):
                while self._connections:
                    self._lost.clear()
                    await self._lost.wait()
        except TimeoutError:
            for peer in self._connections:
                peer.transport.abort()

    def is_full(self) -> bool:
        """Whether there are more connections than descriptors for them. Without any left a server could not
        even close the next one, and asyncio would try to take it again and again."""
        return len(self._connections) > self._most

    def admit(self, peer: _Peer) -> bool:
        """Whether a peer may be there, which is so now. Its connection may have ended meanwhile."""
        if not peer.name or peer.name in self._peers or peer not in self._connections:
            return False
        self._peers[peer.name] = peer
        return True

    def forget(self, peer: _Peer) -> None:
        """A connection has ended. What came before that is handled."""
        self._connections.discard(peer)
        if self._peers.get(peer.name) is peer:
            del self._peers[peer.name]
        self._lost.set()

    def look_at(self, peer: _Peer) -> None:
        """A connection has something to take: at once, if that is the first in this turn of the loop."""
        if not self._will_look:
            self._take(peer)
            if not peer.is_due():
                return
        peer.wait()
        self._due.append(peer)

    def _connect(self) -> _Peer:
        self._count += 1
        peer = _Peer(self, b"" if self._named else self._count.to_bytes(8, "big"))
        self._connections.add(peer)
        return peer

    def _look(self) -> None:
        """Take one frame of the connection whose turn it is, if one waits."""
        self._will_look = False
        if not self._due:
            return
        peer = self._due.popleft()
        self._take(peer)
        if peer.is_due():
            self._due.append(peer)
        else:
            peer.go_on()

    def _take(self, peer: _Peer) -> None:
        """Take one frame, unless nobody listens, and look at the others after what that has set off."""
        if self._failure is None or self._failure.done():
            peer.drop()
            return
        try:
            if (taken := peer.take()) is not None:
                self._handle(peer.name, self._message(taken[0]), taken[1])
        except Exception as error:
            self._failure.set_exception(error)
        self._will_look = True
        asyncio.get_running_loop().call_soon(self._look)

    def _message(self, taken: bytes | TooLarge | ProtocolError) -> Received | TooLarge | ProtocolError:
        if not isinstance(taken, bytes):
            return taken
        try:
            return self._decode(taken)
        except ProtocolError as error:
            return error


def _endpoint(listener: socket.socket) -> str:
    address = listener.getsockname()
    if listener.family == socket.AF_UNIX:
        name: str | bytes = address
        return f"ipc://@{name[1:].decode()}" if isinstance(name, bytes) else f"ipc://{name}"
    host = f"[{address[0]}]" if listener.family == socket.AF_INET6 else address[0]
    return f"tcp://{host}:{address[1]}"


class Caller(Generic[Sent, Received]):
    """The connecting end of a ``Port`` without a key at a local socket, for programs that have no event loop.

    Anybody may listen at an address that is no file while no server does. So it says nothing, not even the
    greeting that ZeroMQ would begin with, before the kernel has told whose process has listened there.

    Args:
        endpoint: such as ``ipc://@x``.
        received: the union of messages that may arrive.
        patience_s: seconds that connecting may take, and each wait for a message.

    Raises:
        OSError: nobody listens there.
        ServerUnreachable: another user's process does.
    """

    def __init__(self, endpoint: str, received: Any, patience_s: float) -> None:
        self._decode: Decoder[Received] = Decoder(received)
        self._patience_s = patience_s
        self._greeted = False
        self._socket = socket.socket(socket.AF_UNIX)
        try:
            self._socket.settimeout(patience_s)  # first: who listens may never accept
            self._socket.connect(_unix_name(endpoint))
            if (user := _user_of(self._socket)) != os.geteuid():
                raise ServerUnreachable(
                    f"The process that listens at {endpoint} is user {user}'s and not this user's, so it was "
                    "asked nothing; run this as the user whose server it is."
                )
            self._socket.sendall(_greeting(b"NULL") + _frame(_ready("DEALER"), _COMMAND))
        except BaseException:
            self._socket.close()
            raise

    def __enter__(self) -> "Caller[Sent, Received]":
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def send(self, message: Sent) -> None:
        """Raises ``OSError`` where the other end is gone."""
        self._socket.sendall(_frame(encode(message)))

    def receive(self) -> Received:
        """The next message.

        Raises:
            OSError: none has come in time, or none will come any more.
            ProtocolError: what has come is none.
        """
        deadline = time.monotonic() + self._patience_s
        if not self._greeted:
            self._read(_GREETING_BYTES, deadline)
            self._greeted = True
        while True:
            flags, size = self._read(2, deadline)
            if flags & _LONG:
                size = int.from_bytes(bytes([size]) + self._read(7, deadline), "big")
            if size > MAX_MESSAGE_BYTES or flags & _MORE:
                raise ProtocolError("What listens there does not speak as a server does.")
            body = self._read(size, deadline)
            if not flags & _COMMAND:
                return self._decode(body)

    def _read(self, count: int, deadline: float) -> bytes:
        data = bytearray()
        while len(data) < count:
            self._socket.settimeout(max(0.001, deadline - time.monotonic()))
            part = self._socket.recv(min(count - len(data), 2**20))
            if not part:
                raise ConnectionError("The other end is gone.")
            data += part
        return bytes(data)
