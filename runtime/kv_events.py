"""Publishes which blocks the stores hold, for routers that send a prompt to where its beginning is."""

import logging
import time
from collections.abc import Sequence
from itertools import count
from typing import Any

import msgspec

from clo.runtime.machine.addresses import not_bound, numeric_host
from clo.runtime.wire.errors import ProtocolError
from clo.runtime.wire.kv_events import EventBatch, KVEvent
from clo.runtime.wire.port import Port, TooLarge, listen_tcp
from clo.runtime.wire.strangers import Strangers

UNREAD_BYTES = 64 * 2**20  # that a subscriber may leave unread; of what comes then it misses whole batches
_SUBSCRIPTION_BYTES = 1024

_logger = logging.getLogger(__name__)


class KVEventPublisher:
    """A PUB of ZeroMQ, whose messages are a topic, a number of 8 bytes that counts up, and an ``EventBatch``.

    It sends every message to every subscriber, and a SUB passes on those that its owner has asked for. A
    subscriber that misses one sees it by the number.

    Args:
        host: as a number or a name; port: 0 for a free one.
        topic: of all messages.

    Attributes:
        address: where subscribers connect.

    Raises:
        ConfigError: the address cannot be used.
    """

    def __init__(self, host: str, port: int, topic: str) -> None:
        try:
            listener = listen_tcp(numeric_host(host), port)
        except OSError as error:
            raise not_bound("--kv-events-port", host, port, error) from None
        self._port: Port[Any, Any] = Port(
            listener,
            type(None),
            None,
            named=False,
            largest=_SUBSCRIPTION_BYTES,
            unread=UNREAD_BYTES,
            handle=self._hear,
            refuse=Strangers(_logger, "A subscriber to KV events was turned away.").turned_away,
            role="PUB",
        )
        self._topic, self._numbers = topic.encode(), count()
        self.address = self._port.endpoint

    def _hear(self, subscriber: bytes, message: ProtocolError | TooLarge | None, size: int) -> None:
        """What it subscribes to makes no difference here."""

    async def listen(self) -> None:
        """Take subscribers until cancelled."""
        await self._port.listen()

    def publish(self, store: int, events: Sequence[KVEvent]) -> None:
        """Tell all subscribers what has changed in a store."""
        number = next(self._numbers).to_bytes(8, "big")
        batch = EventBatch(time.time(), list(events), store)
        self._port.publish(self._topic, number, msgspec.msgpack.encode(batch))

    async def close(self, linger_s: float) -> None:
        await self._port.close(linger_s)
