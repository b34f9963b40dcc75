"""One KV store: ``python -m clo.kvstore CONFIG PARENT``, a ``StoreConfig`` as JSON and the launcher's pid."""

import sys

import msgspec
import zmq

from clo.kvstore.arena import Arena
from clo.kvstore.server import StoreServer, listen
from clo.runtime.config import StoreConfig
from clo.runtime.machine import numa
from clo.runtime.machine.host_memory import check_memory
from clo.runtime.machine.process import configure_logging, die_with_parent, run_process


def main() -> None:
    die_with_parent(int(sys.argv[2]))
    config = msgspec.json.decode(sys.argv[1], type=StoreConfig)
    configure_logging(config.log_level)
    numa.bind(config.node)
    with zmq.Context() as context, listen(context, config.endpoint) as socket:
        check_memory({config.node: config.arena_bytes})
        StoreServer(config, Arena.create(config.arena_bytes), socket).run()


if __name__ == "__main__":
    run_process(main)
