"""``/v1/chat/completions``: answers to conversations, with what was thought and calls of tools apart."""

import asyncio
from typing import Any

import msgspec
from fastapi import Response
from msgspec import UNSET

from clo.runtime.http.answers import (
    ChatChoice,
    ChatChunk,
    ChatCompletion,
    ChunkChoice,
    Delta,
    Message,
    ToolCall,
)
from clo.runtime.http.errors import APIError
from clo.runtime.http.gateway import Gateway
from clo.runtime.http.generation import StreamedUsage, count, head, open_streams
from clo.runtime.http.logprobs import Speller
from clo.runtime.http.reasoning import ReasoningParser
from clo.runtime.http.requests import ChatCompletionRequest, ChosenTool, Tool, read, sampling_of
from clo.runtime.http.streaming import Choice, ChoiceWriter, EventStream, event, gather
from clo.runtime.http.tool_calls import ForcedParser, ToolCallParser, schema_of_calls
from clo.runtime.stream import Result
from clo.runtime.wire.messages import Chat, Chunk, Logprob, Turn


def chat_of(turns: list[Turn], tools: list[Tool], variables: dict[str, Any]) -> Chat:
    """A conversation for the chat template, with the tools that it offers."""
    variables = variables | ({"tools": tools} if tools else {})
    return Chat(turns, msgspec.json.encode(variables).decode() if variables else "")


async def chat(gateway: Gateway, body: dict[str, Any], name: str) -> Response:
    """Answer a request.

    Args:
        body: its fields.
        name: of the request.

    Raises:
        APIError, CLOError: it cannot be served.
    """
    request, fields = read(body, ChatCompletionRequest)
    gateway.check_model(request.model)
    if request.top_logprobs and not request.logprobs:
        raise APIError(
            "'top_logprobs' goes with 'logprobs' true.", param="top_logprobs", code="invalid_value"
        )
    max_tokens = request.max_completion_tokens or request.max_tokens
    logprobs = (request.top_logprobs or 0) if request.logprobs else None
    sampling = sampling_of(request, fields, max_tokens, logprobs)
    tools = [] if request.tool_choice == "none" else request.tools
    schema = _schema(request)
    if schema is not None:
        if sampling.get("structured_outputs") is not None:
            text = "'tool_choice' decides about the answer here; leave 'response_format' out."
            raise APIError(text, param="tool_choice", code="invalid_value")
        sampling["structured_outputs"] = {"json": schema}
    parsers = [_calls_of(gateway, request) if tools else None for _ in range(request.n)]
    prompt = await gateway.tokens(chat_of(request.messages, tools, request.chat_template_kwargs))
    thinks = gateway.thinks and sampling.get("structured_outputs") is None
    begun = thinks and gateway.begins_thinking(prompt)
    accepted = asyncio.Event()
    streams = open_streams(gateway, [prompt], request.n, sampling, accepted)
    begin = head(gateway, f"chatcmpl-{name}")
    speller = Speller(gateway, request.return_tokens_as_token_ids)
    writers = [
        _Writer(
            begin,
            index,
            request,
            speller,
            prompt,
            _Parser(ReasoningParser(begun) if thinks else None, parser, request),
        )
        for index, parser in enumerate(parsers)
    ]
    if request.stream:

        def last() -> bytes:
            if not StreamedUsage(request.stream_options).has_last:
                return b""
            usage = count([prompt], [stream.result for stream in streams])
            return event(ChatChunk(**begin, choices=[], usage=usage))

        choices = [Choice(*pair) for pair in zip(streams, writers, strict=True)]
        return EventStream(choices, accepted, b"", last, "messages")
    results = await gather([stream.to_end() for stream in streams])
    whole = ChatCompletion(
        **begin,
        choices=[writer.whole(result) for writer, result in zip(writers, results, strict=True)],
        usage=count([prompt], results),
        prompt_token_ids=prompt if request.return_token_ids else UNSET,
    )
    return Response(msgspec.json.encode(whole), media_type="application/json")


def _schema(request: ChatCompletionRequest) -> dict[str, Any] | None:
    """What the answer must be where the model has to call a tool; None where it need not.

    Raises:
        APIError: there is no such tool.
    """
    choice = request.tool_choice
    if choice in ("auto", "none"):
        return None
    named = choice.function.name if isinstance(choice, ChosenTool) else None
    offered = [tool for tool in request.tools if named in (None, tool.function.name)]
    if not offered:
        text = "'tool_choice' asks for a tool that is not among 'tools'."
        raise APIError(text, param="tool_choice", code="invalid_value")
    if named is not None:
        return offered[0].function.parameters or {"type": "object"}
    return schema_of_calls(offered, request.parallel_tool_calls)


