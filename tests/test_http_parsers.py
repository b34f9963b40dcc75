"""What a model thinks and which tools it calls, in texts that come in pieces of any size."""

import json
import random

import pytest
from jsonschema import Draft202012Validator

from clo.runtime.http.reasoning import ReasoningParser
from clo.runtime.http.requests import FunctionDefinition, Tool
from clo.runtime.http.tool_calls import HermesParser, Llama3Parser, ToolCallParser, family, schema_of_calls

SEEDS = range(20)


def pieces(text: str, seed: int) -> list[str]:
    rng = random.Random(seed)
    cuts = sorted(rng.randrange(len(text) + 1) for _ in range(rng.randrange(len(text) + 1)))
    return [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]


THOUGHTS = {
    "nothing thought": ("A plain answer.", False, "", "A plain answer."),
    "thought and answer": ("<think>\nHm, 1 < 2.\n</think>\n\nYes.\n", False, "Hm, 1 < 2.", "Yes.\n"),
    "space before": (" \n<think>Hm</think>Yes.", False, "Hm", "Yes."),
    "the prompt has begun it": ("\nHm\n\nand\n</think>\nYes.", True, "Hm\n\nand", "Yes."),
    "nothing in it": ("<think>\n\n</think>\n\nYes.", False, "", "Yes."),
    "never ended": ("<think>Hm, and\n", False, "Hm, and", ""),
    "cut within the last tag": ("Hm</thin", True, "Hm</thin", ""),
    "cut within the first tag": ("<thi", False, "", "<thi"),
    "a tag in the answer": ("Write <think> and </think>.", False, "", "Write <think> and </think>."),
    "a second one": ("<think>a</think>b<think>c</think>", False, "a", "b<think>c</think>"),
    "another tag": ("<thinking>a</thinking>", False, "", "<thinking>a</thinking>"),
    "empty": ("", False, "", ""),
}


@pytest.mark.parametrize(("text", "begun", "thought", "content"), THOUGHTS.values(), ids=THOUGHTS)
def test_what_is_thought(text: str, begun: bool, thought: str, content: str) -> None:
    for seed in SEEDS:
        parser = ReasoningParser(begun)
        found = [*map(parser.push, pieces(text, seed)), parser.flush()]
        assert "".join(piece.reasoning for piece in found) == thought
        assert "".join(piece.content for piece in found) == content


def parse(parser: ToolCallParser, text: str, seed: int) -> tuple[str, list[tuple[str, object]]]:
    found = [*map(parser.push, pieces(text, seed)), parser.flush()]
    calls = [call.function for piece in found for call in piece.calls]
    content = "".join(piece.content for piece in found)
    return content, [(call.name, json.loads(call.arguments)) for call in calls]


F, G = '{"name": "f", "arguments": {"x": "é </b>", "y": [1, {"z": null}]}}', '{"name": "g", "arguments": {}}'
CALLED_F: tuple[str, object] = ("f", {"x": "é </b>", "y": [1, {"z": None}]})
CALLED_G: tuple[str, object] = ("g", {})

HERMES = {
    "no call": ("a < b, <tool> </tool_call>\n", "a < b, <tool> </tool_call>\n", []),
    "one call": (f"<tool_call>\n{F}\n</tool_call>", "", [CALLED_F]),
    "text before": (f"Well.\n\n<tool_call>{F}</tool_call>\n", "Well.", [CALLED_F]),
    "two calls": (f"<tool_call>{F}</tool_call>\n<tool_call>{G}</tool_call>\n", "", [CALLED_F, CALLED_G]),
    "text behind": (f"<tool_call>{G}</tool_call>Done.", "Done.", [CALLED_G]),
    "no end": (f"<tool_call>{G}", "", [CALLED_G]),
    "no JSON": ("<tool_call>f(1)</tool_call>", "<tool_call>f(1)</tool_call>", []),
    "cut short": ("a<tool_call>" + F[:-5], "a<tool_call>" + F[:-5], []),
    "no name": ("<tool_call>{}</tool_call>", "<tool_call>{}</tool_call>", []),
    "arguments as text": ('<tool_call>{"name": "f", "arguments": "{}"}</tool_call>', "", [("f", {})]),
    "no arguments": ('<tool_call>{"name": "f"}</tool_call>', "", [("f", {})]),
    "deep": ("<tool_call>" + "[" * 9999, "<tool_call>" + "[" * 9999, []),
}


