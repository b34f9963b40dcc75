"""The store's message loop: workers ask for blocks, and get back everything that a dead worker held."""

import logging
import os
import random
import signal
from dataclasses import replace
from typing import Any

import msgspec
import zmq

from clo.kvstore.arena import Arena
from clo.kvstore.disk import DiskTier
from clo.kvstore.layout import ArenaLayout
from clo.kvstore.pool import BlockPool, Growth
from clo.kvstore.push import Pusher, Source
from clo.runtime.config import StoreConfig
from clo.runtime.wire.errors import CLOError, ConfigError, ProtocolError
from clo.runtime.wire.handlers import handlers_of
from clo.runtime.wire.liveness import DRAIN_S
from clo.runtime.wire.messages import (
    Allocate,
    Allocated,
    Attach,
    Attached,
    Commit,
    Denied,
    Describe,
    Described,
    Examine,
    Expect,
    Free,
    Freed,
    FromStore,
    GetStoreStats,
    Grow,
    Grown,
    KVEvents,
    LauncherToStore,
    OpenStaging,
    Ping,
    Pong,
    PromptBlock,
    Push,
    StagingOpened,
    StoreExamined,
    StoreReady,
    StoreReport,
    StoreStats,
    ToStore,
)
from clo.runtime.wire.sockets import DealerSocket, Decoder, configure, encode
from clo.runtime.wire.strangers import INTRUDER, Strangers, watch

Launcher = DealerSocket[StoreReady | Pong | KVEvents | StoreExamined, LauncherToStore]

_SENTENCE = 500  # characters of what is wrong: it may name every block
_DESCRIBED_TOKENS = 2**22  # in one answer, which has to pass in one message

_logger = logging.getLogger(__name__)


class _Worker(msgspec.Struct, frozen=True):
    """An attached worker; its descriptor is readable once it has died."""

    number: int
    group: int
    identity: bytes
    pid: int
    pidfd: int


def listen(context: zmq.Context[Any], endpoint: str, key: str) -> zmq.Socket[bytes]:
    """The socket to which workers connect that know ``key``.

    Raises:
        ConfigError: ``endpoint`` cannot be used.
    """
    socket: zmq.Socket[bytes] = context.socket(zmq.ROUTER)
    configure(socket, key, listens=True)
    socket.setsockopt(zmq.SNDHWM, 0)  # answers must not be dropped; workers bound them by what they ask
    try:
        socket.bind(endpoint)
    except zmq.ZMQError as error:
        socket.close()
        raise ConfigError(f"The KV store cannot listen at {endpoint}: {error}.") from None
    return socket


