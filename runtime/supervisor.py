"""Starts, watches and stops the processes of one server."""

import asyncio
import logging
import os
import signal
import sys
import uuid
from contextlib import suppress
from dataclasses import dataclass

import msgspec

from clo.runtime.config import ServerConfig, StoreConfig, WorkerConfig
from clo.runtime.machine.process import EXIT_EXPLAINED, set_threads
from clo.runtime.model.files import resolve
from clo.runtime.model.kv_size import kv_size
from clo.runtime.router import Router
from clo.runtime.wire.errors import CLOError, ServerStopped, WorkerDied

STOP_S = 5.0  # for the children to leave in good order

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Child:
    """A process of the server; ``name`` is what users see: "worker 0", "KV store numa0"."""

    name: str
    process: asyncio.subprocess.Process

    @classmethod
    async def start(cls, name: str, module: str, config: StoreConfig | WorkerConfig, threads: int) -> "Child":
        """Run ``python -m MODULE CONFIG PID`` in a session of its own, out of reach of Ctrl-C.

        To be called in the main thread: a child dies with the thread that started it. What a child prints
        goes to stderr, so that stdout carries the ready line and nothing else.
        """
        environment = dict(os.environ)
        set_threads(environment, threads)
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", module, msgspec.json.encode(config).decode(), str(os.getpid())),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=sys.stderr,
            start_new_session=True,
            env=environment,
        )
        _logger.info("Started %s as process %d.", name, process.pid)
        return cls(name, process)

    def send(self, number: signal.Signals) -> None:
        """Send a signal; nothing happens if the process has ended."""
        if self.process.returncode is None:
            with suppress(ProcessLookupError):  # it ended a moment ago
                os.kill(self.process.pid, number)

    async def watch(self) -> None:
        """Raises ``WorkerDied`` when the process ends, saying how."""
        code = await self.process.wait()
        if code == EXIT_EXPLAINED:
            how = "ended with an error that the server has printed"
        elif code == -signal.SIGKILL:
            how = "was killed by SIGKILL (the kernel does so when memory runs out, see dmesg)"
        elif code < 0:
            how = f"was killed by {signal.Signals(-code).name}"
        else:
            how = f"ended with exit code {code}"
        raise WorkerDied(f"{self.name} {how}; the server has stopped, start it again.")


class Supervisor:
    """One server, from the checks to the last process.

    Args:
        config: what was asked for.
        worker: module that each worker runs.

    Raises:
        ConfigError: the model, the machine's memory or the port do not allow it.
    """

    def __init__(self, config: ServerConfig, worker: str) -> None:
        self._config, self._worker = config, worker
        self._nodes = [int(name.removeprefix("numa")) for name in config.kvstore]
        self._model = resolve(config.model)
        self._kv_size = kv_size(config, self._model, self._nodes)
        self._router = Router(config, self._model)
        self._stores: list[Child] = []
        self._workers: list[Child] = []
        self._stopping = asyncio.Event()

    async def run(self) -> int:
        """Serve until a signal comes or something fails; returns the launcher's exit code."""
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, self._on_signal)
        try:
            await self._start_children()
            error = await self._first_failure()
            self._router.fail_all(error)
        finally:
            await self._stop_children()
            self._router.close()
        if isinstance(error, ServerStopped):
            return 0
        if not any(child.process.returncode == EXIT_EXPLAINED for child in self._stores + self._workers):
            print(f"error: {error}", file=sys.stderr)
        return 1

    def _on_signal(self) -> None:
        if self._stopping.is_set():
            for child in self._stores + self._workers:
                child.send(signal.SIGKILL)
        self._stopping.set()

    async def _start_children(self) -> None:
        config = self._config
        unique = uuid.uuid4()
        endpoints = {node: f"ipc://@clo-{unique}-numa{node}" for node in self._nodes}
        for name, node in zip(config.kvstore, self._nodes, strict=True):
            store = StoreConfig(name, node, self._kv_size, endpoints[node], config.log_level)
            self._stores.append(await Child.start(f"KV store {name}", "clo.kvstore", store, threads=1))
        threads = len(os.sched_getaffinity(0)) // config.workers
        for index in range(config.workers):
            worker_config = WorkerConfig(
                worker=index,
                router=self._router.workers_endpoint,
                stores=endpoints,
                model=self._model,
                cache=config.cache,
                engine=config.engine,
                log_level=config.log_level,
            )
            child = await Child.start(f"worker {index}", self._worker, worker_config, threads)
            self._workers.append(child)

    async def _first_failure(self) -> CLOError:
        """Serve until a signal, the end of a child or an error in the router; says which it was.

        Where several are seen at once, the first in this order is taken to be the cause of the others.
        """
        watched = [
            asyncio.create_task(work)
            for work in (
                self._until_stopped(),
                *(child.watch() for child in self._stores + self._workers),
                self._router.serve(),
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
        name = self._config.model.model
        print(f"ready {self._router.address} model={name} capacity={capacity} tokens", flush=True)

    async def _stop_children(self) -> None:
        """SIGTERM and up to 5 s; then SIGKILL. Workers leave first, or they would report a lost store."""
        deadline = asyncio.get_running_loop().time() + STOP_S
        for children in (self._workers, self._stores):
            for child in children:
                child.send(signal.SIGTERM)
            endings = [asyncio.create_task(child.process.wait()) for child in children]
            if endings:
                await asyncio.wait(endings, timeout=deadline - asyncio.get_running_loop().time())
            for child in children:
                child.send(signal.SIGKILL)
            await asyncio.gather(*endings)


def supervise(config: ServerConfig, worker: str) -> int:
    """Run a server to its end; returns the launcher's exit code.

    Args:
        config, worker: see ``Supervisor``, also for what is raised.
    """

    async def run() -> int:
        return await Supervisor(config, worker).run()

    return asyncio.run(run())
