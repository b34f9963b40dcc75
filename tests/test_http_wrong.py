"""HTTP requests that are wrong: each is told what is wrong with it, where, and by which of OpenAI's codes."""

import socket
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.faults import WAIT_S
from tests.server import Server

Launch = Callable[..., AbstractContextManager[Server]]

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
MESSAGES = [{"role": "user", "content": "a"}]
TOOL = {"type": "function", "function": {"name": "f"}}
UNKNOWN, UNSUPPORTED = "unknown_parameter", "unsupported_parameter"
TOO_LONG = "context_length_exceeded"
MISSING, TYPE, VALUE = "missing_required_parameter", "invalid_type", "invalid_value"


@pytest.fixture(scope="module")
def server(launch: Launch, tiny_model: Path) -> Iterator[Server]:
    with launch("--model", str(tiny_model), "--http", "0", program=("-m", "tests.echo", "serve")) as server:
        yield server


@pytest.fixture(scope="module")
def http(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=WAIT_S) as http:
        yield http


def message(**fields: Any) -> dict[str, Any]:
    return {"messages": [fields]}


def turn(**fields: Any) -> dict[str, Any]:
    return {"messages": [*MESSAGES, fields]}


def chat(**fields: Any) -> dict[str, Any]:
    return {"messages": MESSAGES} | fields


def text(**fields: Any) -> dict[str, Any]:
    return {"prompt": "a"} | fields


