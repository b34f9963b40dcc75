"""Clients of a CLO server: many requests at once over one connection.

with Client("tcp://127.0.0.1:5555") as client:
    print(client.generate("Once upon a time", max_tokens=50).text)
"""

import asyncio
import threading
import uuid
from collections.abc import Coroutine
from contextlib import suppress
from dataclasses import replace
from typing import Any, TypeVar

import msgspec

from clo.runtime.connection import Answer, Connection
from clo.runtime.stream import AsyncStream, OnProgress, Stream
from clo.runtime.stream import Result as Result
from clo.runtime.wire.errors import CLOError, InvalidRequest, ProtocolError
from clo.runtime.wire.messages import (
    MAX_MESSAGE_BYTES,
    Chunk,
    Generate,
    GetInfo,
    Info,
    Progress,
    PromptChunk,
)
from clo.runtime.wire.sockets import encode

Prompt = str | list[int] | list[dict[str, Any]]
T = TypeVar("T")

MAX_N = 128  # completions of one prompt


class _JSONSchema(msgspec.Struct):
    """The part of OpenAI's ``json_schema`` that decides about the answer; it is always followed strictly."""

    schema: dict[str, Any]


class _TextFormat(msgspec.Struct, tag_field="type", tag="text"):
    pass


class _ObjectFormat(msgspec.Struct, tag_field="type", tag="json_object"):
    pass


class _SchemaFormat(msgspec.Struct, tag_field="type", tag="json_schema"):
    json_schema: _JSONSchema


def structured_outputs(response_format: Any) -> dict[str, Any] | None:
    """What OpenAI's ``response_format`` is as ``SamplingParams.structured_outputs``.

    Raises:
        InvalidRequest: it is of no known type, or has no schema.
    """
    try:
        found = msgspec.convert(response_format, _TextFormat | _ObjectFormat | _SchemaFormat)
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"The response_format is not valid: {error}.") from None
    match found:
        case _ObjectFormat():
            return {"json_object": True}
        case _SchemaFormat():
            return {"json": found.json_schema.schema}
    return None


def sampling_fields(options: dict[str, Any]) -> dict[str, Any]:
    """The fields of ``SamplingParams``, from what a caller may write instead; they are not checked here.

    Raises:
        InvalidRequest: the ``response_format`` is not valid, or ``n`` is not 1.
    """
    fields = {name: value for name, value in options.items() if value is not None}
    if fields.pop("n", 1) != 1:
        raise InvalidRequest("stream() and score() give one completion; use generate() or streams() with n.")
    if isinstance(fields.get("stop"), str):
        fields["stop"] = [fields["stop"]]
    if isinstance(fields.get("logit_bias"), dict):  # JSON has no keys but texts
        with suppress(ValueError):
            fields["logit_bias"] = {
                int(key) if isinstance(key, str) else key: value
                for key, value in fields["logit_bias"].items()
            }
    wanted = structured_outputs(fields.pop("response_format", {"type": "text"}))
    if wanted is not None:
        if "structured_outputs" in fields:
            raise InvalidRequest(
                "response_format and structured_outputs say the same; leave one of them out."
            )
        fields["structured_outputs"] = wanted
    return fields


def _each(n: int, sampling: dict[str, Any]) -> list[dict[str, Any]]:
    """The parameters of each of ``n`` completions: as in vLLM, their seeds follow each other.

    Raises:
        InvalidRequest: ``n`` is out of range, or all of them would be the same.
    """
    if not isinstance(n, int) or not 1 <= n <= MAX_N:
        raise InvalidRequest(f"n is {n!r}, and must be a whole number from 1 to {MAX_N}.")
    if n > 1 and sampling.get("temperature") == 0:
        raise InvalidRequest("With temperature 0 all completions are the same; set n to 1 or a temperature.")
    seed = sampling.get("seed")
    if n == 1 or not isinstance(seed, int) or seed == -1:
        return [sampling] * n
    others = [sampling | {"seed": (seed + number) % 2**63} for number in range(1, n)]
    return [sampling, *others]


def _prompt(prompt: Any, template: dict[str, Any] | None = None) -> dict[str, Any]:
    """The fields of a ``Text``, ``Chat`` or ``Tokens``; ``template`` are variables of the chat template."""
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], dict):
        if not isinstance(template, dict | None):
            raise InvalidRequest("chat_template_kwargs must be a dict of variables.")
        variables = "" if template is None else _json(template)
        return {"type": "Chat", "turns": list(map(_turn, prompt)), "chat_template_kwargs": variables}
    if template is not None:
        raise InvalidRequest("chat_template_kwargs go with chat messages; this prompt is not rendered.")
    if isinstance(prompt, str):
        return {"type": "Text", "text": prompt}
    return {"type": "Tokens", "ids": prompt}


