"""The launcher's ear for its own user, who may ask for what clients may not."""

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable

from clo.runtime.machine.control import control_endpoint
from clo.runtime.wire.errors import CLOError, ConfigError, ProtocolError
from clo.runtime.wire.messages import Failed, FromControl, ToControl, Working
from clo.runtime.wire.port import Port, TooLarge, listen_unix
from clo.runtime.wire.strangers import INTRUDER, Strangers

_TICK_S = 1.0  # between two words to who waits
_FLUSH_S = 1.0
_LARGEST = 2**16  # bytes of what is asked

_logger = logging.getLogger(__name__)

Tell = Callable[[Working], None]
"""Says how far something is, to who asked for it."""


class Control:
    """Hears what ``clo.runtime.machine.control.ask`` sends, in the launcher's event loop. The kernel lets no
    other user's process in.

    Args:
        address: where the server's clients connect.
        carry_out: does what is asked. It goes on if who asked goes away.

    Raises:
        ConfigError: somebody else listens there.
    """

    def __init__(self, address: str, carry_out: Callable[[ToControl, Tell], Awaitable[FromControl]]) -> None:
        try:
            listener = listen_unix(control_endpoint(address))
        except OSError as error:
            raise ConfigError(
                f"Nothing can be asked of the launcher at {address} ({error.strerror}); try another --port."
            ) from None
        self._port: Port[FromControl, ToControl] = Port(
            listener,
            ToControl,
            None,
            named=False,
            largest=_LARGEST,
            unread=math.inf,
            handle=self._hear,
            refuse=Strangers(_logger, INTRUDER).turned_away,
        )
        self._carry_out = carry_out
        self._tasks: dict[asyncio.Task[None], bytes] = {}  # and who waits for each

    async def listen(self) -> None:
        """Serve until cancelled."""
        await self._port.listen()

    async def close(self, error: CLOError) -> None:
        """End what is under way, and tell ``error`` to who waits for it."""
        for task, peer in self._tasks.items():
            task.cancel()
            self._fail(peer, error)
        await self._port.close(_FLUSH_S)

    def _hear(self, peer: bytes, message: ToControl | ProtocolError | TooLarge, size: int) -> None:
        if isinstance(message, TooLarge):
            message = ProtocolError(f"A message has at most {_LARGEST} bytes here, not {size}.")
        if isinstance(message, ProtocolError):
            self._fail(peer, message)
            return
        task = asyncio.create_task(self._serve(peer, message))
        self._tasks[task] = peer
        task.add_done_callback(self._tasks.pop)

    async def _serve(self, peer: bytes, message: ToControl) -> None:
        last = Working(0, 0)

        def tell(news: Working) -> None:
            nonlocal last
            last = news
            self._port.send(peer, news)

        work = asyncio.ensure_future(self._carry_out(message, tell))
        try:
            while not (await asyncio.wait([work], timeout=_TICK_S))[0]:
                self._port.send(peer, last)
            self._port.send(peer, work.result())
        except CLOError as error:
            self._fail(peer, error)
        except Exception:
            _logger.exception("%s failed.", type(message).__name__)
            self._fail(peer, CLOError(f"{type(message).__name__} failed; the server's messages say where."))
        finally:
            work.cancel()

    def _fail(self, peer: bytes, error: CLOError) -> None:
        self._port.send(peer, Failed("", error.code, str(error)))
