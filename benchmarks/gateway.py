"""What the HTTP gateway costs for each token that passes it, in CPU time.

    python -m benchmarks.gateway

The router, the worker and the client of ``benchmarks.router``, and beside them a gateway in a process of its
own, as in a server, with one HTTP client that reads all streams. That client only counts events, so that its
own time does not matter. The reference is the native client: its CPU time, and its rate, in the same run.
"""

import asyncio
import json
import os
import socket
import time
from functools import partial
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import uvloop

from benchmarks.cpu_clock import cpu_seconds
from benchmarks.result import Result, write
from benchmarks.router import KEY, RUNS, Peer, ask, measure, middle, serve, work
from clo.runtime.config import GatewayConfig, GatewayProcessConfig, ModelConfig, ResolvedModel
from clo.runtime.http.__main__ import serve as serve_http
from clo.runtime.model.files import resolve
from clo.runtime.tokenizer import Tokenizer
from clo.runtime.wire.messages import GATEWAY_IDENTITY, Text, worker_identity
from examples.document import document

CASES = (
    (1, 2_000, 0.0),
    (32, 4_000, 0.0),
    (32, 500, 32 / 16_000),
    (64, 4_000, 0.0),
    (64, 500, 64 / 16_000),
    (64, 500, 64 / 25_000),
)
"""Streams, steps and seconds from one step to the next, as in ``benchmarks.router``. Where steps come faster
than events can be written several tokens go into one. A small model on a GPU makes 25,000 tokens/s."""
PATHS: dict[str, tuple[str, dict[str, Any]]] = {
    "completions": ("/v1/completions", {"prompt": [1]}),
    "chat": ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
}


class Rates(NamedTuple):
    """CPU seconds of the gateway and of the router for a token, and seconds between tokens."""

    gateway: float
    router: float
    wall: float


def gate(connection: Connection, model: ResolvedModel, server: str, router: str) -> None:
    """The gateway; sends its port."""
    listening = socket.create_server(("127.0.0.1", 0), backlog=1024)
    connection.send(listening.getsockname()[1])
    config = GatewayProcessConfig(GatewayConfig(http=0), model, listening.detach(), server, router)
    uvloop.run(serve_http(config, KEY, None))


class _Reader(asyncio.Protocol):
    """Sends a request and counts the events of its answer."""

    def __init__(self, request: bytes, times: list[float], done: "asyncio.Future[None]") -> None:
        self._request, self._times, self._done = request, times, done
        self._end = b""
        self.events = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self.events += data.count(b"\ndata: ")
        self._times.append(time.perf_counter())
        self._end = (self._end + data)[-50:]

    def connection_lost(self, error: Exception | None) -> None:
        if b"data: [DONE]" in self._end:
            self._done.set_result(None)
        else:
            self._done.set_exception(RuntimeError(f"a stream ended with {self._end!r}"))


def ask_http(connection: Connection, port: int) -> None:
    """The client: as ``benchmarks.router.ask``; it gets the name of an endpoint, too."""

    async def run() -> None:
        loop = asyncio.get_running_loop()
        while True:
            name, streams, tokens = await asyncio.to_thread(connection.recv)
            path, fields = PATHS[name]
            body = json.dumps({**fields, "stream": True, "max_tokens": tokens, "ignore_eos": True}).encode()
            request = (
                b"POST %b HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: application/json\r\n"
                b"content-length: %d\r\n\r\n%b" % (path.encode(), len(body), body)
            )
            times: list[float] = []
            ends = [loop.create_future() for _ in range(streams)]
            for end in ends:
                await loop.create_connection(partial(_Reader, request, times, end), "127.0.0.1", port)
            await asyncio.gather(*ends)
            connection.send(max(times) - min(times))

    asyncio.run(run())


def measure_http(
    gateway: Peer, router: Peer, worker: Peer, client: Peer, name: str, streams: int, steps: int, pace: float
) -> Rates:
    """One run."""
    worker.connection.send((streams, pace))
    began = cpu_seconds(gateway.pid), cpu_seconds(router.pid)
    client.connection.send((name, streams, steps))
    wall = client.connection.recv()
    total = streams * steps
    ended = cpu_seconds(gateway.pid), cpu_seconds(router.pid)
    return Rates((ended[0] - began[0]) / total, (ended[1] - began[1]) / total, wall / total)


def main() -> None:
    model = resolve(ModelConfig(device="cpu"))
    text = Tokenizer(model.folder, model.vocab_size).encode(Text(document("compound")), limit=10**9)
    endpoint = f"ipc://@clo-benchmark-{os.getpid()}"
    router = Peer(serve, model, endpoint)
    address = router.connection.recv()
    worker = Peer(work, endpoint, text)
    gateway = Peer(gate, model, address, endpoint)
    children = [(worker_identity(0), "worker 0", worker.pid), (GATEWAY_IDENTITY, "gateway", gateway.pid)]
    router.connection.send(children)
    native, http = Peer(ask, address), Peer(ask_http, gateway.connection.recv())
    results = []
    try:
        for streams, steps, pace in CASES:
            run = partial(measure, router, worker, native, streams, steps, pace)
            run()
            direct = middle([run() for _ in range(RUNS)])
            for name in PATHS:
                case = f"{name}/{streams}" + (f"/{streams / pace:.0f}" if pace else "")
                ask_once = partial(measure_http, gateway, router, worker, http, name, streams, steps, pace)
                ask_once()
                runs = [ask_once() for _ in range(RUNS)]
                costs = Rates(*(sorted(figures)[RUNS // 2] for figures in zip(*runs, strict=True)))
                results += [
                    Result(
                        case, "gateway CPU", costs.gateway * 1e6, "us/token", direct.receiver * 1e6,
                        costs.gateway / direct.receiver,
                    ),
                    Result(
                        case, "router CPU", costs.router * 1e6, "us/token", direct.sender * 1e6,
                        costs.router / direct.sender,
                    ),
                    Result(
                        case, "rate", 1 / costs.wall, "tokens/s", 1 / direct.wall, direct.wall / costs.wall
                    ),
                ]  # fmt: skip
    finally:
        for peer in (http, native, gateway, worker, router):
            peer.close()
    write("gateway", results)


if __name__ == "__main__":
    main()
