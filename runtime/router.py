"""The router, in the launcher's process: tokenises requests, gives them to workers, streams text back."""

import asyncio
import contextlib
import logging
import secrets
import time
import uuid
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any

import zmq
import zmq.asyncio

from gpu_worker.loader import Resolved
from runtime.channel import Decoder, configure, encode
from runtime.config import ServerConfig
from runtime.errors import CLOError, ConfigError, InvalidRequest, PromptTooLong, ProtocolError
from runtime.messages import (
    NO_STATS,
    Abort,
    Cancel,
    Chunk,
    Done,
    Failed,
    Finished,
    FromWorker,
    Generate,
    GetInfo,
    GetWorkerStats,
    Info,
    Message,
    Prefilled,
    Progress,
    Ready,
    Refused,
    Run,
    Sampling,
    Stepped,
    ToRouter,
    Usage,
    WorkerReport,
)
from runtime.text import Detokenizer, Tokenizer

logger = logging.getLogger(__name__)

PROGRESS_SECONDS = 0.5  # a client hears at least one message a second while a request is open
INFO_SECONDS = 2.0
SEND_QUEUE = 100_000  # messages that a client may leave unread
FLUSH_MS = 1000

Key = tuple[bytes, str]  # a client's identity and its name for a request


@dataclass
class Open:
    """A request that has not ended."""

    client: bytes
    name: str
    sampling: Sampling
    sequence: int = -1  # -1 until it is with a worker
    worker: bytes = b""
    text: Detokenizer | None = None
    prompt_tokens: int = 0
    generated: int = 0
    prefilled: int = -1  # tokens, -1 while queued
    heard: float = field(default_factory=time.monotonic)  # when the client was last sent something
    cancelled: bool = False


