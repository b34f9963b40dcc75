"""The worker process: turns messages into steps, and reports."""

import logging
import os
import time
from pathlib import Path
from typing import Any

import torch
import zmq

from clo.gpu_worker.pacing import Pacing
from clo.gpu_worker.scheduler import Scheduler
from clo.gpu_worker.startup import Started
from clo.runtime.config import WorkerConfig
from clo.runtime.wire.errors import ProtocolError
from clo.runtime.wire.messages import (
    Abort,
    Allocated,
    Denied,
    Freed,
    FromStore,
    FromWorker,
    GetStoreStats,
    GetWorkerStats,
    Grown,
    Ping,
    Pong,
    Ready,
    Run,
    StoreReport,
    ToWorker,
    WorkerReport,
    WorkerStats,
    worker_identity,
)
from clo.runtime.wire.sockets import TURN_S, DealerSocket

logger = logging.getLogger(__name__)

_PAUSE_SECONDS = 2e-4  # between looks at the mailbox; a step is always waiting behind the current one


def private_bytes() -> int:
    """Memory of this process that is not shared with others, so not the arena (RssAnon)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


class Worker:
    """One worker: its connection to the router and the loop that turns messages into steps.

    Args:
        config: the configuration that the launcher passed.
        context: ZeroMQ's context for its sockets.
        key: of the server's sockets.
        started: engine and store that it serves with.

    Attributes:
        scheduler: decides what its requests do next.
    """

    def __init__(self, config: WorkerConfig, context: zmq.Context[Any], key: str, started: Started) -> None:
        self._config = config
        self._engine, self._drift_check, self._store = started.engine, started.drift_check, started.store
        self._router: DealerSocket[FromWorker, ToWorker] = DealerSocket(
            context, config.router, ToWorker, key, identity=worker_identity(config.worker)
        )
        decoder = self._engine.decoder
        token_flops = decoder.shape.layers * decoder.layer_flops(1, 0)
        self.scheduler = Scheduler(
            self._engine, config.model.max_model_len, started.capacity_tokens // decoder.shape.block_tokens,
            Pacing(config.engine.max_num_batched_tokens, token_flops), self.report, self._store.send,
            self._drift_check, started.constraints,
        )  # fmt: skip
        self._ready = Ready(
            config.worker, os.getpid(), started.store_name, started.capacity_tokens, self._engine.slots
        )

    def report(self, message: FromWorker) -> None:
        """Send a message to the router."""
        self._router.send(message)

    def serve(self) -> None:
        """Serve until the process is ended."""
        poller = zmq.Poller()
        poller.register(self._router.socket, zmq.POLLIN)
        poller.register(self._store.socket, zmq.POLLIN)
        self.report(self._ready)
        while True:
            poller.poll(0 if self.scheduler.busy else None)
            turn_ends = time.monotonic() + TURN_S
            while (message := self._receive()) is not None:
                self._handle(message)
                if self.scheduler.busy and time.monotonic() >= turn_ends:
                    break  # or whoever sends without end would stop all streams
            if self.scheduler.busy:
                if not self.scheduler.advance():
                    time.sleep(_PAUSE_SECONDS)
            else:
                self.scheduler.check_integrity()

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
                self.scheduler.add(message)
            case Abort():
                self.scheduler.abort(message)
            case Allocated():
                self.scheduler.granted(message)
            case Grown():
                self.scheduler.grown(message)
            case Freed():
                self.scheduler.freed()
            case Denied():
                self.scheduler.denied(message)
            case Ping():
                self.report(Pong())
            case GetWorkerStats():
                self._store.send(GetStoreStats())  # answered together with the store's
            case StoreReport():
                self.report(WorkerReport(self._stats(), message.stats))

    def _stats(self) -> WorkerStats:
        cache, scheduler = self._engine.cache, self.scheduler
        return WorkerStats(
            worker=self._config.worker,
            running=scheduler.running,
            decoding=scheduler.decoding,
            waiting=scheduler.waiting,
            steps=scheduler.steps,
            generated_tokens=scheduler.generated,
            resident_bytes=cache.resident_bytes,
            index_bytes=cache.index_bytes,
            private_bytes=private_bytes(),
            gpu_bytes=torch.cuda.memory_reserved(),
            drift_check=None if self._drift_check is None else self._drift_check.stats(),
            head_rows=cache.head_rows,
            late_rows=self._engine.late_rows,
            preemptions=scheduler.preemptions,
        )
