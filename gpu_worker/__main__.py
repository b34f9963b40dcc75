"""``python -m clo.gpu_worker CONFIG PARENT``: a ``WorkerConfig`` as JSON, and the pid of the launcher.

The key of the server's sockets comes through stdin. Of a worker's ranks the first one talks to router and
store, and the others do what it does.
"""

import socket
import sys
from typing import Any

import msgspec
import zmq

from clo.gpu_worker.commands import Leader
from clo.gpu_worker.engine import Engine
from clo.gpu_worker.rank import RankProcess
from clo.gpu_worker.startup import start
from clo.gpu_worker.worker import Worker
from clo.runtime.config import WorkerConfig
from clo.runtime.machine.process import (
    configure_logging,
    die_with_parent,
    end_start_up,
    read_key,
    run_process,
)


def main(engine_type: type[Engine] = Engine) -> None:
    """Serve until the process is ended; see ``clo.gpu_worker.startup.start``."""
    die_with_parent(int(sys.argv[2]))
    config = msgspec.json.decode(sys.argv[1], type=WorkerConfig)
    configure_logging(config.log_level)
    key = read_key()
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
