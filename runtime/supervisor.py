"""Starts, watches and stops the processes of one server."""

import asyncio
import logging
import math
import os
import secrets
import signal
import socket
import sys
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from ipaddress import ip_address
from typing import NamedTuple
from urllib.parse import urlsplit

import msgspec

from clo import __version__
from clo.runtime.config import (
    BlockConfig,
    DiskConfig,
    GatewayProcessConfig,
    GroupConfig,
    ServerConfig,
    StartedWorker,
    StoreConfig,
    WorkerConfig,
)
from clo.runtime.control import Control, Tell
from clo.runtime.http.listener import Listener
from clo.runtime.machine.addresses import from_this_machine
from clo.runtime.machine.numa import check_nodes
from clo.runtime.machine.private_folder import PrivateFolder
from clo.runtime.machine.process import EXIT_ALONE, EXIT_EXPLAINED, end_start_up, set_threads
from clo.runtime.model.files import resolve
from clo.runtime.model.fingerprint import fingerprint
from clo.runtime.model.kv_shape import kv_shape
from clo.runtime.model.kv_size import kv_size
from clo.runtime.model.placement import head_nodes
from clo.runtime.model.ranks import check_ranks
from clo.runtime.router import Router
from clo.runtime.wire.errors import CLOError, ConfigError, InvalidRequest, ServerStopped, WorkerDied
from clo.runtime.wire.liveness import DRAIN_S, SERVING_S
from clo.runtime.wire.messages import (
    GATEWAY_IDENTITY,
    Examine,
    Examined,
    Expect,
    Reloaded,
    ToControl,
    Working,
    store_identity,
    worker_identity,
)

STOP_S = 5.0  # for the children to leave in good order
_LEAVE_S = 1.0  # for a store that has written to disk as long as it may to end
_CAUSE_S = 1.0  # for the other ranks of a worker to end as well, before they are killed
_LASTING_S, _QUICK_ENDS, _BACK_OFF_S = 60.0, 6, 0.5
"""Where a process that was started again serves for less than so many seconds, so often in a row, the server
stops. Before its next start such a one waits so many seconds, then three times, seven times, ... as long."""

_logger = logging.getLogger(__name__)


class Part(NamedTuple):
    """What one process of a child is started with; the descriptors are of this process."""

    config: StoreConfig | WorkerConfig | GatewayProcessConfig
    descriptors: tuple[int, ...] = ()


