"""The worker process: start, serve, report."""

import logging
import os
import time
from pathlib import Path
from typing import Any

import torch
import zmq

from clo.gpu_worker.drift_check import DriftCheck
from clo.gpu_worker.engine import Engine
from clo.gpu_worker.pinning import check_gpu_memory, pin
from clo.gpu_worker.scheduler import Scheduler
from clo.kvstore.arena import Arena
from clo.kvstore.client import StoreClient
from clo.runtime.config import WorkerConfig
from clo.runtime.machine.numa import bind
from clo.runtime.model.files import load_decoder, resolve
from clo.runtime.wire.errors import ConfigError, ProtocolError
from clo.runtime.wire.messages import (
    Abort,
    Allocated,
    Attach,
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
ATTACH_SECONDS = 600.0  # the store answers once it has touched its arena, at a GiB or so a second


def private_bytes() -> int:
    """Memory of this process that is not shared with others, so not the arena (RssAnon)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


class Worker:
    """One worker: its channels, its engine and the loop that turns messages into steps.

    Args:
        config: as the launcher passed it.

    Raises:
        ConfigError: the model cannot be loaded, or the store cannot hold one block of it.
        WorkerDied: the store does not answer.
    """

    def __init__(self, config: WorkerConfig) -> None:
        bind(config.node)
        if torch.cuda.is_available() and config.model.device != "cpu":
            gpus = torch.cuda.device_count()
            if config.worker >= gpus:
                raise ConfigError(
                    f"Worker {config.worker} has no GPU of its own, PyTorch sees {gpus}: lower --workers."
                )
            torch.cuda.set_device(config.worker)
        self._config = config
        model = resolve(config.model)
        decoder = load_decoder(model)
        shape = decoder.shape
        context: zmq.Context[Any] = zmq.Context()
        self._store = StoreClient(context, config.store)
        attach = Attach(config.worker, os.getpid(), shape.block_tokens, shape.block_bytes)
        attached = self._store.attach(attach, ATTACH_SECONDS)
        shared = Arena.open(attached.pid, attached.fd, attached.arena_bytes)
        layout = (shape.layers, shape.kv_heads, attached.blocks, shape.block_tokens, 2, shape.head_dim)
        arena = shared.tensor(shape.dtype, layout)
        if decoder.device.type == "cuda":
            check_gpu_memory(
                shape, config.cache, config.max_num_seqs, attached.blocks, model.max_model_len,
                config.gpu_memory_utilization,
            )  # fmt: skip
            arena = pin(arena)
        arena = arena.permute(2, 0, 1, 3, 4, 5)  # the rows of a layer and head lie together
        self._engine = Engine(decoder, arena, config.cache, config.max_num_seqs, model.max_model_len)
        self._engine.capture()
        self._drift_check = None
        if config.cache.drift_check is not None:
            self._drift_check = DriftCheck(
                self._engine, arena, config.cache.drift_check, config.max_num_seqs, model.max_model_len
            )
        self._router: DealerSocket[FromWorker, ToWorker] = DealerSocket(
            context, config.router, ToWorker, identity=b"worker-%d" % config.worker
        )
        self._scheduler = Scheduler(
            self._engine, config.max_num_seqs, model.max_model_len, self._router.send, self._store.send,
            self._drift_check,
        )  # fmt: skip
        capacity = attached.blocks * shape.block_tokens
        self._ready = Ready(config.worker, os.getpid(), attached.store, capacity)

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
        for channel in (self._store, self._router):
            try:
                message = channel.receive()
            except ProtocolError as error:
                logger.warning("a message was ignored: %s", error)
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
            index_bytes=cache.index_token_bytes * self._ready.capacity_tokens,
            private_bytes=private_bytes(),
            gpu_bytes=torch.cuda.memory_reserved(),
            drift_check=None if self._drift_check is None else self._drift_check.stats(),
        )
