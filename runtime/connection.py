"""A client's connection to a server: what arrives goes to the requests that wait for it."""

import asyncio
from abc import ABC, abstractmethod
from contextlib import suppress
from typing import Any, ClassVar
from weakref import WeakValueDictionary

import zmq
from zmq.utils.monitor import parse_monitor_message

from clo.runtime.wire.errors import (
    CLOError,
    ProtocolError,
    RequestTimeout,
    ServerUnreachable,
    Unauthorized,
    error_from,
)
from clo.runtime.wire.messages import (
    Cancel,
    Chunk,
    Chunks,
    Failed,
    Finished,
    Generate,
    GetInfo,
    Info,
    Message,
    Progress,
    PromptChunk,
    ToClient,
)
from clo.runtime.wire.sockets import Arrivals, Decoder, configure, encode, present

_TURNED_AWAY = zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_AUTH

SILENCE_SECONDS = 5.0  # a server says something every second while a request is open
DOUBT_SECONDS = 0.2  # from finding a request silent to giving it up, if it still is


class Answer(ABC):
    """What arrives for one request. The connection adds to it, in its event loop; who reads it may be in
    another thread.

    Args:
        name: name of the request.

    Attributes:
        SILENCE: what to say where nothing is heard of it for too long.
        heard: when something arrived last, in the event loop's seconds.
        deadline: ends it in time; None where it may take any time.
        end: the last message or an error; None while more may come.
    """

    SILENCE: ClassVar[str] = "Nothing heard from {address} for {seconds:g} s; is the server running?"

    def __init__(self, name: str) -> None:
        self.name = name
        self.heard = 0.0
        self.deadline: asyncio.TimerHandle | None = None
        self.end: Finished | Info | CLOError | None = None

    @abstractmethod
    def add(self, message: Chunk | Progress | PromptChunk) -> None:
        """Take a message that is not the last one."""

    @abstractmethod
    def wake(self) -> None:
        """Wake whoever waits for more, after ``end`` was set."""


