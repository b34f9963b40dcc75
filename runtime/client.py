"""Clients of a CLO server: many requests at once over one connection.

with Client("tcp://127.0.0.1:5555") as client:
    print(client.generate("Once upon a time", max_tokens=50).text)
"""

import asyncio
import contextlib
import queue
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec
import zmq
import zmq.asyncio

from clo.runtime.wire.errors import (
    InvalidRequest,
    ProtocolError,
    RequestTimeout,
    ServerUnreachable,
    error_from,
)
from clo.runtime.wire.messages import (
    MAX_MESSAGE_BYTES,
    CacheStats,
    Cancel,
    Chunk,
    Failed,
    Finished,
    Generate,
    GetInfo,
    Info,
    Logprob,
    Message,
    Progress,
    ToClient,
    Usage,
)
from clo.runtime.wire.sockets import Decoder, configure, encode

SILENCE_SECONDS = 5.0  # a server says something every second while a request is open

Prompt = str | list[int] | list[dict[str, str]]
OnProgress = Callable[[Progress], None]
T = TypeVar("T")


@dataclass(frozen=True)
class Result:
    """A finished request. ``finish_reason`` is "stop", "length" or "cancelled"."""

    text: str
    tokens: list[int]
    logprobs: list[Logprob] | None
    finish_reason: str
    usage: Usage
    cache: CacheStats


def _prompt(prompt: Any) -> dict[str, Any]:
    """The fields of a ``Text``, ``Chat`` or ``Tokens``."""
    if isinstance(prompt, str):
        return {"type": "Text", "text": prompt}
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], dict):
        return {"type": "Chat", "turns": prompt}
    return {"type": "Tokens", "ids": prompt}


def _request(prompt: Any, sampling: dict[str, Any], continuation: Any = None) -> Generate:
    """A checked request with a name of its own.

    Raises:
        InvalidRequest: a field has the wrong type or value, or the message would be too large.
    """
    fields = {
        "request": uuid.uuid4().hex,
        "prompt": _prompt(prompt),
        "sampling": sampling,
        "continuation": None if continuation is None else _prompt(continuation),
    }
    try:
        message = msgspec.convert(fields, Generate)
        size = len(encode(message))
    except (msgspec.ValidationError, TypeError, UnicodeEncodeError, OverflowError) as error:
        raise InvalidRequest(f"The request is not valid: {error}.") from None
    if size > MAX_MESSAGE_BYTES:
        raise InvalidRequest(f"The request takes {size} bytes; at most {MAX_MESSAGE_BYTES} are sent.")
    return message


class AsyncStream:
    """Pieces of one answer, as they come; ``result`` holds everything once the stream has ended."""

    def __init__(
        self, client: "AsyncClient", request: Generate, timeout: float | None, progress: OnProgress | None
    ):
        self._client, self._name = client, request.request
        self._timeout = client._timeout if timeout is None else timeout
        self._deadline = None if self._timeout is None else time.monotonic() + self._timeout
        self._progress = progress
        self._chunks: list[Chunk] = []
        self._inbox = client._open(request)
        self._result: Result | None = None

    @property
    def result(self) -> Result:
        """The whole answer. Raises ``RuntimeError`` before the stream has ended."""
        if self._result is None:
            raise RuntimeError("The stream has not ended; read it to its end first.")
        return self._result

    async def cancel(self) -> None:
        """Ask the server to end the request; the stream then ends with the reason "cancelled"."""
        self._client._post(Cancel(self._name))

    async def __aiter__(self) -> AsyncIterator[Chunk]:
        try:
            while True:
                message = await self._next()
                match message:
                    case Chunk():
                        self._chunks.append(message)
                        yield message
                    case Progress():
                        if self._progress is not None:
                            self._progress(message)
                    case Failed():
                        raise error_from(message.code, message.text)
                    case Finished():
                        self._finish(message)
                        return
        finally:
            self._client._close(self._name, cancel=self._result is None)

    async def _next(self) -> Any:
        wait = SILENCE_SECONDS
        if self._deadline is not None:
            wait = min(wait, self._deadline - time.monotonic())
        try:
            message = await asyncio.wait_for(self._inbox.get(), max(wait, 0.0))
        except TimeoutError:
            if self._deadline is not None and time.monotonic() >= self._deadline:
                raise RequestTimeout(
                    f"No answer within {self._timeout:g} s; the request was cancelled."
                ) from None
            raise ServerUnreachable(
                f"Nothing heard from {self._client.address} for {SILENCE_SECONDS:g} s; is the server running?"
            ) from None
        if isinstance(message, Exception):
            raise message
        return message

    def _finish(self, message: Finished) -> None:
        chunks = self._chunks
        logprobs = [entry for chunk in chunks for entry in chunk.logprobs or []]
        self._result = Result(
            text="".join(chunk.text for chunk in chunks),
            tokens=[token for chunk in chunks for token in chunk.tokens],
            logprobs=logprobs or None,
            finish_reason=message.reason,
            usage=message.usage,
            cache=message.cache,
        )