class StoreServer:
    """Serves one arena over one ROUTER socket, and answers the launcher. It sleeps in ``poll`` and has no
    timers, but for the one of ``disk``, if it has such a tier, to which it writes what is left when it is
    ended by SIGTERM."""

    def __init__(
        self,
        config: StoreConfig,
        arena: Arena,
        pool: BlockPool,
        socket: zmq.Socket[bytes],
        launcher: Launcher,
        disk: DiskTier | None = None,
    ) -> None:
        self._config = config
        self._disk = disk
        self._arena = arena
        self._pool = pool
        self._socket, self._launcher = socket, launcher
        self._decode: Decoder[ToStore] = Decoder(ToStore)
        self._poller = zmq.Poller()
        self._poller.register(socket, zmq.POLLIN)
        self._poller.register(launcher.socket, zmq.POLLIN)
        self._watch, self._strangers = watch(socket), Strangers(_logger, INTRUDER)
        self._poller.register(self._watch, zmq.POLLIN)
        if disk is not None:
            self._poller.register(disk.fd, zmq.POLLIN)
        self._end = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)  # readable after SIGTERM
        self._poller.register(self._end, zmq.POLLIN)
        self._workers = dict(config.workers)  # that may attach
        self._doors: dict[int, str] = {}  # where those connect that were started again, by worker
        self._by_number: dict[int, _Worker] = {}
        self._by_identity: dict[bytes, _Worker] = {}
        self._source = Source(arena)
        self._pushers: dict[int, Pusher] = {}  # by number of the worker

    def run(self) -> None:
        """Serve until the process is ended."""
        if self._disk is not None:
            signal.signal(signal.SIGTERM, lambda *_: os.eventfd_write(self._end, 1))
        self._launcher.send(StoreReady(os.getpid()))
        while True:
            ready = dict(self._poller.poll(None if self._disk is None else self._disk.timeout_ms))
            for worker in list(self._by_number.values()):
                if worker.pidfd in ready:
                    _logger.info("Worker %d is gone; its blocks are free again.", worker.number)
                    self._forget(worker)
            if self._watch in ready:
                self._watch.recv_multipart()
                self._strangers.turned_away()
            match self._launcher.receive():
                case Ping():
                    self._launcher.send(Pong())
                case Expect() as message:
                    self._expect(message)
                case Examine() as message:
                    self._launcher.send(self._examine(message))
            if self._socket in ready:
                self._answer(*self._socket.recv_multipart())
            elif self._end in ready:
                self._leave()
            if self._disk is not None and (finished := self._disk.finished()):
                for load, blocks in finished:
                    self._pool.loaded(load, blocks)
                self._grant()
            if events := self._pool.events():
                self._launcher.send(KVEvents(events))

    def _leave(self) -> None:
        """Write to disk what is not there yet, and end as without a disk. Nobody is served meanwhile: the
        launcher has ended the workers."""
        assert self._disk is not None, "else SIGTERM would have ended the process"
        if left := self._disk.drain(DRAIN_S):
            _logger.info("%d blocks could not be written to disk within %g s.", left, DRAIN_S)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.raise_signal(signal.SIGTERM)

    def _expect(self, message: Expect) -> None:
        """A worker was started again, in the place of one that has ended."""
        if message.worker not in self._workers:
            _logger.error("The launcher speaks of worker %d, which is not of this server.", message.worker)
            return
        former = self._doors.pop(message.worker, None)
        if former is not None and former not in self._doors.values():
            self._socket.unbind(former)  # only now, as that ends the connections made there
        self._workers[message.worker] = replace(self._workers[message.worker], pid=message.pid)
        if message.endpoint in self._doors.values():  # of another rank of the same worker
            self._doors[message.worker] = message.endpoint
            return
        try:
            self._socket.bind(message.endpoint)
        except zmq.ZMQError as error:  # the worker has gone again, or has connected to another store
            _logger.info("Worker %d is not waited for any more: %s.", message.worker, error)
        else:
            self._doors[message.worker] = message.endpoint

    def _examine(self, message: Examine) -> StoreExamined:
        """Look into the pool's books. What is wrong there is told and ends nothing."""
        pool, wrong = self._pool, list[str]()
        for check in (pool.check_integrity, pool.check_names):
            try:
                check()
            except AssertionError as error:
                wrong.append(str(error)[:_SENTENCE])
        names = pool.committed(message.longest // pool.block_tokens)
        sample = random.sample(names, min(message.sample, len(names)))
        described, room = list[PromptBlock](), _DESCRIBED_TOKENS
        for name in [*message.names, *sample]:
            if (found := pool.prompt_of(name)) is not None and len(found[1]) <= room:
                described.append(PromptBlock(name, *found))
                room -= len(found[1])
        return StoreExamined(
            store=self._config.name,
            number=message.number,
            wrong=wrong,
            blocks=pool.blocks,
            block_tokens=pool.block_tokens,
            free_blocks=pool.free_blocks - pool.kept_blocks,
            kept_blocks=pool.kept_blocks,
            committed_blocks=len(pool.committed(pool.blocks)),
            sequences=pool.sequences,
            waiting=pool.waiting,
            pid=os.getpid(),
            fd=self._arena.fd,
            arena_bytes=self._arena.size,
            block_bytes=self._config.block.bytes,
            described=described,
        )

    def _answer(self, identity: bytes, *frames: bytes) -> None:
        answers, sequence = "", -1
        try:
            if len(frames) != 1:
                raise ProtocolError(f"A message has one frame, this one has {len(frames)}.")
            message = self._decode(frames[0])
            answers, sequence = type(message).__name__, getattr(message, "sequence", -1)
            _HANDLERS[type(message)](self, identity, message)
        except CLOError as error:
            _logger.info("Denied: %s", error)
            self._send(identity, Denied(answers, sequence, error.code, str(error)))

    def on_attach(self, identity: bytes, message: Attach) -> None:
        started = self._workers.get(message.worker)
        if started is None or started.pid != message.pid:
            _logger.error("Process %d may not attach as worker %d.", message.pid, message.worker)
            raise ProtocolError(f"Process {message.pid} is not worker {message.worker} of this server.")
        try:
            pidfd = os.pidfd_open(message.pid)
        except OSError:
            raise ProtocolError(f"There is no process {message.pid} that could attach.") from None
        for former in (self._by_number.get(message.worker), self._by_identity.get(identity)):
            if former is not None and former.number in self._by_number:
                self._forget(former)
        worker = _Worker(message.worker, started.group, identity, message.pid, pidfd)
        self._by_number[message.worker] = self._by_identity[identity] = worker
        self._poller.register(pidfd, zmq.POLLIN)
        self._send(
            identity,
            Attached(self._config.name, os.getpid(), self._arena.fd, self._arena.size, self._pool.blocks),
        )

    def on_allocate(self, identity: bytes, message: Allocate) -> None:
        worker = self._attached(identity)
        self._pool.allocate(
            worker.group,
            message.sequence,
            message.blocks,
            message.prompt,
            message.own,
            message.salt,
            message.most,
        )
        self._grant()

    def on_grow(self, identity: bytes, message: Grow) -> None:
        worker = self._attached(identity)
        self._pool.grow(worker.group, message.sequence, message.blocks)
        self._grant()

    def on_commit(self, identity: bytes, message: Commit) -> None:
        worker = self._attached(identity)
        if self._pool.commit(worker.group, message.sequence, message.start, message.tokens):
            self._grant()

    def on_free(self, identity: bytes, message: Free) -> None:
        worker = self._attached(identity)
        blocks = self._pool.free(worker.group, message.sequence)
        self._grant()  # first, so that a worker knows by the answer who goes on waiting
        self._send(identity, Freed(message.sequence, blocks))

    def on_get_stats(self, identity: bytes, message: GetStoreStats) -> None:
        self._attached(identity)
        pool = self._pool
        stats = StoreStats(
            store=self._config.name,
            arena_bytes=self._arena.size,
            block_bytes=self._config.block.bytes,
            blocks=pool.blocks,
            free_blocks=pool.free_blocks,
            kept_blocks=pool.kept_blocks,
            sequences=pool.sequences,
            waiting=pool.waiting,
            asked_tokens=pool.asked_tokens,
            cached_tokens=pool.cached_tokens,
            disk_blocks=0 if self._disk is None else self._disk.blocks,
            disk_hits=0 if self._disk is None else self._disk.hits,
            disk_unusable=0 if self._disk is None else self._disk.unusable,
        )
        self._send(identity, StoreReport(stats))

    def on_describe(self, identity: bytes, message: Describe) -> None:
        worker = self._attached(identity)
        described = self._pool.describe(worker.group, message.sequence)
        self._send(identity, Described(message.sequence, *described))

    def on_open_staging(self, identity: bytes, message: OpenStaging) -> None:
        worker = self._attached(identity)
        self._close_pusher(worker.number)
        block = self._config.block
        layout = ArenaLayout.of_block(block.layers, block.kv_heads, self._pool.blocks, block.bytes)
        self._pushers[worker.number] = Pusher(self._source, worker.pid, message, layout)
        self._send(identity, StagingOpened())

    def on_push(self, identity: bytes, message: Push) -> None:
        worker = self._attached(identity)
        blocks = self._pool.blocks_of(worker.group, message.sequence)
        if worker.number not in self._pushers:
            raise ProtocolError("A worker has to send OpenStaging before Push.")
        self._pushers[worker.number].push(message, blocks)

    def _attached(self, identity: bytes) -> _Worker:
        """The worker that asks."""
        worker = self._by_identity.get(identity)
        if worker is None:
            raise ProtocolError("A worker's first message has to be Attach.")
        return worker

    def _forget(self, worker: _Worker) -> None:
        """A worker is gone, and its group cannot go on. Once no rank is left that may still write, all that
        the group held is free, and those that wait are served."""
        del self._by_number[worker.number], self._by_identity[worker.identity]
        self._poller.unregister(worker.pidfd)
        os.close(worker.pidfd)
        self._close_pusher(worker.number)
        if not any(other.group == worker.group for other in self._by_number.values()):
            self._pool.free_group(worker.group)
        self._grant()

    def _close_pusher(self, worker: int) -> None:
        if worker in self._pushers:
            self._pushers.pop(worker).close()

    def _grant(self) -> None:
        for grant in self._pool.grants():
            answer: Allocated | Grown
            if isinstance(grant, Growth):
                answer = Grown(grant.sequence, grant.blocks)
            else:
                answer = Allocated(grant.sequence, grant.blocks, grant.cached)
            self._send(self._leader(grant.group).identity, answer)
        for load in self._pool.loads():
            assert self._disk is not None, "only it has what can be loaded"
            self._disk.read(load)
        if self._pool.sequences == 0:
            self._pool.check_integrity()  # nobody is waiting, so this delays no one

    def _leader(self, group: int) -> _Worker:
        """The worker of a group that asks for all of them."""
        members = (worker for worker in self._by_number.values() if worker.group == group)
        return min(members, key=lambda worker: worker.number)

    def _send(self, identity: bytes, message: FromStore) -> None:
        self._socket.send_multipart([identity, encode(message)])


_HANDLERS = handlers_of(StoreServer, ToStore)
