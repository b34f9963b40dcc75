"""The router, in the launcher's process: tokenises requests, gives them to workers, streams text back."""

import asyncio
import errno
import logging
import secrets
import uuid
from collections import defaultdict
from collections.abc import Coroutine
from functools import partial
from typing import Any

import zmq

from clo.runtime.config import ResolvedModel, ServerConfig
from clo.runtime.machine.addresses import tcp_endpoint
from clo.runtime.model.generation import read_generation
from clo.runtime.request import Request, State
from clo.runtime.tokenizer import Detokenizer, Tokenizer
from clo.runtime.wire.errors import (
    CLOError,
    ConfigError,
    InvalidRequest,
    Overloaded,
    PromptTooLong,
    ProtocolError,
)
from clo.runtime.wire.handlers import handlers_of
from clo.runtime.wire.messages import (
    NO_STATS,
    Abort,
    Cancel,
    Chat,
    Chunk,
    Chunks,
    Done,
    Failed,
    Finished,
    FromWorker,
    Generate,
    GetInfo,
    GetWorkerStats,
    Info,
    Prefilled,
    Progress,
    Ready,
    Refused,
    Run,
    Sampling,
    SamplingParams,
    Stepped,
    Text,
    ToClient,
    Tokens,
    ToRouter,
    ToWorker,
    Usage,
    WorkerReport,
)
from clo.runtime.wire.sockets import Arrivals, Delivery, RouterSocket

UNREAD_MESSAGES = 5_000  # that a client may leave unread before its requests are dropped
QUIET_S = 0.7  # a client hears something at least once a second while a request is open
TICK_S = 0.25
INFO_S = 2.0
FLUSH_MS = 1_000
THREAD_CHARACTERS = 10_000  # longer prompts are tokenised in a thread; shorter ones take milliseconds

_logger = logging.getLogger(__name__)


def _not_bound(config: ServerConfig, error: zmq.ZMQError) -> ConfigError:
    """Why clients cannot be listened to."""
    if error.errno in (errno.EADDRNOTAVAIL, errno.ENODEV, errno.EAFNOSUPPORT):
        return ConfigError(
            f"--host {config.host} is not an address of this machine; use 127.0.0.1, or 0.0.0.0 for all of "
            "its addresses."
        )
    reason = zmq.strerror(error.errno or 0)
    return ConfigError(f"Port {config.port} of {config.host} cannot be used ({reason}); try another --port.")


