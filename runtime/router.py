"""The router, in the launcher's process: tokenises requests, gives them to workers, streams text back."""

import asyncio
import logging
import math
import secrets
from collections import defaultdict
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Literal, TypeVar
from weakref import WeakValueDictionary

from msgspec.structs import replace

from clo.runtime.accounts import Accounts
from clo.runtime.children import Children
from clo.runtime.config import ResolvedModel, ServerConfig
from clo.runtime.grammars import GRAMMAR_BYTES, Grammars
from clo.runtime.kv_events import KVEventPublisher
from clo.runtime.machine.addresses import not_bound, numeric_host
from clo.runtime.request import Request, State
from clo.runtime.sampling import SamplingRules
from clo.runtime.tokenizer import Detokenizer, Tokenizer, takes_long
from clo.runtime.traffic import TrafficMeter
from clo.runtime.wire.errors import (
    CLOError,
    InvalidRequest,
    Overloaded,
    PromptTooLong,
    ProtocolError,
    WorkerDied,
    context_is,
)
from clo.runtime.wire.handlers import handlers_of
from clo.runtime.wire.messages import (
    MAX_MESSAGE_BYTES,
    NO_STATS,
    Abort,
    CacheStats,
    Cancel,
    Chat,
    Chunk,
    Chunks,
    Done,
    Examine,
    Expect,
    Failed,
    Finished,
    FromChild,
    GatewayReady,
    Generate,
    GetInfo,
    GetWorkerStats,
    Info,
    KVEvents,
    LauncherToStore,
    Logprob,
    Ping,
    Pong,
    Prefilled,
    Progress,
    PromptChunk,
    PromptScored,
    RankReady,
    Ready,
    Reason,
    Refused,
    Run,
    SamplingParams,
    Stepped,
    StoreExamined,
    StoreReady,
    Text,
    ToClient,
    Tokens,
    ToRouter,
    ToWorker,
    Usage,
    WorkerReport,
    store_identity,
)
from clo.runtime.wire.port import Delivery, Port, TooLarge, listen_tcp, listen_unix
from clo.runtime.wire.strangers import INTRUDER, Strangers

UNREAD_BYTES = 16 * 2**20  # that a client may leave unread before its requests are dropped
TOKEN_BYTES = 16  # of a message for each token of the longest prompt, at most: far more than text takes
OTHER_BYTES = 2**16 + GRAMMAR_BYTES  # that a message may have besides
QUIET_S = 0.7  # a client hears something at least once a second while a request is open
TICK_S = 0.25
PING_S = 1.0  # between two questions to a child
INFO_S = 2.0
EXAMINE_S = 60.0  # for a store to look into its books
FLUSH_S = 1.0
THREADS = 4  # that tokenise, each for another client
SPARE = 16  # requests of a client that wait at workers, beside those for twice as many slots as there are

_MOST_LOSSES = 3  # of its workers, after which a request is taken for the cause

_FIRST = Ready | RankReady | StoreReady | GatewayReady
"""What a child begins with."""
_TURNED_AWAY = "A client was turned away: it has another API key, or none."

T = TypeVar("T")
_logger = logging.getLogger(__name__)


