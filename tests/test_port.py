"""A port: real ZeroMQ peers, and some that speak as no ZeroMQ does."""

import asyncio
import os
import random
import resource
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import msgspec
import pytest
import zmq
import zmq.asyncio

from clo.runtime.wire import port as port_module
from clo.runtime.wire.errors import ProtocolError
from clo.runtime.wire.messages import (
    MAX_MESSAGE_BYTES,
    Cancel,
    Failed,
    Generate,
    GetInfo,
    Text,
    ToClient,
    ToRouter,
)
from clo.runtime.wire.port import Caller, Delivery, Port, TooLarge, listen_tcp, listen_unix
from clo.runtime.wire.sockets import configure, encode, present
from tests.faults import WAIT_S
from tests.routers import in_loop
from tests.store import new_endpoint

Heard = ToRouter | ProtocolError | TooLarge

LARGEST = 10_000
SIZES = 1, 200, 235, 236, 237, 300, 9_000  # of texts, around those where the frame changes
GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x01" + b"NULL".ljust(20, b"\0") + bytes(32)
READY = b"\x05READY\x0bSocket-Type\x00\x00\x00\x06DEALER"
NAME = b"\x08Identity\x00\x00\x00\x01a"


def command(body: bytes) -> bytes:
    return bytes((4, len(body))) + body


def frame(body: bytes, more: int = 0) -> bytes:
    return struct.pack(">BQ", 2 | more, len(body)) + body