@dataclass(frozen=True)
class Child:
    """A process of the server, or the ranks of a worker, which live and die together; ``name`` is what users
    see: "worker 0", "KV store numa0"."""

    name: str
    processes: tuple[asyncio.subprocess.Process, ...]

    @classmethod
    async def start(cls, name: str, module: str, parts: Sequence[Part], secret: str, threads: int) -> "Child":
        """Run ``python -m MODULE CONFIG PID`` for each part in a session of its own, out of reach of Ctrl-C.

        A process reads ``secret`` from its stdin. What it prints goes to stderr, so that stdout carries the
        ready line and nothing else. To be called in the main thread: a child dies with the thread that
        started it.
        """
        environment = dict(os.environ)
        set_threads(environment, threads)
        processes = list[asyncio.subprocess.Process]()
        try:
            for config, descriptors in parts:
                process = await asyncio.create_subprocess_exec(
                    *(sys.executable, "-m", module, msgspec.json.encode(config).decode(), str(os.getpid())),
                    stdin=asyncio.subprocess.PIPE,
                    stdout=sys.stderr,
                    start_new_session=True,
                    env=environment,
                    pass_fds=descriptors,
                )
                processes.append(process)
                assert process.stdin is not None
                process.stdin.write(secret.encode())
                process.stdin.close()
                _logger.info("Started %s as process %d.", name, process.pid)
        except BaseException:
            cls(name, tuple(processes)).send(signal.SIGKILL)
            raise
        return cls(name, tuple(processes))

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self.processes]

    @property
    def is_running(self) -> bool:
        """Whether any of its processes is."""
        return any(process.returncode is None for process in self.processes)

    def send(self, number: signal.Signals) -> None:
        """Send a signal; nothing happens to a process that has ended."""
        for process in self.processes:
            if process.returncode is None:
                with suppress(ProcessLookupError):  # it ended a moment ago
                    os.kill(process.pid, number)

    async def wait(self) -> None:
        """Wait for the end of all processes."""
        await asyncio.gather(*(process.wait() for process in self.processes))

    async def ended(self) -> WorkerDied:
        """Wait for the end of a process, and end the others, which cannot go on; says how it ended. Of
        several that have, this is about one that did not end for the others' sake."""
        waits = [asyncio.create_task(process.wait()) for process in self.processes]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            if len(waits) > 1:
                await asyncio.wait(waits, timeout=_CAUSE_S, return_when=asyncio.FIRST_EXCEPTION)
            codes = [process.returncode for process in self.processes]
            self.send(signal.SIGKILL)
            await asyncio.gather(*waits)
        finally:
            for wait in waits:
                wait.cancel()
        causes = [rank for rank, code in enumerate(codes) if code not in (None, EXIT_ALONE)]
        if not causes:
            return WorkerDied(f"the ranks of {self.name} have lost one another; --log-level info shows why")
        code, name = codes[causes[0]], self.name if len(codes) == 1 else f"rank {causes[0]} of {self.name}"
        assert code is not None
        if code == EXIT_EXPLAINED:
            return _Explained(f"{name} ended with an error that the server has printed")
        if code == -signal.SIGKILL:
            how = "was killed by SIGKILL (the kernel does so when memory runs out, see dmesg)"
        elif code < 0:
            how = f"was killed by {signal.Signals(-code).name}"
        else:
            how = f"ended with exit code {code}"
        return WorkerDied(f"{name} {how}")


class _Explained(WorkerDied):
    """The process has said why itself."""


class _LostStore(WorkerDied):
    """The worker has ended with its store."""


class _Planned(WorkerDied):
    """The process was ended to start it with the code that is on disk."""


def _stopped(error: WorkerDied) -> WorkerDied:
    """The same for those whose server does not go on."""
    return type(error)(f"{error}; the server has stopped, start it again.")


