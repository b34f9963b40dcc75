"""Clients that read a base URL, unmodified: ``pip install litellm llm``, which CI does without."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from clo.runtime.client import Client
from tests.faults import WAIT_S
from tests.server import Server

Launch = Callable[..., AbstractContextManager[Server]]

QUESTION: list[dict[str, Any]] = [{"role": "user", "content": "once upon a time"}]
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 12}
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def server(launch: Launch, tiny_model: Path) -> Iterator[Server]:
    options = ("--kv-size", "4MiB", "--served-model-name", "tiny", "--http", "0")
    with launch("--model", str(tiny_model), *options) as server:
        yield server


def native(server: Server, prompt: Any) -> str:
    with Client(server.address, timeout=WAIT_S) as client:
        return client.generate(prompt, **GREEDY).text


@pytest.mark.skipif(importlib.util.find_spec("litellm") is None, reason="needs pip install litellm")
def test_litellm(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # its prices, which it would download
    import litellm

    options: Any = {"api_base": f"{server.url}/v1", "api_key": "none", "num_retries": 0} | GREEDY
    expected = native(server, QUESTION)
    for provider in ("openai", "hosted_vllm"):
        named = options | {"model": f"{provider}/tiny", "messages": QUESTION}
        answer = litellm.completion(**named)
        assert answer.choices[0].message.content == expected
        assert answer.usage.completion_tokens <= GREEDY["max_tokens"]
        chunks = list(litellm.completion(**named, stream=True))
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected
    text = litellm.text_completion(model="text-completion-openai/tiny", prompt="once upon", **options)
    assert text.choices[0].text == native(server, "once upon")

    wanted = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA, "strict": True}}
    chat = options | {"messages": QUESTION, "max_tokens": 300}
    answer = litellm.completion(model="openai/tiny", response_format=wanted, **chat)
    assert json.loads(answer.choices[0].message.content)["city"] in ("Paris", "Rome")

    with pytest.raises(litellm.NotFoundError, match="nobody"):
        litellm.completion(model="openai/nobody", **chat)
    long = chat | {"messages": [{"role": "user", "content": "w " * 5000}]}
    with pytest.raises(litellm.ContextWindowExceededError):
        litellm.completion(model="openai/tiny", **long)


@pytest.mark.skipif(importlib.util.find_spec("llm") is None, reason="needs pip install llm")
def test_llm(server: Server, tmp_path: Path) -> None:
    """The command ``llm``, told of the server by a file: a chat, a stream, a schema and a text."""
    common = {"model_name": "tiny", "api_base": f"{server.url}/v1"}
    models = [
        common | {"model_id": "chat", "supports_schema": True},
        common | {"model_id": "text", "completion": True},
    ]
    (tmp_path / "extra-openai-models.yaml").write_text(json.dumps(models))  # JSON is YAML
    environment = os.environ | {"LLM_USER_PATH": str(tmp_path), "LLM_LOAD_PLUGINS": ""}

    def llm(model: str, text: str, *options: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "llm", "-m", model, text, "-o", "temperature", "0", *options],
            env=environment, capture_output=True, text=True, timeout=WAIT_S, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout.removesuffix("\n")

    few = ("-o", "max_tokens", str(GREEDY["max_tokens"]))
    expected = native(server, QUESTION)
    assert llm("chat", "once upon a time", *few) == expected
    assert llm("chat", "once upon a time", *few, "--no-stream") == expected
    assert llm("text", "once upon", *few) == native(server, "once upon")
    answer = llm("chat", "once upon a time", "-o", "max_tokens", "300", "--schema", json.dumps(SCHEMA))
    assert json.loads(answer)["city"] in ("Paris", "Rome")
