"""The worker process: turns messages into steps, and reports."""

import logging
import os
import time
from pathlib import Path
from typing import Any

import torch
import zmq

from clo.gpu_worker.scheduler import Scheduler
from clo.gpu_worker.startup import start
from clo.runtime.config import WorkerConfig
from clo.runtime.wire.errors import ProtocolError
from clo.runtime.wire.messages import (
    Abort,
    Allocated,
    Denied,
    FromStore,
    FromWorker,
    GetStoreStats,
    GetWorkerStats,
    Ready,
    Run,
    StoreReport,
    ToWorker,
    WorkerReport,
    WorkerStats,
)
from clo.runtime.wire.sockets import DealerSocket

logger = logging.getLogger(__name__)

_PAUSE_SECONDS = 2e-4  # between looks at the mailbox; a step is always waiting behind the current one


def private_bytes() -> int:
    """Memory of this process that is not shared with others, so not the arena (RssAnon)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


class Worker:
    """One worker: its sockets, its engine and the loop that turns messages into steps.

    Args:
        config: as the launcher passed it.

    Raises:
        ConfigError, WorkerDied: see ``clo.gpu_worker.startup.start``.
    """

    def __init__(self, config: WorkerConfig) -> None:
        self._config = config
        context: zmq.Context[Any] = zmq.Context()
        started = start(config, context)
        self._engine, self._drift_check, self._store = started.engine, started.drift_check, started.store
        self._router: DealerSocket[FromWorker, ToWorker] = DealerSocket(
            context, config.router, ToWorker, identity=b"worker-%d" % config.worker
        )
        self._scheduler = Scheduler(
            self._engine, config.model.max_model_len, self._router.send, self._store.send, self._drift_check
        )
        self._ready = Ready(config.worker, os.getpid(), started.store_name, started.capacity_tokens)

    def serve(self) -> None:
        """Serve until the process is ended."""
        poller = zmq.Poller()
        poller.register(self._router.socket, zmq.POLLIN)
        poller.register(self._store.socket, zmq.POLLIN)
        self._router.send(self._ready)
        while True:
            poller.poll(0 if self._scheduler.busy else None)
            while (message := self._receive()) is not None:
                self._handle(message)
            if self._scheduler.busy:
                if not self._scheduler.advance():
                    time.sleep(_PAUSE_SECONDS)
            else:
                self._scheduler.check_integrity()

    def _receive(self) -> ToWorker | FromStore | None:
        for socket in (self._store, self._router):
            try:
                message = socket.receive()
            except ProtocolError as error:
                logger.warning("A message was ignored: %s", error)
                continue
            if message is not None:
                return message
        return None

    def _handle(self, message: ToWorker | FromStore) -> None:
        match message:
            case Run():
                self._scheduler.add(message)
            case Abort():
                self._scheduler.abort(message)
            case Allocated():
                self._scheduler.granted(message)
            case Denied():
                self._scheduler.denied(message)
            case GetWorkerStats():
                self._store.send(GetStoreStats())  # answered together with the store's
            case StoreReport():
                self._router.send(WorkerReport(self._stats(), message.stats))

    def _stats(self) -> WorkerStats:
        cache, scheduler = self._engine.cache, self._scheduler
        return WorkerStats(
            worker=self._config.worker,
            running=scheduler.running,
            waiting=scheduler.waiting,
            steps=scheduler.steps,
            generated_tokens=scheduler.generated,
            resident_bytes=cache.resident_bytes,
            index_bytes=cache.index_bytes,
            private_bytes=private_bytes(),
            gpu_bytes=torch.cuda.memory_reserved(),
            drift_check=None if self._drift_check is None else self._drift_check.stats(),
        )
