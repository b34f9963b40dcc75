"""``python -m clo.gpu_worker CONFIG PARENT``: a ``WorkerConfig`` as JSON, and the pid of the launcher.

The key of the server's sockets comes through stdin. Of a worker's ranks the first one talks to router and
store, and the others do what it does.
"""

import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
import zmq

from clo.gpu_worker.commands import Leader
from clo.gpu_worker.engine import Engine
from clo.gpu_worker.rank import RankProcess
from clo.gpu_worker.startup import start
from clo.gpu_worker.worker import Worker
from clo.runtime.config import GroupConfig, WorkerConfig
from clo.runtime.machine.process import (
    GroupEnded,
    configure_logging,
    die_with_parent,
    end_start_up,
    read_key,
    run_process,
)
from clo.runtime.wire.errors import CLOError


def main(engine_type: type[Engine] = Engine) -> None:
    """Serve until the process is ended; see ``clo.gpu_worker.startup.start``."""
    die_with_parent(int(sys.argv[2]))
    config = msgspec.json.decode(sys.argv[1], type=WorkerConfig)
    configure_logging(config.log_level)
    with _one_explains(config.group):
        _serve(config, read_key(), engine_type)


@contextmanager
def _one_explains(group: GroupConfig | None) -> Iterator[None]:
    """Users shall read an error once that several ranks see. Raises ``GroupEnded`` in the place of a
    ``CLOError`` where another rank explains one already."""
    try:
        yield
    except CLOError as error:
        if group is not None and not os.read(group.turn, 1):
            raise GroupEnded(str(error)) from None
        raise


def _serve(config: WorkerConfig, key: str, engine_type: type[Engine]) -> None:
    context: zmq.Context[Any] = zmq.Context()
    others = [socket.socket(fileno=number) for number in config.group.commands] if config.group else []
    started = start(config, context, key, engine_type)
    process: Worker | RankProcess
    if config.rank:
        process = RankProcess(config, context, key, started, *others)
    else:
        process = Worker(config, context, key, started)
        if others:
            started.engine.tell = Leader(started.engine, others)
    end_start_up()
    process.serve()


if __name__ == "__main__":
    run_process(main)