WRONG: dict[str, tuple[str, dict[str, Any], str | None, str | None]] = {
    "no messages": (CHAT, {}, "messages", MISSING),
    "messages that are null": (CHAT, {"messages": None}, "messages", MISSING),
    "empty messages": (CHAT, {"messages": []}, "messages", VALUE),
    "messages that are a text": (CHAT, {"messages": "a"}, "messages", TYPE),
    "a message that is a text": (CHAT, {"messages": ["a"]}, "messages[0]", TYPE),
    "no role": (CHAT, message(content="a"), "messages[0].role", VALUE),
    "an unknown role": (CHAT, message(role="boss", content="a"), "messages[0].role", VALUE),
    "a role that is a number": (CHAT, turn(role=5, content="a"), "messages[1].role", VALUE),
    "content that is a number": (CHAT, message(role="user", content=5), "messages[0].content", TYPE),
    "an unknown field of a message": (
        CHAT, message(role="user", colour="red"), "messages[0].colour", UNKNOWN,
    ),
    "an image": (
        CHAT,
        message(role="user", content=[{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {}}]),
        "messages[0].content[1].type",
        "unsupported_content",
    ),
    "a part without its text": (
        CHAT, message(role="user", content=[{"type": "text"}]), "messages[0].content[0].text", MISSING,
    ),
    "a call without a function": (
        CHAT, turn(role="assistant", tool_calls=[{"id": "1"}]), "messages[1].tool_calls[0].function", MISSING,
    ),
    "arguments that are not JSON": (
        CHAT,
        turn(role="assistant", tool_calls=[{"id": "1", "function": {"name": "f", "arguments": "{"}}]),
        "messages",
        None,
    ),
    "another model": (CHAT, chat(model="gpt-4"), "model", "model_not_found"),
    "a temperature below 0": (CHAT, chat(temperature=-0.1), "temperature", VALUE),
    "a temperature that is a text": (CHAT, chat(temperature="hot"), "temperature", TYPE),
    "top_p 0": (CHAT, chat(top_p=0), "top_p", VALUE),
    "top_k -2": (CHAT, chat(top_k=-2), "top_k", VALUE),
    "a seed of more than 64 bits": (TEXT, text(seed=2**63), "seed", VALUE),
    "no tokens": (CHAT, chat(max_tokens=0), "max_tokens", VALUE),
    "half a token": (CHAT, chat(max_completion_tokens=0.5), "max_completion_tokens", TYPE),
    "n 0": (CHAT, chat(n=0), "n", VALUE),
    "n 129": (CHAT, chat(n=129), "n", VALUE),
    "an empty stop string": (CHAT, chat(stop=""), "stop[0]", VALUE),
    "17 stop strings": (CHAT, chat(stop=["a"] * 17), "stop", VALUE),
    "stream as a text": (CHAT, chat(stream="yes"), "stream", TYPE),
    "stream_options without a stream": (
        CHAT, chat(stream_options={"include_usage": True}), "stream_options", VALUE,
    ),
    "an unknown stream option": (
        CHAT, chat(stream=True, stream_options={"fast": True}), "stream_options.fast", UNKNOWN,
    ),
    "top_logprobs without logprobs": (CHAT, chat(top_logprobs=2), "top_logprobs", VALUE),
    "21 top_logprobs": (CHAT, chat(logprobs=True, top_logprobs=21), "top_logprobs", VALUE),
    "logprobs of a chat as a number": (CHAT, chat(logprobs=3), "logprobs", TYPE),
    "an unknown field": (CHAT, chat(colour="red"), "colour", UNKNOWN),
    "an unknown field in two lines": (CHAT, chat(**{"col\nour": "red"}), None, VALUE),
    "what an engine cannot": (CHAT, chat(best_of=2), "best_of", UNSUPPORTED),
    "an adapter": (CHAT, chat(lora_path="an/adapter"), "lora_path", UNSUPPORTED),
    "a suffix": (TEXT, text(suffix="b"), "suffix", UNSUPPORTED),
    "functions": (CHAT, chat(functions=[{"name": "f"}]), "functions", UNSUPPORTED),
    "audio": (CHAT, chat(modalities=["text", "audio"]), "modalities", UNSUPPORTED),
    "another template": (CHAT, chat(chat_template="{{ x }}"), "chat_template", UNSUPPORTED),
    "an option of the library in the template's variables": (
        CHAT, chat(chat_template_kwargs={"chat_template": "{{ x }}"}), "messages", None,
    ),
    "tools that the model does not know": (CHAT, chat(tools=[TOOL]), "tools", UNSUPPORTED),
    "a tool without a name": (
        CHAT, chat(tools=[{"type": "function", "function": {}}]), "tools[0].function.name", MISSING,
    ),
    "a tool of another type": (CHAT, chat(tools=[{"type": "search"}]), "tools[0].type", VALUE),
    "a tool that must be called and is not there": (CHAT, chat(tool_choice="required"), "tool_choice", VALUE),
    "a tool that must be called and is another": (
        CHAT,
        chat(tools=[TOOL], tool_choice={"type": "function", "function": {"name": "g"}}),
        "tool_choice",
        VALUE,
    ),
    "a tool that must be called and another format": (
        CHAT,
        chat(tools=[TOOL], tool_choice="required", response_format={"type": "json_object"}),
        "tool_choice",
        VALUE,
    ),
    "a format that there is not": (CHAT, chat(response_format={"type": "xml"}), "response_format", VALUE),
    "a schema that is missing": (
        CHAT, chat(response_format={"type": "json_schema"}), "response_format", VALUE,
    ),
    "a schema that is none": (
        CHAT, chat(structured_outputs={"json": {"type": "thing"}}), None, None,
    ),
    "a regular expression that is none": (TEXT, text(structured_outputs={"regex": "("}), None, None),
    "a penalty above 2": (CHAT, chat(presence_penalty=2.1), "presence_penalty", VALUE),
    "a bias of a word": (CHAT, chat(logit_bias={"a": 1}), "logit_bias", TYPE),
    "a bias out of the vocabulary": (CHAT, chat(logit_bias={"512": 1}), None, None),
    "more tokens at least than at most": (TEXT, text(min_tokens=3, max_tokens=2), None, None),
    "the same answer twice": (CHAT, chat(n=2, temperature=0), None, None),
    "probabilities of a chat's prompt": (CHAT, chat(prompt_logprobs=1), "prompt_logprobs", UNSUPPORTED),
    "an echo of a chat": (CHAT, chat(echo=True), "echo", UNSUPPORTED),
    "an unknown choice of tools": (CHAT, chat(tools=[TOOL], tool_choice="all"), "tool_choice", VALUE),
    "no prompt": (TEXT, {}, "prompt", MISSING),
    "an empty prompt": (TEXT, {"prompt": ""}, "prompt", None),
    "no prompts": (TEXT, {"prompt": []}, "prompt", TYPE),
    "prompts of two kinds": (TEXT, {"prompt": ["a", 5]}, "prompt", TYPE),
    "a token id below 0": (TEXT, {"prompt": [1, -1]}, "prompt[1]", VALUE),
    "a token id out of the vocabulary": (TEXT, {"prompt": [[1], [512]]}, "prompt", None),
    "too many answers": (TEXT, {"prompt": ["a"] * 100, "n": 30}, "prompt", VALUE),
    "no tokens without echo": (TEXT, text(max_tokens=0), "max_tokens", VALUE),
    "logprobs of a text as a truth": (TEXT, text(logprobs=True), "logprobs", TYPE),
    "a prompt and an answer beyond the context": (TEXT, text(max_tokens=4096), "prompt", TOO_LONG),
    "a prompt beyond the context": (
        CHAT, message(role="user", content="a " * 9000), "messages", TOO_LONG,
    ),
    "a stream beyond the context": (TEXT, text(max_tokens=4096, stream=True), "prompt", TOO_LONG),
    "nothing to tokenise": ("/tokenize", {}, "prompt", VALUE),
    "twice something to tokenise": ("/tokenize", chat(prompt="a"), "prompt", VALUE),
    "tokens that are texts": ("/detokenize", {"tokens": ["a"]}, "tokens[0]", TYPE),
}  # fmt: skip


