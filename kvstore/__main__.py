"""One KV store: ``python -m clo.kvstore CONFIG PARENT``, a ``StoreConfig`` as JSON and the launcher's pid.

The key of the server's sockets comes through stdin.
"""

import logging
import sys
from collections import Counter
from pathlib import Path

import msgspec
import zmq

from clo.kvstore.arena import Arena, Piece
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
        arena = _arena(config, blocks)
        disk = _disk_tier(config, arena, blocks)
        keep = config.prefix_caching == "on"
        pool = BlockPool(blocks, config.block.tokens, keep=keep, report=config.kv_events, lower=disk)
        launcher: Launcher = DealerSocket(
            context, config.router, LauncherToStore, key, store_identity(config.name)
        )
        store = StoreServer(config, arena, pool, socket, launcher, disk)
        end_start_up()
        store.run()


def _layout(config: StoreConfig, blocks: int) -> ArenaLayout:
    block = config.block
    return ArenaLayout.of_block(block.layers, block.kv_heads, blocks, block.bytes)


def _arena(config: StoreConfig, blocks: int) -> Arena:
    """The arena, whose KV heads lie where they should. Raises ``ConfigError`` where they have no room."""
    pieces, held = list[Piece](), Counter[int]()
    if config.head_nodes:
        pieces += _layout(config, blocks).on_nodes(config.head_nodes, config.arena_bytes)
    for piece in pieces or [Piece(0, config.arena_bytes, config.node)]:
        held[piece.node] += piece.stop - piece.start
    check_memory(held)
    try:
        return Arena.create(config.arena_bytes, pieces)
    except OSError as error:  # the launcher has tried it
        raise ConfigError(f"The memory of {config.name} cannot be bound to NUMA nodes: {error}.") from None


def _disk_tier(config: StoreConfig, arena: Arena, blocks: int) -> DiskTier | None:
    if config.disk is None:
        return None
    block, folder = config.block, Path(config.disk.folder).expanduser() / config.name
    root = root_of(config.disk.model, block.layers, block.kv_heads, block.tokens, block.bytes)
    try:
        key = None if config.disk.key is None else read_disk_key(Path(config.disk.key).expanduser())
        return DiskTier(folder, config.disk.bytes, root, arena_bytes(arena, _layout(config, blocks)), key)
    except ConfigError as error:
        if config.disk.needed:
            raise
        _logger.warning("%s The server goes on without.", error)
        return None


if __name__ == "__main__":
    run_process(main)
