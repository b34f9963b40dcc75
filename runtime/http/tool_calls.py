"""Calls of tools in the text of an answer, as the families that CLO serves write them."""

import json
import secrets
from typing import Any, NamedTuple, Protocol

import msgspec

from clo.runtime.http.answers import CalledFunction, ToolCall
from clo.runtime.http.reasoning import partial_end
from clo.runtime.http.requests import Tool

BEGIN, END = "<tool_call>", "</tool_call>"


class Found(NamedTuple):
    """New text that is no call, and calls that are complete now."""

    content: str
    calls: list[ToolCall]


class ToolCallParser(Protocol):
    """Finds calls in the text of one answer, piece by piece."""

    def push(self, text: str) -> Found: ...

    def flush(self) -> Found:
        """The rest, at the end of the answer."""
        ...


def _call(found: Any) -> ToolCall | None:
    """A call from what a model wrote: ``{"name": ..., "arguments": {...}}``, or Llama's ``parameters``."""
    if not isinstance(found, dict) or not isinstance(found.get("name"), str):
        return None
    arguments = found.get("arguments", found.get("parameters", {}))
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    called = CalledFunction(found["name"], arguments)
    return ToolCall(id=_id(), function=called)


def _id() -> str:
    return f"call_{secrets.token_hex(12)}"


class HermesParser:
    """Calls between ``<tool_call>`` and ``</tool_call>``, each a JSON object, as Hermes and Qwen write them.
    What is no valid call stays in the text."""

    def __init__(self) -> None:
        self._held = ""
        self._inside = self._called = False

    def push(self, text: str) -> Found:
        text = self._held + text
        self._held = ""
        content, calls = "", list[ToolCall]()
        while True:
            if self._inside:
                written, found, text = text.partition(END)
                if not found:
                    self._held = written
                    return Found(content, calls)
                self._inside = False
                call = self._read(written)
                if call is None:
                    content += BEGIN + written + END
                else:
                    self._called = True
                    calls.append(call)
            before, found, text = text.partition(BEGIN)
            if found:
                content += before.rstrip()
                self._inside = True
            else:
                certain = len(before) - partial_end(before, BEGIN)
                certain = len(before[:certain].rstrip())  # line breaks before a call go with it
                self._held = before[certain:]
                return Found(content + before[:certain], calls)

    def flush(self) -> Found:
        """A call may lack its end: some models stop right behind the object."""
        rest, self._held = self._held, ""
        if not self._inside:
            return Found("" if self._called and rest.isspace() else rest, [])
        call = self._read(rest)
        return Found(BEGIN + rest, []) if call is None else Found("", [call])

    def _read(self, written: str) -> ToolCall | None:
        try:
            return _call(msgspec.json.decode(written.strip()))
        except (msgspec.DecodeError, RecursionError):
            return None


class Llama3Parser:
    """Calls as Llama 3 writes them: an answer that is nothing but JSON objects, with ``;`` between them.

    Args:
        tools: names of the tools that the request offers; other objects are plain answers.
    """

    def __init__(self, tools: set[str]) -> None:
        self._tools = tools
        self._held = ""
        self._plain = False  # the answer begins with something else

    def push(self, text: str) -> Found:
        if self._plain:
            return Found(text, [])
        self._held += text
        start = self._held.lstrip()
        if not start or start.startswith("{"):
            return Found("", [])
        self._plain = True
        return Found(self._held, [])

    def flush(self) -> Found:
        if self._plain:
            return Found("", [])
        calls = self._read(self._held.strip())
        return Found("", calls) if calls else Found(self._held, [])

    def _read(self, text: str) -> list[ToolCall]:
        """None at all where something else stands beside the calls."""
        decoder, calls = json.JSONDecoder(), list[ToolCall]()
        try:
            while text:
                found, end = decoder.raw_decode(text)
                call = _call(found)
                if call is None or call.function.name not in self._tools:
                    return []
                calls.append(call)
                text = text[end:].lstrip("; \n")
        except (ValueError, RecursionError):
            return []
        return calls


class ForcedParser:
    """Calls that the model had to make, as ``schema_of_calls`` or the tool's own schema has them.

    Args:
        name: of the one tool that it could call, whose arguments are the whole answer; None where the answer
            is a list of calls.
    """

    def __init__(self, name: str | None) -> None:
        self._name = name
        self._held = ""

    def push(self, text: str) -> Found:
        self._held += text
        return Found("", [])

    def flush(self) -> Found:
        """What was cut short stays as it is."""
        text, self._held = self._held, ""
        if not text:
            return Found("", [])
        if self._name is not None:
            return Found("", [ToolCall(id=_id(), function=CalledFunction(self._name, text))])
        try:
            calls = [_call(found) for found in msgspec.json.decode(text, type=list[Any])]
        except (msgspec.DecodeError, RecursionError):
            return Found(text, [])
        return Found("", [call for call in calls if call is not None])


def schema_of_calls(tools: list[Tool], parallel: bool) -> dict[str, Any]:
    """The JSON schema of a list of calls, one at least, and no more where they are not ``parallel``."""
    definitions: dict[str, Any] = {}
    calls = []
    for tool in tools:
        arguments = dict(tool.function.parameters or {"type": "object"})
        definitions |= arguments.pop("$defs", {})  # references look for them at the top
        properties = {"name": {"const": tool.function.name}, "arguments": arguments}
        call = {"type": "object", "properties": properties, "required": ["name", "arguments"]}
        calls.append(call | {"additionalProperties": False})
    schema = {"type": "array", "items": {"anyOf": calls}, "minItems": 1, "$defs": definitions}
    return schema if parallel else schema | {"maxItems": 1}


def family(chat_template: str) -> str:
    """Which parser a model needs, by the chat template that tells it how to write calls."""
    if "tools" not in chat_template:
        return "none"
    if BEGIN in chat_template:
        return "hermes"
    return "llama3_json" if '"parameters": dictionary' in chat_template else "none"