class Peer:
    """A TCP connection that sends what it likes."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self.writer = reader, writer

    def send(self, *parts: bytes) -> None:
        self.writer.write(b"".join(parts))

    async def read(self, size: int) -> bytes:
        return await asyncio.wait_for(self._reader.readexactly(size), WAIT_S)

    async def frame(self) -> bytes:
        flags, size = await self.read(2)
        assert not flags & 2, "a short one is expected"
        return await self.read(size)

    def close(self) -> None:
        self.writer.close()

    async def is_closed(self) -> bool:
        """Wait until the other end closes; what it has sent before is dropped."""
        with suppress(ConnectionResetError):
            await asyncio.wait_for(self._reader.read(-1), WAIT_S)
        return True


class Listening:
    """A running port, and what it has heard."""

    def __init__(self, port: Port[ToClient, ToRouter]) -> None:
        self.port = port
        self.heard: asyncio.Queue[tuple[bytes, Heard, int]] = asyncio.Queue()
        self.refused = 0
        self.context = zmq.asyncio.Context()

    async def next(self) -> tuple[bytes, Heard, int]:
        return await asyncio.wait_for(self.heard.get(), WAIT_S)

    def client(self, **options: Any) -> zmq.asyncio.Socket:
        client = self.context.socket(zmq.DEALER)
        client.setsockopt(zmq.LINGER, 0)
        for name, value in options.items():
            setattr(client, name, value)
        client.connect(self.port.endpoint)
        return client

    async def peer(self, greet: bool = True) -> Peer:
        host, port = self.port.endpoint.removeprefix("tcp://").split(":")
        peer = Peer(*await asyncio.open_connection(host, int(port)))
        if greet:
            peer.send(GREETING, command(READY))
            await peer.read(64)
            assert (await peer.frame()).startswith(b"\x05READY")
        return peer

    async def assert_serves(self) -> None:
        """A new client is heard and answered."""
        client = self.client()
        client.send(encode(GetInfo("served")))
        while (found := await self.next())[1] != GetInfo("served"):
            pass
        name = found[0]
        assert self.port.send(name, Failed("served", "internal", "x")) is Delivery.SENT
        assert b"served" in await asyncio.wait_for(client.recv(), WAIT_S)
        client.close()


@asynccontextmanager
async def listening(
    key: str | None = None, unread: int = 10**6, endpoint: str | None = None, named: bool = True
) -> AsyncIterator[Listening]:
    """Listen to clients, or at an endpoint to peers with names, if they have any."""
    found: Listening

    def handle(name: bytes, message: Heard, size: int) -> None:
        found.heard.put_nowait((name, message, size))

    def refuse() -> None:
        found.refused += 1

    listener = listen_tcp("127.0.0.1", 0) if endpoint is None else listen_unix(endpoint)
    named = named and endpoint is not None
    found = Listening(Port(listener, ToRouter, key, named, LARGEST, unread, handle, refuse))
    task = asyncio.create_task(found.port.listen())
    try:
        yield found
        assert not task.done()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await found.port.close(0)
        found.context.destroy(linger=0)


@in_loop
async def test_messages_of_many_clients_come_in_order_and_whole() -> None:
    async with listening() as found:
        clients = [found.client() for _ in range(20)]
        for number in range(200):
            for place, client in enumerate(clients):
                client.send(encode(Cancel(f"{place}-{number}" + "x" * (number % 50))))
        seen: dict[bytes, list[str]] = {}
        for _ in range(200 * len(clients)):
            name, message, size = await found.next()
            assert isinstance(message, Cancel) and size == len(encode(message))
            seen.setdefault(name, []).append(message.request)
        assert len(seen) == len(clients)
        for requests in seen.values():
            index = requests[0].partition("-")[0]
            assert requests == [f"{index}-{number}" + "x" * (number % 50) for number in range(200)]


@in_loop
async def test_no_message_waits_until_the_one_before_it_is_acknowledged() -> None:
    async with listening() as found:
        client = found.client()
        client.send(encode(GetInfo("first")))
        name, _, _ = await found.next()
        connection = found.port._peers[name].transport.get_extra_info("socket")
        assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


@in_loop
async def test_sizes_around_those_where_the_frame_changes() -> None:
    async with listening() as found:
        client = found.client()
        for size in SIZES:
            message = Generate("r", Text("x" * size))
            client.send(encode(message))
            name, heard, _ = await found.next()
            assert heard == message
            answer = Failed("r", "internal", "y" * size)
            assert found.port.send(name, answer) is Delivery.SENT
            assert msgspec.msgpack.decode(await client.recv(), type=Failed) == answer


@in_loop
async def test_a_message_that_is_too_large_is_not_kept_and_its_request_is_known() -> None:
    async with listening() as found:
        client = found.client()
        large = encode(Generate("its name", Text("x" * 3_000_000)))
        client.send(large)
        client.send(b"\x81\xa7request\xdb" + bytes(LARGEST))
        client.send(bytes(LARGEST + 1))
        client.send(encode(GetInfo("after")))
        assert (await found.next())[1:] == (TooLarge("its name", len(large)), len(large))
        assert [(await found.next())[1] for _ in range(2)] == [
            TooLarge("", LARGEST + 10),
            TooLarge("", LARGEST + 1),
        ]
        name, message, _ = await found.next()
        assert message == GetInfo("after")
        assert len(found.port._peers[name]._arrived) == 0


@in_loop
async def test_several_frames_are_one_wrong_message() -> None:
    async with listening() as found:
        client = found.client()
        client.send_multipart([b"", encode(GetInfo("a"))])
        client.send_multipart([b"x" * (LARGEST + 1), b"", b""])
        client.send(b"\xc1")
        client.send(encode(GetInfo("b")))
        heard = [(await found.next())[1] for _ in range(4)]
        assert [type(message) for message in heard] == [ProtocolError] * 3 + [GetInfo]
        assert "one frame, not 2" in str(heard[0]) and "one frame, not 3" in str(heard[1])


@in_loop
async def test_a_client_that_does_not_read_is_full_and_one_that_is_gone_is_gone() -> None:
    async with listening(unread=100_000) as found:
        deaf, other = await found.peer(), await found.peer()
        for peer in (deaf, other):
            peer.send(frame(encode(GetInfo("r"))))
        (first, _, _), (second, _, _) = await found.next(), await found.next()
        while found.port.send(first, Failed("r", "internal", "x" * 50_000)) is Delivery.SENT:
            await asyncio.sleep(0)
        assert found.port.send(first, Failed("r", "internal", "")) is Delivery.FULL
        assert found.port.send(second, Failed("r", "internal", "")) is Delivery.SENT
        deaf.writer.transport.abort()
        while found.port.send(first, Failed("r", "internal", "")) is not Delivery.GONE:
            await asyncio.sleep(0.01)
        assert found.port.send(b"nobody", Failed("r", "internal", "")) is Delivery.GONE


@in_loop
async def test_what_came_before_the_end_of_a_connection_is_heard() -> None:
    async with listening() as found:
        peer = await found.peer()
        peer.send(*(frame(encode(Cancel(f"{number}"))) for number in range(1000)))
        peer.writer.close()
        assert [(await found.next())[1] for _ in range(1000)] == [Cancel(f"{n}") for n in range(1000)]


@in_loop
async def test_a_flood_is_read_no_faster_than_it_is_handled() -> None:
    """Others have their turns, and the port keeps a bounded part of it."""
    async with listening() as found:
        peer = await found.peer()
        flood = frame(b"a") * 300_000
        peer.send(flood)
        quiet = await found.peer()
        quiet.send(frame(encode(GetInfo("quiet"))))
        count = 0
        while (await found.next())[1] != GetInfo("quiet"):
            count += 1
            assert all(len(other._arrived) < 600_000 for other in found.port._peers.values())
        assert count < 300_000


PING = command(b"\x04PING\x00\x00context")
FLOODS: dict[str, bytes] = {
    "bytes": frame(b"a") * 50_000,
    "pings among them": (frame(b"a") * 20 + PING * 5) * 3_000,
    "pings": PING * 50_000,
    "empty frames": b"\x00\x00" * 100_000,
    "a message without an end": frame(b"a", more=1) * 50_000,
    "unknown commands": command(b"\x07UNKNOWN") * 50_000,
    "half a message": frame(bytes(MAX_MESSAGE_BYTES))[:1_000_000],
}


@pytest.mark.parametrize("flood", FLOODS.values(), ids=FLOODS)
@in_loop
async def test_a_flood_whose_sender_goes_away_hurts_nobody(flood: bytes) -> None:
    async with listening() as found:
        for _ in range(3):
            peer = await found.peer()
            peer.send(flood)
            await asyncio.sleep(0.05)
            peer.writer.transport.abort()
        await found.assert_serves()
        while found.port._peers:
            await asyncio.sleep(0.01)


@in_loop
async def test_pings_of_a_peer_that_does_not_read_are_not_answered_before_it_does() -> None:
    """One answer may wait for it to read, and no more."""
    async with listening() as found:
        peer = await found.peer()
        transport = peer.writer.transport
        assert isinstance(transport, asyncio.Transport)
        transport.pause_reading()
        count = 20_000  # far more answers than the kernel keeps
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        (connection,) = found.port._connections
        ours = connection.transport.get_extra_info("socket")
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        peer.send(PING * count, frame(encode(Cancel("after"))))
        assert (await found.next())[1] == Cancel("after")
        assert connection.transport.get_write_buffer_size() <= len(PING)
        transport.resume_reading()
        while connection.transport.get_write_buffer_size():
            await asyncio.sleep(0.001)
        peer.send(command(b"\x04PING\x00\x00again"))
        answers = 0
        while (answer := await peer.frame()) != b"\x04PONGagain":
            assert answer == b"\x04PONGcontext"
            answers += 1
        assert 0 < answers < count


WRONG: dict[str, tuple[bool, bytes]] = {
    "another protocol": (False, b"GET / HTTP/1.1\r\n" + bytes(64)),
    "an old ZMTP": (False, GREETING[:10] + b"\x01" + GREETING[11:]),
    "another mechanism": (False, GREETING.replace(b"NULL", b"PLAI")),
    "a message before READY": (False, GREETING + frame(b"a")),
    "a large message before READY": (False, GREETING + frame(bytes(5000))),
    "HELLO without a key": (False, GREETING + command(b"\x05HELLO\x01a\x01b")),
    "an empty command": (False, GREETING + command(b"")),
    "a command that is too large": (True, struct.pack(">BQ", 6, LARGEST + 1) + bytes(LARGEST + 1)),
    "a message beyond all limits": (True, struct.pack(">BQ", 2, 2**63) + bytes(LARGEST)),
}


@pytest.mark.parametrize(("greet", "data"), WRONG.values(), ids=WRONG)
@in_loop
async def test_a_peer_that_does_not_speak_as_it_should_loses_its_connection(greet: bool, data: bytes) -> None:
    async with listening() as found:
        peer = await found.peer(greet)
        peer.send(data)
        assert await peer.is_closed()
        await found.assert_serves()


@pytest.mark.parametrize("seed", range(5))
@in_loop
async def test_random_frames_hurt_nobody(seed: int) -> None:
    """With and without a key, before and after the handshake, cut anywhere."""
    rng = random.Random(seed)
    parts = [
        READY,
        b"\x05HELLO\x03clo\x01k",
        b"\x05HELLO",
        b"\x04PING\x00\x00x",
        b"",
        b"\xff",
        encode(Cancel("r")),
    ]
    for key in (None, "k"):
        mechanism = b"PLAIN" if key else b"NULL\0"
        async with listening(key) as found:
            for _ in range(100):
                peer = await found.peer(greet=False)
                peer.send(GREETING.replace(b"NULL\0", mechanism))
                for _ in range(rng.randrange(12)):
                    body = rng.choice([*parts, rng.randbytes(rng.randrange(30))])
                    flags = rng.choice([0, 1, 2, 4, 6, rng.randrange(256)])
                    size = rng.choice([len(body), len(body), rng.randrange(2**20)])
                    head = struct.pack(">BQ", flags, size) if flags & 2 else bytes((flags, size & 255))
                    peer.send(head, body)
                    if rng.random() < 0.2:
                        await asyncio.sleep(0)
                peer.writer.close()
            while found.port._peers:
                await asyncio.sleep(0.01)
            if key is None:
                await found.assert_serves()


@in_loop
async def test_a_peer_that_never_says_who_it_is_loses_its_connection() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(port_module, "HANDSHAKE_S", 0.05)
        async with listening() as found:
            silent, half = await found.peer(greet=False), await found.peer(greet=False)
            half.send(GREETING)
            assert await silent.is_closed() and await half.is_closed()


@in_loop
async def test_more_idle_connections_than_descriptors_hurt_nobody() -> None:
    """Those are closed at once; who is there already is served, and so is everybody once they have gone."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = len(os.listdir("/proc/self/fd")) + port_module._SPARE_DESCRIPTORS + 40
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, before[1]))
    try:
        async with listening() as found:
            client = found.client()
            client.send(encode(GetInfo("first")))
            name, _, _ = await found.next()
            resource.setrlimit(resource.RLIMIT_NOFILE, before)  # this process holds both ends
            idle = [await found.peer(greet=False) for _ in range(60)]
            for peer in idle[45:]:
                assert await peer.is_closed()
            assert found.port.send(name, Failed("first", "internal", "x")) is Delivery.SENT
            assert b"first" in await asyncio.wait_for(client.recv(), WAIT_S)
            for peer in idle:
                peer.close()
            await found.assert_serves()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@in_loop