class Router:
    """Between clients (TCP) and workers (ipc).

    Args:
        config: host, port, number of workers, attention.
        model: the model that is served.

    Attributes:
        address: where clients connect.
        workers_endpoint: where workers connect, each under the identity ``worker-N``.

    Raises:
        ConfigError: host or port cannot be used, or the model has no tokenizer.
    """

    def __init__(self, config: ServerConfig, model: ResolvedModel) -> None:
        self._config, self._model = config, model
        self._handlers = handlers_of(Router, ToRouter | FromWorker)
        self._tokenizer = Tokenizer(model.folder, model.vocab_size)
        self._defaults = read_generation(model.folder)
        if self._defaults.ignored:
            ignored = ", ".join(self._defaults.ignored)
            _logger.warning("generation_config.json has %s, which CLO does not do.", ignored)
        endpoint = tcp_endpoint(config.host, config.port)
        self._context: zmq.Context[Any] = zmq.Context()
        try:
            self._clients: RouterSocket[ToClient, ToRouter] = RouterSocket(
                self._context, endpoint, ToRouter, UNREAD_MESSAGES
            )
        except zmq.ZMQError as error:
            self._context.destroy(linger=0)
            raise _not_bound(config, error) from None
        self.address = self._clients.endpoint
        self.workers_endpoint = f"ipc://@clo-{uuid.uuid4()}-router"
        self._workers: RouterSocket[ToWorker, FromWorker] = RouterSocket(
            self._context, self.workers_endpoint, FromWorker, queue=0
        )
        self._arrivals = Arrivals()
        # a request's task begins before the next message, perhaps its Cancel, is read
        self._clients.hear(self._arrivals, self._hear_client, turn_s=0.0)
        self._workers.hear(self._arrivals, self._hear_worker)
        self._open: dict[tuple[bytes, str], Request] = {}  # by client and name
        self._running: dict[int, Request] = {}  # by sequence; CLOSED ones too
        self._sequences = 0
        self._ready_workers: dict[bytes, Ready] = {}
        self._all_ready = asyncio.Event()
        self._reports: dict[bytes, asyncio.Future[WorkerReport]] = {}  # asked for but not here yet
        self._owed: dict[bytes, list[Failed]] = {}  # owed to clients whose queues were full
        self._failure: CLOError | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def capacity_tokens(self) -> int:
        """Tokens that all stores hold together."""
        return sum({ready.store: ready.capacity_tokens for ready in self._ready_workers.values()}.values())

    async def ready(self) -> int:
        """Wait until all workers are ready; returns ``capacity_tokens``."""
        await self._all_ready.wait()
        return self.capacity_tokens

    async def serve(self) -> None:
        """Serve until cancelled. Requests that come before the workers are ready wait for them."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._arrivals.listen())
            group.create_task(self._keep_in_touch())

    def fail_all(self, error: CLOError) -> None:
        """End every open request with ``error``, and every later one at once."""
        self._failure = error
        for request in list(self._open.values()):
            self._end(request, Failed(request.name, error.code, str(error)))

    def close(self) -> None:
        """Close the sockets, after ``serve`` has ended. What was sent gets up to a second to leave."""
        for task in self._tasks:
            task.cancel()
        self._arrivals.close()
        for peers in (self._clients, self._workers):
            peers.close(FLUSH_MS)
        self._context.term()

    def _hear_client(self, client: bytes, message: ToRouter | ProtocolError) -> None:
        if isinstance(message, ProtocolError):
            self._send(client, Failed("", message.code, str(message)))
        else:
            self._handlers[type(message)](self, client, message)

    def _hear_worker(self, worker: bytes, message: FromWorker | ProtocolError) -> None:
        if isinstance(message, ProtocolError):
            _logger.error("%s sent what cannot be read: %s", worker.decode(errors="replace"), message)
        else:
            self._handlers[type(message)](self, worker, message)

    # ------------------------------------------------------------------------------ from clients

    def on_generate(self, client: bytes, message: Generate) -> None:
        name = message.request
        if self._failure is not None:
            self._send(client, Failed(name, self._failure.code, str(self._failure)))
        elif (client, name) in self._open:
            text = f"A request '{name}' is open already; give each request an id of its own."
            self._send(client, Failed(name, InvalidRequest.code, text))
        else:
            request = Request(client, name, asyncio.get_running_loop().time())
            self._open[client, name] = request
            self._spawn(self._admit(request, message))

    def on_cancel(self, client: bytes, message: Cancel) -> None:
        request = self._open.get((client, message.request))
        if request is None:  # it has ended meanwhile
            return
        if request.state is State.ADMITTING:
            self._end(request, Finished(request.name, "cancelled", Usage(request.prompt_tokens, 0), NO_STATS))
        elif request.state is State.ASSIGNED:
            self._stop(request, "cancelled")

    def on_get_info(self, client: bytes, message: GetInfo) -> None:
        self._spawn(self._inform(client, message.request))

    async def _admit(self, request: Request, message: Generate) -> None:
        """Tokenise, check, wait until the workers are ready, and give the request to one of them."""
        try:
            tokens = await self._tokens(message.prompt)
            forced, params = None, message.sampling
            if message.continuation is not None:
                forced = await self._tokens(message.continuation, continues=True)
                params = SamplingParams(max_tokens=len(forced), logprobs=params.logprobs or 0)
            self._check_length(len(tokens), params.max_tokens)
        except CLOError as error:
            self._end(request, Failed(request.name, error.code, str(error)))
            return
        except Exception:  # a tokenizer runs code of the model's authors; it must not end the server
            _logger.exception("A prompt could not be tokenised.")
            self._end(request, Failed(request.name, CLOError.code, "The prompt could not be tokenised."))
            return
        request.prompt_tokens = len(tokens)
        request.text = Detokenizer(self._tokenizer, tokens, params.stop)
        await self._all_ready.wait()
        if not request.open:  # it was cancelled meanwhile, or its client is gone
            return
        request.move(State.ASSIGNED)
        request.worker = min(self._ready_workers, key=self._load)
        sampling = self._sampling(params, len(tokens), self._ready_workers[request.worker].capacity_tokens)
        request.max_tokens = sampling.max_tokens
        request.sequence = self._sequences
        self._sequences += 1
        self._running[request.sequence] = request
        seed = secrets.randbits(63) if params.seed is None else params.seed
        self._order(request, Run(request.sequence, tokens, sampling, seed, self._tokenizer.eos, forced))

    def _check_length(self, prompt: int, max_tokens: int | None) -> None:
        """Raises ``PromptTooLong`` where a prompt and its answer exceed the model length."""
        longest = self._model.max_model_len
        if max_tokens is None and prompt >= longest:
            raise PromptTooLong(
                f"The prompt has {prompt} tokens, which leaves no room for an answer in the model length of "
                f"{longest}; shorten the prompt."
            )
        if max_tokens is not None and prompt + max_tokens > longest:
            raise PromptTooLong(
                f"The prompt has {prompt} tokens and max_tokens is {max_tokens}; together they exceed the "
                f"model length of {longest}. Shorten the prompt or lower max_tokens."
            )

    def _sampling(self, params: SamplingParams, prompt: int, capacity: int) -> Sampling:
        """What a client wants, with the model's defaults; a store holds ``capacity`` tokens."""
        defaults = self._defaults
        room = min(self._model.max_model_len, capacity) - prompt
        return Sampling(
            temperature=defaults.temperature if params.temperature is None else params.temperature,
            top_p=defaults.top_p if params.top_p is None else params.top_p,
            top_k=defaults.top_k if params.top_k is None else max(0, params.top_k),
            max_tokens=params.max_tokens or max(1, min(defaults.max_tokens, room)),
            ignore_eos=params.ignore_eos,
            logprobs=params.logprobs,
        )

    async def _tokens(self, prompt: Text | Chat | Tokens, continues: bool = False) -> list[int]:
        match prompt:
            case Text():
                characters = len(prompt.text)
            case Chat():
                # What a template makes of variables and tool calls may be long though the messages are short.
                more = prompt.chat_template_kwargs or any(turn.tool_calls for turn in prompt.turns)
                characters = THREAD_CHARACTERS if more else sum(len(turn.text) for turn in prompt.turns)
            case Tokens():
                characters = 0
        encode = partial(self._tokenizer.encode, prompt, self._model.max_model_len, continues=continues)
        if characters < THREAD_CHARACTERS:
            return encode()
        return await asyncio.to_thread(encode)

    def _load(self, worker: bytes) -> int:
        return sum(request.outstanding for request in self._running.values() if request.worker == worker)

    async def _inform(self, client: bytes, name: str) -> None:
        """Answer ``GetInfo``, with the reports of the workers that give one within 2 s."""
        for worker in self._ready_workers:
            if worker not in self._reports:
                self._reports[worker] = asyncio.get_running_loop().create_future()
                self._workers.send(worker, GetWorkerStats())
        reports: list[WorkerReport] = []
        if self._reports:
            done, _ = await asyncio.wait(self._reports.values(), timeout=INFO_S)
            reports = sorted((report.result() for report in done), key=lambda report: report.worker.worker)
        if self._failure is not None:
            self._send(client, Failed(name, self._failure.code, str(self._failure)))
            return
        stores = {report.store.store: report.store for report in reports}
        info = Info(
            request=name,
            model=self._model.name,
            max_model_len=self._model.max_model_len,
            capacity_tokens=self.capacity_tokens,
            attention=self._config.cache.attention,
            workers=[report.worker for report in reports],
            stores=list(stores.values()),
        )
        self._send(client, info)

    # ------------------------------------------------------------------------------ from workers

    def on_ready(self, worker: bytes, message: Ready) -> None:
        self._ready_workers[worker] = message
        if len(self._ready_workers) == self._config.workers:
            self._all_ready.set()

    def on_prefilled(self, worker: bytes, message: Prefilled) -> None:
        request = self._running.get(message.sequence)
        if request is not None:
            request.prefilled = message.done
            self._tell(request, Progress(request.name, "prefill", message.done, message.total))

    def on_stepped(self, worker: bytes, message: Stepped) -> None:
        """The new tokens of a step, as text: one message to each client."""
        now = asyncio.get_running_loop().time()
        assigned = State.ASSIGNED  # to look up a member of an enum takes longer than all the rest of a test
        chunks: defaultdict[bytes, list[Chunk]] = defaultdict(list)
        for step in message.steps:
            request = self._running.get(step.sequence)
            if request is None or request.state is not assigned:  # the worker has not read the Abort yet
                continue
            assert request.text is not None
            try:
                text = request.text.push(step.token)
            except Exception:  # it runs code of the model's authors; it must not end the server
                self._fail_text(request)
                continue
            if request.text.stopped:
                self._stop(request, "stop")
            request.generated += 1
            request.heard = now
            logprobs = None if step.logprob is None else [step.logprob]
            chunks[request.client].append(Chunk(request.name, text, [step.token], logprobs))
        for client, new in chunks.items():
            self._send(client, Chunks(new))

    def on_done(self, worker: bytes, message: Done) -> None:
        request = self._running.pop(message.sequence, None)
        if request is None or not request.open:
            return
        assert request.text is not None
        try:
            rest = request.text.flush()
        except Exception:
            self._fail_text(request)
            return
        if rest:
            self._tell(request, Chunks([Chunk(request.name, rest, [], None)]))
        usage = Usage(request.prompt_tokens, request.generated)
        reason = "stop" if request.text.stopped else request.reason or message.reason
        self._end(request, Finished(request.name, reason, usage, message.cache))

    def _fail_text(self, request: Request) -> None:
        """End a request whose tokens cannot be made into text."""
        _logger.exception("Tokens could not be made into text.")
        if request.sequence in self._running:
            self._order(request, Abort(request.sequence))
        self._end(request, Failed(request.name, CLOError.code, "The tokens could not be made into text."))

    def on_refused(self, worker: bytes, message: Refused) -> None:
        request = self._running.pop(message.sequence, None)
        if request is not None:
            self._end(request, Failed(request.name, message.code, message.text))

    def on_worker_report(self, worker: bytes, message: WorkerReport) -> None:
        if worker in self._reports:
            self._reports.pop(worker).set_result(message)

    # ---------------------------------------------------------------------------------- sending

    async def _keep_in_touch(self) -> None:
        """Tell quiet clients how far their requests are, which also finds clients that are gone."""
        while True:
            await asyncio.sleep(TICK_S)
            late = asyncio.get_running_loop().time() - QUIET_S
            for request in list(self._open.values()):
                if request.open and request.heard < late:
                    stage = "queued" if request.prefilled is None else "prefill"
                    done = request.prefilled or 0
                    self._tell(request, Progress(request.name, stage, done, request.prompt_tokens))
            for client in list(self._owed):
                owed = self._owed[client]
                while owed and self._clients.send(client, owed[-1]) is not Delivery.FULL:
                    owed.pop()
                if not owed:
                    del self._owed[client]

    def _tell(self, request: Request, message: ToClient) -> None:
        if request.open:
            request.heard = asyncio.get_running_loop().time()
            self._send(request.client, message)

    def _end(self, request: Request, message: Finished | Failed) -> None:
        """The last message of a request; nothing happens where it has ended."""
        if request.open:
            self._tell(request, message)
            if request.open:  # not if the client turned out to be gone
                self._forget(request)

    def _forget(self, request: Request) -> None:
        request.move(State.CLOSED)
        del self._open[request.client, request.name]

    def _stop(self, request: Request, reason: str) -> None:
        """Have the worker end a request for a reason that the worker does not know."""
        request.reason = reason
        request.move(State.STOPPING)
        self._order(request, Abort(request.sequence))

    def _send(self, client: bytes, message: ToClient) -> None:
        """Send to a client; one that is gone or does not read loses its requests."""
        delivery = self._clients.send(client, message)
        if delivery is Delivery.SENT:
            return
        for request in [request for request in self._open.values() if request.client == client]:
            _logger.info("Request %s is dropped: its client is %s.", request.name, delivery.value)
            if request.state is State.ASSIGNED:
                self._order(request, Abort(request.sequence))
            self._forget(request)
            if delivery is Delivery.FULL:
                text = "The client did not read its stream and its requests were dropped; read it faster."
                self._owed.setdefault(client, []).append(Failed(request.name, Overloaded.code, text))

    def _order(self, request: Request, message: Run | Abort) -> None:
        """Send to a request's worker. One that is gone needs nothing here: the supervisor ends the server."""
        if self._workers.send(request.worker, message) is not Delivery.SENT:
            _logger.warning("%s does not take messages.", request.worker.decode())

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
