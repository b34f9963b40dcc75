"""OpenAI's API over HTTP, as the unmodified package ``openai`` uses it; the model says what a test wants."""

import asyncio
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from openai.types.chat import ChatCompletion, ChatCompletionMessageParam, ChatCompletionToolParam

from clo.runtime.client import Client
from tests.conftest import CHAT_TEMPLATE
from tests.echo import HOLD
from tests.faults import WAIT_S
from tests.server import ROOT, Server

Launch = Callable[..., AbstractContextManager[Server]]

# What Qwen3's does in many more lines.
TEMPLATE = (
    "{% if tools %}<|im_start|>system\nTools: {{ tools | tojson }}\n"
    'Write <tool_call>{"name": ..., "arguments": ...}</tool_call><|im_end|>\n{% endif %}'
    + CHAT_TEMPLATE
    + "{% if enable_thinking is defined %}<think>\n{% endif %}"
    + "{% if enable_thinking is defined and not enable_thinking %}\n</think>\n\n{% endif %}"
)
WEATHER: ChatCompletionToolParam = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "What the weather is like.",
        "parameters": {"type": "object", "properties": {"place": {"type": "string"}}},
    },
}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"place": "Zürich"}}\n</tool_call>'


@pytest.fixture(scope="module")
def talking_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a chat template of a family that thinks and calls tools."""
    folder = tmp_path_factory.mktemp("models") / "talking"
    shutil.copytree(tiny_model, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def server(launch: Launch, talking_model: Path) -> Iterator[Server]:
    options = ("--http", "0", "--served-model-name", "talking,other-name,smollm2-135m-instruct")
    with launch("--model", str(talking_model), *options, program=("-m", "tests.echo", "serve")) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key="any", timeout=WAIT_S, max_retries=0) as client:
        yield client


def say(text: str) -> list[ChatCompletionMessageParam]:
    """What makes the model answer with this text."""
    return [{"role": "system", "content": "Echo."}, {"role": "user", "content": text}]


def chat(client: OpenAI, text: str, **options: Any) -> ChatCompletion:
    answer: ChatCompletion = client.chat.completions.create(model="talking", messages=say(text), **options)
    return answer


# ------------------------------------------------------------------------------------------- chats


def test_a_chat(client: OpenAI) -> None:
    answer = chat(client, "Hé 👍\n  there")
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content) == ("assistant", "Hé 👍\n  there")
    assert choice.finish_reason == "stop" and choice.logprobs is None and choice.message.tool_calls is None
    assert answer.model == "talking" and answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")
    usage = answer.usage
    assert usage is not None and usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.completion_tokens == len("Hé 👍\n  there".encode()), "'he' is one token, and one ends it"


@pytest.mark.parametrize("limit", ["max_tokens", "max_completion_tokens"])
def test_an_answer_that_is_cut_short(client: OpenAI, limit: str) -> None:
    (choice,) = chat(client, "0123456789", **{limit: 4}).choices
    assert (choice.message.content, choice.finish_reason) == ("0123", "length")


@pytest.mark.parametrize("stop", ["56", ["x", "56"]])
def test_an_answer_ends_before_a_stop_string(client: OpenAI, stop: Any) -> None:
    (choice,) = chat(client, "0123456789", stop=stop).choices
    assert (choice.message.content, choice.finish_reason) == ("01234", "stop")


def test_null_is_as_good_as_absent(server: Server) -> None:
    fields = (
        "stop",
        "max_tokens",
        "seed",
        "tools",
        "n",
        "temperature",
        "logit_bias",
        "response_format",
        "user",
    )
    body = {"messages": say("a"), **dict.fromkeys(fields)}
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=WAIT_S)
    assert answer.json()["choices"][0]["message"] == {"role": "assistant", "content": "a"}


def test_what_asks_for_nothing_is_taken(client: OpenAI) -> None:
    """Clients send defaults of parameters that nobody has set."""
    (choice,) = chat(
        client,
        "a",
        presence_penalty=0,
        frequency_penalty=0.0,
        logit_bias={},
        response_format={"type": "text"},
        n=1,
        user="me",
        metadata={"a": "b"},
        store=False,
        extra_body={"min_p": 0, "repetition_penalty": 1.0, "best_of": 1, "top_k": -1, "ignore_eos": False},
    ).choices
    assert choice.message.content == "a"


def test_a_stream(client: OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(model="other-name", messages=say("some 👍 words"), stream=True)
    )
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert (deltas[0].role, deltas[0].content) == ("assistant", "")
    assert "".join(delta.content or "" for delta in deltas) == "some 👍 words"
    assert [chunk.choices[0].finish_reason for chunk in chunks[-2:]] == [None, "stop"]
    assert len({chunk.id for chunk in chunks}) == 1 and chunks[0].object == "chat.completion.chunk"
    assert all(chunk.usage is None for chunk in chunks) and chunks[0].model == "talking"


def test_a_stream_with_counts(client: OpenAI) -> None:
    *chunks, last = client.chat.completions.create(
        model="talking", messages=say("0123"), stream=True, stream_options={"include_usage": True}
    )
    assert all(chunk.usage is None for chunk in chunks)
    assert last.choices == [] and last.usage is not None
    assert last.usage.completion_tokens == 5
    options: Any = {"include_usage": True, "continuous_usage_stats": True}
    *chunks, last = client.chat.completions.create(
        model="talking", messages=say("0123"), stream=True, stream_options=options
    )
    counts = [chunk.usage.completion_tokens for chunk in chunks if chunk.usage is not None]
    assert len(counts) == len(chunks) and counts == sorted(counts) and counts[-1] == 5


def test_several_answers(client: OpenAI) -> None:
    """Whole and as a stream, in which their pieces alternate."""
    answer = chat(client, "abc 012", n=3)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert {choice.message.content for choice in answer.choices} == {"abc 012"}
    assert answer.usage is not None and answer.usage.completion_tokens == 3 * 7
    texts = ["", "", ""]
    for chunk in client.chat.completions.create(model="talking", messages=say("abc 012"), n=3, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == ["abc 012"] * 3


def test_log_probabilities_of_a_chat(client: OpenAI) -> None:
    (choice,) = chat(client, "ab é", logprobs=True, top_logprobs=2).choices
    assert choice.logprobs is not None and choice.logprobs.content is not None
    entries = choice.logprobs.content
    assert [entry.token for entry in entries] == ["ab", " ", "bytes:\\xc3", "bytes:\\xa9", "<|im_end|>"]
    assert [bytes(entry.bytes or ()) for entry in entries[:4]] == [b"ab", b" ", b"\xc3", b"\xa9"]
    assert [entry.logprob for entry in entries] == [-0.5] * 5
    assert [top.logprob for top in entries[0].top_logprobs] == [-0.5, -3.0]
    streamed = [
        entry
        for chunk in client.chat.completions.create(
            model="talking", messages=say("ab é"), logprobs=True, top_logprobs=2, stream=True
        )
        for entry in ((chunk.choices[0].logprobs and chunk.choices[0].logprobs.content) or ())
    ]
    assert streamed == entries


def test_content_as_parts_roles_and_fields_of_earlier_answers(client: OpenAI, server: Server) -> None:
    """What an answer has can be sent back as it came, and 'developer' is the newer name of 'system'."""
    first = chat(client, CALL, tools=[WEATHER]).choices[0].message
    assert first.tool_calls is not None
    messages: Any = [
        {"role": "developer", "content": "Echo."},
        {"role": "user", "content": [{"type": "text", "text": "weather?"}], "name": "me"},
        first,
        {"role": "tool", "tool_call_id": first.tool_calls[0].id, "content": "sunny"},
    ]
    answer = client.chat.completions.create(model="talking", messages=messages, tools=[WEATHER])
    assert answer.choices[0].message.content == "sunny"
    body = {"messages": [{"role": "developer", "content": "x"}]}
    tokens = httpx.post(f"{server.url}/tokenize", json=body, timeout=WAIT_S).json()["tokens"]
    text = httpx.post(f"{server.url}/detokenize", json={"tokens": tokens}, timeout=WAIT_S).json()["prompt"]
    assert text == "<|im_start|>system\nx<|im_end|>\n<|im_start|>assistant\n"


# --------------------------------------------------------------------------- tools and reasoning


@pytest.mark.parametrize("stream", [False, True])
def test_calls_of_tools(client: OpenAI, stream: bool) -> None:
    text = f"Let me see.\n{CALL}\n{CALL.replace('Zürich', 'Bern')}"
    message: Any
    if stream:
        with client.chat.completions.stream(model="talking", messages=say(text), tools=[WEATHER]) as events:
            choice = events.get_final_completion().choices[0]
    else:
        choice = chat(client, text, tools=[WEATHER], tool_choice="auto").choices[0]  # type: ignore[assignment]
    message = choice.message
    assert choice.finish_reason == "tool_calls" and message.content == "Let me see."
    assert [call.function.name for call in message.tool_calls] == ["weather", "weather"]
    places = [json.loads(call.function.arguments)["place"] for call in message.tool_calls]
    assert places == ["Zürich", "Bern"]
    assert len({call.id for call in message.tool_calls}) == 2


def test_a_call_alone_has_no_content(client: OpenAI) -> None:
    message = chat(client, CALL, tools=[WEATHER]).choices[0].message
    assert message.content is None and message.tool_calls is not None


@pytest.mark.parametrize("stream", [False, True])
def test_calls_that_the_model_has_to_make(client: OpenAI, stream: bool) -> None:
    """One of a named tool, whose arguments the answer is, or of any; a grammar sees to it elsewhere."""
    named = {"type": "function", "function": {"name": "weather"}}
    calls = '[{"name": "weather", "arguments": {"place": "Bern"}}]'
    for text, choice in (('{"place": "Bern"}', named), (calls, "required")):
        options: Any = {"model": "talking", "messages": say(text), "tools": [WEATHER], "tool_choice": choice}
        if stream:
            with client.chat.completions.stream(**options) as events:
                answered: Any = events.get_final_completion().choices[0]
        else:
            answered = client.chat.completions.create(**options).choices[0]
        (call,) = answered.message.tool_calls
        assert (call.function.name, json.loads(call.function.arguments)) == ("weather", {"place": "Bern"})
        assert answered.finish_reason == "tool_calls" and not answered.message.content


def test_one_call_where_no_more_are_wanted(client: OpenAI) -> None:
    message = chat(client, CALL * 2, tools=[WEATHER], parallel_tool_calls=False).choices[0].message
    assert message.tool_calls is not None and len(message.tool_calls) == 1


def test_the_template_sees_the_tools_only_where_they_may_be_called(client: OpenAI) -> None:
    without = chat(client, "a").usage
    offered = chat(client, "a", tools=[WEATHER]).usage
    hidden = chat(client, CALL, tools=[WEATHER], tool_choice="none")
    assert without is not None and offered is not None
    assert offered.prompt_tokens > without.prompt_tokens + 50
    assert hidden.choices[0].message.content == CALL and hidden.choices[0].finish_reason == "stop"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("begun", [False, True])
def test_what_was_thought_comes_apart(client: OpenAI, stream: bool, begun: bool) -> None:
    """Whether the model or its template writes the first tag."""
    text = ("" if begun else "<think>\n") + f"Well …\n\n</think>\n\nThe answer.\n{CALL}"
    options: Any = {"tools": [WEATHER]}
    if begun:
        options["extra_body"] = {"chat_template_kwargs": {"enable_thinking": True}}
    if stream:
        thought, content, names = "", "", []
        for chunk in client.chat.completions.create(
            model="talking", messages=say(text), stream=True, **options
        ):
            delta: Any = chunk.choices[0].delta
            thought += getattr(delta, "reasoning_content", None) or ""
            content += delta.content or ""
            names += [call.function.name for call in delta.tool_calls or ()]
    else:
        message: Any = chat(client, text, **options).choices[0].message
        thought, content = message.reasoning_content, message.content
        names = [call.function.name for call in message.tool_calls]
    assert (thought, content, names) == ("Well …", "The answer.", ["weather"])


def test_an_answer_without_thoughts(client: OpenAI) -> None:
    options = {"chat_template_kwargs": {"enable_thinking": False}}
    message: Any = chat(client, "Just <this>.", extra_body=options).choices[0].message
    assert message.content == "Just <this>." and not hasattr(message, "reasoning_content")


def test_thoughts_can_be_sent_back(client: OpenAI) -> None:
    message = chat(client, "<think>a</think>b").choices[0].message
    messages: Any = [*say("x"), message, {"role": "user", "content": "y"}]
    assert (
        client.chat.completions.create(model="talking", messages=messages).choices[0].message.content == "y"
    )


# ------------------------------------------------------------------------------------------- texts


def test_a_text(client: OpenAI) -> None:
    answer = client.completions.create(model="talking", prompt="0123456789", max_tokens=3)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("012", "length")
    assert answer.object == "text_completion" and answer.id.startswith("cmpl-")
    assert answer.usage is not None and answer.usage.prompt_tokens == 10


@pytest.mark.parametrize("stream", [False, True])
def test_prompts_of_every_kind(client: OpenAI, server: Server, stream: bool) -> None:
    """Texts, token ids, lists of both; with n, the answers to one prompt stand together."""
    ids = httpx.post(f"{server.url}/tokenize", json={"prompt": "012"}, timeout=WAIT_S).json()["tokens"]
    for prompt, expected in (
        ("012", ["012"]),
        (ids, ["012"]),
        (["012", "34"], ["012", "34"]),
        ([ids, ids[:2]], ["012", "01"]),
    ):
        for n in (1, 2):
            texts = [""] * len(expected) * n
            options: Any = {"model": "talking", "prompt": prompt, "n": n}
            answers = (
                client.completions.create(**options, stream=True)
                if stream
                else [client.completions.create(**options)]
            )
            for answer in answers:
                for choice in answer.choices:
                    texts[choice.index] += choice.text
            assert texts == [text for text in expected for _ in range(n)]


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_stands_before_its_answer(client: OpenAI, stream: bool) -> None:
    for max_tokens, expected in ((0, "0123"), (2, "012301"), (None, "01230123")):
        options: Any = {"model": "talking", "prompt": "0123", "echo": True, "max_tokens": max_tokens}
        answers = (
            client.completions.create(**options, stream=True)
            if stream
            else [client.completions.create(**options)]
        )
        choices = [answer.choices[0] for answer in answers]
        assert "".join(choice.text for choice in choices) == expected
        assert choices[-1].finish_reason == ("length" if max_tokens is not None else "stop")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("max_tokens", [0, 1, 3])
def test_log_probabilities_of_a_text_and_its_prompt(client: OpenAI, stream: bool, max_tokens: int) -> None:
    """Evaluation harnesses score with them."""
    options: Any = {
        "model": "talking",
        "prompt": "a é",
        "echo": True,
        "max_tokens": max_tokens,
        "logprobs": 2,
    }
    answers = (
        client.completions.create(**options, stream=True)
        if stream
        else [client.completions.create(**options)]
    )
    found: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for answer in answers:
        for name, values in found.items():
            if answer.choices[0].logprobs is not None:
                values += getattr(answer.choices[0].logprobs, name)
    prompt = ["a", " ", "bytes:\\xc3", "bytes:\\xa9"]
    assert found["tokens"] == prompt + prompt[:max_tokens]
    assert found["token_logprobs"] == [None] + [-0.5] * (3 + max_tokens)
    assert found["top_logprobs"][0] is None
    assert found["top_logprobs"][1][" "] == -0.5 and len(found["top_logprobs"][1]) == 2
    assert found["text_offset"] == [0, 1, 2, 2, 3, 4, 5][: 4 + max_tokens]


def test_tokens_written_as_ids(client: OpenAI, server: Server) -> None:
    body = {"return_token_ids": True, "return_tokens_as_token_ids": True}
    choice: Any = client.completions.create(
        model="talking", prompt="01", logprobs=0, extra_body=body
    ).choices[0]
    assert len(choice.token_ids) == 3 and len(choice.prompt_token_ids) == 2
    assert choice.logprobs.tokens == [f"token_id:{token}" for token in choice.token_ids]
    answer: Any = chat(client, "01", extra_body=body)
    assert answer.choices[0].token_ids == choice.token_ids
    assert answer.usage.prompt_tokens == len(answer.prompt_token_ids)
    streamed: list[Any] = list(
        client.chat.completions.create(
            model="talking", messages=say("01"), stream=True, extra_body={"return_token_ids": True}
        )
    )
    ids = [token for chunk in streamed for token in chunk.choices[0].token_ids]
    assert ids == choice.token_ids
    assert [hasattr(chunk, "prompt_token_ids") for chunk in streamed[:2]] == [True, False]


# ------------------------------------------------------------------------- what clients do besides


def test_an_async_client(server: Server) -> None:
    async def run() -> None:
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="x", timeout=WAIT_S) as client:
            texts = [f"number {number} 👍" for number in range(20)]

            async def whole(text: str) -> str | None:
                answer = await client.chat.completions.create(model="talking", messages=say(text))
                return answer.choices[0].message.content

            async def streamed(text: str) -> str:
                pieces = await client.chat.completions.create(
                    model="talking", messages=say(text), stream=True
                )
                return "".join([chunk.choices[0].delta.content or "" async for chunk in pieces])

            async def completed(text: str) -> str:
                return (await client.completions.create(model="talking", prompt=text)).choices[0].text

            for ask in (whole, streamed, completed):
                assert await asyncio.gather(*map(ask, texts)) == texts
            with pytest.raises(openai.NotFoundError) as raised:
                await client.chat.completions.create(model="gpt-4", messages=say("a"))
            assert raised.value.code == "model_not_found"

    asyncio.run(run())


def test_models(client: OpenAI) -> None:
    models = client.models.list().data
    assert [model.id for model in models] == ["talking", "other-name", "smollm2-135m-instruct"]
    assert getattr(models[0], "max_model_len") == 4096  # noqa: B009
    assert client.models.retrieve("other-name").owned_by == "clo"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")


def test_errors_are_those_of_the_package(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as wrong:
        chat(client, "a", temperature=-1)
    assert wrong.value.param == "temperature" and wrong.value.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError) as long:
        chat(client, "a", max_tokens=5000)
    assert long.value.code == "context_length_exceeded" and "4096" in str(long.value)
    with pytest.raises(openai.BadRequestError) as streamed:
        chat(client, "a" * 9000, stream=True)
    assert streamed.value.code == "context_length_exceeded"


def test_tokens_of_a_text_and_back(server: Server) -> None:
    with httpx.Client(base_url=server.url, timeout=WAIT_S) as http:
        found = http.post("/tokenize", json={"prompt": "ab 👍", "return_token_strs": True}).json()
        assert found["count"] == len(found["tokens"]) == 6 and found["max_model_len"] == 4096
        assert found["token_strs"][:2] == ["ab", " "]
        assert http.post("/detokenize", json={"tokens": found["tokens"]}).json() == {"prompt": "ab 👍"}
        chat = {"messages": say("a"), "tools": [WEATHER], "chat_template_kwargs": {"enable_thinking": True}}
        tokens = http.post("/tokenize", json=chat).json()["tokens"]
        text = http.post("/detokenize", json={"tokens": tokens}).json()["prompt"]
        assert '"name": "weather"' in text and text.endswith("<|im_start|>assistant\n<think>\n")


def test_the_quick_start_of_the_readme(server: Server) -> None:
    """As it stands there, but for the port."""
    section = (ROOT / "README.md").read_text().partition("\n## HTTP\n")[2].partition("\n## ")[0]
    command, program = re.findall(r"```(?:python)?\n(.*?)```", section, re.DOTALL)
    question = "What is the capital of France?"
    for line in (("sh", "-c", command), (sys.executable, "-c", program)):
        *words, text = line
        text = text.replace("http://127.0.0.1:8000", server.url)
        ran = subprocess.run([*words, text], capture_output=True, text=True, timeout=WAIT_S)
        assert question in ran.stdout, ran.stderr


def test_names_of_requests(server: Server) -> None:
    with httpx.Client(base_url=server.url, timeout=WAIT_S) as http:
        named = http.post("/v1/completions", json={"prompt": "a"}, headers={"X-Request-Id": "my-request.1"})
        assert named.headers["x-request-id"] == "my-request.1"
        assert named.json()["id"] == "cmpl-my-request.1"
        for given in ({}, {"X-Request-Id": "has spaces"}, {"X-Request-Id": "x" * 200}):
            names = [http.get("/health", headers=given).headers["x-request-id"] for _ in range(2)]
            assert len(set(names)) == 2 and names[0] not in given.values()


def test_facts_about_the_server(server: Server) -> None:
    with httpx.Client(base_url=server.url, timeout=WAIT_S) as http:
        assert (http.get("/health").status_code, http.get("/health").json()) == (200, {"status": "ready"})
        assert http.get("/version").json()["version"].count(".") == 2
        assert http.get("/load").json() == {"server_load": 0}
        described = http.get("/openapi.json").json()
        body = described["components"]["schemas"]["ChatCompletionRequest"]["properties"]
        assert {"messages", "temperature", "tools", "stop"} <= body.keys()
        assert "/v1/chat/completions" in described["paths"]


def test_pages_of_other_origins_may_not_use_a_server_by_default(server: Server) -> None:
    page = "https://page.example"
    answer = httpx.get(f"{server.url}/v1/models", headers={"Origin": page}, timeout=WAIT_S)
    assert "access-control-allow-origin" not in answer.headers
    asked = {"Origin": page, "Access-Control-Request-Method": "POST"}
    assert httpx.options(f"{server.url}/v1/completions", headers=asked, timeout=WAIT_S).status_code == 405


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_a_client_that_goes_away_cancels_its_request(server: Server, path: str, stream: bool) -> None:
    """Before its first token, which never comes, so also where the answer has not begun."""
    prompt: Any = {"messages": say(HOLD)} if "chat" in path else {"prompt": [HOLD, HOLD]}

    async def run() -> None:
        async with httpx.AsyncClient(base_url=server.url, timeout=WAIT_S) as http:
            asking = asyncio.create_task(http.post(path, json=prompt | {"stream": stream}))
            while (await http.get("/load")).json() != {"server_load": 1} or not held():
                await asyncio.sleep(0.01)
            asking.cancel()
            while held():
                await asyncio.sleep(0.01)
            assert (await http.get("/load")).json() == {"server_load": 0}

    with Client(server.address) as native:

        def held() -> int:
            return native.info().workers[0].waiting

        asyncio.run(asyncio.wait_for(run(), WAIT_S))