class Connection:
    """A socket for many requests at once, for use in one event loop. It needs the running loop.

    Args:
        address: such as ``tcp://127.0.0.1:5555``.
        api_key: the server's, where it has one.

    Raises:
        ServerUnreachable: ``address`` is not an address.
    """

    def __init__(self, address: str, api_key: str | None) -> None:
        self.address = address
        self._loop = asyncio.get_running_loop()
        self._context: zmq.Context[Any] = zmq.Context()
        self._socket: zmq.Socket[Any] = self._context.socket(zmq.DEALER)
        configure(self._socket)
        self._socket.setsockopt(zmq.SNDHWM, 0)  # else a burst could lose those beyond the first 1000
        self._socket.setsockopt(zmq.RCVHWM, 0)  # what comes while this process is busy waits here
        # For all others, or ZeroMQ would look up names as IPv6 first.
        self._socket.setsockopt(zmq.IPV6, address.startswith("tcp://["))
        if api_key is not None:
            present(self._socket, api_key)
        monitor = self._socket.get_monitor_socket(zmq.EVENT_DISCONNECTED | _TURNED_AWAY)
        try:
            self._socket.connect(address)
        except zmq.ZMQError as error:
            self._context.destroy(linger=0)
            raise ServerUnreachable(f"'{address}' is not an address: {error.strerror}.") from None
        self._arrivals = Arrivals()
        self._sent = self._arrivals.add(self._socket, self._receive)
        self._arrivals.add(monitor, self._lose)
        self._decode: Decoder[ToClient] = Decoder(ToClient)
        self._turned_away: Unauthorized | None = None
        # By name of the request. A stream that nobody holds and nobody reads is not held here either.
        self._open: WeakValueDictionary[str, Answer] = WeakValueDictionary()
        self._awaited: set[Answer] = set()
        self._silence: asyncio.TimerHandle | None = None  # the next check for it, while a request is open
        self._listening = self._loop.create_task(self._arrivals.listen())

    def open(self, request: Generate | GetInfo, answer: Answer, timeout: float | None) -> None:
        """Send a request; its answer ends with ``RequestTimeout`` after ``timeout`` seconds.

        Raises:
            ServerUnreachable: the connection was closed.
            Unauthorized: the server has turned this client away.
        """
        if self._socket.closed:
            raise ServerUnreachable("The client was closed.")
        if self._turned_away is not None:
            raise self._turned_away
        self._open[answer.name] = answer
        answer.heard = self._loop.time()
        if timeout is not None:
            error = RequestTimeout(f"No answer within {timeout:g} s; the request was cancelled.")
            answer.deadline = self._loop.call_later(timeout, self._expire, answer.name, error)
        if self._silence is None:
            self._check_silence_at(answer.heard + SILENCE_SECONDS, set())
        self._post(request)

    def cancel(self, answer: Answer) -> None:
        """Ask the server to end a request, which then ends with the reason "cancelled"."""
        if answer.end is None:
            self._post(Cancel(answer.name))

    def hold(self, answer: Answer) -> None:
        """Somebody waits for this answer, perhaps a task that nothing else holds."""
        if answer.end is None:
            self._awaited.add(answer)

    def drop(self, answer: Answer) -> None:
        """Nobody holds this answer any more; the server is told. Any thread may call this."""
        if answer.end is None:
            with suppress(RuntimeError):  # the event loop was closed
                self._loop.call_soon_threadsafe(self._forget, answer.name, answer.deadline)

    def leave(self, answer: Answer) -> None:
        """Nobody reads this answer any more; the server is told where it has not ended."""
        if answer.end is None:
            self._give_up(answer, CLOError("The stream was left before its end."))

    async def close(self) -> None:
        """End open requests and the connection."""
        if self._socket.closed:
            return
        self._give_all_up(ServerUnreachable("The client was closed."))
        self._listening.cancel()
        try:
            await asyncio.gather(self._listening, return_exceptions=True)
        finally:  # also where this is cancelled: a context left open would hold up the end of the process
            self._arrivals.close()
            self._socket.disable_monitor()
            self._context.destroy(linger=500)

    def _expire(self, name: str, error: RequestTimeout) -> None:
        answer = self._open.get(name)
        if answer is not None:
            self._give_up(answer, error)

    def _forget(self, name: str, deadline: asyncio.TimerHandle | None) -> None:
        if deadline is not None:
            deadline.cancel()
        if not self._socket.closed:
            self._post(Cancel(name))

    def _post(self, message: Message) -> None:
        with suppress(zmq.Again):  # ZeroMQ has no connection any more once it was turned away
            self._socket.send(encode(message), zmq.NOBLOCK)
        self._sent()

    def _receive(self, frames: list[bytes]) -> None:
        try:
            message = self._decode(frames[0])
        except ProtocolError as error:
            self._give_all_up(error)
            return
        now = self._loop.time()
        if isinstance(message, Chunks):
            for chunk in message.chunks:
                answer = self._open.get(chunk.request)
                if answer is not None:
                    answer.heard = now
                    answer.add(chunk)
        else:
            self._take(message, now)

    def _take(self, message: Progress | PromptChunk | Finished | Failed | Info, now: float) -> None:
        answer = self._open.get(message.request)
        if answer is not None:
            answer.heard = now
            match message:
                case Progress() | PromptChunk():
                    answer.add(message)
                case Failed():
                    self._end(answer, error_from(message.code, message.text))
                case _:
                    self._end(answer, message)
        elif isinstance(message, Failed) and not message.request:
            self._give_all_up(error_from(message.code, message.text))

    def _lose(self, frames: list[bytes]) -> None:
        """The monitor has told of a lost connection, or of one that was turned away."""
        if parse_monitor_message(frames)["event"] & _TURNED_AWAY:
            error = f"{self.address} wants another API key, or none, or is not a CLO server; see api_key."
            self._turned_away = Unauthorized(error)
            self._give_all_up(self._turned_away)
        else:
            error = f"The connection to {self.address} was lost; is the server running?"
            self._give_all_up(ServerUnreachable(error))

    def _check_silence_at(self, due: float, suspects: set[str]) -> None:
        self._silence = self._loop.call_at(due, self._check_silence, due, suspects)

    def _check_silence(self, due: float, suspects: set[str]) -> None:
        """End the requests of which nothing was heard for too long.

        Args:
            due: when this check should have begun, in the event loop's seconds.
            suspects: those that were silent for too long at the check before, too. If this process was busy
                or stopped before that, what had arrived meanwhile has been read since.
        """
        now = self._loop.time()
        if now - due > DOUBT_SECONDS:  # it was busy or stopped once more
            suspects = set()
        silent = {name for name, answer in self._open.items() if now - answer.heard >= SILENCE_SECONDS}
        for name in silent & suspects:
            answer = self._open[name]
            text = answer.SILENCE.format(address=self.address, seconds=SILENCE_SECONDS)
            self._give_up(answer, ServerUnreachable(text))
        self._silence = None
        if silent - suspects:
            self._check_silence_at(now + DOUBT_SECONDS, silent)
        elif self._open:
            first = min(answer.heard for answer in self._open.values())
            self._check_silence_at(first + SILENCE_SECONDS, set())

    def _give_all_up(self, error: CLOError) -> None:
        for answer in list(self._open.values()):
            self._give_up(answer, error)

    def _give_up(self, answer: Answer, error: CLOError) -> None:
        self._end(answer, error)
        self._post(Cancel(answer.name))

    def _end(self, answer: Answer, end: Finished | Info | CLOError) -> None:
        del self._open[answer.name]
        self._awaited.discard(answer)
        if answer.deadline is not None:
            answer.deadline.cancel()
        answer.end = end
        answer.wake()