async def test_only_clients_with_the_key_are_heard() -> None:
    """Others are told apart by their libraries: a mechanism that does not fit, or a key that does not."""
    async with listening(key="ünïque") as found:
        strangers = [
            found.client(),
            found.client(plain_username=b"clo", plain_password=b"another"),
            found.client(plain_username=b"clo", plain_password="ünïqu".encode()),
        ]
        events = zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_AUTH
        monitors = [stranger.get_monitor_socket(events) for stranger in strangers]
        for stranger in strangers:
            stranger.send(encode(GetInfo("stranger")))
        for monitor in monitors:
            await asyncio.wait_for(monitor.recv_multipart(), WAIT_S)
        for data in (
            GREETING.replace(b"NULL\0", b"PLAIN") + command(READY),
            GREETING.replace(b"NULL\0", b"PLAIN") + command(b"\x08INITIATE"),
            GREETING.replace(b"NULL\0", b"PLAIN") + command(b"\x05HELLO\x03clo"),
            GREETING.replace(b"NULL\0", b"PLAIN") + command(b"\x05HELLO"),
        ):
            peer = await found.peer(greet=False)
            peer.send(data, frame(encode(GetInfo("stranger"))))
            assert await peer.is_closed()
        client = found.client(plain_username=b"clo", plain_password="ünïque".encode())
        client.send(encode(GetInfo("friend")))
        name, message, _ = await found.next()
        assert message == GetInfo("friend")
        found.port.send(name, Failed("friend", "internal", ""))
        assert b"friend" in await asyncio.wait_for(client.recv(), WAIT_S)
        assert found.refused >= 3 and found.heard.empty()