def _turn(turn: Any) -> Any:
    """A chat message whose tool calls have their arguments as JSON, where they were given as objects."""
    calls = turn.get("tool_calls") if isinstance(turn, dict) else None
    return turn | {"tool_calls": list(map(_call, calls))} if isinstance(calls, list) else turn


def _call(call: Any) -> Any:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), dict):
        return call
    return call | {"function": function | {"arguments": _json(function["arguments"])}}


def _json(value: dict[str, Any]) -> str:
    return msgspec.json.encode(value).decode()


def _request(
    prompt: Any,
    sampling: dict[str, Any],
    continuation: Any = None,
    template: dict[str, Any] | None = None,
) -> Generate:
    """A checked request with a name of its own.

    Raises:
        InvalidRequest: a field has the wrong type or value, or the message would be too large.
    """
    try:
        fields = {
            "request": uuid.uuid4().hex,
            "prompt": _prompt(prompt, template),
            "sampling": sampling_fields(sampling),
            "continuation": None if continuation is None else _prompt(continuation),
        }
        message = msgspec.convert(fields, Generate)
        size = len(encode(message))
    except (
        msgspec.MsgspecError,
        TypeError,
        ValueError,
        OverflowError,
        RecursionError,
    ) as error:
        raise InvalidRequest(f"The request is not valid: {error}.") from None
    if size > MAX_MESSAGE_BYTES:
        raise InvalidRequest(f"The request takes {size} bytes; at most {MAX_MESSAGE_BYTES} are sent.")
    return message


class _Question(Answer):
    """Waits for the answer to ``GetInfo``."""

    SILENCE = "No server answers at {address}."

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.answered = asyncio.Event()

    def add(self, message: Chunk | Progress | PromptChunk) -> None:
        """Nothing comes before the end."""

    def wake(self) -> None:
        self.answered.set()


class AsyncClient:
    """A connection to a server, for use in one event loop.

    Args:
        address: such as ``tcp://127.0.0.1:5555``.
        timeout: seconds that a request may take, None for any time.
        api_key: the server's ``--api-key``, where it has one.
    """

    def __init__(
        self,
        address: str = "tcp://127.0.0.1:5555",
        timeout: float | None = None,
        api_key: str | None = None,
    ) -> None:
        self.address, self._timeout = address, timeout
        self._connection = Connection(address, api_key)

    async def __aenter__(self) -> "AsyncClient":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def generate(
        self,
        prompt: Prompt,
        *,
        n: int = 1,
        chat_template_kwargs: dict[str, Any] | None = None,
        timeout: float | None = None,
        on_progress: OnProgress | None = None,
        **sampling: Any,
    ) -> Result:
        """The whole answer to a text, token ids or chat messages.

        Args:
            prompt: chat messages are dicts with ``role`` and ``content``, which is a text, a list of parts
                ``{"type": "text", "text": ...}`` or None; see ``clo.runtime.wire.messages.Turn``.
            n: completions, 128 at most; ``Result.choices`` has all of them. Each is a request of its own,
                with a prefill of its own, and their seeds are ``seed``, ``seed`` + 1, ... where there is one.
            chat_template_kwargs: variables of the model's chat template, such as ``enable_thinking``.
            timeout: seconds, instead of the client's own.
            on_progress: called with ``Progress`` while the request waits and prefills.
            sampling: fields of ``clo.runtime.wire.messages.SamplingParams``. ``stop`` may also be one text,
                the keys of ``logit_bias`` may be texts, and OpenAI's ``response_format`` may stand in the
                place of ``structured_outputs``.

        Raises:
            CLOError: one of ``clo.runtime.wire.errors``, saying what went wrong.
        """
        streams = self.streams(
            prompt,
            n=n,
            chat_template_kwargs=chat_template_kwargs,
            timeout=timeout,
            on_progress=on_progress,
            **sampling,
        )
        tasks = [asyncio.ensure_future(stream.to_end()) for stream in streams]
        try:
            first, *others = await asyncio.gather(*tasks)
        finally:
            for task in tasks:  # one has failed, or nobody waits any more
                task.cancel()
        return replace(first, others=others)

    def stream(
        self,
        prompt: Prompt,
        *,
        chat_template_kwargs: dict[str, Any] | None = None,
        timeout: float | None = None,
        on_progress: OnProgress | None = None,
        **sampling: Any,
    ) -> AsyncStream:
        """Like ``generate``, piece by piece: ``async for chunk in client.stream(...)``."""
        request = _request(prompt, sampling, template=chat_template_kwargs)
        return AsyncStream(self._connection, request, self._limit(timeout), on_progress)

    def streams(
        self,
        prompt: Prompt,
        *,
        n: int = 1,
        chat_template_kwargs: dict[str, Any] | None = None,
        timeout: float | None = None,
        on_progress: OnProgress | None = None,
        **sampling: Any,
    ) -> list[AsyncStream]:
        """``n`` completions of one prompt, see ``generate``, each as a stream of its own."""
        requests = [_request(prompt, one, template=chat_template_kwargs) for one in _each(n, sampling)]
        limit = self._limit(timeout)
        return [AsyncStream(self._connection, request, limit, on_progress) for request in requests]

    async def score(
        self,
        prompt: Prompt,
        continuation: str | list[int],
        *,
        chat_template_kwargs: dict[str, Any] | None = None,
        timeout: float | None = None,
        on_progress: OnProgress | None = None,
    ) -> Result:
        """Log-probabilities of a continuation, token by token through the decode path (teacher-forced)."""
        request = _request(prompt, {"logprobs": 0}, continuation, chat_template_kwargs)
        return await AsyncStream(self._connection, request, self._limit(timeout), on_progress).to_end()

    async def info(self) -> Info:
        """Model, capacity and what workers and stores hold now."""
        request = GetInfo(uuid.uuid4().hex)
        question = _Question(request.request)
        self._connection.open(request, question, timeout=None)
        self._connection.hold(question)
        try:
            await question.answered.wait()
        finally:
            self._connection.leave(question)
        if isinstance(question.end, CLOError):
            raise question.end
        if not isinstance(question.end, Info):
            raise ProtocolError(f"The server answered GetInfo with {type(question.end).__name__}.")
        return question.end

    async def close(self) -> None:
        """End open requests and the connection."""
        await self._connection.close()

    def _limit(self, timeout: float | None) -> float | None:
        return self._timeout if timeout is None else timeout


