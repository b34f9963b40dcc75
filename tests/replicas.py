"""What tests of replicas on Ray ask the processes of this machine."""

import socket
from contextlib import suppress
from pathlib import Path

import psutil


def free_port() -> int:
    """Of TCP on loopback, which nobody listens at."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def left_of(model: Path) -> list[psutil.Process]:
    """Processes that name the model on their command lines: launchers, gateways, workers."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            found += [process] if any(str(model) in word for word in process.cmdline()) else []
    return found


def server_url(actor: psutil.Process) -> str:
    """Where the server of a replica listens for HTTP."""
    (gateway,) = (child for child in actor.children(recursive=True) if "clo.runtime.http" in child.cmdline())
    (port,) = (at.laddr.port for at in gateway.net_connections("tcp") if at.status == psutil.CONN_LISTEN)
    return f"http://127.0.0.1:{port}"
