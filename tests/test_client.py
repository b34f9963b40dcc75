"""The client alone: servers that are not there, do not answer or go away, and a client that is closed."""

import asyncio
import socket
import threading
from collections.abc import Iterator

import pytest
import zmq

from clo.runtime import client as client_module
from clo.runtime.client import AsyncClient, Client
from clo.runtime.wire.errors import CLOError, ProtocolError, ServerUnreachable
from clo.runtime.wire.messages import (
    NO_STATS,
    Cancel,
    Chunk,
    Failed,
    Finished,
    Generate,
    Message,
    ToRouter,
    Usage,
)
from clo.runtime.wire.sockets import Decoder, configure, encode
from tests.faults import WAIT_S, error_of


class FakeServer:
    """A router that answers what a test tells it to."""

    def __init__(self, context: zmq.Context) -> None:
        self.socket: zmq.Socket[bytes] = context.socket(zmq.ROUTER)
        configure(self.socket)
        self.address = f"tcp://127.0.0.1:{self.socket.bind_to_random_port('tcp://127.0.0.1')}"
        self._peer = b""
        self._decode: Decoder[ToRouter] = Decoder(ToRouter)

    def receive(self) -> ToRouter:
        assert self.socket.poll(1000 * WAIT_S), "the client sent nothing"
        self._peer, data = self.socket.recv_multipart()
        return self._decode(data)

    def send(self, message: Message | bytes) -> None:
        data = message if isinstance(message, bytes) else encode(message)
        self.socket.send_multipart([self._peer, data])


@pytest.fixture
def server() -> Iterator[FakeServer]:
    context: zmq.Context = zmq.Context()
    yield FakeServer(context)
    context.destroy(linger=0)


@pytest.mark.parametrize("address", ["nowhere", "tcp://127.0.0.1", "smtp://127.0.0.1:1"])
def test_an_address_that_is_none(address: str) -> None:
    threads = threading.active_count()
    with pytest.raises(ServerUnreachable, match=f"'{address}' is not an address"):
        Client(address)
    assert threading.active_count() == threads


def test_no_server_at_the_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error after 5 s of silence, here 0.3 s."""
    monkeypatch.setattr(client_module, "SILENCE_SECONDS", 0.3)
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))  # it does not listen
        address = f"tcp://127.0.0.1:{reserved.getsockname()[1]}"
        with Client(address) as client:
            with pytest.raises(ServerUnreachable, match=f"No server answers at {address}"):
                client.info()
            with pytest.raises(ServerUnreachable, match=f"Nothing heard from {address} for 0.3 s"):
                client.generate("a")


@pytest.mark.parametrize("answer", [b"\xc1", encode(Cancel("a")), b"\xa4\xff\xff\xff\xff"])
def test_a_server_that_speaks_otherwise(server: FakeServer, answer: bytes) -> None:
    """An error at once, and the connection can still be used."""
    with Client(server.address) as client:
        stream = client.stream("a")
        server.receive()
        server.send(answer)
        assert type(error_of(stream)) is ProtocolError
        assert isinstance(server.receive(), Cancel)
        stream = client.stream("a")
        server.send(Finished(server.receive().request, "stop", Usage(1, 0), NO_STATS))
        assert list(stream) == []


def test_a_connection_that_breaks_ends_every_open_request(server: FakeServer) -> None:
    with Client(server.address) as client:
        streams = [client.stream("a"), client.stream("b")]
        for _ in streams:
            server.receive()
        server.socket.close()
        for stream in streams:
            assert "was lost; is the server running?" in str(error_of(stream))


def test_an_error_without_a_request_ends_every_open_request(server: FakeServer) -> None:
    with Client(server.address) as client:
        streams = [client.stream("a"), client.stream("b")]
        for _ in streams:
            server.receive()
        server.send(Failed("", "a code of later versions", "No."))
        for stream in streams:
            error = error_of(stream)
            assert type(error) is CLOError and str(error) == "No."


def test_leaving_a_stream_early_cancels_it(server: FakeServer) -> None:
    with Client(server.address) as client:
        stream = client.stream("a")
        request = server.receive().request
        with pytest.raises(RuntimeError, match="has not ended"):
            _ = stream.result
        server.send(Chunk(request, "x", [1], None))
        for chunk in stream:
            assert chunk.text == "x"
            break
        assert server.receive() == Cancel(request)
        server.send(Finished(request, "cancelled", Usage(1, 1), NO_STATS))


def test_closing_the_client_ends_its_open_streams(server: FakeServer) -> None:
    """A thread that reads one is told, and the server hears ``Cancel``."""
    client = Client(server.address)
    stream = client.stream("a")
    errors: list[CLOError] = []
    reader = threading.Thread(target=lambda: errors.append(error_of(stream)))
    reader.start()
    request = server.receive()
    assert isinstance(request, Generate)
    client.close()
    reader.join(WAIT_S)
    assert [str(error) for error in errors] == ["The client was closed."]
    assert server.receive() == Cancel(request.request)
    client.close()  # a second time does nothing


def test_closing_an_async_client_ends_its_open_requests(server: FakeServer) -> None:
    async def run() -> None:
        client = AsyncClient(server.address)
        request = asyncio.create_task(client.generate("a"))
        await asyncio.to_thread(server.receive)
        await client.close()
        with pytest.raises(ServerUnreachable, match="closed"):
            await request

    asyncio.run(run())


def test_threads_share_a_client(server: FakeServer) -> None:
    """Each gets the answer to its own request, in whatever order they come."""
    results: dict[str, str] = {}

    def ask(client: Client, prompt: str) -> None:
        results[prompt] = client.generate(prompt, timeout=WAIT_S).text

    with Client(server.address) as client:
        threads = [threading.Thread(target=ask, args=(client, str(number))) for number in range(8)]
        for thread in threads:
            thread.start()
        requests = [server.receive() for _ in threads]
        for request in reversed(requests):
            assert isinstance(request, Generate)
            server.send(Chunk(request.request, f"answer to {request.prompt.text}", [1], None))  # type: ignore[union-attr]
            server.send(Finished(request.request, "stop", Usage(1, 1), NO_STATS))
        for thread in threads:
            thread.join(WAIT_S)
    assert results == {str(number): f"answer to {number}" for number in range(8)}