class Client:
    """``AsyncClient`` for programs without an event loop; safe to use from several threads.

    Args:
        address: such as ``tcp://127.0.0.1:5555``.
        timeout: seconds that a request may take, None for any time.
        api_key: the server's ``--api-key``, where it has one.
    """

    def __init__(
        self,
        address: str = "tcp://127.0.0.1:5555",
        timeout: float | None = None,
        api_key: str | None = None,
    ) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="clo-client", daemon=True)
        self._thread.start()
        try:
            self._client = self._call(self._connect(address, timeout, api_key))
        except BaseException:
            self._stop()
            raise

    async def _connect(self, address: str, timeout: float | None, api_key: str | None) -> AsyncClient:
        return AsyncClient(address, timeout, api_key)

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def generate(self, prompt: Prompt, **options: Any) -> Result:
        """See ``AsyncClient.generate``."""
        return self._call(self._client.generate(prompt, **options))

    def stream(
        self,
        prompt: Prompt,
        *,
        chat_template_kwargs: dict[str, Any] | None = None,
        timeout: float | None = None,
        on_progress: OnProgress | None = None,
        **sampling: Any,
    ) -> Stream:
        """See ``AsyncClient.stream``; ``on_progress`` is called in the thread that reads the stream."""
        request = _request(prompt, sampling, template=chat_template_kwargs)
        return self._call(self._open(request, timeout, on_progress))

    def streams(
        self,
        prompt: Prompt,
        *,
        n: int = 1,
        chat_template_kwargs: dict[str, Any] | None = None,
        timeout: float | None = None,
        on_progress: OnProgress | None = None,
        **sampling: Any,
    ) -> list[Stream]:
        """See ``AsyncClient.streams`` and ``stream``."""
        requests = [_request(prompt, one, template=chat_template_kwargs) for one in _each(n, sampling)]
        return [self._call(self._open(request, timeout, on_progress)) for request in requests]

    async def _open(self, request: Generate, timeout: float | None, on_progress: OnProgress | None) -> Stream:
        client = self._client
        return Stream(client._connection, request, client._limit(timeout), on_progress)

    def score(self, prompt: Prompt, continuation: str | list[int], **options: Any) -> Result:
        """See ``AsyncClient.score``."""
        return self._call(self._client.score(prompt, continuation, **options))

    def info(self) -> Info:
        """See ``AsyncClient.info``."""
        return self._call(self._client.info())

    def close(self) -> None:
        """End open requests, the connection and the thread."""
        if self._thread.is_alive():
            self._call(self._client.close())
            self._stop()

    def _call(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def _stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
