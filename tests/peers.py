"""A router in the event loop of a test, and clients and workers that say what the test says."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import msgspec
import zmq
import zmq.asyncio

from clo.runtime.config import ResolvedModel, ServerConfig
from clo.runtime.router import Router
from clo.runtime.wire.messages import (
    GATEWAY_IDENTITY,
    Chunk,
    Chunks,
    DriftStats,
    Failed,
    Finished,
    GetInfo,
    GetWorkerStats,
    HeadRows,
    Info,
    Logprob,
    Message,
    Ping,
    Ready,
    Step,
    Stepped,
    StoreStats,
    ToClient,
    ToWorker,
    WorkerReport,
    WorkerStats,
    worker_identity,
)
from clo.runtime.wire.sockets import configure, encode, present
from tests.faults import WAIT_S
from tests.store import KEY, new_endpoint

SLOTS = 2  # of each worker


class Peer:
    """One end of a connection to the router; what it hears is kept until somebody asks for it."""

    def __init__(
        self, context: zmq.asyncio.Context, endpoint: str, union: Any, key: str | None, **options: Any
    ) -> None:
        self.socket = context.socket(zmq.DEALER)
        configure(self.socket)
        if key is not None:
            present(self.socket, key)
        for name, value in options.items():
            self.socket.setsockopt(getattr(zmq, name), value)
        self.socket.connect(endpoint)
        self._decoder = msgspec.msgpack.Decoder(union)

    def send(self, message: Message) -> None:
        self.socket.send(encode(message))

    async def message(self) -> Any:
        """The next message, as it came."""
        return self._decoder.decode(await asyncio.wait_for(self.socket.recv(), WAIT_S))


class Client(Peer):
    """A client; ``next`` gives the chunks of a message one by one."""

    def __init__(self, context: zmq.asyncio.Context, endpoint: str, **options: Any) -> None:
        super().__init__(context, endpoint, ToClient, None, **options)
        self._questions = 0
        self._chunks: deque[Chunk] = deque()

    async def next(self) -> Any:
        while not self._chunks:
            message = await self.message()
            if not isinstance(message, Chunks):
                return message
            self._chunks.extend(message.chunks)
        return self._chunks.popleft()

    async def info(self) -> tuple[Info | Failed, list[Any]]:
        """The answer to ``GetInfo``, and what came before it."""
        self._questions += 1
        name = f"question {self._questions}"
        self.send(GetInfo(name))
        before: list[Any] = []
        while (message := await self.next()).request != name:
            before.append(message)
        return message, before

    async def to_end(self, name: str) -> list[Any]:
        """All that comes for a request, to its end; there is nothing else."""
        messages: list[Any] = []
        while not messages or not isinstance(messages[-1], Finished | Failed):
            messages.append(await self.next())
            assert messages[-1].request == name
        return messages


class Worker(Peer):
    """A worker that reports its statistics by itself, unless it is ``silent``."""

    def __init__(self, context: zmq.asyncio.Context, endpoint: str, key: str | None, number: int) -> None:
        super().__init__(context, endpoint, ToWorker, key, IDENTITY=worker_identity(number))
        self.number, self.silent = number, False
        self.asked = 0  # times that it was asked for statistics
        self.heard: list[ToWorker] = []
        self._read = 0
        self._more = asyncio.Event()
        self.task = asyncio.create_task(self._listen())

    async def _listen(self) -> None:
        while True:
            message = self._decoder.decode(await self.socket.recv())
            if isinstance(message, GetWorkerStats):
                self.asked += 1
                if not self.silent:
                    self.send(self.report())
            else:
                self.heard.append(message)
                self._more.set()

    def report(self) -> WorkerReport:
        heads = HeadRows(selected=[[9, 8]], fetched=[[1, 0]])
        stats = WorkerStats(self.number, 1, 1, 2, 3, 4, 5, 6, 7, 8, DriftStats(9, 0.5, 1.0), heads, 1)
        return WorkerReport(stats, StoreStats(f"numa{self.number % 2}", 1, 2, 3, 4, 0, 5, 6, 0, 0))

    def ready(self) -> None:
        self.send(Ready(self.number, 1000 + self.number, f"numa{self.number % 2}", 1000, SLOTS))

    async def order(self) -> Any:
        """The next order."""
        while len(self.heard) == self._read:
            self._more.clear()
            await asyncio.wait_for(self._more.wait(), WAIT_S)
        self._read += 1
        return self.heard[self._read - 1]

    def step(self, sequence: int, *tokens: int, logprob: Logprob | None = None) -> None:
        """Report tokens of a sequence, each as a step."""
        for token in tokens:
            self.send(Stepped([Step(sequence, token, logprob)]))


class Wire:
    """A running router, its workers, and a way to make clients."""

    def __init__(
        self, router: Router, context: zmq.asyncio.Context, endpoint: str, workers: list[Worker]
    ) -> None:
        self.router, self.workers = router, workers
        self._context, self._endpoint = context, endpoint

    def stranger(self, number: int, key: str | None = KEY) -> Worker:
        """Somebody who says to be a worker of this number."""
        return Worker(self._context, self._endpoint, key, number)

    def gateway(self) -> Peer:
        """What only speaks as the HTTP gateway."""
        return Peer(self._context, self._endpoint, Ping, KEY, IDENTITY=GATEWAY_IDENTITY)

    def client(self, **options: Any) -> Client:
        return Client(self._context, self.router.address, **options)


@asynccontextmanager
async def running(model: ResolvedModel, workers: int = 1, ready: bool = True) -> AsyncIterator[Wire]:
    endpoint = new_endpoint()
    router = Router(ServerConfig(port=0, workers=workers), model, endpoint, KEY)
    context = zmq.asyncio.Context()
    serving = asyncio.create_task(router.serve())
    for number in range(workers):
        router.expect(worker_identity(number), f"worker {number}", 1000 + number)
    peers = [Worker(context, endpoint, KEY, number) for number in range(workers)]
    try:
        if ready:
            for worker in peers:
                worker.ready()
            await asyncio.wait_for(router.ready(), WAIT_S)
        yield Wire(router, context, endpoint, peers)
        assert not serving.done(), "the router has failed"
    finally:
        for task in (serving, *(worker.task for worker in peers)):
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
        await router.close()
        context.destroy(linger=0)
