"""One KV store: ``python -m clo.kvstore CONFIG PARENT``, a ``StoreConfig`` as JSON and the launcher's pid.

The key of the server's sockets comes through stdin.
"""

import sys

import msgspec
import zmq

from clo.kvstore.arena import Arena
from clo.kvstore.pool import BlockPool
from clo.kvstore.server import Launcher, StoreServer, listen
from clo.runtime.config import StoreConfig
from clo.runtime.machine import numa
from clo.runtime.machine.host_memory import check_memory
from clo.runtime.machine.process import (
    configure_logging,
    die_with_parent,
    end_start_up,
    read_key,
    run_process,
)
from clo.runtime.wire.errors import ConfigError
from clo.runtime.wire.messages import LauncherToStore, store_identity
from clo.runtime.wire.sockets import DealerSocket


def main() -> None:
    die_with_parent(int(sys.argv[2]))
    config = msgspec.json.decode(sys.argv[1], type=StoreConfig)
    configure_logging(config.log_level)
    numa.bind(config.node)
    blocks = config.arena_bytes // config.block.bytes
    if blocks == 0:
        raise ConfigError(
            f"One block of the KV cache takes {config.block.bytes} bytes, {config.name} has only "
            f"{config.arena_bytes}: raise --kv-size."
        )
    key = read_key()
    with zmq.Context() as context, listen(context, config.endpoint, key) as socket:
        check_memory({config.node: config.arena_bytes})
        arena = Arena.create(config.arena_bytes)
        keep = config.prefix_caching == "on"
        pool = BlockPool(blocks, config.block.tokens, keep=keep, report=config.kv_events)
        launcher: Launcher = DealerSocket(
            context, config.router, LauncherToStore, key, store_identity(config.name)
        )
        store = StoreServer(config, arena, pool, socket, launcher)
        end_start_up()
        store.run()


if __name__ == "__main__":
    run_process(main)
