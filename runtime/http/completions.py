"""``/v1/completions``: texts that go on."""

import asyncio
from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec
from fastapi import Response
from msgspec import UNSET

from clo.runtime.http.answers import Completion, CompletionChoice, CompletionLogprobs
from clo.runtime.http.errors import APIError
from clo.runtime.http.gateway import Gateway
from clo.runtime.http.generation import StreamedUsage, count, head, open_streams
from clo.runtime.http.logprobs import Offsets, Speller
from clo.runtime.http.requests import MAX_CHOICES, CompletionRequest, read, sampling_of
from clo.runtime.http.streaming import Choice, ChoiceWriter, EventStream, event, gather
from clo.runtime.stream import Result
from clo.runtime.wire.messages import Chunk, Logprob, Text, Tokens


class _Echo(NamedTuple):
    """A prompt that stands before its answer; empty where none is wanted."""

    text: str = ""
    tokens: Sequence[int] = ()
    logprobs: Sequence[Logprob | None] = ()  # where they are wanted


def _prompts(prompt: str | list[Any]) -> list[Text | Tokens]:
    """The prompts of a request: one text, one list of token ids, or a list of either."""
    if isinstance(prompt, str):
        return [Text(prompt)]
    if prompt and all(isinstance(part, int) for part in prompt):
        return [Tokens(prompt)]
    if prompt and all(isinstance(part, str) for part in prompt):
        return [Text(part) for part in prompt]
    if prompt and all(isinstance(part, list) for part in prompt):
        return [Tokens(part) for part in prompt]
    text = "'prompt' is not valid: it is a text, a list of token ids, or a list of one or more of either."
    raise APIError(text, param="prompt", code="invalid_type")


async def complete(gateway: Gateway, body: dict[str, Any], name: str) -> Response:
    """Answer a request.

    Args:
        body: its fields.
        name: of the request.

    Raises:
        APIError, CLOError: it cannot be served.
    """
    request, fields = read(body, CompletionRequest)
    gateway.check_model(request.model)
    if request.max_tokens == 0 and not request.echo:
        text = "'max_tokens' is 0, which goes with 'echo' only."
        raise APIError(text, param="max_tokens", code="invalid_value")
    sampling = sampling_of(request, fields, request.max_tokens or None, request.logprobs)
    prompts = _prompts(request.prompt)
    if len(prompts) * request.n > MAX_CHOICES:
        text = (
            f"{len(prompts)} prompts with n {request.n} ask for more than {MAX_CHOICES} answers; send fewer."
        )
        raise APIError(text, param="prompt", code="invalid_value")
    tokens = await gather([gateway.tokens(prompt) for prompt in prompts])
    echoes = [_Echo()] * len(prompts)
    if request.echo:
        pairs = zip(prompts, tokens, strict=True)
        echoes = await gather([_echo(gateway, prompt, ids, request.logprobs) for prompt, ids in pairs])
    accepted = asyncio.Event()
    streams = [] if request.max_tokens == 0 else open_streams(gateway, tokens, request.n, sampling, accepted)
    begin = head(gateway, f"cmpl-{name}")
    speller = Speller(gateway, request.return_tokens_as_token_ids)
    writers = [
        _Writer(begin, place * request.n + index, request, speller, Offsets(gateway), ids, echo)
        for place, (ids, echo) in enumerate(zip(tokens, echoes, strict=True))
        for index in range(request.n)
    ]
    if request.stream:

        def last() -> bytes:
            unread = b"".join([writer.end(None) for writer in writers]) if not streams else b""
            if not StreamedUsage(request.stream_options).has_last:
                return unread
            results = [stream.result for stream in streams]
            return unread + event(Completion(**begin, choices=[], usage=count(tokens, results)))

        choices = [Choice(*pair) for pair in zip(streams, writers, strict=False)]
        first = b"".join([writer.first() for writer in writers])
        return EventStream(choices, accepted, first, last, "prompt")
    results = await gather([stream.to_end() for stream in streams])
    ends: Sequence[Result | None] = results or [None] * len(writers)
    whole = Completion(
        **begin,
        choices=[writer.whole(result) for writer, result in zip(writers, ends, strict=True)],
        usage=count(tokens, results),
    )
    return Response(msgspec.json.encode(whole), media_type="application/json")


