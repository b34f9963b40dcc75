"""A real KV store process for tests."""

import json
import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

import zmq

from clo.kvstore.arena import Arena
from clo.kvstore.client import StoreClient
from clo.kvstore.server import StoreServer, listen
from clo.runtime.config import StoreConfig
from clo.runtime.wire.messages import Attach, Attached, FromStore, ToStore

MIB = 2**20
ARENA_BYTES = 64 * MIB
WAIT_MS = 120_000  # only a failure takes as long


def command(
    endpoint: str, arena_bytes: int = ARENA_BYTES, node: int = 0, parent: int | None = None
) -> list[str]:
    """Command line of a store whose parent is this process, or ``parent``."""
    config = {"name": f"numa{node}", "node": node, "arena_bytes": arena_bytes, "endpoint": endpoint}
    return [sys.executable, "-m", "clo.kvstore", json.dumps(config), str(parent or os.getpid())]


def new_endpoint() -> str:
    return f"ipc://@clo-test-{uuid.uuid4().hex}"


class Store:
    """A running store and clients of it.

    Attributes:
        process: the store; its stderr is a pipe.
        endpoint: its control address.
    """

    def __init__(self, context: zmq.Context, node: int) -> None:
        self.endpoint = new_endpoint()
        self.process = subprocess.Popen(command(self.endpoint, node=node), stderr=subprocess.PIPE, text=True)
        self._context = context

    def client(self) -> StoreClient:
        """A client that has not attached."""
        return StoreClient(self._context, self.endpoint)

    def worker(self, number: int, block_bytes: int = MIB) -> tuple[StoreClient, Attached]:
        """A client that has attached from this process, with blocks of 16 tokens."""
        client = self.client()
        return client, client.attach(Attach(number, number, os.getpid(), 16, block_bytes), WAIT_MS / 1000)

    def raw(self) -> zmq.Socket[bytes]:
        """A socket that sends what it likes."""
        socket: zmq.Socket[bytes] = self._context.socket(zmq.DEALER)
        socket.connect(self.endpoint)
        return socket


@contextmanager
def running_store(node: int = 0) -> Iterator[Store]:
    """A store with an arena of 64 MiB; at the end it and its clients are gone."""
    context: zmq.Context = zmq.Context()
    store = Store(context, node)
    try:
        yield store
    finally:
        store.process.kill()
        store.process.wait()
        if store.process.stderr is not None:
            store.process.stderr.close()
        context.destroy(linger=0)


@contextmanager
def own_store() -> Iterator[StoreServer]:
    """A store of 64 MiB in this process, to which a test gives messages itself; nobody reads its answers."""
    endpoint = new_endpoint()
    arena = Arena.create(ARENA_BYTES)
    with zmq.Context() as context, listen(context, endpoint) as socket:
        yield StoreServer(StoreConfig("numa0", 0, ARENA_BYTES, endpoint), arena, socket)
    arena.close()


def ask(client: StoreClient, message: ToStore) -> FromStore:
    """The next answer after ``message``."""
    client.send(message)
    answer = client.receive(WAIT_MS)
    assert answer is not None, f"no answer to {message}"
    return answer