@in_loop
async def test_what_was_sent_leaves_before_the_port_closes() -> None:
    async with listening() as found:
        client = found.client()
        client.send(encode(GetInfo("r")))
        name, _, _ = await found.next()
        for _ in range(100):
            found.port.send(name, Failed("r", "internal", "x" * 5_000))
        await found.port.close(WAIT_S)
        for _ in range(100):
            assert len(await asyncio.wait_for(client.recv(), WAIT_S)) > 5_000


@in_loop
async def test_the_kernel_asks_whether_a_silent_client_is_still_there() -> None:
    """Its timer runs: a client whose machine is gone loses its connection without a word."""
    async with listening() as found:
        peer = await found.peer()
        ours = peer.writer.get_extra_info("sockname")[1]
        with open("/proc/net/tcp") as table:
            (row,) = (line.split() for line in table if line.split()[2].endswith(f":{ours:04X}"))
        assert row[5].startswith("02"), "timer 2 is that of keepalive"


@in_loop
async def test_peers_with_names_are_heard_and_answered_by_them() -> None:
    """Each name is there once; one without a name, with another key or with none is not let in."""
    async with listening("key", endpoint=new_endpoint()) as found:

        def peer(name: bytes, key: str | None = "key") -> zmq.asyncio.Socket:
            socket = found.context.socket(zmq.DEALER)
            configure(socket)
            socket.setsockopt(zmq.RECONNECT_IVL, -1)
            if name:
                socket.setsockopt(zmq.IDENTITY, name)
            if key is not None:
                present(socket, key)
            socket.connect(found.port.endpoint)
            socket.send(encode(Cancel(name.decode())))
            return socket

        peers = {name: peer(name) for name in (b"worker-0", b"worker-1", b"x" * 60)}
        heard = {name: message for name, message, _ in [await found.next() for _ in peers]}
        assert heard == {name: Cancel(name.decode()) for name in peers}
        for name, socket in peers.items():
            assert found.port.send(name, Failed(name.decode(), "internal", "x")) is Delivery.SENT
            assert name in await asyncio.wait_for(socket.recv(), WAIT_S)
        intruders = [peer(b"worker-1"), peer(b""), peer(b"worker-2", None), peer(b"worker-3", "another key")]
        while not found.refused:  # one without a key goes away by itself
            await asyncio.sleep(0.01)
        assert found.port.send(b"worker-1", Failed("own", "internal", "x")) is Delivery.SENT
        assert b"own" in await asyncio.wait_for(peers[b"worker-1"].recv(), WAIT_S)
        for name in (b"", b"worker-2", b"worker-3"):
            assert found.port.send(name, Failed("r", "internal", "x")) is Delivery.GONE
        peers[b"worker-1"].close()
        while found.port.send(b"worker-1", Failed("r", "internal", "x")) is not Delivery.GONE:
            await asyncio.sleep(0.01)
        again = peer(b"worker-1")
        assert (await found.next())[:2] == (b"worker-1", Cancel("worker-1"))
        for socket in (*intruders, again):
            assert not await socket.poll(0)