async def _echo(gateway: Gateway, prompt: Text | Tokens, tokens: list[int], logprobs: int | None) -> _Echo:
    """A prompt as it stands before its answer.

    Args:
        tokens: those of the prompt.
        logprobs: how many of the most likely tokens are wanted beside each; None for no probabilities.
    """
    text = prompt.text if isinstance(prompt, Text) else gateway.tokenizer.decode(tokens)
    if logprobs is None:
        return _Echo(text, tokens)
    scored: list[Logprob | None] = [None]
    if len(tokens) > 1:
        scored += (await gateway.client.score(tokens[:1], tokens[1:], logprobs=logprobs)).logprobs or []
    return _Echo(text, tokens, scored)


class _Writer(ChoiceWriter):
    """Writes one choice, whole or piece by piece.

    Args:
        begin: see ``head``.
        index: number of the choice.
        offsets: of its tokens.
        prompt: tokens of its prompt.
        echo: its prompt, where that stands before the answer.
    """

    def __init__(
        self,
        begin: dict[str, Any],
        index: int,
        request: CompletionRequest,
        speller: Speller,
        offsets: Offsets,
        prompt: list[int],
        echo: _Echo,
    ) -> None:
        self._begin, self._index, self._speller, self._offsets = begin, index, speller, offsets
        self._prompt, self._echo = prompt, echo
        self._wanted, self._with_ids = request.logprobs, request.return_token_ids
        self._usage = StreamedUsage(request.stream_options)
        self._count = 0  # tokens so far
        self._shows_prompt = request.return_token_ids  # in the first chunk

    def whole(self, result: Result | None) -> CompletionChoice:
        """The choice; None where nothing was to be generated."""
        echo = self._echo
        tokens = result.tokens if result else []
        logprobs = [*echo.logprobs, *((result and result.logprobs) or ())]
        return CompletionChoice(
            index=self._index,
            text=echo.text + (result.text if result else ""),
            logprobs=self._logprobs([*echo.tokens, *tokens], logprobs),
            finish_reason=result.finish_reason if result else "length",
            token_ids=tokens if self._with_ids else UNSET,
            prompt_token_ids=self._prompt if self._with_ids else UNSET,
        )

    def first(self) -> bytes:
        """The event of an echoed prompt."""
        echo = self._echo
        return self._event(echo.text, self._logprobs(echo.tokens, echo.logprobs), []) if echo.tokens else b""

    def piece(self, chunk: Chunk) -> bytes:
        self._count += len(chunk.tokens)
        if not (chunk.text or chunk.logprobs or self._with_ids or self._usage.is_continuous):
            return b""
        logprobs = self._logprobs(chunk.tokens, chunk.logprobs or [])
        return self._event(chunk.text, logprobs, chunk.tokens)

    def end(self, result: Result | None) -> bytes:
        return self._event("", None, [], result.finish_reason if result else "length")

    def _event(
        self, text: str, logprobs: CompletionLogprobs | None, tokens: list[int], reason: str | None = None
    ) -> bytes:
        choice = CompletionChoice(
            index=self._index,
            text=text,
            logprobs=logprobs,
            finish_reason=reason,
            token_ids=tokens if self._with_ids else UNSET,
            prompt_token_ids=self._prompt if self._shows_prompt else UNSET,
        )
        self._shows_prompt = False
        usage = self._usage.of_chunk(len(self._prompt), self._count)
        return event(Completion(**self._begin, choices=[choice], usage=usage))

    def _logprobs(
        self, tokens: Sequence[int], logprobs: Sequence[Logprob | None]
    ) -> CompletionLogprobs | None:
        if self._wanted is None or not tokens:
            return None
        return self._speller.completion(tokens, logprobs, self._wanted, self._offsets)