def _calls_of(gateway: Gateway, request: ChatCompletionRequest) -> ToolCallParser:
    """Finds calls in one answer. Raises ``APIError`` where it is not known how the model writes them."""
    choice = request.tool_choice
    if choice == "auto":
        return gateway.tool_call_parser(request.tools)
    return ForcedParser(choice.function.name if isinstance(choice, ChosenTool) else None)


class _Parser:
    """Parts the text of one answer into what was thought, the answer and calls of tools."""

    def __init__(
        self, reasoning: ReasoningParser | None, calls: ToolCallParser | None, request: ChatCompletionRequest
    ) -> None:
        self._reasoning, self._calls = reasoning, calls
        self._most = None if request.parallel_tool_calls else 1
        self.called = 0  # calls so far

    def push(self, text: str) -> Delta:
        thought = ""
        if self._reasoning is not None:
            thought, text = self._reasoning.push(text)
        if self._calls is None:
            return _delta(thought, text, [])
        text, calls = self._calls.push(text)
        return _delta(thought, text, self._numbered(calls))

    def flush(self) -> Delta:
        """The rest, at the end of the answer."""
        thought, text, calls = "", "", list[ToolCall]()
        if self._reasoning is not None:
            thought, text = self._reasoning.flush()
        if self._calls is not None:
            first, second = self._calls.push(text), self._calls.flush()
            text, calls = first.content + second.content, first.calls + second.calls
        return _delta(thought, text, self._numbered(calls))

    def _numbered(self, calls: list[ToolCall]) -> list[ToolCall]:
        numbered = []
        for call in calls:
            if self._most is None or self.called < self._most:
                numbered.append(msgspec.structs.replace(call, index=self.called))
                self.called += 1
        return numbered


def _delta(thought: str, text: str, calls: list[ToolCall]) -> Delta:
    return Delta(content=text or None, reasoning_content=thought or None, tool_calls=calls or None)


class _Writer(ChoiceWriter):
    """Writes one choice, whole or piece by piece.

    Args:
        begin: see ``head``.
        index: number of the choice.
        prompt: tokens of the prompt.
    """

    def __init__(
        self,
        begin: dict[str, Any],
        index: int,
        request: ChatCompletionRequest,
        speller: Speller,
        prompt: list[int],
        parser: _Parser,
    ) -> None:
        self._begin, self._index, self._speller = begin, index, speller
        self._prompt, self._parser = prompt, parser
        self._with_ids = request.return_token_ids
        self._usage = StreamedUsage(request.stream_options)
        self._count = 0  # tokens so far
        self._shows_prompt = request.return_token_ids and index == 0  # in the first chunk
        self._has_begun = False

    def whole(self, result: Result) -> ChatChoice:
        pushed, rest = self._parser.push(result.text), self._parser.flush()
        content = (pushed.content or "") + (rest.content or "")
        thought = (pushed.reasoning_content or "") + (rest.reasoning_content or "")
        calls = [
            msgspec.structs.replace(call, index=UNSET)
            for call in (*(pushed.tool_calls or ()), *(rest.tool_calls or ()))
        ]
        return ChatChoice(
            index=self._index,
            message=Message(
                content=content if content or not calls else None,
                reasoning_content=thought or UNSET,
                tool_calls=calls or UNSET,
            ),
            logprobs=self._speller.chat(result.logprobs),
            finish_reason=self._reason(result),
            token_ids=result.tokens if self._with_ids else UNSET,
        )

    def piece(self, chunk: Chunk) -> bytes:
        self._count += len(chunk.tokens)
        delta = self._parser.push(chunk.text)
        if delta == _NOTHING and not (chunk.logprobs or self._with_ids or self._usage.is_continuous):
            return b""
        return self._event(delta, chunk.logprobs, chunk.tokens)

    def end(self, result: Result) -> bytes:
        rest = self._parser.flush()
        before = b"" if rest == _NOTHING else self._event(rest, None, [])
        return before + self._event(_NOTHING, None, [], self._reason(result))

    def _reason(self, result: Result) -> str:
        return (
            "tool_calls" if self._parser.called and result.finish_reason == "stop" else result.finish_reason
        )

    def _event(
        self, delta: Delta, logprobs: list[Logprob] | None, tokens: list[int], reason: str | None = None
    ) -> bytes:
        begin = b""
        if not self._has_begun:
            self._has_begun = True
            begin = self._event(_BEGIN, None, [])
        choice = ChunkChoice(
            index=self._index,
            delta=delta,
            logprobs=self._speller.chat(logprobs),
            finish_reason=reason,
            token_ids=tokens if self._with_ids else UNSET,
        )
        chunk = ChatChunk(
            **self._begin,
            choices=[choice],
            usage=self._usage.of_chunk(len(self._prompt), self._count),
            prompt_token_ids=self._prompt if self._shows_prompt else UNSET,
        )
        self._shows_prompt = False
        return begin + event(chunk)


_BEGIN = Delta(role="assistant", content="")
_NOTHING = Delta()
