"""The pieces of one answer as a client reads them, and all of them together."""

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from dataclasses import dataclass, field

from clo.runtime.connection import Answer, Connection
from clo.runtime.wire.errors import CLOError, ProtocolError
from clo.runtime.wire.messages import (
    CacheStats,
    Chunk,
    Finished,
    Generate,
    Logprob,
    Progress,
    PromptChunk,
    Usage,
)

OnProgress = Callable[[Progress], None]


@dataclass(frozen=True)
class Result:
    """A finished request. ``finish_reason`` is "stop", "length" or "cancelled".

    Where ``prompt_logprobs`` were asked for, they stand beside ``prompt_tokens``, and the first one is None.
    """

    text: str
    tokens: list[int]
    logprobs: list[Logprob] | None
    finish_reason: str
    usage: Usage
    cache: CacheStats
    prompt_tokens: list[int] | None = None
    prompt_logprobs: list[Logprob | None] | None = None
    others: "list[Result]" = field(default_factory=list)  # the other completions of the same prompt

    @property
    def choices(self) -> "list[Result]":
        """All completions of the prompt, this one first."""
        return [self, *self.others]


def _join(chunks: list[Chunk]) -> Chunk:
    if len(chunks) == 1:
        return chunks[0]
    logprobs = [entry for chunk in chunks for entry in chunk.logprobs or ()]
    return Chunk(
        request=chunks[0].request,
        text="".join([chunk.text for chunk in chunks]),
        tokens=[token for chunk in chunks for token in chunk.tokens],
        logprobs=logprobs or None,
    )


class _Pieces(Answer):
    """What has arrived of one answer, and how much of it was read.

    Args:
        connection: sends the request.
        request: what it is the answer to.
        timeout: seconds until it ends with ``RequestTimeout``, None for any time.
        on_progress: called by the reader with each ``Progress``.

    Attributes:
        first_token: when the first token was there, in seconds of ``time.monotonic``; None before.

    Raises:
        ServerUnreachable: the connection was closed.
    """

    def __init__(
        self, connection: Connection, request: Generate, timeout: float | None, on_progress: OnProgress | None
    ) -> None:
        super().__init__(request.request)
        self._connection, self._on_progress = connection, on_progress
        self._arrived: list[Chunk | Progress | PromptChunk] = []  # since the last piece was read
        self._texts: list[str] = []  # of the pieces that were read
        self._tokens: list[int] = []
        self._logprobs: list[Logprob] = []
        self._prompt_tokens: list[int] = []
        self._prompt_logprobs: list[Logprob | None] = []
        self._result: Result | None = None
        self.first_token: float | None = None
        connection.open(request, self, timeout)

    def __del__(self) -> None:
        self._connection.drop(self)

    @property
    def result(self) -> Result:
        """The whole answer. Raises ``RuntimeError`` before the stream has ended."""
        if self._result is None:
            raise RuntimeError("The stream has not ended; read it to its end first.")
        return self._result

    @property
    def is_complete(self) -> bool:
        """Whether there is a ``result``."""
        return self._result is not None

    @property
    def tokens(self) -> int:
        """How many have been read so far."""
        return len(self._tokens)

    def _piece(self) -> Chunk | None:
        """All chunks that have arrived since the last time, as one. Progress goes to whoever wants it."""
        new = self._arrived[:]
        del self._arrived[: len(new)]  # what another thread adds meanwhile stays
        chunks = [message for message in new if isinstance(message, Chunk)]
        piece = _join(chunks) if chunks else None
        if piece is not None:
            self._keep(piece)  # first, as the caller's function may raise
        for message in new:
            if isinstance(message, PromptChunk):
                self._prompt_tokens += message.tokens
                self._prompt_logprobs += message.logprobs
        for message in new:
            if isinstance(message, Progress) and self._on_progress is not None:
                self._on_progress(message)
        return piece

    def _keep(self, piece: Chunk) -> None:
        """Remember a piece for the result, without its many small objects."""
        if self.first_token is None:
            self.first_token = time.monotonic()
        self._texts.append(piece.text)
        self._tokens += piece.tokens
        self._logprobs += piece.logprobs or ()

    def _finish(self) -> None:
        """Make the result, or raise the error with which the answer ended."""
        if isinstance(self.end, CLOError):
            raise self.end
        if not isinstance(self.end, Finished):
            raise ProtocolError(f"The server ended a stream with {type(self.end).__name__}.")
        self._result = Result(
            text="".join(self._texts),
            tokens=self._tokens,
            logprobs=self._logprobs or None,
            finish_reason=self.end.reason,
            usage=self.end.usage,
            cache=self.end.cache,
            prompt_tokens=self._prompt_tokens or None,
            prompt_logprobs=self._prompt_logprobs or None,
        )


class AsyncStream(_Pieces):
    """Pieces of one answer, as they come; ``result`` holds everything once the stream has ended. What has
    arrived since the last piece was read comes as one. Leaving the loop over it early, or dropping it,
    cancels the request."""

    _waiting: asyncio.Future[None] | None = None
    _is_read = False  # whether a task reads it
    _patient = False  # whether that task waits for the end alone

    def add(self, message: Chunk | Progress | PromptChunk) -> None:
        if self._patient and isinstance(message, Chunk):
            self._keep(message)
        else:
            self._arrived.append(message)
            self.wake()

    def wake(self) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    async def cancel(self) -> None:
        """Ask the server to end the request; the stream then ends with the reason "cancelled"."""
        self._connection.cancel(self)

    async def to_end(self) -> Result:
        """The whole answer, for which nobody is woken at each piece."""
        self._patient = True
        async for _ in self:
            pass
        return self.result

    async def __aiter__(self) -> AsyncGenerator[Chunk, None]:
        if self._is_read:
            raise RuntimeError("The stream is being read already; one task can read it.")
        self._is_read = True
        self._connection.hold(self)
        try:
            while True:
                chunk = self._piece()
                if chunk is not None:
                    yield chunk
                if not self._arrived:
                    if self.end is not None:
                        self._finish()
                        return
                    self._waiting = asyncio.get_running_loop().create_future()
                    await self._waiting
        finally:
            self._is_read = False
            self._connection.leave(self)


class Stream(_Pieces):
    """Pieces of one answer, as they come, for a thread that is not the event loop's; leaving the loop over
    it early, or dropping it, cancels the request. What has arrived since the last piece was read comes as
    one."""

    def __init__(
        self, connection: Connection, request: Generate, timeout: float | None, on_progress: OnProgress | None
    ) -> None:
        self._news = threading.Event()
        self._loop = asyncio.get_running_loop()
        super().__init__(connection, request, timeout, on_progress)

    def add(self, message: Chunk | Progress | PromptChunk) -> None:
        self._arrived.append(message)
        self.wake()

    def wake(self) -> None:
        if not self._news.is_set():
            self._news.set()

    def cancel(self) -> None:
        """Ask the server to end the request; the stream then ends with the reason "cancelled"."""
        if self.end is None:
            with contextlib.suppress(RuntimeError):  # the client was closed meanwhile, and with it the stream
                self._loop.call_soon_threadsafe(self._connection.cancel, self)

    def __iter__(self) -> Iterator[Chunk]:
        try:
            while True:
                ended = self.end is not None  # asked first: what came before the end has arrived then
                chunk = self._piece()
                if chunk is not None:
                    yield chunk
                if ended:
                    self._finish()
                    return
                self._news.wait()
                self._news.clear()
        finally:
            self._news.set()  # another thread that reads it too must not wait for ever
            self.cancel()