@in_loop
async def test_a_process_of_another_user_is_not_let_in() -> None:
    """Whatever its name: it hears nothing and nothing of it is heard. (Here it is the port's user that
    changes.)"""
    async with listening(endpoint=new_endpoint()) as found:
        address = "\0" + found.port.endpoint.removeprefix("ipc://@")
        another = os.geteuid() + 1
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "geteuid", lambda: another)
            reader, writer = await asyncio.open_unix_connection(address)
            assert await asyncio.wait_for(reader.read(1), WAIT_S) == b""
            writer.close()
        assert found.refused == 1
        reader, writer = await asyncio.open_unix_connection(address)
        writer.write(GREETING + command(READY + NAME) + frame(encode(Cancel("r"))))
        assert await asyncio.wait_for(reader.readexactly(64), WAIT_S)
        assert (await found.next())[:2] == (b"a", Cancel("r"))
        assert found.refused == 1
        writer.close()


@in_loop
async def test_a_peer_is_heard_at_once_and_the_tasks_that_it_sets_off_before_its_next_message() -> None:
    """Whatever the number of messages that one read of the connection brings."""
    order: list[str] = []

    async def note(text: str) -> None:
        order.append(text)

    def handle(name: bytes, message: Heard, size: int) -> None:
        assert isinstance(message, Cancel)
        order.append(f"message {message.request}")
        tasks.append(asyncio.create_task(note(f"task {message.request}")))

    tasks: list[asyncio.Task[None]] = []
    port: Port[ToClient, ToRouter] = Port(
        listen_unix(new_endpoint()), ToRouter, None, True, LARGEST, 10**6, handle, lambda: None
    )
    listen = asyncio.create_task(port.listen())
    _, writer = await asyncio.open_unix_connection("\0" + port.endpoint.removeprefix("ipc://@"))
    messages = [encode(Cancel(f"{number}")) for number in range(3)]
    writer.write(b"".join([GREETING, command(READY + NAME), *map(frame, messages)]))
    while len(order) < 6:
        await asyncio.sleep(0.001)
    assert order == [f"{what} {number}" for number in range(3) for what in ("message", "task")]
    listen.cancel()
    await asyncio.gather(listen, *tasks, return_exceptions=True)
    await port.close(0)
    writer.close()