class AsyncClient:
    """A connection to a server, for use in one event loop.

    Args:
        address: such as ``tcp://127.0.0.1:5555``.
        timeout: seconds that a request may take, None for any time.
    """

    def __init__(self, address: str = "tcp://127.0.0.1:5555", timeout: float | None = None) -> None:
        self.address, self._timeout = address, timeout
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.DEALER)
        configure(self._socket)
        self._socket.setsockopt(zmq.SNDHWM, 0)  # else a burst could lose those beyond the first 1000
        monitor = self._socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        try:
            self._socket.connect(address)
        except zmq.ZMQError as error:
            self._context.destroy(linger=0)
            raise ServerUnreachable(f"'{address}' is not an address: {error.strerror}.") from None
        self._decode: Decoder[Any] = Decoder(ToClient)
        self._inboxes: dict[str, asyncio.Queue[Any]] = {}
        loop = asyncio.get_running_loop()
        self._tasks = [loop.create_task(self._receive()), loop.create_task(self._watch(monitor))]

    async def __aenter__(self) -> "AsyncClient":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def generate(
        self,
        prompt: Prompt,
        *,
        timeout: float | None = None,
        on_progress: OnProgress | None = None,
        **sampling: Any,
    ) -> Result:
        """The whole answer to a text, token ids or chat messages (dicts with ``role`` and ``content``).

        Args:
            timeout: seconds, instead of the client's own.
            on_progress: called with ``Progress`` while the request waits and prefills.
            sampling: fields of ``clo.runtime.wire.messages.Sampling``.

        Raises:
            CLOError: one of ``clo.runtime.wire.errors``, saying what went wrong.
        """
        stream = self.stream(prompt, timeout=timeout, on_progress=on_progress, **sampling)
        async for _ in stream:
            pass
        return stream.result

    def stream(
        self,
        prompt: Prompt,
        *,
        timeout: float | None = None,
        on_progress: OnProgress | None = None,
        **sampling: Any,
    ) -> AsyncStream:
        """Like ``generate``, piece by piece: ``async for chunk in client.stream(...)``."""
        request = _request(prompt, sampling)
        return AsyncStream(self, request, timeout, on_progress)

    async def score(
        self,
        prompt: Prompt,
        continuation: str | list[int],
        *,
        timeout: float | None = None,
        on_progress: OnProgress | None = None,
    ) -> Result:
        """Log-probabilities of a continuation, token by token through the decode path (teacher-forced)."""
        request = _request(prompt, {"logprobs": 0}, continuation)
        stream = AsyncStream(self, request, timeout, on_progress)
        async for _ in stream:
            pass
        return stream.result

    async def info(self) -> Info:
        """Model, capacity and what workers and stores hold now."""
        request = GetInfo(uuid.uuid4().hex)
        inbox = self._open(request)
        try:
            message = await asyncio.wait_for(inbox.get(), SILENCE_SECONDS)
        except TimeoutError:
            raise ServerUnreachable(f"No server answers at {self.address}.") from None
        finally:
            self._close(request.request, cancel=False)
        if isinstance(message, Exception):
            raise message
        if isinstance(message, Failed):
            raise error_from(message.code, message.text)
        assert isinstance(message, Info)
        return message

    async def close(self) -> None:
        """End open requests and the connection."""
        for name in self._inboxes:
            self._post(Cancel(name))
        self._fail(ServerUnreachable("The client was closed."))
        for task in self._tasks:
            task.cancel()
        try:
            await asyncio.gather(*self._tasks, return_exceptions=True)
        finally:  # also where this is cancelled: a context left open would hold up the end of the process
            self._socket.disable_monitor()
            self._context.destroy(linger=500)

    def _open(self, request: Generate | GetInfo) -> asyncio.Queue[Any]:
        inbox: asyncio.Queue[Any] = asyncio.Queue()
        self._inboxes[request.request] = inbox
        self._post(request)
        return inbox

    def _close(self, name: str, *, cancel: bool) -> None:
        if self._inboxes.pop(name, None) is not None and cancel and not self._socket.closed:
            self._post(Cancel(name))

    def _post(self, message: Message) -> None:
        self._socket.send(encode(message), zmq.NOBLOCK)

    async def _receive(self) -> None:
        while True:
            data = await self._socket.recv()
            try:
                message = self._decode(data)
            except ProtocolError as error:
                self._fail(error)
                continue
            inbox = self._inboxes.get(message.request)
            if inbox is not None:
                inbox.put_nowait(message)
            elif isinstance(message, Failed) and not message.request:
                self._fail(error_from(message.code, message.text))

    async def _watch(self, monitor: Any) -> None:
        while True:
            await monitor.recv_multipart()
            self._fail(
                ServerUnreachable(f"The connection to {self.address} was lost; is the server running?")
            )

    def _fail(self, error: Exception) -> None:
        for inbox in self._inboxes.values():
            inbox.put_nowait(error)


