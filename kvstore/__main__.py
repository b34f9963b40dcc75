"""One KV store: ``python -m clo.kvstore CONFIG PARENT``, a ``StoreConfig`` as JSON and the launcher's pid.

The key of the server's sockets comes through stdin.
"""

import logging
import sys
from pathlib import Path

import msgspec
import zmq

from clo.kvstore.arena import Arena
from clo.kvstore.block_file import read_disk_key
from clo.kvstore.disk import DiskTier, root_of
from clo.kvstore.layout import ArenaLayout, arena_bytes
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

_logger = logging.getLogger(__name__)


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
        disk = _disk_tier(config, arena, blocks)
        keep = config.prefix_caching == "on"
        pool = BlockPool(blocks, config.block.tokens, keep=keep, report=config.kv_events, lower=disk)
        launcher: Launcher = DealerSocket(
            context, config.router, LauncherToStore, key, store_identity(config.name)
        )
        store = StoreServer(config, arena, pool, socket, launcher, disk)
        end_start_up()
        store.run()


def _disk_tier(config: StoreConfig, arena: Arena, blocks: int) -> DiskTier | None:
    if config.disk is None:
        return None
    block, folder = config.block, Path(config.disk.folder).expanduser() / config.name
    layout = ArenaLayout.of_block(block.layers, block.kv_heads, blocks, block.bytes)
    root = root_of(config.disk.model, block.layers, block.kv_heads, block.tokens, block.bytes)
    try:
        key = None if config.disk.key is None else read_disk_key(Path(config.disk.key).expanduser())
        return DiskTier(folder, config.disk.bytes, root, arena_bytes(arena, layout), key)
    except ConfigError as error:
        if config.disk.needed:
            raise
        _logger.warning("%s The server goes on without.", error)
        return None


if __name__ == "__main__":
    run_process(main)
