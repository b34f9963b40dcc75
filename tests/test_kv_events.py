"""What stores publish, as a subscriber of vLLM's events sees it."""

import re
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq

from clo.runtime.client import Client
from tests.faults import WAIT_S, assert_serves
from tests.server import Server

OPTIONS = ("--kv-size", "4MiB", "--max-num-seqs", "2", "--kv-events-port", "0", "--kv-events-topic", "kv")


class Event(msgspec.Struct, array_like=True, tag=True):
    """As vLLM's example of a subscriber declares it, and so are those below."""


class BlockStored(Event):
    block_hashes: list[int | bytes]
    parent_block_hash: int | bytes | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None
    medium: str | None
    lora_name: str | None


class BlockRemoved(Event):
    block_hashes: list[int | bytes]
    medium: str | None


class AllBlocksCleared(Event):
    pass


class Batch(msgspec.Struct, array_like=True):
    ts: float
    events: list[BlockStored | BlockRemoved | AllBlocksCleared]
    data_parallel_rank: int | None = None


class Subscriber:
    def __init__(self, socket: zmq.Socket[bytes]) -> None:
        self._socket = socket
        self.numbers: list[int] = []

    def hears(self, seconds: float) -> bool:
        return bool(self._socket.poll(int(seconds * 1000)))

    def batch(self) -> Batch:
        assert self.hears(WAIT_S), "nothing was published"
        topic, number, payload = self._socket.recv_multipart()
        assert topic == b"kv"
        self.numbers.append(int.from_bytes(number, "big"))
        return msgspec.msgpack.decode(payload, type=Batch)

    def events(self, count: int) -> list[Any]:
        """So many events, however they come."""
        found: list[Any] = []
        while len(found) < count:
            batch = self.batch()
            assert abs(batch.ts - time.time()) < WAIT_S and batch.data_parallel_rank == 0
            found += batch.events
        assert len(found) == count
        return found


def address_of(server: Server) -> str:
    (address,) = re.findall(r"kv-events=(\S+)", server.stdout.read_text())
    return str(address)


@contextmanager
def subscribed(server: Server, topic: bytes = b"kv") -> Iterator[Subscriber]:
    """Once it is connected: what was published before that is lost."""
    with zmq.Context() as context, context.socket(zmq.SUB) as subscriber:
        monitor = subscriber.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED)
        subscriber.setsockopt(zmq.LINGER, 0)
        subscriber.subscribe(topic)
        subscriber.connect(address_of(server))
        assert monitor.poll(WAIT_S * 1000), "no handshake"
        subscriber.disable_monitor()
        yield Subscriber(subscriber)


@pytest.fixture(scope="module")
def server(launch: Callable[..., AbstractContextManager[Server]], tiny_model: Path) -> Iterator[Server]:
    with launch("--model", str(tiny_model), *OPTIONS) as server:
        yield server


def test_a_subscriber_learns_which_blocks_there_are(server: Server) -> None:
    with Client(server.address, timeout=WAIT_S) as client, subscribed(server) as subscriber:

        def ask(prompt: list[int]) -> None:
            client.generate(prompt, max_tokens=1, temperature=0.0)

        (store,) = client.info().stores
        prompt = [5 + place % 200 for place in range(1200)]
        ask(prompt)
        one, two = subscriber.events(2)
        size = one.block_size
        assert (one.token_ids, two.token_ids) == (prompt[:size], prompt[size : 2 * size])
        assert one.parent_block_hash is None and [two.parent_block_hash] == one.block_hashes
        ask(prompt[:size] + [9] * size + prompt[:10])
        (other,) = subscriber.events(1)
        assert [other.parent_block_hash] == one.block_hashes and other.token_ids == [9] * size
        stored = {*one.block_hashes, *two.block_hashes, *other.block_hashes}
        removed: list[int | bytes] = []
        for first in range(300, 300 + store.blocks):  # until none of these are left
            ask([first, *prompt[: 2 * size]])
        while not stored <= set(removed):
            for event in subscriber.batch().events:
                assert isinstance(event, BlockStored | BlockRemoved)
                if isinstance(event, BlockRemoved):
                    removed += event.block_hashes
        assert len(set(removed)) == len(removed)
        assert removed.index(two.block_hashes[0]) < removed.index(one.block_hashes[0]), "the end goes first"
        first = subscriber.numbers[0]
        assert subscriber.numbers == list(range(first, first + len(subscriber.numbers)))


def test_one_who_subscribes_to_something_else_hears_nothing(server: Server) -> None:
    with Client(server.address, timeout=WAIT_S) as client, subscribed(server, b"other") as deaf:
        with subscribed(server) as subscriber:
            client.generate(list(range(4, 300)) * 3, max_tokens=1)
            subscriber.events(1)
        assert not deaf.hears(0.1)


def test_a_store_that_is_started_again_holds_nothing(server: Server) -> None:
    prompt = list(range(300, 4, -1)) * 2 + [11] * 20
    with Client(server.address, timeout=WAIT_S) as client, subscribed(server) as subscriber:

        def ask() -> None:
            assert client.generate(prompt, max_tokens=1).usage.cached_tokens == 0
            while not isinstance(event := subscriber.batch().events[-1], BlockStored):
                assert isinstance(event, BlockRemoved)  # of what was asked before
            assert event.token_ids == prompt[:512]

        ask()
        (store,) = server.children("kvstore")
        store.kill()
        (cleared,) = subscriber.events(1)
        assert isinstance(cleared, AllBlocksCleared)
        ask()


@pytest.mark.parametrize("data", [b"GET / HTTP/1.1\r\n\r\n", bytes(range(256)) * 400])
def test_what_is_no_subscriber_hurts_nobody(server: Server, data: bytes) -> None:
    host, port = address_of(server).removeprefix("tcp://").split(":")
    with socket.create_connection((host, int(port))) as stranger:
        stranger.sendall(data)
    with Client(server.address, timeout=WAIT_S) as client, subscribed(server) as subscriber:
        client.generate([7, *data[:20]] * 30, max_tokens=1)
        subscriber.events(1)
    assert_serves(server)
