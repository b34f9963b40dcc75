"""What clients may ask for: the bodies of requests, checked, and what is refused by name.

How tokens are chosen is the business of ``SamplingParams``: each of its fields may stand in a body under its
own name and is passed on as the native client does. The classes here have only what HTTP adds, or takes in
another form.
"""

import re
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta

from clo.runtime.client import sampling_fields
from clo.runtime.http.errors import APIError
from clo.runtime.wire.errors import InvalidRequest
from clo.runtime.wire.messages import MAX_LOGPROBS, SamplingParams, TokenId, Turn

MAX_CHOICES = 2048  # answers to one request: prompts times n

Body = TypeVar("Body", bound=msgspec.Struct)
Generating = TypeVar("Generating", bound="_Generation")

# Fields that say nothing about the answer.
_IGNORED = {"user", "metadata", "service_tier", "safety_identifier", "prompt_cache_key"}

# Fields that are not supported, but with these values ask for nothing that needs support.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "add_generation_prompt": (True,),
    "audio": (),
    "best_of": (1,),
    "chat_template": (),
    "continue_final_message": (False,),
    "documents": (),
    "echo": (False,),
    "function_call": ("none",),
    "functions": ([],),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1,),
    "lora_path": (),
    "lora_request": (),
    "modalities": (["text"],),
    "prediction": (),
    "prompt_logprobs": (),
    "reasoning_effort": (),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "store": (False,),
    "suffix": ("",),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    "verbosity": (),
    "web_search_options": (),
}


NO_LORA = "it serves no LoRA adapters: merge yours into its model and serve that."


class StreamOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``include_usage`` adds a last chunk with token counts, ``continuous_usage_stats`` gives every chunk
    those so far."""

    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: bool = False  # padding of OpenAI's, without a meaning here


class FunctionDefinition(msgspec.Struct, frozen=True, omit_defaults=True):
    name: Annotated[str, Meta(pattern="^[a-zA-Z0-9_.-]{1,128}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(msgspec.Struct, frozen=True, omit_defaults=True):
    type: Literal["function"]
    function: FunctionDefinition


class ChosenFunction(msgspec.Struct, frozen=True):
    name: str


class ChosenTool(msgspec.Struct, frozen=True):
    type: Literal["function"]
    function: ChosenFunction


class _Generation(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What both ways to generate have in common."""

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    stop: str | Annotated[list[str], Meta(max_length=16)] = []
    n: Annotated[int, Meta(ge=1, le=128)] = 1
    return_token_ids: bool = False
    return_tokens_as_token_ids: bool = False


class CompletionRequest(_Generation, frozen=True, kw_only=True):
    """The body of ``/v1/completions``."""

    prompt: str | list[str | TokenId | list[TokenId]]
    echo: bool = False
    logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None = None
    max_tokens: Annotated[int, Meta(ge=0, lt=2**31)] = 16


class ChatCompletionRequest(_Generation, frozen=True, kw_only=True):
    """The body of ``/v1/chat/completions``."""

    messages: Annotated[list[Turn], Meta(min_length=1)]
    logprobs: bool = False
    top_logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None = None
    max_tokens: Annotated[int, Meta(ge=1, lt=2**31)] | None = None
    max_completion_tokens: Annotated[int, Meta(ge=1, lt=2**31)] | None = None
    tools: list[Tool] = []
    tool_choice: Literal["none", "auto", "required"] | ChosenTool = "auto"
    parallel_tool_calls: bool = True
    chat_template_kwargs: dict[str, Any] = {}


class TokenizeRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The body of ``/tokenize``, with either ``prompt`` or ``messages``."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Turn], Meta(min_length=1)] | None = None
    add_special_tokens: bool = True
    return_token_strs: bool = False
    tools: list[Tool] = []
    chat_template_kwargs: dict[str, Any] = {}


class DetokenizeRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The body of ``/detokenize``."""

    model: str | None = None
    tokens: list[TokenId]


BODIES = (CompletionRequest, ChatCompletionRequest, TokenizeRequest, DetokenizeRequest)
# What HTTP has in forms of its own is not taken in these.
SAMPLING_FIELDS = {*SamplingParams.__struct_fields__, "response_format"} - {"echo", "prompt_logprobs"}


def decode(data: bytes) -> dict[str, Any]:
    """The fields of a body that are not null; null is as good as absent.

    Raises:
        APIError: it is not a JSON object.
    """
    try:
        body = msgspec.json.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise APIError(f"The body is not JSON: {error}.", code="invalid_json") from None
    if not isinstance(body, dict):
        raise APIError("The body is not a JSON object.", code="invalid_json")
    return {name: value for name, value in body.items() if value is not None}


def read(body: dict[str, Any], kind: type[Generating]) -> tuple[Generating, dict[str, Any]]:
    """Check a body of ``CompletionRequest`` or ``ChatCompletionRequest``.

    Returns:
        What HTTP adds, and the fields of ``SamplingParams`` that stand in the body beside that.

    Raises:
        APIError: a field is missing, wrong or not supported.
    """
    own = _own(body, kind)
    sampling = {name: own.pop(name) for name in SAMPLING_FIELDS & own.keys() - set(kind.__struct_fields__)}
    for name in list(own):
        if name in _IGNORED:
            del own[name]
        elif name in _NEUTRAL and name not in kind.__struct_fields__:
            if own[name] not in _NEUTRAL[name]:
                text = NO_LORA if "lora" in name else "leave it out."
                text = f"'{name}' is not supported by this server; {text}"
                raise APIError(text, param=name, code="unsupported_parameter")
            del own[name]
    request = convert(own, kind)
    if request.stream_options is not None and not request.stream:
        text = "'stream_options' goes with 'stream' true."
        raise APIError(text, param="stream_options", code="invalid_value")
    return request, sampling


def sampling_of(
    request: _Generation, fields: dict[str, Any], max_tokens: int | None, logprobs: int | None
) -> dict[str, Any]:
    """The fields of ``SamplingParams``, checked, with those that HTTP takes in another form.

    Raises:
        APIError: a field is wrong.
    """
    own = {"stop": request.stop, "max_tokens": max_tokens, "logprobs": logprobs}
    try:
        sampling = sampling_fields(fields | own)
    except InvalidRequest as error:
        raise APIError(str(error), param="response_format", code="invalid_value") from None
    convert(sampling, SamplingParams)
    return sampling


def convert(body: dict[str, Any], kind: type[Body]) -> Body:
    """A checked body. Raises ``APIError`` where a field is unknown, missing or wrong."""
    try:
        return msgspec.convert(body, kind)
    except msgspec.ValidationError as error:
        raise _explain(str(error)) from None


def read_plain(body: dict[str, Any], kind: type[Body]) -> Body:
    """Check a body that has nothing to do with sampling. Raises ``APIError`` as ``read`` does."""
    return convert(_own(body, kind), kind)


def _own(body: dict[str, Any], kind: type[Body]) -> dict[str, Any]:
    """The fields, with messages as templates know them."""
    own = dict(body)
    if "messages" in kind.__struct_fields__ and isinstance(own.get("messages"), list):
        own["messages"] = [_message(message, index) for index, message in enumerate(own["messages"])]
    return own


_ROLES = ("system", "developer", "user", "assistant", "tool")
_ANSWERED = ("refusal", "annotations", "audio", "function_call", "reasoning")  # a client may send back


def _message(message: Any, index: int) -> Any:
    """A message without what is null, or what an answer has and a question does not need."""
    if not isinstance(message, dict):
        return message
    param = f"messages[{index}]"
    role = message.get("role")
    if role not in _ROLES:
        text = f"'{role}' is not one of {', '.join(_ROLES)}."
        raise APIError(text, param=f"{param}.role", code="invalid_value")
    for name in _ANSWERED:
        if message.get(name):
            text = f"'{name}' in a message is not supported by this server; leave it out."
            raise APIError(text, param=f"{param}.{name}", code="unsupported_parameter")
    content = message.get("content")
    for place, part in enumerate(content if isinstance(content, list) else []):
        if isinstance(part, dict) and part.get("type") != "text":
            text = f"Content of type '{part.get('type')}' is not supported by this server; send text."
            where = f"{param}.content[{place}].type"
            raise APIError(text, param=where, code="unsupported_content")
    kept = {name: value for name, value in message.items() if value is not None and name not in _ANSWERED}
    if role == "developer":  # OpenAI's newer name; templates know the older one
        kept["role"] = "system"
    if isinstance(kept.get("tool_calls"), list):
        kept["tool_calls"] = [_without_index(call) for call in kept["tool_calls"]]
    return kept


def _without_index(call: Any) -> Any:
    """A tool call that a client may have put together from a stream."""
    return {name: call[name] for name in call if name != "index"} if isinstance(call, dict) else call


def _explain(text: str) -> APIError:
    """msgspec's sentence as OpenAI's API says it."""
    sentence, _, place = text.partition(" - at ")
    path = place.partition("`$")[2].rstrip("`").lstrip(".")
    if unknown := re.fullmatch("Object contains unknown field `(.*)`", sentence):
        param = ".".join(filter(None, (path, unknown[1])))
        return APIError(f"'{param}' is not a field of this request.", param=param, code="unknown_parameter")
    if missing := re.fullmatch("Object missing required field `(.*)`", sentence):
        param = ".".join(filter(None, (path, missing[1])))
        return APIError(f"'{param}' is missing.", param=param, code="missing_required_parameter")
    typed = re.fullmatch("Expected `[^`]*`, got `.*`", sentence)
    message = f"'{path}' is not valid: {sentence}." if path else f"The body is not valid: {sentence}."
    return APIError(message, param=path or None, code="invalid_type" if typed else "invalid_value")
