"""What texts and chats have in common: prompts become streams, and these are counted."""

import asyncio
import time
from typing import Any

from msgspec import UNSET, UnsetType

from clo.runtime.http.answers import Usage
from clo.runtime.http.gateway import Gateway
from clo.runtime.http.requests import StreamOptions
from clo.runtime.http.traces import current_span
from clo.runtime.stream import AsyncStream, Result
from clo.runtime.wire.messages import Progress


def head(gateway: Gateway, id: str) -> dict[str, Any]:
    """The fields with which every answer and every chunk begins."""
    return {"id": id, "created": int(time.time()), "model": gateway.names[0]}


def open_streams(
    gateway: Gateway, prompts: list[list[int]], n: int, sampling: dict[str, Any], accepted: asyncio.Event
) -> list[AsyncStream]:
    """``n`` answers to each prompt, those to the same prompt together.

    Args:
        sampling: fields of ``SamplingParams``.
        accepted: is set when the server has taken one of them on and it waits.
    """

    def accept(progress: Progress) -> None:
        accepted.set()

    answers = [gateway.client.streams(tokens, n=n, on_progress=accept, **sampling) for tokens in prompts]
    streams = [stream for streams in answers for stream in streams]
    if (span := current_span()) is not None:
        span.open([len(tokens) for tokens in prompts], n, sampling, streams)
    return streams


def count(prompts: list[list[int]], results: list[Result]) -> Usage:
    """Of a whole answer; a prompt counts once, however many answers it has, with what the first of them found
    cached."""
    firsts = results[:: max(1, len(results) // len(prompts))]
    return Usage.of(
        sum(map(len, prompts)),
        sum(result.usage.completion_tokens for result in results),
        sum(result.usage.cached_tokens for result in firsts),
    )


class StreamedUsage:
    """Token counts in the chunks of a stream.

    Args:
        options: whether and where they are wanted.
    """

    def __init__(self, options: StreamOptions | None) -> None:
        self._options = options or StreamOptions()

    def of_chunk(self, prompt_tokens: int, completion_tokens: int) -> Usage | UnsetType | None:
        """For a chunk of one choice, with the tokens of that choice so far."""
        if self._options.continuous_usage_stats:
            return Usage.of(prompt_tokens, completion_tokens)
        return None if self._options.include_usage else UNSET

    @property
    def is_continuous(self) -> bool:
        """Whether every chunk has counts."""
        return self._options.continuous_usage_stats

    @property
    def has_last(self) -> bool:
        """Whether a last chunk has the counts of all choices."""
        return self._options.include_usage