class Stream:
    """Pieces of one answer, as they come; leaving the loop early cancels the request."""

    def __init__(self, client: "Client", open_stream: Callable[[], AsyncStream]) -> None:
        self._client = client
        self._pieces: queue.SimpleQueue[Chunk | Exception | None] = queue.SimpleQueue()
        self._stream = client._call(self._start(open_stream))

    async def _start(self, open_stream: Callable[[], AsyncStream]) -> AsyncStream:
        stream = open_stream()
        task = asyncio.get_running_loop().create_task(self._pump(stream))
        self._client._pumps.add(task)
        task.add_done_callback(self._client._pumps.discard)
        return stream

    async def _pump(self, stream: AsyncStream) -> None:
        try:
            async for chunk in stream:
                self._pieces.put(chunk)
            self._pieces.put(None)
        except Exception as error:
            self._pieces.put(error)

    @property
    def result(self) -> Result:
        """The whole answer. Raises ``RuntimeError`` before the stream has ended."""
        return self._stream.result

    def cancel(self) -> None:
        """Ask the server to end the request; the stream then ends with the reason "cancelled"."""
        self._client._call(self._stream.cancel())

    def __iter__(self) -> Iterator[Chunk]:
        ended = False
        try:
            while True:
                piece = self._pieces.get()
                if not isinstance(piece, Chunk):
                    ended = True
                    if piece is None:
                        return
                    raise piece
                yield piece
        finally:
            if not ended:
                self.cancel()


class Client:
    """``AsyncClient`` for programs without an event loop; safe to use from several threads.

    Args:
        address: such as ``tcp://127.0.0.1:5555``.
        timeout: seconds that a request may take, None for any time.
    """

    def __init__(self, address: str = "tcp://127.0.0.1:5555", timeout: float | None = None) -> None:
        self._pumps: set[asyncio.Task[None]] = set()  # one for each open stream
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="clo-client", daemon=True)
        self._thread.start()
        try:
            self._client = self._call(self._connect(address, timeout))
        except BaseException:
            self._stop()
            raise

    async def _connect(self, address: str, timeout: float | None) -> AsyncClient:
        return AsyncClient(address, timeout)

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def generate(self, prompt: Prompt, **options: Any) -> Result:
        """See ``AsyncClient.generate``."""
        return self._call(self._client.generate(prompt, **options))

    def stream(self, prompt: Prompt, **options: Any) -> Stream:
        """See ``AsyncClient.stream``."""
        return Stream(self, lambda: self._client.stream(prompt, **options))

    def score(self, prompt: Prompt, continuation: str | list[int], **options: Any) -> Result:
        """See ``AsyncClient.score``."""
        return self._call(self._client.score(prompt, continuation, **options))

    def info(self) -> Info:
        """See ``AsyncClient.info``."""
        return self._call(self._client.info())

    def close(self) -> None:
        """End open requests, the connection and the thread."""
        if self._thread.is_alive():
            with contextlib.suppress(zmq.ZMQError):
                self._call(self._close())
            self._stop()

    async def _close(self) -> None:
        await self._client.close()
        await asyncio.gather(*self._pumps)

    def _call(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def _stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