@in_loop
async def test_a_caller_and_a_port_understand_each_other() -> None:
    """Over messages of all sizes, in both directions."""
    endpoint = new_endpoint()
    async with listening(endpoint=endpoint, named=False) as found:

        def talk() -> list[str]:
            with Caller[ToRouter, ToClient](endpoint, ToClient, WAIT_S) as caller:
                for size in SIZES:
                    caller.send(Generate("r", Text("x" * size)))
                answers = [caller.receive() for _ in SIZES]
            return [answer.text for answer in answers if isinstance(answer, Failed)]

        talking = asyncio.create_task(asyncio.to_thread(talk))
        for size in SIZES:
            name, message, _ = await found.next()
            assert isinstance(message, Generate) and message.prompt == Text("x" * size)
            found.port.send(name, Failed("r", "internal", "y" * size))
        assert await talking == ["y" * size for size in SIZES]


ANSWERS = {
    "nothing": b"",
    "half a greeting": GREETING[:40],
    "half a frame": GREETING + command(READY) + b"\0\x09half",
    "random bytes": random.Random(0).randbytes(1000),
    "more than a message": GREETING + b"\x02" + (2**40).to_bytes(8, "big"),
    "several frames": GREETING + b"\x01\x01x\0\x01x",
    "no message": GREETING + b"\0\x01\xc1",
}


@pytest.mark.parametrize("answer", ANSWERS.values(), ids=ANSWERS)
@pytest.mark.parametrize("stays", [True, False])
def test_a_caller_waits_for_nothing_that_will_not_come(answer: bytes, stays: bool) -> None:
    endpoint = new_endpoint()
    patience_s = 0.05 if stays else WAIT_S
    with (
        listen_unix(endpoint) as listener,
        Caller[ToRouter, ToClient](endpoint, ToClient, patience_s) as caller,
        listener.accept()[0] as peer,
    ):
        caller.send(GetInfo("r"))
        peer.sendall(answer)
        if not stays:
            peer.shutdown(socket.SHUT_RDWR)
        with pytest.raises((OSError, ProtocolError)):
            caller.receive()
    with pytest.raises(ConnectionRefusedError):
        Caller[ToRouter, ToClient](endpoint, ToClient, WAIT_S)
