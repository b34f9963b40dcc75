"""Those who are not let in: the log hears of them, but not of each."""

import logging
import math
import time
from typing import Any

import zmq

INTRUDER = "A process that is none of this server's tried to connect to its processes and was not let in."
"""The warning of sockets between a server's processes."""

_WARN_S = 60.0

# Another user's process, or one that does not know the key. A peer that ends in mid-handshake is neither.
_TURNED_AWAY = zmq.EVENT_ACCEPT_FAILED | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_AUTH


class Strangers:
    """Warns of those who were turned away, once a minute at most.

    Args:
        logger: gets the warnings.
        warning: what it is told.
    """

    def __init__(self, logger: logging.Logger, warning: str) -> None:
        self._logger, self._warning = logger, warning
        self._warned = -math.inf

    def turned_away(self) -> None:
        """Somebody was."""
        now = time.monotonic()
        if now - self._warned > _WARN_S:
            self._warned = now
            self._logger.warning(self._warning)


def watch(socket: zmq.Socket[Any]) -> zmq.Socket[Any]:
    """Where a message arrives whenever somebody was turned away from a listening socket."""
    return socket.get_monitor_socket(_TURNED_AWAY)