@pytest.mark.parametrize(("path", "body", "param", "code"), WRONG.values(), ids=WRONG)
def test_wrong_requests(
    http: httpx.Client, path: str, body: dict[str, Any], param: str | None, code: str | None
) -> None:
    answer = http.post(path, json=body)
    error = answer.json()["error"]
    assert answer.status_code == (404 if code == "model_not_found" else 400), error
    assert (error["param"], error["code"], error["type"]) == (param, code, "invalid_request_error"), error
    assert error["message"].endswith(".") and error["message"].count("\n") == 0
    # words by which clients such as litellm recognise it
    assert ("this model's maximum context length is 4096" in error["message"]) == (code == TOO_LONG)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/chat/completions", 405),
        ("POST", "/v1/models", 405),
        ("POST", "/v1/embeddings", 404),
        ("GET", "/page", 404),
        ("GET", "/docs", 404),
    ],
)
def test_what_is_not_there(http: httpx.Client, method: str, path: str, status: int) -> None:
    answer = http.request(method, path)
    assert answer.status_code == status
    assert path in answer.json()["error"]["message"]
    assert ("allow" in answer.headers) == (status == 405)


def test_adapters_are_refused_by_name(http: httpx.Client) -> None:
    """As fields, and at the endpoints where vLLM takes them."""
    asked: list[tuple[str, dict[str, Any], int]] = [
        (TEXT, {"prompt": "a", "lora_request": {"lora_name": "b"}}, 400),
        ("/v1/load_lora_adapter", {}, 404),
    ]
    for path, body, status in asked:
        answer = http.post(path, json=body)
        assert answer.status_code == status
        assert "it serves no LoRA adapters: merge yours" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("data", "kind", "status"),
    [
        (b"", "application/json", 400),
        (b"{", "application/json", 400),
        (b"[]", "application/json", 400),
        (b"5", "application/json", 400),
        (b'{"prompt": "\xff"}', "application/json", 400),
        (b'{"temperature": NaN, "prompt": "a"}', "application/json", 400),
        (b'{"temperature": 1e999, "prompt": "a"}', "application/json", 400),
        (b'{"prompt": "\\ud800"}', "application/json", 400),
        (b'{"prompt": ' + b"[" * 100_000, "application/json", 400),
        (b'{"prompt": "a"}', "text/plain", 415),
        (b'{"prompt": "a"}', "application/x-www-form-urlencoded", 415),
        (b'{"prompt": "a"}', "application/json; charset=utf-8", 200),
    ],
)
def test_bodies_that_are_not_json(http: httpx.Client, data: bytes, kind: str, status: int) -> None:
    answer = http.post(TEXT, content=data, headers={"content-type": kind})
    assert answer.status_code == status, answer.text
    assert ("error" in answer.json()) == (status != 200)


def test_a_body_that_is_too_large(http: httpx.Client) -> None:
    def parts() -> Iterator[bytes]:
        for _ in range(65):
            yield b" " * 2**20

    answer = http.post(TEXT, content=parts(), headers={"content-type": "application/json"})
    assert answer.status_code == 413 and "67108864" in answer.json()["error"]["message"]


def test_bytes_that_are_not_http(server: Server, http: httpx.Client) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    for data in (b"\x00" * 1000, b"GET / HTTP/9\r\n\r\n", b"POST / HTTP/1.1\r\nContent-Length: -1\r\n\r\n"):
        with socket.create_connection((host, int(port)), WAIT_S) as connection:
            connection.sendall(data)
            assert connection.recv(1000).startswith(b"HTTP/1.1 400")
    assert http.get("/health").status_code == 200
