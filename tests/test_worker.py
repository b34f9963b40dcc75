"""A worker's loop: real sockets within this process, and the engine of ``tests.fake_engine``."""

from pathlib import Path
from typing import Any, cast

import msgspec
import pytest
import zmq

from clo.gpu_worker.engine import Engine
from clo.gpu_worker.startup import Started
from clo.gpu_worker.worker import Worker
from clo.kvstore.client import StoreClient
from clo.runtime.config import ResolvedModel, WorkerConfig
from clo.runtime.wire.messages import (
    Allocate,
    Allocated,
    Done,
    FromWorker,
    Ping,
    Pong,
    Run,
    Sampling,
    Stepped,
    ToStore,
)
from clo.runtime.wire.sockets import encode
from tests.conftest import TINY
from tests.fake_engine import MAX_TOKENS, FakeEngine
from tests.store import KEY

ROUTER, STORE = "inproc://router", "inproc://store"
FLOOD = 30_000  # messages, far more than fit into the turns of one short stream


class Over(Exception):
    """The worker has nothing to do any more."""


def peer(context: zmq.Context[Any], endpoint: str) -> zmq.Socket[bytes]:
    """The other end of a worker's connection; it may be any number of messages ahead."""
    socket: zmq.Socket[bytes] = context.socket(zmq.DEALER)
    socket.set_hwm(0)
    socket.bind(endpoint)
    return socket


def test_a_flood_of_messages_does_not_keep_a_worker_from_its_streams(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stream comes to its end between them, though more messages wait all the time."""
    model = ResolvedModel("tiny", str(tmp_path), TINY, MAX_TOKENS, "float32", "cpu", "auto", 0)
    engine = FakeEngine()
    context: zmq.Context[Any] = zmq.Context()
    router, store = peer(context, ROUTER), peer(context, STORE)
    client = StoreClient(context, STORE, KEY)
    started = Started(cast(Engine, engine), None, None, client, "numa0", MAX_TOKENS)
    worker = Worker(WorkerConfig(0, ROUTER, {0: STORE}, model), context, KEY, started)
    advance = worker.scheduler.advance

    def advance_until_over() -> bool:
        engine.finish()
        moved = advance()
        if not worker.scheduler.busy:
            raise Over
        return moved

    monkeypatch.setattr(worker.scheduler, "advance", advance_until_over)
    try:
        worker.scheduler.add(Run(0, [0, 0], Sampling(temperature=0.0, max_tokens=3), 1, [], None, 0))
        wanted = msgspec.msgpack.decode(store.recv(), type=ToStore)
        assert isinstance(wanted, Allocate)
        store.send(encode(Allocated(0, list(range(wanted.blocks)))))
        ping = encode(Ping())
        for _ in range(FLOOD):
            router.send(ping)
        with pytest.raises(Over):
            worker.serve()
        heard: list[FromWorker] = []
        while not heard or not isinstance(heard[-1], Done):
            assert router.poll(0), "the stream has not come to its end"
            heard.append(msgspec.msgpack.decode(router.recv(), type=FromWorker))
        tokens = [step.token for message in heard if isinstance(message, Stepped) for step in message.steps]
        assert tokens == [1, 2, 3]
        assert sum(isinstance(message, Pong) for message in heard) < FLOOD
    finally:
        context.destroy(linger=0)