class Router:
    """Between clients (TCP) and workers (ipc).

    Args:
        config: host, port, number of workers.
        model: as the loader resolved it.

    Raises:
        ConfigError: the port is taken, or the model has no tokenizer.
    """

    def __init__(self, config: ServerConfig, model: Resolved) -> None:
        self._config, self._max_len = config, model.max_model_len
        self._context: zmq.asyncio.Context = zmq.asyncio.Context()
        self._clients = self._socket()
        self._clients.setsockopt(zmq.SNDHWM, SEND_QUEUE)
        try:
            self._clients.bind(f"tcp://{config.host}:{config.port}")
        except zmq.ZMQError as error:
            self._context.destroy(linger=0)
            raise ConfigError(
                f"Address {config.host}:{config.port} cannot be used ({error.strerror}); choose another."
            ) from None
        self.address: str = self._clients.getsockopt_string(zmq.LAST_ENDPOINT)
        self.workers_endpoint = f"ipc://@clo-{uuid.uuid4()}-router"
        self._workers = self._socket()
        self._workers.bind(self.workers_endpoint)
        self._tokenizer = Tokenizer(model.folder, model.config.vocab_size)
        self._from_client: Decoder[ToRouter] = Decoder(ToRouter)
        self._from_worker: Decoder[FromWorker] = Decoder(FromWorker)
        self._requests: dict[Key, Open] = {}
        self._by_sequence: dict[int, Open] = {}
        self._next_sequence = 0
        self._load: dict[bytes, int] = {}  # tokens that each ready worker has before it
        self._capacity: dict[str, int] = {}  # by store
        self._reports: list[WorkerReport] = []
        self._all_reported = asyncio.Event()
        self._failure: CLOError | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._ready = asyncio.Event()

    def _socket(self) -> zmq.asyncio.Socket:
        socket = self._context.socket(zmq.ROUTER)
        configure(socket)
        socket.setsockopt(zmq.LINGER, FLUSH_MS)
        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        return socket

    async def ready(self) -> int:
        """Wait until all workers are ready; returns the tokens that all stores hold together."""
        await self._ready.wait()
        return sum(self._capacity.values())

    async def serve(self) -> None:
        """Serve until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._serve_clients())
            group.create_task(self._serve_workers())
            group.create_task(self._keep_clients_informed())

    def fail_all(self, error: CLOError) -> None:
        """End every open request with ``error``, and every later one too."""
        self._failure = error
        for request in list(self._requests.values()):
            self._end(request, Failed(request.name, error.code, str(error)))

    def close(self) -> None:
        """Close the sockets; what was sent gets up to a second to leave."""
        for task in self._tasks:
            task.cancel()
        self._context.destroy(linger=FLUSH_MS)

    # ------------------------------------------------------------------------------------- clients

    async def _serve_clients(self) -> None:
        while True:
            client, *frames = await self._clients.recv_multipart()
            try:
                if len(frames) != 1:
                    raise ProtocolError(f"A message has one frame, not {len(frames)}.")
                message = self._from_client(frames[0])
            except ProtocolError as error:
                self._send(client, Failed("", error.code, str(error)))
                continue
            match message:
                case Generate():
                    self._begin(client, message)
                case Cancel():
                    self._cancel(self._requests.get((client, message.request)))
                case GetInfo():
                    self._spawn(self._inform(client, message))

    def _begin(self, client: bytes, message: Generate) -> None:
        if self._failure is not None:
            self._send(client, Failed(message.request, self._failure.code, str(self._failure)))
            return
        if (client, message.request) in self._requests:
            text = f"A request named '{message.request}' is open already; choose another name."
            self._send(client, Failed(message.request, InvalidRequest.code, text))
            return
        request = Open(client, message.request, message.sampling)
        self._requests[client, message.request] = request
        self._spawn(self._submit(request, message))

    async def _submit(self, request: Open, message: Generate) -> None:
        """Tokenise, check and give to a worker."""
        sampling, forced = message.sampling, None
        try:
            tokens = await asyncio.to_thread(self._tokenizer.encode, message.prompt, self._max_len)
            if message.continuation is not None:
                forced = await asyncio.to_thread(
                    self._tokenizer.encode, message.continuation, self._max_len, False
                )
                sampling = Sampling(0.0, max_tokens=len(forced), logprobs=sampling.logprobs or 0)
            if len(tokens) + sampling.max_tokens > self._max_len:
                raise PromptTooLong(
                    f"The prompt has {len(tokens)} tokens and {sampling.max_tokens} may follow; together the "
                    f"model takes {self._max_len}. Shorten the prompt or lower max_tokens."
                )
        except CLOError as error:
            self._end(request, Failed(request.name, error.code, str(error)))
            return
        request.prompt_tokens, request.sampling = len(tokens), sampling
        request.text = Detokenizer(self._tokenizer, sampling.stop)
        await self._ready.wait()
        if (request.client, request.name) not in self._requests:  # ended while it waited
            return
        request.sequence = self._next_sequence
        self._next_sequence += 1
        request.worker = min(self._load, key=lambda name: self._load[name])
        self._load[request.worker] += len(tokens) + sampling.max_tokens
        self._by_sequence[request.sequence] = request
        seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
        self._order(request, Run(request.sequence, tokens, sampling, seed, self._tokenizer.eos, forced))

    def _cancel(self, request: Open | None) -> None:
        if request is None or request.cancelled:
            return
        request.cancelled = True
        if request.sequence >= 0:
            self._order(request, Abort(request.sequence))
        else:  # no worker knows it
            self._send(request.client, self._nothing_done(request))
            self._forget(request)

    def _nothing_done(self, request: Open) -> Finished:
        return Finished(request.name, "cancelled", Usage(request.prompt_tokens, 0), NO_STATS)

    async def _inform(self, client: bytes, message: GetInfo) -> None:
        self._reports, self._all_reported = [], asyncio.Event()
        for worker in self._load:
            self._deliver(self._workers, worker, GetWorkerStats())
        if self._load:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._all_reported.wait(), INFO_SECONDS)
        stores = {report.store.store: report.store for report in self._reports}
        info = Info(
            request=message.request,
            model=self._config.model.model,
            max_model_len=self._max_len,
            capacity_tokens=sum(self._capacity.values()),
            attention=self._config.cache.attention,
            workers=[report.worker for report in self._reports],
            stores=list(stores.values()),
        )
        self._send(client, info)

    async def _keep_clients_informed(self) -> None:
        """Progress for those who have not heard for a while; it also shows which clients are gone."""
        while True:
            await asyncio.sleep(PROGRESS_SECONDS / 2)
            late = time.monotonic() - PROGRESS_SECONDS
            for request in list(self._requests.values()):
                if request.heard < late:
                    stage = "queued" if request.prefilled < 0 else "prefill"
                    done = max(request.prefilled, 0)
                    self._tell(request, Progress(request.name, stage, done, request.prompt_tokens))

    def _tell(self, request: Open, message: Message) -> None:
        request.heard = time.monotonic()
        self._send(request.client, message)

    def _send(self, client: bytes, message: Message) -> None:
        if not self._deliver(self._clients, client, message):
            gone = [request for key, request in self._requests.items() if key[0] == client]
            for request in gone:
                logger.info("a client is gone, request %s ends", request.name)
                self._forget(request)
                if request.sequence >= 0 and not request.cancelled:
                    request.cancelled = True
                    self._order(request, Abort(request.sequence))

    def _deliver(self, socket: zmq.asyncio.Socket, peer: bytes, message: Message) -> bool:
        """Send without waiting; False where the peer is gone or does not read."""
        sent: Any = socket.send_multipart([peer, encode(message)], zmq.NOBLOCK)  # a future that is done
        error = sent.exception()
        if isinstance(error, zmq.ZMQError) and error.errno in (zmq.EHOSTUNREACH, zmq.EAGAIN):
            return False
        if error is not None:
            raise error
        return True

    def _end(self, request: Open, message: Finished | Failed) -> None:
        self._forget(request)
        self._send(request.client, message)

    def _forget(self, request: Open) -> None:
        self._requests.pop((request.client, request.name), None)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # ------------------------------------------------------------------------------------- workers

    async def _serve_workers(self) -> None:
        while True:
            worker, data = await self._workers.recv_multipart()
            try:
                message = self._from_worker(data)
            except ProtocolError as error:
                logger.warning("a message of %s was ignored: %s", worker.decode(errors="replace"), error)
                continue
            match message:
                case Ready():
                    self._capacity[message.store] = message.capacity_tokens
                    self._load[worker] = 0
                    if len(self._load) == self._config.workers:
                        self._ready.set()
                case Stepped():
                    for step in message.steps:
                        request = self._by_sequence.get(step.sequence)
                        if request is not None:
                            self._take(request, step.token, [step.logprob] if step.logprob else None)
                case Prefilled():
                    request = self._by_sequence.get(message.sequence)
                    if request is not None:
                        request.prefilled = message.done
                        progress = Progress(request.name, "prefill", message.done, message.total)
                        self._tell(request, progress)
                case Done():
                    self._done(message)
                case Refused():
                    request = self._leave(message.sequence)
                    if request is not None:
                        self._end(request, Failed(request.name, message.code, message.text))
                case WorkerReport():
                    self._reports.append(message)
                    if len(self._reports) == len(self._load):
                        self._all_reported.set()

    def _take(self, request: Open, token: int, logprobs: list[Any] | None) -> None:
        """One new token of a request that has not been stopped."""
        assert request.text is not None
        ended = request.text.stopped or request.cancelled
        if ended:
            return
        request.generated += 1
        self._load[request.worker] -= 1
        text = request.text.push(token)
        self._tell(request, Chunk(request.name, text, [token], logprobs))
        if request.text.stopped:
            self._order(request, Abort(request.sequence))

    def _done(self, message: Done) -> None:
        request = self._leave(message.sequence)
        if request is None:
            return
        assert request.text is not None
        reason = "stop" if request.text.stopped else message.reason
        rest = request.text.flush()
        if rest:
            self._tell(request, Chunk(request.name, rest, [], None))
        if request.text.stopped and message.reason != "cancelled":
            reason = "stop"
        usage = Usage(request.prompt_tokens, request.generated)
        if (request.client, request.name) in self._requests:
            self._end(request, Finished(request.name, reason, usage, message.cache))

    def _leave(self, sequence: int) -> Open | None:
        """The worker is done with a sequence."""
        request = self._by_sequence.pop(sequence, None)
        if request is not None:
            total = request.prompt_tokens + request.sampling.max_tokens
            self._load[request.worker] -= total - request.generated
        return request

    def _order(self, request: Open, message: Run | Abort) -> None:
        if not self._deliver(self._workers, request.worker, message):
            logger.warning("%s does not take messages", request.worker.decode())
