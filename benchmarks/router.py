"""What the router and a client cost for each token that passes them, in CPU time.

    python -m benchmarks.router

A router in a process of its own, as in a server; a worker process that only speaks the worker's messages,
and sends the tokens of a real text (SmolLM2's tokenizer), as fast as the router takes them or at the pace of
a GPU; one client with all streams in a third process. A run has fewer steps than the router holds for a
client that does not read, so that none is dropped. The median of some runs counts.

The reference is the same ``Chunks`` made and sent by one bare socket and read by another at the same pace.
Beside it stands the detokenizer's part of the router's time, compared with ``tokenizers``' DecodeStream.
"""

import asyncio
import multiprocessing
import os
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from statistics import median
from typing import Any, NamedTuple

import tokenizers
import zmq
from tokenizers.decoders import DecodeStream

from benchmarks.cpu_clock import cpu_seconds
from benchmarks.result import Result, write
from clo.runtime.client import AsyncClient
from clo.runtime.config import ModelConfig, ResolvedModel, ServerConfig
from clo.runtime.machine.process import die_with_parent
from clo.runtime.model.files import resolve
from clo.runtime.router import Router
from clo.runtime.tokenizer import Detokenizer, Tokenizer
from clo.runtime.wire.messages import (
    NO_STATS,
    Chunk,
    Chunks,
    Done,
    FromWorker,
    Ready,
    Run,
    Step,
    Stepped,
    Text,
    ToClient,
    ToWorker,
    worker_identity,
)
from clo.runtime.wire.sockets import DealerSocket, Decoder, encode
from examples.document import document

CASES = ((1, 2_000, 0.0), (16, 2_000, 0.0), (64, 2_000, 0.0), (64, 500, 0.004))
"""Streams, steps and seconds from one step to the next. There are fewer steps than
``clo.runtime.router.UNREAD_BYTES`` allow. A step of 64 streams of a small model on a GPU takes about 4 ms."""
KEY = "the key of the benchmark"
TOKENS = 16_000  # for the detokenizer
RUNS = 5

_processes = multiprocessing.get_context("spawn")


class Costs(NamedTuple):
    """CPU seconds of two processes for a number of messages, and how long these took to arrive."""

    sender: float
    receiver: float
    wall: float


class Peer:
    """A process that runs ``main(connection, *arguments)`` and dies with this one."""

    def __init__(self, main: Callable[..., None], *arguments: object) -> None:
        self.connection, theirs = _processes.Pipe()
        self._process = _processes.Process(
            target=_run, args=(main, theirs, os.getpid(), *arguments), daemon=True
        )
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def close(self) -> None:
        self._process.kill()
        self._process.join()


def _run(main: Callable[..., None], connection: Connection, parent: int, *arguments: object) -> None:
    die_with_parent(parent)
    main(connection, *arguments)


def serve(connection: Connection, model: ResolvedModel, endpoint: str) -> None:
    """The router; sends its address, and gets its children: identities, names and pids."""

    async def run() -> None:
        router = Router(ServerConfig(port=0), model, endpoint, KEY)
        connection.send(router.address)
        for identity, name, pid in connection.recv():
            router.expect(identity, name, pid)
        await router.serve()

    asyncio.run(run())


def work(connection: Connection, endpoint: str, text: list[int]) -> None:
    """The worker: gives every request the tokens of the text, again and again, all requests together. It
    gets the number of streams and the seconds from one step to the next through ``connection``."""
    router: DealerSocket[FromWorker, ToWorker] = DealerSocket(
        zmq.Context(), endpoint, ToWorker, KEY, worker_identity(0)
    )
    router.send(Ready(0, os.getpid(), "numa0", 10**6, 64))
    while True:
        streams, pace = connection.recv()
        runs: list[Run] = []
        while len(runs) < streams:
            message = router.receive(None)
            runs += [message] if isinstance(message, Run) else []
        began = time.perf_counter()
        for step in range(max(run.sampling.max_tokens for run in runs)):
            if pace:
                time.sleep(max(0.0, began + pace * step - time.perf_counter()))
            token = text[step % len(text)]
            router.send(Stepped([Step(run.sequence, token, None) for run in runs]))
        for run in runs:
            router.send(Done(run.sequence, "length", NO_STATS))


def ask(connection: Connection, address: str) -> None:
    """The client: gets numbers of streams and of tokens of each, and answers with the seconds in between the
    first piece and the last one."""

    async def run() -> None:
        async with AsyncClient(address) as client:
            while True:
                streams, tokens = await asyncio.to_thread(connection.recv)
                times: list[float] = []

                async def read(tokens: int, times: list[float]) -> None:
                    stream = client.stream([1], max_tokens=tokens, ignore_eos=True)
                    async for _ in stream:
                        times.append(time.perf_counter())
                    assert stream.result.usage.completion_tokens == tokens

                await asyncio.gather(*(read(tokens, times) for _ in range(streams)))
                connection.send(max(times) - min(times))

    asyncio.run(run())


