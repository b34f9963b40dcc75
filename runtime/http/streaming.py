"""Answers while they are made: server-sent events, and what happens when a client goes away."""

import asyncio
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine
from contextlib import aclosing, suppress
from typing import Any, NamedTuple, TypeVar

import msgspec
from fastapi import Response
from starlette.types import Receive, Scope, Send

from clo.runtime.http.errors import APIError
from clo.runtime.http.traces import current_span
from clo.runtime.stream import AsyncStream, Result
from clo.runtime.wire.errors import CLOError
from clo.runtime.wire.messages import Chunk

_DONE = b"data: [DONE]\n\n"
_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}  # proxies shall not collect events

T = TypeVar("T")
_logger = logging.getLogger(__name__)
_encode = msgspec.json.Encoder().encode


class ClientGone(Exception):
    """There is nobody left to answer."""


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of ``work``, which is cancelled when the client goes away.

    Args:
        receive: of ASGI, after the whole body was read.

    Raises:
        ClientGone: it has.
    """
    tasks = asyncio.ensure_future(work), asyncio.ensure_future(_until_gone(receive))
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise ClientGone
        return tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def gather(work: list[Coroutine[Any, Any, T]]) -> list[T]:
    """All results; where one of them fails the others are cancelled, and the first error is raised."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(each) for each in work]
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]


def event(data: msgspec.Struct | dict[str, Any]) -> bytes:
    """A server-sent event."""
    return b"data: %b\n\n" % _encode(data)


def api_error(error: Exception, param: str | None = None) -> APIError:
    """What a client is told of an error; one that nobody raised on purpose is logged."""
    if isinstance(error, APIError):
        return error
    if isinstance(error, CLOError):
        return APIError.of(error, param)
    _logger.error("A request failed.", exc_info=error)
    return failed()


def failed() -> APIError:
    """What a client is told of an error that it need not understand."""
    return APIError("The server failed at this request; its log says why.", 500, code="internal")


class ChoiceWriter(ABC):
    """Makes events of one choice."""

    @abstractmethod
    def piece(self, chunk: Chunk) -> bytes:
        """Events for new text and tokens; b"" where there is nothing to tell yet."""

    @abstractmethod
    def end(self, result: Result) -> bytes:
        """Events for the end of the choice."""


class Choice(NamedTuple):
    stream: AsyncStream
    writer: ChoiceWriter


class EventStream(Response):
    """Choices as they are made, each piece at once. The status is only sent when a request has been taken on,
    so that one that is refused gets an error of its own.

    Args:
        choices: what is streamed.
        accepted: is set by the streams' ``on_progress``.
        first: events before all others.
        last: makes the events behind all others.
        param: the field of the request that the prompt came in, for errors.
    """

    def __init__(
        self,
        choices: list[Choice],
        accepted: asyncio.Event,
        first: bytes,
        last: Callable[[], bytes],
        param: str,
    ) -> None:
        super().__init__(media_type="text/event-stream", headers=_HEADERS)
        del self.headers["content-length"]
        self._choices, self._accepted, self._param = choices, accepted, param
        self._first, self._last = first, last
        self._begun = asyncio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with suppress(ClientGone):
            await unless_gone(receive, self._write(send))

    async def _write(self, send: Send) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                for choice in self._choices:
                    group.create_task(self._pump(choice, send))
                if self._choices:
                    await self._accepted.wait()
                start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
                await send(start)
                self._begun.set()
                if self._first:
                    await self._send(send, self._first)
            last = self._last()
        except ExceptionGroup as errors:
            error = api_error(errors.exceptions[0], self._param)
            if not self._begun.is_set():
                raise error from None
            if (span := current_span()) is not None:
                span.fail(str(error))
            last = event(error.body)
        await send({"type": "http.response.body", "body": last + _DONE})

    async def _pump(self, choice: Choice, send: Send) -> None:
        stream, writer = choice
        async with aclosing(aiter(stream)) as chunks:
            async for chunk in chunks:
                if data := writer.piece(chunk):
                    await self._send(send, data)
        if data := writer.end(stream.result):
            await self._send(send, data)

    async def _send(self, send: Send, data: bytes) -> None:
        if not self._begun.is_set():
            self._accepted.set()
            await self._begun.wait()
        await send({"type": "http.response.body", "body": data, "more_body": True})