class Supervisor:
    """One server, from the checks to the last process.

    Args:
        config: what was asked for.
        worker: module that each worker runs.
        folder: for the sockets between the processes. It is removed once they are connected, so that nobody
            can connect to them any more, and nothing is left behind where this process is killed. A process
            that is started again connects in a folder of its own.

    Raises:
        ConfigError: the model, the machine's memory or the port do not allow it.
    """

    def __init__(self, config: ServerConfig, worker: str, folder: PrivateFolder) -> None:
        self._config, self._worker, self._folder = config, worker, folder
        self._key = secrets.token_hex(32)
        self._nodes = [int(name.removeprefix("numa")) for name in config.kvstore]
        check_nodes(self._nodes)
        self._listener = None if config.gateway.http is None else Listener(config)
        self._model = resolve(config.model)
        check_ranks(self._model.architecture, config.tensor_parallel_size)
        self._head_nodes = head_nodes(config, self._model, self._nodes)
        self._kv_size = kv_size(config, self._model, self._head_nodes)
        shape = kv_shape(
            self._model.architecture,
            self._model.dtype,
            codes=config.cache.prefix_attention == "sparse",
        )
        self._block = BlockConfig(shape.layers, shape.kv_heads, shape.block_tokens, shape.block_bytes)
        self._disk: DiskConfig | None = None
        if config.kv_disk is not None and config.kv_disk_size is not None:
            said = fingerprint(
                self._model, config.cache.prefill_attention, config.cache.prefix_attention, __version__
            )
            self._disk = DiskConfig(config.kv_disk, config.kv_disk_size, said, key=config.kv_disk_key)
        self._router = Router(config, self._model, _router_in(folder), self._key)
        self._control = Control(self._router.address, self._carry_out)
        self._reloading = False
        self._gateways: list[Child] = []  # one or none
        self._workers: list[Child] = []
        self._stores: list[Child] = []
        self._stopping = asyncio.Event()
        self._serving = False  # it was ready
        self._killed: dict[Child, WorkerDied] = {}  # and why

    def _warn(self) -> None:
        """Once, where others than this machine's users can use the server."""
        host = urlsplit(self._router.address).hostname
        if self._config.api_key is None and host is not None and not ip_address(host).is_loopback:
            _logger.warning(
                "Whoever reaches %s can use this server; set CLO_API_KEY, or listen on 127.0.0.1.",
                self._addresses,
            )
        if self._router.kv_events is not None and host is not None and not ip_address(host).is_loopback:
            _logger.warning(
                "Whoever reaches %s can read the tokens of prompts.", self._router.kv_events.address
            )

    @property
    def _addresses(self) -> str:
        """Where clients connect."""
        return (
            self._router.address
            if self._listener is None
            else f"{self._router.address} or {self._listener.url}"
        )

    @property
    def _children(self) -> list[Child]:
        """All that have been started, in the order in which they leave: the gateway first, which hands the
        last errors on, and the stores last, or workers would report a lost one."""
        return self._gateways + self._workers + self._stores

    async def run(self) -> int:
        """Serve until a signal comes or something fails; returns the launcher's exit code. Signals that come
        later are ignored, or they would decide the exit code while Python ends."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: loop.call_soon_threadsafe(self._on_signal))
        error: CLOError = ServerStopped("The server has stopped.")
        try:
            await self._start_children()
            error = await self._first_failure()
            self._router.fail_all(error)
        finally:
            await self._stop_children()
            await self._control.close(error)
            await self._router.close()
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_IGN)
        if isinstance(error, ServerStopped):
            return 0
        if not isinstance(error, _Explained):
            print(f"error: {error}", file=sys.stderr)
        return 1

    def _on_signal(self) -> None:
        if self._stopping.is_set():
            for child in self._children:
                child.send(signal.SIGKILL)
        self._stopping.set()

    async def _start_children(self) -> None:
        """Workers before stores, which have to know which processes they are."""
        config, folder = self._config, self._folder
        if self._listener is not None:
            self._gateways.append(await self._start_gateway(self._listener, folder))
        for index in range(config.workers):
            self._workers.append(await self._start_worker(index, folder))
        for index in range(len(config.kvstore)):
            self._stores.append(await self._start_store(index, folder))

    async def _start_store(self, index: int, folder: PrivateFolder) -> Child:
        config, name, node = self._config, self._config.kvstore[index], self._nodes[index]
        heads = self._head_nodes[index]
        store = StoreConfig(
            name=name,
            node=node,
            arena_bytes=self._kv_size,
            endpoint=_store_in(folder, node),
            router=_router_in(folder),
            block=self._block,
            workers={
                config.tensor_parallel_size * number + rank: StartedWorker(pid, number)
                for number, child in enumerate(self._workers)
                for rank, pid in enumerate(child.pids)
            },
            disk=None if self._disk is None else replace(self._disk, needed=not self._serving),
            prefix_caching=config.prefix_caching,
            kv_events=config.kv_events_port is not None,
            log_level=config.log_level,
            head_nodes=heads if set(heads) != {node} else (),
        )
        child = await Child.start(f"KV store {name}", "clo.kvstore", [Part(store)], self._key, threads=1)
        self._router.expect(store_identity(name), child.name, *child.pids)
        return child

    async def _start_worker(self, index: int, folder: PrivateFolder) -> Child:
        config = self._config
        worker_config = WorkerConfig(
            worker=index,
            router=_router_in(folder),
            stores={node: _store_in(folder, node) for node in self._nodes},
            model=self._model,
            cache=config.cache,
            engine=config.engine,
            log_level=config.log_level,
        )
        threads = len(os.sched_getaffinity(0)) // (config.workers * config.tensor_parallel_size)
        name = f"worker {index}"
        with _ranks(worker_config, config.tensor_parallel_size) as parts:
            child = await Child.start(name, self._worker, parts, self._key, threads)
        for rank, pid in enumerate(child.pids):
            known = f"rank {rank} of {name}" if rank else name
            self._router.expect(worker_identity(index, rank), known, pid)
        return child

    def _identities(self, index: int) -> list[bytes]:
        """Names of the connections of a worker's ranks to the router."""
        return [worker_identity(index, rank) for rank in range(self._config.tensor_parallel_size)]

    async def _start_gateway(self, listener: Listener, folder: PrivateFolder) -> Child:
        gateway_config = GatewayProcessConfig(
            gateway=self._config.gateway,
            model=self._model,
            descriptor=listener.descriptor,
            server=from_this_machine(self._router.address),
            router=_router_in(folder),
            log_level=self._config.log_level,
        )
        secret = f"{self._key}\n{self._config.api_key or ''}"
        child = await Child.start(
            "HTTP gateway", "clo.runtime.http", [Part(gateway_config, (listener.descriptor,))], secret, 1
        )
        if self._config.recovery == "off":
            listener.close()  # here: nobody else shall keep the port open
        self._router.expect(GATEWAY_IDENTITY, child.name, *child.pids)
        return child

    # --------------------------------------------------------------------------------- recovery

    async def _keep_worker(self, index: int) -> None:
        """Start a worker again whenever it ends. Raises ``WorkerDied`` where that is not wanted or of no
        use."""
        identity, *others = self._identities(index)

        def lose(error: WorkerDied) -> None:
            self._router.lose(identity, error)
            for other in others:
                self._router.end(other)

        async def start(folder: PrivateFolder) -> Child:
            store = self._router.store_of(identity)
            await self._router.until_begun(store_identity(store))
            child = self._workers[index] = await self._start_worker(index, folder)
            if not self._router.has_begun(store_identity(store)):  # it has ended while the process was made
                self._kill(child, _LostStore(f"{child.name} has lost KV store {store}"))
            for rank, pid in enumerate(child.pids):
                number = len(child.pids) * index + rank
                for name, node in zip(self._config.kvstore, self._nodes, strict=True):
                    self._router.tell_store(name, Expect(number, pid, _store_in(folder, node)))
            return child

        await self._keep(self._workers[index], [identity, *others], start, lose)

    async def _keep_store(self, index: int) -> None:
        """The same for a store, with which its workers end: what they know of its arena is lost."""
        name, workers = self._config.kvstore[index], list[Child]()

        def lose(error: WorkerDied) -> None:
            self._router.end(store_identity(name))
            workers.clear()
            for number, child in enumerate(self._workers):
                identity = worker_identity(number)
                if self._router.store_of(identity) == name:
                    workers.append(child)
                    why = _LostStore(f"{child.name} has lost KV store {name}")
                    self._kill(child, why)
                    self._router.lose(identity, why)  # all at once: no request goes on with one of them

        async def start(folder: PrivateFolder) -> Child:
            for child in workers:  # or there would be two arenas for a moment
                try:
                    await asyncio.wait_for(child.wait(), SERVING_S)
                except TimeoutError:
                    raise _stopped(WorkerDied(f"{child.name} does not end")) from None
            child = self._stores[index] = await self._start_store(index, folder)
            return child

        await self._keep(self._stores[index], [store_identity(name)], start, lose)

    async def _keep_gateway(self, listener: Listener) -> None:
        """The same for the HTTP gateway. Its clients' connections end with it, and so do their requests."""

        async def start(folder: PrivateFolder) -> Child:
            child = self._gateways[0] = await self._start_gateway(listener, folder)
            return child

        await self._keep(self._gateways[0], [GATEWAY_IDENTITY], start, lambda error: None)

    async def _carry_out(self, message: ToControl, tell: Tell) -> Reloaded | Examined:
        """What this server's user has asked for.

        Raises:
            ConfigError: the server starts no process again.
            InvalidRequest: it is starting, or a reload is under way.
            WorkerDied: a store does not answer.
        """
        if not self._serving:
            raise InvalidRequest("The server is starting; ask again once it is ready.")
        if isinstance(message, Examine):
            stores = await asyncio.gather(
                *(self._router.examine(name, message) for name in self._config.kvstore)
            )
            return Examined(stores, msgspec.json.encode(self._model).decode())
        if self._config.recovery == "off":
            raise ConfigError(
                "The server has --recovery off and starts no process again; stop it and start it again."
            )
        if self._reloading:
            raise InvalidRequest("A reload is under way; wait for its end.")
        self._reloading = True
        try:
            await self._reload(tell)
        finally:
            self._reloading = False
        return Reloaded([child.pids[0] for child in self._workers])

    async def _reload(self, tell: Tell) -> None:
        """Restart the workers one after another, each once all of them are ready: others serve meanwhile.
        One that does not come up again is kept as after a death."""
        identities = [worker_identity(index) for index in range(len(self._workers))]
        for index, identity in enumerate(identities):
            tell(Working(index, len(identities)))
            await self._until_all_begun(identities)
            child = self._workers[index]
            why = _Planned(f"{child.name} is restarted with the code that is on disk")
            self._router.lose(identity, why, planned=True)  # before it ends: it is given nothing more
            self._kill(child, why)
            await self._router.until_begun(identity)
        await self._until_all_begun(identities)
        tell(Working(len(identities), len(identities)))

    async def _until_all_begun(self, identities: list[bytes]) -> None:
        while waits := [identity for identity in identities if not self._router.has_begun(identity)]:
            await self._router.until_begun(waits[0])  # others may end meanwhile

    async def _keep(
        self,
        child: Child,
        identities: list[bytes],
        start: Callable[[PrivateFolder], Awaitable[Child]],
        lose: Callable[[WorkerDied], None],
    ) -> None:
        loop = asyncio.get_running_loop()
        quick = 0
        error = await self._end_of(child)
        while self._serving and self._config.recovery == "on" and quick < _QUICK_ENDS:
            lose(error)
            if isinstance(error, _Planned):
                quick = 0  # whatever ended it before, its code may be another now
                _logger.info("%s.", error)
            else:
                _logger.warning("%s; it is started again.", error)
            await asyncio.sleep(_BACK_OFF_S * (2 ** min(quick, 10) - 1))
            try:
                with PrivateFolder() as folder:
                    door = await self._router.listen_at(_router_in(folder))
                    try:
                        child = await start(folder)
                        # all ranks, as nobody can connect any more once the door is closed
                        begun = asyncio.create_task(self._until_all_begun(identities))
                        ended = asyncio.create_task(self._end_of(child))
                        await asyncio.wait((begun, ended), return_when=asyncio.FIRST_COMPLETED)
                    finally:
                        door.close()
            except OSError as problem:  # such as no memory for another process
                quick += 1
                error = WorkerDied(f"{child.name} cannot be started: {problem.strerror}")
                continue
            since = loop.time() if begun.done() else math.inf
            begun.cancel()
            error = await ended
            if not isinstance(error, _LostStore | _Planned):
                quick = quick + 1 if loop.time() - since < _LASTING_S else 0
        raise _stopped(error)

    async def _end_of(self, child: Child) -> WorkerDied:
        """Wait for the end of a process; says why it ended."""
        error = await child.ended()
        return self._killed.pop(child, error)

    def _kill(self, child: Child, why: WorkerDied) -> None:
        if child.is_running:
            self._killed[child] = why
            child.send(signal.SIGKILL)

    def _give_up(self, identity: bytes, error: WorkerDied) -> None:
        """A process does not answer. Raises ``WorkerDied`` unless it is one that is started again."""
        identities = [[GATEWAY_IDENTITY]] * len(self._gateways)
        identities += map(self._identities, range(len(self._workers)))
        identities += [[store_identity(name)] for name in self._config.kvstore]
        child, first = next(
            (child, names[0])
            for child, names in zip(self._children, identities, strict=True)
            if identity in names
        )
        if child in self._killed and identity != first:
            return  # as its worker has been silent, too
        if not self._serving or self._config.recovery == "off" or child in self._killed:
            raise _stopped(error)  # the kernel itself cannot end one that was killed before
        _logger.warning("%s; it is killed.", error)
        self._kill(child, error)

    async def _first_failure(self) -> CLOError:
        """Serve until a signal, the end of a child or an error in the router; says which it was.

        Where several are seen at once, the first in this order is taken to be the cause of the others.
        """
        watched = [
            asyncio.create_task(work)
            for work in (
                self._until_stopped(),
                *([] if self._listener is None else [self._keep_gateway(self._listener)]),
                *(self._keep_worker(index) for index in range(len(self._workers))),
                *(self._keep_store(index) for index in range(len(self._stores))),
                self._router.watch_children(self._give_up),
                self._router.serve(),
                self._control.listen(),
                self._announce(),
            )
        ]
        done, pending = await asyncio.wait(watched, return_when=asyncio.FIRST_EXCEPTION)
        for task in pending:
            task.cancel()
        error = next(error for task in watched if task in done and (error := task.exception()))
        if isinstance(error, CLOError):
            return error
        _logger.debug("The router failed.", exc_info=error)
        return CLOError(f"The router failed with {error!r}; --log-level debug shows where.")

    async def _until_stopped(self) -> None:
        await self._stopping.wait()
        raise ServerStopped("The server was stopped.")

    async def _announce(self) -> None:
        capacity = await self._router.ready()
        self._folder.remove()
        self._serving = True
        end_start_up()
        self._warn()
        name = self._config.model.model
        words = [f"ready {self._router.address} model={name} capacity={capacity} tokens"]
        if self._router.kv_events is not None:
            words.append(f"kv-events={self._router.kv_events.address}")
        words += [] if self._listener is None else [self._listener.url]
        print(*words, flush=True)

    async def _stop_children(self) -> None:
        """SIGTERM and up to 5 s, for stores that still write to disk as long again and a little; then
        SIGKILL."""
        if self._listener is not None:
            self._listener.close()
        now = asyncio.get_running_loop().time
        deadline = now() + STOP_S
        for children in (self._gateways, self._workers, self._stores):
            if children is self._stores and self._disk is not None:
                deadline = now() + DRAIN_S + _LEAVE_S
            for child in children:
                child.send(signal.SIGTERM)
            endings = [asyncio.create_task(child.wait()) for child in children]
            if endings:
                await asyncio.wait(endings, timeout=deadline - now())
            for child in children:
                child.send(signal.SIGKILL)
            await asyncio.gather(*endings)