def measure(router: Peer, worker: Peer, client: Peer, streams: int, steps: int, pace: float) -> Costs:
    """One run: of router and client, for a token."""
    worker.connection.send((streams, pace))
    began = cpu_seconds(router.pid), cpu_seconds(client.pid)
    client.connection.send((streams, steps))
    wall = client.connection.recv()
    total = streams * steps
    return Costs(
        (cpu_seconds(router.pid) - began[0]) / total,
        (cpu_seconds(client.pid) - began[1]) / total,
        wall / total,
    )


def send_bare(
    connection: Connection, streams: int, steps: int, pace: float, text: list[int], words: list[str]
) -> None:
    """Sends the same chunks to ``reader``, and nothing else; each time its parent asks for it."""
    socket = zmq.Context().socket(zmq.ROUTER)
    socket.set_hwm(0)
    socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
    socket.bind("tcp://127.0.0.1:0")
    connection.send(socket.getsockopt_string(zmq.LAST_ENDPOINT))
    names = [f"{number:032x}" for number in range(streams)]
    while True:
        connection.recv()
        began = time.perf_counter()
        for step in range(steps):
            if pace:
                time.sleep(max(0.0, began + pace * step - time.perf_counter()))
            place = step % len(text)
            chunks = [Chunk(name, words[place], [text[place]], None) for name in names]
            while True:
                try:
                    socket.send_multipart([b"reader", encode(Chunks(chunks))], copy=True)
                    break
                except zmq.ZMQError:  # it is not connected yet
                    time.sleep(0.01)


def read_bare(connection: Connection, address: str, steps: int) -> None:
    """Reads chunks with a bare socket, and tells its parent when they are all there."""
    server, decode = zmq.Context().socket(zmq.DEALER), Decoder[ToClient](ToClient)
    server.setsockopt(zmq.IDENTITY, b"reader")
    server.connect(address)
    while True:
        for _ in range(steps):
            decode(server.recv())
        connection.send(None)


def measure_bare(streams: int, steps: int, pace: float, text: list[int], words: list[str]) -> Costs:
    """Of a bare sender and a bare reader, for a token."""
    sender = Peer(send_bare, streams, steps, pace, text, words)
    reader = Peer(read_bare, sender.connection.recv(), steps)
    tokens = steps * streams
    try:
        runs = []
        for _ in range(RUNS + 1):
            began = time.perf_counter(), cpu_seconds(sender.pid), cpu_seconds(reader.pid)
            sender.connection.send(None)
            reader.connection.recv()
            ended = time.perf_counter(), cpu_seconds(sender.pid), cpu_seconds(reader.pid)
            wall, sending, reading = ((b - a) / tokens for a, b in zip(began, ended, strict=True))
            runs.append(Costs(sending, reading, wall))
        return middle(runs[1:])
    finally:
        reader.close()
        sender.close()


def middle(runs: list[Costs]) -> Costs:
    return Costs(*(median(figures) for figures in zip(*runs, strict=True)))


def seconds_per_token(push: Callable[[int], object], text: list[int]) -> float:
    """CPU seconds of this process that ``push`` takes for each of ``TOKENS`` tokens."""
    began = time.process_time()
    for step in range(TOKENS):
        push(text[step % len(text)])
    return (time.process_time() - began) / TOKENS


def main() -> None:
    model = resolve(ModelConfig(device="cpu"))
    tokenizer = Tokenizer(model.folder, model.vocab_size)
    text = tokenizer.encode(Text(document("compound")), limit=10**9)
    words = [tokenizer.decode([token]) for token in text]
    backend: Any = tokenizers.Tokenizer.from_file(str(model.folder / "tokenizer.json"))
    own, theirs = [], []
    for _ in range(RUNS):
        stream = DecodeStream(skip_special_tokens=True)
        own.append(seconds_per_token(Detokenizer(tokenizer, [], []).push, text))
        theirs.append(seconds_per_token(partial(stream.step, backend), text))
    detokenizer, decode_stream = median(own), median(theirs)

    endpoint = f"ipc://@clo-benchmark-{os.getpid()}"
    router = Peer(serve, model, endpoint)
    address = router.connection.recv()
    worker = Peer(work, endpoint, text)
    router.connection.send([(worker_identity(0), "worker 0", worker.pid)])
    client = Peer(ask, address)
    results = [
        Result(
            "detokenizer",
            "CPU",
            detokenizer * 1e6,
            "us/token",
            decode_stream * 1e6,
            detokenizer / decode_stream,
        ),
    ]
    try:
        for streams, steps, pace in CASES:
            case = f"router/{streams}/paced" if pace else f"router/{streams}"
            bare = measure_bare(streams, steps, pace, text, words)
            run = partial(measure, router, worker, client, streams, steps, pace)
            run()
            costs = middle([run() for _ in range(RUNS)])
            results += [
                Result(
                    case, "router CPU", costs.sender * 1e6, "us/token", bare.sender * 1e6,
                    costs.sender / bare.sender,
                ),
                Result(
                    case, "client CPU", costs.receiver * 1e6, "us/token", bare.receiver * 1e6,
                    costs.receiver / bare.receiver,
                ),
                Result(case, "rate", 1 / costs.wall, "tokens/s", 1 / bare.wall, bare.wall / costs.wall),
            ]  # fmt: skip
    finally:
        for peer in (client, worker, router):
            peer.close()
    write("router", results)


if __name__ == "__main__":
    main()
