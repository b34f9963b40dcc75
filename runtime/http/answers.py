"""What clients get: the objects of OpenAI's API, with vLLM's additions.

A field that is UNSET is not in the JSON; None is null there.
"""

from typing import Literal

import msgspec
from msgspec import UNSET, UnsetType

from clo.runtime.wire.messages import StoreStats, Traffic, WorkerStats


class PromptTokensDetails(msgspec.Struct, frozen=True):
    cached_tokens: int


class Usage(msgspec.Struct, frozen=True, omit_defaults=True):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails | None = None

    @classmethod
    def of(cls, prompt_tokens: int, completion_tokens: int, cached_tokens: int = 0) -> "Usage":
        """``cached_tokens`` are those of the prompt whose KV was there already."""
        details = PromptTokensDetails(cached_tokens) if cached_tokens else None
        return cls(prompt_tokens, completion_tokens, prompt_tokens + completion_tokens, details)


# ----------------------------------------------------------------------------------- /v1/completions


class CompletionLogprobs(msgspec.Struct, frozen=True):
    """Lists of the same length: the first token of an echoed prompt has no probability."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(msgspec.Struct, frozen=True):
    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None
    token_ids: list[int] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET


class Completion(msgspec.Struct, frozen=True, kw_only=True):
    """A whole answer, or a chunk of one."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | UnsetType | None = UNSET


# ------------------------------------------------------------------------------ /v1/chat/completions


class TopLogprob(msgspec.Struct, frozen=True):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(msgspec.Struct, frozen=True):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct, frozen=True):
    content: list[TokenLogprob]


class CalledFunction(msgspec.Struct, frozen=True):
    name: str
    arguments: str  # JSON


class ToolCall(msgspec.Struct, frozen=True, kw_only=True):
    index: int | UnsetType = UNSET  # in streams
    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class Delta(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a chunk adds to a message."""

    role: str | None = None
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None


class ChunkChoice(msgspec.Struct, frozen=True):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    token_ids: list[int] | UnsetType = UNSET


class ChatChunk(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | UnsetType | None = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET


class Message(msgspec.Struct, frozen=True, kw_only=True):
    role: Literal["assistant"] = "assistant"
    content: str | None
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[ToolCall] | UnsetType = UNSET


class ChatChoice(msgspec.Struct, frozen=True):
    index: int
    message: Message
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    token_ids: list[int] | UnsetType = UNSET


class ChatCompletion(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_token_ids: list[int] | UnsetType = UNSET


# ------------------------------------------------------------------------------------------- others


class Model(msgspec.Struct, frozen=True, kw_only=True):
    """``root`` is what the server was started with; ``max_model_len`` counts a prompt and its answer."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["clo"] = "clo"
    root: str
    max_model_len: int


class Models(msgspec.Struct, frozen=True, kw_only=True):
    object: Literal["list"] = "list"
    data: list[Model]


class Tokenized(msgspec.Struct, frozen=True):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class Detokenized(msgspec.Struct, frozen=True):
    prompt: str


class Health(msgspec.Struct, frozen=True):
    status: Literal["starting", "ready", "unreachable"]


class Load(msgspec.Struct, frozen=True):
    server_load: int


class Stats(msgspec.Struct, frozen=True):
    """What the server is doing; counts are since its start. ``open`` are requests for tokens at the gateway,
    ``waiting`` those of all clients that no worker has yet."""

    model: str
    state: Literal["starting", "ready"]
    attention: str
    max_model_len: int
    capacity_tokens: int
    open: int
    waiting: int
    workers: list[WorkerStats]
    stores: list[StoreStats]
    traffic: Traffic


class Version(msgspec.Struct, frozen=True):
    version: str


class APIError(msgspec.Struct, frozen=True):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(msgspec.Struct, frozen=True):
    error: APIError
