"""Any server with the completions API of OpenAI, such as vLLM and SGLang, over HTTP."""

from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import msgspec

from benchmarks.serve.endpoint import EndpointError

_CONNECT_S = 10.0
_SILENT_S = 600.0  # a request may wait as long for others
_SHOWN = 300  # characters of what a server says about an error


class Choice(msgspec.Struct):
    """A piece of an answer."""

    text: str = ""
    finish_reason: str | None = None


class Usage(msgspec.Struct):
    """Tokens that have been generated so far."""

    completion_tokens: int


class Event(msgspec.Struct):
    """What matters of one event of a stream."""

    choices: list[Choice] = []
    usage: Usage | None = None
    error: Any = None


class EventStream:
    """The data of server-sent events, from bytes in pieces of any size.

    As the HTML standard has it (9.2, server-sent events): lines end with LF, CR or both, an empty line ends
    an event, the lines of its data are joined, and comments and other fields are skipped.
    """

    def __init__(self) -> None:
        self._rest = b""  # the beginning of a line
        self._skip_newline = False  # the last piece ended with a CR, of which a LF may be part
        self._data: list[bytes] = []

    def feed(self, piece: bytes) -> list[bytes]:
        """The data of the events that this piece completes."""
        if self._skip_newline and piece:
            piece = piece.removeprefix(b"\n")
        lines = (self._rest + piece).splitlines(keepends=True)
        self._skip_newline = bool(lines) and lines[-1].endswith(b"\r")
        self._rest = b"" if not lines or lines[-1].endswith((b"\n", b"\r")) else lines.pop()
        events = []
        for line in lines:
            name, _, value = line.rstrip(b"\r\n").partition(b":")
            if name == b"data":
                self._data.append(value.removeprefix(b" "))
            elif not name and not value and self._data and line[:1] != b":":
                events.append(b"\n".join(self._data))
                self._data = []
        return events


class Peer:
    """An ``Endpoint`` that asks for completions of token ids.

    Args:
        session: to send with.
        url: of the server, without a path.
        model: the name under which the server knows its model.
    """

    def __init__(self, session: aiohttp.ClientSession, url: str, model: str) -> None:
        self._session, self._url, self._model = session, url.rstrip("/"), model
        self._decoder = msgspec.json.Decoder(Event)

    async def stream(self, prompt: list[int], tokens: int) -> AsyncIterator[int]:
        """See ``Endpoint.stream``."""
        body = {
            "model": self._model,
            "prompt": prompt,
            "max_tokens": tokens,
            "temperature": 0.0,
            "ignore_eos": True,
            "stream": True,
            # with the second one every event says how many tokens there are, also where several came together
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        }
        seen, ended = 0, False
        try:
            async with self._session.post(f"{self._url}/v1/completions", json=body) as response:
                if response.status != 200:
                    said = " ".join((await response.text()).split())[:_SHOWN]
                    raise EndpointError(
                        f"{self._url} refused a request with status {response.status}: {said}"
                    )
                events = EventStream()
                async for piece in response.content.iter_any():
                    for data in events.feed(piece):
                        ended = ended or data == b"[DONE]"
                        if not ended:
                            known = self._tokens(data, seen)
                            yield known - seen
                            seen = known
        except (aiohttp.ClientError, TimeoutError, msgspec.DecodeError) as error:
            what = "broke off an answer" if seen else "gave no answer"
            reason = " ".join(str(error).split())[:_SHOWN] or type(error).__name__
            raise EndpointError(f"{self._url} {what} after {seen} of {tokens} tokens: {reason}.") from None
        if not ended:
            raise EndpointError(f"{self._url} broke off an answer after {seen} of {tokens} tokens.")

    def _tokens(self, data: bytes, seen: int) -> int:
        """Tokens that have come by an event; ``seen`` had come before it."""
        event = self._decoder.decode(data)
        if event.error is not None:
            raise EndpointError(f"{self._url} sent an error: {str(event.error)[:_SHOWN]}")
        if event.usage is not None:
            return event.usage.completion_tokens
        return seen + any(choice.text or choice.finish_reason is None for choice in event.choices)


def session() -> aiohttp.ClientSession:
    """A session for as many streams as wanted, each of which may wait for the others."""
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S, sock_read=_SILENT_S)
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout)