class Router:
    """Between clients (TCP) and workers (ipc). Stores are connected too, to say that they are alive.

    Args:
        config: host, port, number of workers, attention.
        model: the model that is served.
        endpoint: where workers and stores connect, see ``worker_identity`` and ``store_identity``.
        key: that they have to know.

    Attributes:
        address: where clients connect.
        kv_events: where changes in the stores are published, None for nowhere.

    Raises:
        ConfigError: host or port cannot be used, or the model has no tokenizer.
    """

    def __init__(self, config: ServerConfig, model: ResolvedModel, endpoint: str, key: str) -> None:
        self._config, self._model = config, model
        self._handlers = handlers_of(Router, ToRouter | FromChild)
        self._tokenizer = Tokenizer(model.folder, model.vocab_size)
        self._rules = SamplingRules(model)
        self._grammars = Grammars()
        host = numeric_host(config.host)
        try:
            listener = listen_tcp(host, config.port)
        except OSError as error:
            raise not_bound("--port", config.host, config.port, error) from None
        largest = min(OTHER_BYTES + TOKEN_BYTES * model.max_model_len, MAX_MESSAGE_BYTES)
        self._clients: Port[ToClient, ToRouter] = Port(
            listener,
            ToRouter,
            config.api_key,
            named=False,
            largest=largest,
            unread=UNREAD_BYTES,
            handle=self._hear_client,
            refuse=Strangers(_logger, _TURNED_AWAY).turned_away,
        )
        self.address = self._clients.endpoint
        self._workers: Port[ToWorker | LauncherToStore, FromChild] = Port(
            listen_unix(endpoint),
            FromChild,
            key,
            named=True,
            largest=MAX_MESSAGE_BYTES,
            unread=math.inf,
            handle=self._hear_worker,
            refuse=Strangers(_logger, INTRUDER).turned_away,
        )
        self.kv_events: KVEventPublisher | None = None
        if config.kv_events_port is not None:
            self.kv_events = KVEventPublisher(config.host, config.kv_events_port, config.kv_events_topic)
        self._stores = [store_identity(name) for name in config.kvstore]
        self._open: dict[tuple[bytes, str], Request] = {}  # by client and name
        self._accounts = Accounts()  # of open requests and questions
        self._turns: WeakValueDictionary[bytes, asyncio.Lock] = WeakValueDictionary()  # to tokenise
        self._permits: WeakValueDictionary[bytes, asyncio.Semaphore] = WeakValueDictionary()  # by client
        self._threads = ThreadPoolExecutor(THREADS, "tokenizer")
        self._traffic = TrafficMeter()
        self._children = Children()
        self._running: dict[bytes, dict[int, Request]] = {}  # by worker and sequence; CLOSED ones too
        self._sequences = 0
        self._ready_workers: dict[bytes, Ready] = {}
        self._known_workers: dict[bytes, Ready] = {}  # with those that have ended and are started again
        self._all_ready = asyncio.Event()
        self._some_ready = asyncio.Event()  # a worker, once all have been
        self._begun: dict[bytes, asyncio.Event] = {}  # by connection
        self._reports: dict[bytes, asyncio.Future[WorkerReport]] = {}  # asked for but not here yet
        self._examined: dict[tuple[bytes, int], asyncio.Future[StoreExamined]] = {}  # by store and number
        self._examinations = 0
        self._owed: dict[bytes, list[Failed]] = {}  # owed to clients whose queues were full
        self._failure: CLOError | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def capacity_tokens(self) -> int:
        """Tokens that all stores hold together."""
        return sum({ready.store: ready.capacity_tokens for ready in self._known_workers.values()}.values())

    def expect(self, connection: bytes, name: str, pid: int) -> None:
        """A worker or store was started, and may say that it is ready; nobody else may say anything."""
        self._children.expect(connection, name, pid)
        self._begun.setdefault(connection, asyncio.Event()).clear()

    async def until_begun(self, connection: bytes) -> None:
        """Wait until a worker, store or gateway that was started is ready."""
        await self._begun[connection].wait()

    def has_begun(self, connection: bytes) -> bool:
        """Whether a worker, store or gateway is ready, and has not ended."""
        return self._begun[connection].is_set()

    def store_of(self, worker: bytes) -> str:
        """The store of a worker, which is the same after each start of it; it has been ready once."""
        return self._known_workers[worker].store

    async def listen_at(self, endpoint: str) -> asyncio.Server:
        """Let children connect at another address, too, until what is returned is closed."""
        return await self._workers.listen_also(listen_unix(endpoint))

    def tell_store(self, name: str, message: Expect) -> None:
        """Tell a store of a worker that was started again."""
        self._workers.send(store_identity(name), message)

    async def examine(self, name: str, message: Examine) -> StoreExamined:
        """Have a store look into its books.

        Raises:
            WorkerDied: it does not answer within ``EXAMINE_S`` seconds.
        """
        self._examinations += 1
        store, number = store_identity(name), self._examinations
        answer = self._examined[store, number] = asyncio.get_running_loop().create_future()
        try:
            self._workers.send(store, replace(message, number=number))
            return await asyncio.wait_for(answer, EXAMINE_S)
        except TimeoutError:
            raise WorkerDied(f"KV store {name} has not answered for {EXAMINE_S:g} s; ask again.") from None
        finally:
            del self._examined[store, number]

    def lose(self, worker: bytes, error: WorkerDied, *, planned: bool = False) -> None:
        """A worker has ended, or is about to. Its requests go on with another one, or with its successor,
        from the tokens that have come; what a worker had when it ended ``_MOST_LOSSES`` times fails with
        ``error``. An end that was ``planned`` does not count."""
        self._children.end(worker)
        self._begun[worker].clear()
        self._ready_workers.pop(worker, None)
        if not self._ready_workers:
            self._some_ready.clear()
        if (report := self._reports.pop(worker, None)) is not None:
            report.cancel()
        lost, self._running[worker] = self._running.get(worker, {}), {}
        for request in lost.values():
            request.losses += not planned
            reason = request.reason if request.state is State.STOPPING else request.complete
            if not request.open:
                self._give_permit_back(request)
            elif reason is not None:
                self._give_permit_back(request)
                self._finish(request, reason, NO_STATS)
            elif request.losses == _MOST_LOSSES and not planned:
                self._give_permit_back(request)
                text = f"Workers ended {_MOST_LOSSES} times while they had the request: {error}"
                self._end(request, Failed(request.name, error.code, text))
            else:
                request.move(State.LOST)
                request.worker, request.prefilled = b"", None
                self._spawn(self._go_on(request))

    def end(self, connection: bytes) -> None:
        """A child that has no requests has ended: a store, for whose workers ``lose`` is called, too, or a
        rank of a worker that is not its first one."""
        self._children.end(connection)
        self._begun[connection].clear()

    async def _go_on(self, request: Request) -> None:
        """Give a lost request to a worker, from the tokens that have come."""
        await self._until_some_ready()
        if request.state is not State.LOST:  # it was cancelled meanwhile, or its client is gone
            return
        assert request.run is not None
        prompt = request.run.tokens[: request.prompt_tokens]
        run = replace(request.run, tokens=prompt + request.answer, answered=len(request.answer))
        self._assign(request, run, self._least_loaded())

    async def ready(self) -> int:
        """Wait until all workers are ready; returns ``capacity_tokens``."""
        await self._all_ready.wait()
        return self.capacity_tokens

    async def serve(self) -> None:
        """Serve until cancelled. Requests that come before the workers are ready wait for them."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._workers.listen())
            group.create_task(self._clients.listen())
            if self.kv_events is not None:
                group.create_task(self.kv_events.listen())
            group.create_task(self._keep_in_touch())

    async def watch_children(self, give_up: Callable[[bytes, WorkerDied], None]) -> None:
        """Tell ``give_up`` where a child is not ready, or does not answer, in time."""
        loop = asyncio.get_running_loop()
        while True:
            for child in self._children.ask():
                self._workers.send(child, Ping())
            began = loop.time()
            await asyncio.sleep(PING_S)
            if loop.time() - began < 2 * PING_S:  # else this process was stopped itself
                for connection, error in self._children.wait(PING_S):
                    give_up(connection, error)

    def fail_all(self, error: CLOError) -> None:
        """End every open request with ``error``, and every later one at once."""
        self._failure = error
        for request in list(self._open.values()):
            self._end(request, Failed(request.name, error.code, str(error)))

    async def close(self) -> None:
        """Close the sockets, after ``serve`` has ended. What was sent gets up to a second to leave."""
        for task in self._tasks:
            task.cancel()
        self._threads.shutdown(wait=False, cancel_futures=True)
        await self._grammars.close()
        await self._clients.close(FLUSH_S)
        if self.kv_events is not None:
            await self.kv_events.close(FLUSH_S)
        await self._workers.close(0)

    def _hear_client(self, client: bytes, message: ToRouter | ProtocolError | TooLarge, size: int) -> None:
        if isinstance(message, ProtocolError):
            self._send(client, Failed("", message.code, str(message)))
        elif isinstance(message, TooLarge):
            text = (
                f"The request takes {size} bytes, which cannot fit: {context_is(self._model.max_model_len)}. "
                "Shorten it."
            )
            self._send(client, Failed(message.request, PromptTooLong.code, text))
        else:
            self._handlers[type(message)](self, client, message, size)

    def _hear_worker(self, worker: bytes, message: FromChild | ProtocolError | TooLarge, size: int) -> None:
        if isinstance(message, ProtocolError | TooLarge):
            _logger.error("%s sent what cannot be read: %s", worker.decode(errors="replace"), message)
        elif isinstance(message, _FIRST) or self._children.has_begun(worker):
            self._handlers[type(message)](self, worker, message)
        else:
            _logger.error("%s speaks before it is ready.", worker.decode(errors="replace"))

    # ------------------------------------------------------------------------------ from clients

    def on_generate(self, client: bytes, message: Generate, size: int) -> None:
        name = message.request
        if self._failure is not None:
            self._send(client, Failed(name, self._failure.code, str(self._failure)))
        elif (client, name) in self._open:
            text = f"A request '{name}' is open already; give each request an id of its own."
            self._send(client, Failed(name, InvalidRequest.code, text))
        elif self._charge(client, name, size):
            request = Request(client, name, size, asyncio.get_running_loop().time())
            self._open[client, name] = request
            task = self._spawn(self._admit(request, message))
            task.add_done_callback(lambda _: self._admitted(request))

    def on_cancel(self, client: bytes, message: Cancel, size: int) -> None:
        request = self._open.get((client, message.request))
        if request is None:  # it has ended meanwhile
            return
        if request.state is State.ADMITTING:
            self._end(request, Finished(request.name, "cancelled", Usage(request.prompt_tokens, 0), NO_STATS))
        elif request.state is State.LOST:
            self._finish(request, "cancelled", NO_STATS)
        elif request.state is State.ASSIGNED:
            self._stop(request, "cancelled")

    def on_get_info(self, client: bytes, message: GetInfo, size: int) -> None:
        if self._charge(client, message.request, size):
            task = self._spawn(self._inform(client, message.request))
            task.add_done_callback(lambda _: self._accounts.discharge(client, size))

    def _charge(self, client: bytes, name: str, size: int) -> bool:
        """Count a request of a client as open; False where it has too many and was told so."""
        try:
            self._accounts.charge(client, size)
        except Overloaded as error:
            self._send(client, Failed(name, error.code, str(error)))
            return False
        return True

    async def _admit(self, request: Request, message: Generate) -> None:
        """Tokenise, check, wait until the workers are ready, and give the request to one of them."""
        grammar: str | None = None
        try:
            tokens = await self._tokens(request, message.prompt)
            forced, params = None, message.sampling
            if message.continuation is not None:
                forced = await self._tokens(request, message.continuation, continues=True)
                params = SamplingParams(
                    max_tokens=len(forced), logprobs=params.logprobs or 0, cache_salt=params.cache_salt
                )
            self._rules.check(params, len(tokens))
            if params.structured_outputs is not None:
                grammar = await self._grammars.compile(params.structured_outputs)
            if params.echo:
                prompt = message.prompt
                if isinstance(prompt, Text):
                    text = prompt.text
                else:
                    text = await self._aside(request, partial(self._tokenizer.decode, tokens))
                self._tell(request, Chunks([Chunk(request.name, text, [], None)]))
        except CLOError as error:
            self._end(request, Failed(request.name, error.code, str(error)))
            return
        except Exception:  # a tokenizer runs code of the model's authors; it must not end the server
            _logger.exception("A prompt could not be tokenised.")
            self._end(request, Failed(request.name, CLOError.code, "The prompt could not be tokenised."))
            return
        request.prompt_tokens = len(tokens)
        request.text = Detokenizer(self._tokenizer, tokens, params.stop, params.min_tokens)
        request.stop_token_ids = frozenset(params.stop_token_ids)
        if params.prompt_logprobs is not None:
            request.prompt = tokens
        await self._all_ready.wait()
        permits = self._permits.setdefault(request.client, asyncio.Semaphore(self._most_at_workers()))
        await permits.acquire()
        await self._until_some_ready()
        if not request.open:  # it was cancelled meanwhile, or its client is gone
            permits.release()
            return
        request.permits = permits
        worker = self._least_loaded()
        capacity = self._ready_workers[worker].capacity_tokens
        sampling = self._rules.fill_in(params, len(tokens), capacity, grammar)
        request.max_tokens = sampling.max_tokens
        seed = secrets.randbits(63) if params.seed is None or params.seed == -1 else params.seed % 2**63
        client = int.from_bytes(request.client)
        self._assign(request, Run(0, tokens, sampling, seed, self._tokenizer.eos, forced, client), worker)

    async def _until_some_ready(self) -> None:
        while not self._ready_workers:  # one that was ready may have ended before this goes on
            await self._some_ready.wait()

    def _least_loaded(self) -> bytes:
        return min(self._ready_workers, key=self._load)

    def _assign(self, request: Request, run: Run, worker: bytes) -> None:
        request.move(State.ASSIGNED)
        request.worker, request.sequence = worker, self._sequences
        request.run = replace(run, sequence=request.sequence)
        self._sequences += 1
        self._running[worker][request.sequence] = request
        self._order(request, request.run)

    def _most_at_workers(self) -> int:
        """Requests of one client that workers have at a time: so many that no slot of a batch stays free, and
        so few that those of other clients are read soon."""
        return SPARE + 2 * sum(ready.slots for ready in self._known_workers.values())

    def _admitted(self, request: Request) -> None:
        request.admitted = True
        if not request.open:
            self._accounts.discharge(request.client, request.size)

    def _leave_worker(self, worker: bytes, sequence: int) -> Request | None:
        """A worker has nothing more to do with a request, if it had."""
        request = self._running[worker].pop(sequence, None)
        if request is not None:
            self._give_permit_back(request)
        return request

    def _give_permit_back(self, request: Request) -> None:
        if request.permits is not None:
            request.permits.release()
            request.permits = None

    async def _tokens(
        self, request: Request, prompt: Text | Chat | Tokens, continues: bool = False
    ) -> list[int]:
        encode = partial(self._tokenizer.encode, prompt, self._model.max_model_len, continues=continues)
        if not takes_long(prompt):
            return encode()
        return await self._aside(request, encode)

    async def _aside(self, request: Request, work: Callable[[], T]) -> T:
        """Do what may take long in a thread, one piece after another for each client.

        Raises:
            CLOError: the request has ended before its turn.
        """
        async with self._turns.setdefault(request.client, asyncio.Lock()):
            if not request.open:
                raise CLOError("The request ended before it was tokenised.")
            return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def _load(self, worker: bytes) -> int:
        return sum(request.outstanding for request in self._running[worker].values())

    async def _inform(self, client: bytes, name: str) -> None:
        """Answer ``GetInfo``, with the reports of the workers that give one within 2 s."""
        for worker in self._ready_workers:
            if worker not in self._reports:
                self._reports[worker] = asyncio.get_running_loop().create_future()
                self._workers.send(worker, GetWorkerStats())
        reports: list[WorkerReport] = []
        if self._reports:
            done, _ = await asyncio.wait(self._reports.values(), timeout=INFO_S)
            there = (report.result() for report in done if not report.cancelled())  # else the worker ended
            reports = sorted(there, key=lambda report: report.worker.worker)
        if self._failure is not None:
            self._send(client, Failed(name, self._failure.code, str(self._failure)))
            return
        stores = {report.store.store: report.store for report in reports}
        waiting = State.ADMITTING, State.LOST
        info = Info(
            request=name,
            state="ready" if self._all_ready.is_set() else "starting",
            model=self._model.name,
            max_model_len=self._model.max_model_len,
            capacity_tokens=self.capacity_tokens,
            attention=self._config.cache.attention,
            workers=[report.worker for report in reports],
            stores=list(stores.values()),
            waiting=sum(request.state in waiting for request in self._open.values()),
            traffic=self._traffic.traffic(),
        )
        self._send(client, info)

    # ------------------------------------------------------------------------------ from workers

    def on_ready(self, worker: bytes, message: Ready) -> None:
        if self._begin(worker, message.pid):
            self._ready_workers[worker] = self._known_workers[worker] = message
            self._check_ready()

    def on_rank_ready(self, rank: bytes, message: RankReady) -> None:
        if self._begin(rank, message.pid):
            self._check_ready()

    def on_store_ready(self, store: bytes, message: StoreReady) -> None:
        if self._begin(store, message.pid):
            self._check_ready()

    def on_kv_events(self, store: bytes, message: KVEvents) -> None:
        if self.kv_events is not None:
            self.kv_events.publish(self._stores.index(store), message.events)

    def on_store_examined(self, store: bytes, message: StoreExamined) -> None:
        answer = self._examined.get((store, message.number))
        if answer is not None and not answer.done():
            answer.set_result(message)

    def on_gateway_ready(self, gateway: bytes, message: GatewayReady) -> None:
        if self._begin(gateway, message.pid):
            self._check_ready()

    def _begin(self, child: bytes, pid: int) -> bool:
        """Whether a first message is from the process that was started."""
        if self._children.begin(child, pid):
            self._running.setdefault(child, {})
            self._begun[child].set()
            return True
        _logger.error("Process %d is not %s.", pid, child.decode(errors="replace"))
        return False

    def _check_ready(self) -> None:
        if self._children.ready and len(self._ready_workers) == self._config.workers:
            self._all_ready.set()
        if self._all_ready.is_set() and self._ready_workers:
            self._some_ready.set()

    def on_pong(self, child: bytes, message: Pong) -> None:
        self._children.answered(child)

    def on_prefilled(self, worker: bytes, message: Prefilled) -> None:
        request = self._running[worker].get(message.sequence)
        if request is not None:
            total = request.prompt_tokens  # its worker may count a part of the answer, too
            request.prefilled = min(message.done, total)
            self._tell(request, Progress(request.name, "prefill", request.prefilled, total))

    def on_prompt_scored(self, worker: bytes, message: PromptScored) -> None:
        request = self._running[worker].get(message.sequence)
        if request is None or request.state is not State.ASSIGNED:
            return
        start, logprobs = message.start, list[Logprob | None](message.logprobs)
        if start == 1:
            start, logprobs = 0, [None, *logprobs]
        known = max(0, request.scored - start)  # from a worker that has ended
        start, logprobs = start + known, logprobs[known : max(0, request.prompt_tokens - start)]
        if not logprobs:
            return
        request.scored = start + len(logprobs)
        tokens = request.prompt[start : request.scored]
        self._tell(request, PromptChunk(request.name, tokens, logprobs))

    def on_stepped(self, worker: bytes, message: Stepped) -> None:
        """The new tokens of a step, as text: one message to each client."""
        now = asyncio.get_running_loop().time()
        assigned = State.ASSIGNED  # to look up a member of an enum takes longer than all the rest of a test
        chunks: defaultdict[bytes, list[Chunk]] = defaultdict(list)
        running = self._running[worker]
        self._traffic.step(len(message.steps))
        for step in message.steps:
            request = running.get(step.sequence)
            if request is None or request.state is not assigned:  # the worker has not read the Abort yet
                continue
            assert request.text is not None
            try:
                text = "" if step.token in request.stop_token_ids else request.text.push(step.token)
            except Exception:  # it runs code of the model's authors; it must not end the server
                self._fail_text(request)
                continue
            if request.text.stopped:
                self._stop(request, "stop")
            self._traffic.token(request, now)
            request.answer.append(step.token)
            request.heard = now
            logprobs = None if step.logprob is None else [step.logprob]
            chunks[request.client].append(Chunk(request.name, text, [step.token], logprobs))
        for client, new in chunks.items():
            self._send(client, Chunks(new))

    def on_done(self, worker: bytes, message: Done) -> None:
        self._traffic.add_cache(message.cache)
        request = self._leave_worker(worker, message.sequence)
        if request is not None and request.open:
            self._finish(request, message.reason, message.cache)

    def _finish(self, request: Request, reason: Reason, cache: CacheStats) -> None:
        """The answer of a request is complete."""
        assert request.text is not None
        try:
            rest = request.text.flush()
        except Exception:
            self._fail_text(request)
            return
        if rest:
            self._tell(request, Chunks([Chunk(request.name, rest, [], None)]))
        cached = min(cache.cached_tokens, request.prompt_tokens)
        usage = Usage(request.prompt_tokens, request.generated, cached)
        reason = "stop" if request.text.stopped else request.reason or reason
        self._end(request, Finished(request.name, reason, usage, cache))

    def _fail_text(self, request: Request) -> None:
        """End a request whose tokens cannot be made into text."""
        _logger.exception("Tokens could not be made into text.")
        if request.sequence in self._running.get(request.worker, {}):
            self._order(request, Abort(request.sequence))
        self._end(request, Failed(request.name, CLOError.code, "The tokens could not be made into text."))

    def on_refused(self, worker: bytes, message: Refused) -> None:
        request = self._leave_worker(worker, message.sequence)
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
                    done = request.prefilled or 0
                    progress = Progress(request.name, self._stage(request), done, request.prompt_tokens)
                    self._tell(request, progress)
            for client in list(self._owed):
                owed = self._owed[client]
                while owed and self._clients.send(client, owed[-1]) is not Delivery.FULL:
                    owed.pop()
                if not owed:
                    del self._owed[client]

    def _stage(self, request: Request) -> Literal["queued", "prefill", "stalled"]:
        if request.worker:
            stalls = self._is_stalled(request.worker)
        else:
            stalls = self._all_ready.is_set() and all(map(self._is_stalled, self._ready_workers))
        if stalls:
            return "stalled"
        return "queued" if request.prefilled is None else "prefill"

    def _is_stalled(self, worker: bytes) -> bool:
        """Whether a worker or its store does not answer."""
        store = store_identity(self._ready_workers[worker].store)
        return self._children.is_stalled(worker) or self._children.is_stalled(store)

    def _tell(self, request: Request, message: ToClient) -> None:
        if request.open:
            request.heard = asyncio.get_running_loop().time()
            self._send(request.client, message)

    def _end(self, request: Request, message: Finished | Failed) -> None:
        """The last message of a request; nothing happens where it has ended."""
        if request.open:
            self._tell(request, message)
            if request.open:  # not if the client turned out to be gone
                self._forget(request, message.reason if isinstance(message, Finished) else "failed")

    def _forget(self, request: Request, how: Reason | Literal["failed"]) -> None:
        if request.state is State.LOST:  # else its worker's last word gives it back
            self._give_permit_back(request)
        request.move(State.CLOSED)
        self._traffic.end(request, how, asyncio.get_running_loop().time())
        del self._open[request.client, request.name]
        if request.admitted:
            self._accounts.discharge(request.client, request.size)

    def _stop(self, request: Request, reason: Reason) -> None:
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
            self._forget(request, "cancelled")
            if delivery is Delivery.FULL:
                text = "The client did not read its stream and its requests were dropped; read it faster."
                self._owed.setdefault(client, []).append(Failed(request.name, Overloaded.code, text))

    def _order(self, request: Request, message: Run | Abort) -> None:
        """Send to a request's worker. One that is gone needs nothing here: its connection lasts as long as
        the process, at whose end the supervisor calls ``lose``, or ends the server."""
        if self._workers.send(request.worker, message) is not Delivery.SENT:
            _logger.info("%s is gone.", request.worker.decode())

    def _spawn(self, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
