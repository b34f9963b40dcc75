"""What the fault tests share: messages that nobody means to send, and whether a server is well."""

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
import zmq

from clo.runtime.client import Client
from clo.runtime.wire.errors import CLOError
from clo.runtime.wire.messages import Failed, Finished, Message, ToClient
from clo.runtime.wire.sockets import configure, encode
from tests.server import Server

WAIT_S = 120  # only a failure takes as long
SMALL = (  # 4 blocks of 512 tokens
    *("--kv-size", "2MiB", "--max-num-seqs", "8"),
    *("--select-k", "32", "--resident", "128"),
)
ENDLESS: dict[str, Any] = {"max_tokens": 1400, "ignore_eos": True}  # 3 blocks; takes longer than any test


class Raw:
    """A socket that sends what it likes."""

    def __init__(self, socket: zmq.Socket[bytes]) -> None:
        self.socket = socket

    def send(self, message: Message | dict[str, Any] | bytes) -> None:
        if isinstance(message, Message):
            message = encode(message)
        self.socket.send(msgspec.msgpack.encode(message) if isinstance(message, dict) else message)

    def receive(self) -> Any:
        """The next message from a router."""
        assert self.socket.poll(1000 * WAIT_S), "no answer"
        return msgspec.msgpack.decode(self.socket.recv(), type=ToClient)

    def last(self, request: str) -> Any:
        """What ends ``request``; everything else until then is dropped."""
        while True:
            message = self.receive()
            if isinstance(message, Finished | Failed) and message.request == request:
                return message

    def refusal(self) -> Failed:
        message = self.receive()
        assert isinstance(message, Failed), message
        return message


@contextmanager
def raw(address: str, **options: int) -> Iterator[Raw]:
    """A connection to any socket of a server; ``options`` are names of ZeroMQ socket options."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        configure(socket)
        for name, value in options.items():
            socket.setsockopt(getattr(zmq, name), value)
        socket.connect(address)
        yield Raw(socket)


def garbage() -> list[bytes]:
    """Frames that are no message."""
    rng = random.Random(0)
    pack = msgspec.msgpack.encode
    valid = pack({"type": "Cancel", "request": "a"})
    return [
        *(rng.randbytes(rng.randrange(1, 200)) for _ in range(50)),
        b"",
        b"\x91" * 100_000,  # arrays in arrays
        b"\xdd\xff\xff\xff\xff",  # an array of 2**32 - 1 entries that are not there
        valid[:-1],
        valid + b"\x00",
        valid[:-1] + b"\xff",  # no UTF-8
        pack(None),
        pack([1, 2, 3]),
        pack({}),
        pack({"type": 3}),
    ]


def wait_until_idle(client: Client) -> int:
    """Wait until all blocks are free and nothing runs or waits; returns the tokens generated so far."""
    deadline = time.monotonic() + WAIT_S
    while True:
        info = client.info()
        if not info.stores or not info.workers:  # too busy to answer in time
            assert time.monotonic() < deadline, "no answer of store or worker"
            continue
        (store,) = info.stores
        busy = sum(worker.running + worker.waiting for worker in info.workers)
        if store.free_blocks == store.blocks and not store.waiting and not busy:
            return sum(worker.generated_tokens for worker in info.workers)
        assert time.monotonic() < deadline, f"still busy: {info}"
        time.sleep(0.05)


def assert_serves(server: Server) -> None:
    """A normal request of a new client is served and leaves nothing behind."""
    with Client(server.address, timeout=WAIT_S) as client:
        assert len(client.generate("and then", max_tokens=3, ignore_eos=True).tokens) == 3
        wait_until_idle(client)


def error_of(work: Any) -> CLOError:
    """The error with which reading a stream ends."""
    try:
        for _ in work:
            pass
    except CLOError as error:
        return error
    raise AssertionError("the stream ended without an error")