@pytest.mark.parametrize(("text", "content", "calls"), HERMES.values(), ids=HERMES)
def test_calls_in_tags(text: str, content: str, calls: list[tuple[str, object]]) -> None:
    for seed in SEEDS:
        assert parse(HermesParser(), text, seed) == (content, calls)


def test_a_call_is_given_as_soon_as_it_is_complete() -> None:
    parser = HermesParser()
    assert parser.push(f"Well. <tool_call>{G}</tool_call") == ("Well.", [])
    content, calls = parser.push("><tool_call>")
    assert content == "" and [call.function.name for call in calls] == ["g"]


PARAMETERS = F.replace("arguments", "parameters")

LLAMA3 = {
    "no call": ("A plain {answer}.", "A plain {answer}.", []),
    "one call": (PARAMETERS, "", [CALLED_F]),
    "space around": (f"\n {F}\n", "", [CALLED_F]),
    "two calls": (f"{PARAMETERS}; {G}", "", [CALLED_F, CALLED_G]),
    "an object that is no call": ('{"a": 1}', '{"a": 1}', []),
    "a tool that is not offered": ('{"name": "h", "parameters": {}}', '{"name": "h", "parameters": {}}', []),
    "text behind": (f"{G} is what I would call.", f"{G} is what I would call.", []),
    "cut short": (F[:-3], F[:-3], []),
    "empty": ("", "", []),
}


@pytest.mark.parametrize(("text", "content", "calls"), LLAMA3.values(), ids=LLAMA3)
def test_calls_as_bare_objects(text: str, content: str, calls: list[tuple[str, object]]) -> None:
    for seed in SEEDS:
        assert parse(Llama3Parser({"f", "g"}), text, seed) == (content, calls)


def test_the_schema_of_calls_finds_what_it_refers_to() -> None:
    parameters = {"type": "object", "properties": {"x": {"$ref": "#/$defs/X"}}, "$defs": {"X": {"const": 5}}}
    tools = [Tool("function", FunctionDefinition("f", parameters=parameters))]
    tools.append(Tool("function", FunctionDefinition("g")))
    schema = schema_of_calls(tools, parallel=False)
    check = Draft202012Validator(schema)
    assert check.is_valid([{"name": "f", "arguments": {"x": 5}}])
    assert check.is_valid([{"name": "g", "arguments": {"x": 6}}])
    for wrong in (
        [],
        [{"name": "f", "arguments": {"x": 6}}],
        [{"name": "h", "arguments": {}}],
        [{"name": "g"}],
        [{"name": "g", "arguments": {}}] * 2,
    ):
        assert not check.is_valid(wrong)
    assert Draft202012Validator(schema_of_calls(tools, parallel=True)).is_valid(
        [{"name": "g", "arguments": {}}] * 2
    )


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{% if tools %}return a json object within <tool_call></tool_call> XML tags{% endif %}", "hermes"),
        (
            '{% if tools is not none %}Respond in the format {"name": function name, '
            '"parameters": dictionary of argument name and its value}{% endif %}',
            "llama3_json",
        ),
        ("{% for tool in tools %}[AVAILABLE_TOOLS]{% endfor %}", "none"),
        ("{% for message in messages %}<tool_call>{% endfor %}", "none"),
        ("", "none"),
    ],
)
def test_the_chat_template_tells_how_calls_are_written(template: str, expected: str) -> None:
    assert family(template) == expected