@contextmanager
def _ranks(config: WorkerConfig, count: int) -> Iterator[list[Part]]:
    """What the ranks of a worker are started with: where they meet, and from the first one a pair of sockets
    to each of the others. They have nothing of it that the others could not go without, so that each is told
    when another ends. One byte in a pipe is for the rank that explains an error, which all of them may see.
    This process has it no longer than the body."""
    if count == 1:
        yield [Part(config)]
        return
    rendezvous = os.memfd_create("clo-ranks")
    turn, written = os.pipe()
    os.write(written, b"1")
    os.close(written)
    pairs = [socket.socketpair() for _ in range(1, count)]
    firsts, seconds = (tuple(end.fileno() for end in ends) for ends in zip(*pairs, strict=True))
    try:
        yield [
            Part(
                replace(config, group=GroupConfig(rank, count, rendezvous, commands, turn)),
                (rendezvous, turn, *commands),
            )
            for rank, commands in enumerate([firsts, *((second,) for second in seconds)])
        ]
    finally:
        os.close(rendezvous)
        os.close(turn)
        for pair in pairs:
            for end in pair:
                end.close()


def _router_in(folder: PrivateFolder) -> str:
    return f"ipc://{folder.path}/router"


def _store_in(folder: PrivateFolder, node: int) -> str:
    return f"ipc://{folder.path}/numa{node}"


def supervise(config: ServerConfig, worker: str) -> int:
    """Run a server to its end; returns the launcher's exit code.

    Args:
        config, worker: see ``Supervisor``, also for what is raised.
    """

    async def run(folder: PrivateFolder) -> int:
        return await Supervisor(config, worker, folder).run()

    with PrivateFolder() as folder:
        return asyncio.run(run(folder))
