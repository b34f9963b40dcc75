"""``python -m clo.runtime.http CONFIG PARENT``: a ``GatewayProcessConfig`` as JSON, and the launcher's pid.

The key of the server's sockets comes through stdin, and behind it the API key, where there is one.
"""

import asyncio
import os
import socket
import sys
from typing import Any

if __name__ == "__main__":
    from clo.runtime.machine.process import keep_torch_out

    keep_torch_out()

import msgspec
import uvicorn
import uvloop
import zmq

from clo.runtime.config import GatewayProcessConfig
from clo.runtime.http.app import build
from clo.runtime.http.gateway import Gateway
from clo.runtime.machine.process import (
    configure_logging,
    die_with_parent,
    end_start_up,
    read_key,
    run_process,
)
from clo.runtime.wire.messages import GATEWAY_IDENTITY, FromChild, GatewayReady, Ping, Pong
from clo.runtime.wire.sockets import Arrivals, DealerSocket

_GRACE_S = 2  # for answers to end when the server stops; all requests have ended by then
_IDLE_S = 75  # that a connection stays open without a request: clients give theirs up after less
_POLL_S = 0.01


async def serve(config: GatewayProcessConfig, key: str, api_key: str | None) -> None:
    """Serve until SIGTERM.

    Args:
        key: of the server's sockets.
        api_key: what clients have to know, None for nothing.
    """
    gateway = Gateway(config, api_key)
    options = config.gateway
    server = uvicorn.Server(
        uvicorn.Config(
            build(gateway),
            http="httptools",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=_IDLE_S,
            timeout_graceful_shutdown=_GRACE_S,
            ssl_certfile=options.ssl_certfile,
            ssl_keyfile=options.ssl_keyfile,
        )
    )
    end_start_up()
    async with asyncio.TaskGroup() as group:
        tasks = [
            group.create_task(gateway.watch()),
            group.create_task(_answer_launcher(config, key, server)),
        ]
        await server.serve([socket.socket(fileno=config.descriptor)])
        for task in tasks:
            task.cancel()
    if gateway.tracer is not None:
        gateway.tracer.close()


async def _answer_launcher(config: GatewayProcessConfig, key: str, server: uvicorn.Server) -> None:
    """Tell the launcher when the gateway listens, and afterwards whenever it asks that it is alive."""
    context: zmq.Context[Any] = zmq.Context()
    launcher: DealerSocket[FromChild, Ping] = DealerSocket(
        context, config.router, Ping, key, GATEWAY_IDENTITY
    )
    arrivals = Arrivals()

    def answer(frames: list[bytes]) -> None:
        launcher.send(Pong())

    arrivals.add(launcher.socket, answer)
    while not server.started:
        await asyncio.sleep(_POLL_S)
    launcher.send(GatewayReady(os.getpid()))
    await arrivals.listen()


def main() -> None:
    """Serve until the process is ended."""
    die_with_parent(int(sys.argv[2]))
    config = msgspec.json.decode(sys.argv[1], type=GatewayProcessConfig)
    configure_logging(config.log_level)
    key, api_key = read_key(), sys.stdin.read()
    uvloop.run(serve(config, key, api_key or None))


if __name__ == "__main__":
    run_process(main)
