"""A real KV store process for tests."""

import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import msgspec
import zmq

from clo.kvstore.arena import Arena
from clo.kvstore.client import StoreClient
from clo.kvstore.pool import BlockPool
from clo.kvstore.server import Launcher, StoreServer, listen
from clo.runtime.config import BlockConfig, StartedWorker, StoreConfig
from clo.runtime.wire.messages import Attach, Attached, FromStore, Ping, ToStore
from clo.runtime.wire.sockets import DealerSocket, configure

MIB = 2**20
ARENA_BYTES = 64 * MIB
BLOCK = BlockConfig(layers=4, kv_heads=2, tokens=16, bytes=MIB)
KEY = "the key of all stores in tests"
LAUNCHER = "ipc://@clo-test-nobody"
WAIT_MS = 120_000  # only a failure takes as long


def new_endpoint() -> str:
    return f"ipc://@clo-test-{uuid.uuid4().hex}"


def store_config(endpoint: str, **others: Any) -> StoreConfig:
    """A store with ``ARENA_BYTES`` for workers 0 to 9, each of which is this process and a group of its own;
    ``others`` are fields that differ."""
    workers = {number: StartedWorker(os.getpid(), number) for number in range(10)}
    return replace(StoreConfig("numa0", 0, ARENA_BYTES, endpoint, LAUNCHER, BLOCK, workers), **others)


def start(config: StoreConfig, parent: int | None = None) -> subprocess.Popen[str]:
    """A store whose parent is this process, or says to be ``parent``; its stderr is a pipe."""
    process = subprocess.Popen(
        command(config, parent or os.getpid()), stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdin is not None
    print(KEY, file=process.stdin, flush=True)
    return process


def command(config: StoreConfig, parent: int) -> list[str]:
    return [sys.executable, "-m", "clo.kvstore", msgspec.json.encode(config).decode(), str(parent)]


class Store:
    """A running store and clients of it.

    Attributes:
        process: the store; its stderr is a pipe.
        endpoint: its control address.
    """

    def __init__(self, context: zmq.Context, config: StoreConfig) -> None:
        self.endpoint = config.endpoint
        self.process = start(config)
        self._context = context

    def client(self) -> StoreClient:
        """A client that has not attached."""
        return StoreClient(self._context, self.endpoint, KEY)

    def worker(self, number: int) -> tuple[StoreClient, Attached]:
        """A client that has attached from this process."""
        client = self.client()
        return client, client.attach(Attach(number, os.getpid()), WAIT_MS / 1000)

    def raw(self, key: str | None = KEY) -> zmq.Socket[bytes]:
        """A socket that sends what it likes."""
        socket: zmq.Socket[bytes] = self._context.socket(zmq.DEALER)
        configure(socket, key)
        socket.connect(self.endpoint)
        return socket


@contextmanager
def running_store(**others: Any) -> Iterator[Store]:
    """A store with a configuration as of ``store_config``; at the end it and its clients are gone."""
    context: zmq.Context = zmq.Context()
    store = Store(context, store_config(new_endpoint(), **others))
    try:
        yield store
    finally:
        store.process.kill()
        store.process.communicate()
        context.destroy(linger=0)


@contextmanager
def own_store() -> Iterator[StoreServer]:
    """A store in this process, to which a test gives messages itself; nobody reads its answers."""
    config = store_config(new_endpoint())
    arena = Arena.create(ARENA_BYTES)
    pool = BlockPool(ARENA_BYTES // BLOCK.bytes, BLOCK.tokens)
    with zmq.Context() as context, listen(context, config.endpoint, KEY) as socket:
        launcher: Launcher = DealerSocket(context, LAUNCHER, Ping, KEY)
        yield StoreServer(config, arena, pool, socket, launcher)
        launcher.close()
    arena.close()


def ask(client: StoreClient, message: ToStore) -> FromStore:
    """The next answer after ``message``."""
    client.send(message)
    answer = client.receive(WAIT_MS)
    assert answer is not None, f"no answer to {message}"
    return answer
