"""``/v1/completions``: texts that go on."""

import asyncio
from collections.abc import Sequence
from functools import partial
from typing import Any

import msgspec
from fastapi import Response
from msgspec import UNSET

from clo.runtime.http.answers import Completion, CompletionChoice, CompletionLogprobs, Usage
from clo.runtime.http.errors import APIError
from clo.runtime.http.gateway import Gateway
from clo.runtime.http.generation import StreamedUsage, count, head, open_streams
from clo.runtime.http.logprobs import Offsets, Speller
from clo.runtime.http.requests import MAX_CHOICES, CompletionRequest, read, sampling_of
from clo.runtime.http.streaming import Choice, ChoiceWriter, EventStream, event, gather
from clo.runtime.stream import Result
from clo.runtime.wire.messages import Chunk, Logprob, Text, Tokens


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
    scores = request.echo and request.logprobs is not None  # also the prompt
    sampling = sampling_of(request, fields, request.max_tokens, request.logprobs)
    prompts = _prompts(request.prompt)
    if len(prompts) * request.n > MAX_CHOICES:
        text = f"{len(prompts)} prompts with n {request.n} are more than {MAX_CHOICES} answers; send fewer."
        raise APIError(text, param="prompt", code="invalid_value")
    tokens = await gather([gateway.tokens(prompt) for prompt in prompts])
    if scores:
        sampling["prompt_logprobs"] = request.logprobs
    echoes = [""] * len(prompts)
    if request.echo:
        echoes = await gather([_text(gateway, *pair) for pair in zip(prompts, tokens, strict=True)])
    accepted = asyncio.Event()
    streams = []
    if scores or request.max_tokens != 0:
        streams = open_streams(gateway, tokens, request.n, sampling, accepted)
    begin = head(gateway, f"cmpl-{name}")
    speller = Speller(gateway, request.return_tokens_as_token_ids)
    writers: list[_Writer] = []
    for ids, echo in zip(tokens, echoes, strict=True):
        for _ in range(request.n):
            offsets = Offsets(gateway)
            writers.append(_Writer(begin, len(writers), request, speller, offsets, ids, echo))

    def counts() -> Usage:
        return count(tokens, [stream.result for stream in streams])

    def last() -> bytes:
        if not StreamedUsage(request.stream_options).has_last:
            return b""
        return event(Completion(**begin, choices=[], usage=counts()))

    if request.stream and streams and not scores:
        first = b"".join([writer.first() for writer in writers])
        choices = [Choice(*pair) for pair in zip(streams, writers, strict=True)]
        return EventStream(choices, accepted, first, last, "prompt")
    # Log-probabilities of a prompt are there at the end, and where nothing is generated nothing streams.
    results: Sequence[Result | None] = await gather([stream.to_end() for stream in streams])
    whole = [
        writer.whole(result) for writer, result in zip(writers, results or [None] * len(writers), strict=True)
    ]
    if request.stream:
        first = b"".join([event(Completion(**begin, choices=[choice])) for choice in whole])
        return EventStream([], accepted, first, last, "prompt")
    answer = Completion(**begin, choices=whole, usage=counts())
    return Response(msgspec.json.encode(answer), media_type="application/json")


async def _text(gateway: Gateway, prompt: Text | Tokens, ids: list[int]) -> str:
    """A prompt as text."""
    if isinstance(prompt, Text):
        return prompt.text
    return await gateway.aside(partial(gateway.tokenizer.decode, ids))


class _Writer(ChoiceWriter):
    """Writes one choice, whole or piece by piece.

    Args:
        begin: see ``head``.
        index: number of the choice.
        offsets: of its tokens.
        prompt: tokens of its prompt.
        echo: text of the prompt, where that stands before the answer.
    """

    def __init__(
        self,
        begin: dict[str, Any],
        index: int,
        request: CompletionRequest,
        speller: Speller,
        offsets: Offsets,
        prompt: list[int],
        echo: str,
    ) -> None:
        self._begin, self._index, self._speller, self._offsets = begin, index, speller, offsets
        self._prompt, self._echo = prompt, echo
        self._wanted, self._with_ids = request.logprobs, request.return_token_ids
        self._usage = StreamedUsage(request.stream_options)
        self._count = 0  # tokens so far
        self._shows_prompt = request.return_token_ids  # in the first chunk

    def whole(self, result: Result | None) -> CompletionChoice:
        """The choice; None where nothing was to be generated."""
        tokens = result.tokens if result else []
        prompt = (result and result.prompt_logprobs) or []
        logprobs = [*prompt, *((result and result.logprobs) or ())]
        return CompletionChoice(
            index=self._index,
            text=self._echo + (result.text if result else ""),
            logprobs=self._logprobs([*(self._prompt if prompt else ()), *tokens], logprobs),
            finish_reason=result.finish_reason if result else "length",
            token_ids=tokens if self._with_ids else UNSET,
            prompt_token_ids=self._prompt if self._with_ids else UNSET,
        )

    def first(self) -> bytes:
        """The event of an echoed prompt."""
        return self._event(self._echo, None, []) if self._echo else b""

    def piece(self, chunk: Chunk) -> bytes:
        self._count += len(chunk.tokens)
        if not (chunk.text or chunk.logprobs or self._with_ids or self._usage.is_continuous):
            return b""
        logprobs = self._logprobs(chunk.tokens, chunk.logprobs or [])
        return self._event(chunk.text, logprobs, chunk.tokens)

    def end(self, result: Result) -> bytes:
        return self._event("", None, [], result.finish_reason)

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
