"""The process of a rank that is not its worker's first one: it follows that one, and answers the launcher."""

import os
import socket
from typing import Any

import zmq

from clo.gpu_worker.commands import Follower
from clo.gpu_worker.startup import Started
from clo.runtime.config import WorkerConfig
from clo.runtime.wire.messages import Ping, Pong, RankReady, ToWorker, worker_identity
from clo.runtime.wire.sockets import DealerSocket


class RankProcess:
    """A rank of a worker: its connection to the router, which asks whether it lives, and to the first rank.

    Args:
        config: the configuration that the launcher passed.
        context: ZeroMQ's context for its sockets.
        key: of the server's sockets.
        started: engine and store that it serves with.
        first: the socket from the first rank.
    """

    def __init__(
        self,
        config: WorkerConfig,
        context: zmq.Context[Any],
        key: str,
        started: Started,
        first: socket.socket,
    ) -> None:
        self._router: DealerSocket[RankReady | Pong, ToWorker] = DealerSocket(
            context, config.router, ToWorker, key, identity=worker_identity(config.worker, config.rank)
        )
        self._first = first
        name = f"Rank {config.rank} of worker {config.worker}"
        self._follower = Follower(name, started.engine, started.drift_check, first)

    def serve(self) -> None:
        """Follow until the process is ended.

        Raises:
            GroupEnded: another rank is gone.
            WorkerDied: this rank has strayed.
        """
        poller = zmq.Poller()
        poller.register(self._router.socket, zmq.POLLIN)
        poller.register(self._first, zmq.POLLIN)
        self._router.send(RankReady(os.getpid()))
        while True:
            ready = dict(poller.poll())
            if self._first.fileno() in ready:
                self._follower.follow()
            if isinstance(self._router.receive(), Ping):
                self._router.send(Pong())
