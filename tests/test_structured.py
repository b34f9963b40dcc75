"""Structured output: grammars that are made or refused, and answers of real servers that follow them."""

import asyncio
import json
import random
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from clo.gpu_worker.constraint import Constraint, Constraints
from clo.runtime import grammars as grammars_module
from clo.runtime.client import AsyncClient, Client, Result
from clo.runtime.grammars import GRAMMAR_BYTES, Grammars
from clo.runtime.wire.errors import InvalidRequest
from clo.runtime.wire.messages import StructuredOutputs
from tests.conftest import VOCABULARY, byte_level_tokenizer
from tests.faults import WAIT_S, assert_serves
from tests.schemas import object_schema, schema
from tests.server import Server

pytest.importorskip("llguidance", reason="needs llguidance: pip install -e '.[structured]'")
jsonschema = pytest.importorskip("jsonschema", reason="needs jsonschema: pip install -e '.[test]'")

Launch = Callable[..., AbstractContextManager[Server]]

CHAIN = (
    "\n".join(  # of rules, deeper than any stack
        ["start: r0", *(f"r{number}: r{number + 1} | r{number + 1} r{number + 1}" for number in range(5000))]
    )
    + '\nr5000: "x"'
)


# ----------------------------------------------------------------------------- making grammars


def compiled(*wanted: StructuredOutputs) -> list[str]:
    """The grammars, or the sentences with which they are refused."""

    async def run() -> list[str]:
        grammars, found = Grammars(), []
        try:
            for one in wanted:
                try:
                    found.append(await grammars.compile(one))
                except InvalidRequest as error:
                    found.append(f"refused: {error}")
        finally:
            await grammars.close()
        return found

    return asyncio.run(run())


REFUSED: dict[str, tuple[StructuredOutputs, str]] = {
    "none": (StructuredOutputs(), "takes one of json, .* and not none"),
    "two": (StructuredOutputs(regex="a", json={}), "and not json and regex"),
    "no object": (StructuredOutputs(json_object=False), "json_object"),
    "a keyword": (StructuredOutputs(json={"not": {}}), r'followed: Unimplemented keys: \["not"\]'),
    "a type": (StructuredOutputs(json={"type": "text"}), "followed: Invalid type: text"),
    "a format": (StructuredOutputs(json={"type": "string", "format": "x"}), "Unknown format: x"),
    "a reference": (StructuredOutputs(json={"$ref": "http://127.0.0.1/a"}), "does not fetch"),
    "no instance": (StructuredOutputs(json={"type": "integer", "minimum": 2, "maximum": 1}), "followed"),
    "not JSON": (StructuredOutputs(json='{"type": '), "followed: Expecting value"),
    "a list": (StructuredOutputs(json="[]"), "the JSON schema is not an object"),
    "no choice": (StructuredOutputs(choice=[]), "choice needs at least one text"),
    "an empty choice": (StructuredOutputs(choice=["a", ""]), "none may be empty"),
    "a regex": (StructuredOutputs(regex="(a"), "unclosed group"),
    "a look-ahead": (StructuredOutputs(regex="(?=a)b"), "look-around"),
    "a rule": (StructuredOutputs(grammar="start: other"), 'unknown name: "other"'),
    "no rule": (StructuredOutputs(grammar="nothing of the kind"), "followed"),
    "a large one": (
        StructuredOutputs(regex="a" * GRAMMAR_BYTES),
        rf"and may take {GRAMMAR_BYTES}; shorten it",
    ),
    "a deep one": (StructuredOutputs(grammar=CHAIN), "nested too deeply"),
}


def test_what_cannot_be_followed_is_refused_in_one_sentence_that_says_why() -> None:
    """A grammar of which the process dies included: the next one is compiled by another process."""
    good = StructuredOutputs(regex="[a-z]+")
    found = compiled(*[one for refused, _ in REFUSED.values() for one in (refused, good)])
    for (name, (_, sentence)), refusal, grammar in zip(REFUSED.items(), found[::2], found[1::2], strict=True):
        assert re.search(f"^refused: .*{sentence}.*\\.$", refusal), (name, refusal)
        assert grammar == found[1]


def test_a_grammar_is_not_blamed_where_the_process_was_killed_before_it() -> None:
    async def run() -> None:
        grammars = Grammars()
        try:
            first = await grammars.compile(StructuredOutputs(regex="[a-z]+"))
            assert grammars._process is not None
            grammars._process.kill()
            await grammars._process.wait()
            assert await grammars.compile(StructuredOutputs(regex="[0-9]+")) != first
        finally:
            await grammars.close()

    asyncio.run(run())


def test_a_grammar_that_takes_too_long_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammars_module, "COMPILE_S", 0.0)
    (refusal,) = compiled(StructuredOutputs(regex="[a-z]+"))
    assert refusal == "refused: structured_outputs takes more than 0 s to compile; simplify it."


def test_a_server_without_the_package_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    (refusal,) = compiled(StructuredOutputs(regex="[a-z]+"))
    assert refusal.endswith("pip install 'clo-llm[structured]'.")


def test_values_that_no_json_can_hold_are_refused() -> None:
    schema = msgspec.msgpack.decode(msgspec.msgpack.encode({"enum": [{(1, 2): 3}]}), strict=False)
    (refusal,) = compiled(StructuredOutputs(json=schema))
    assert refusal.startswith("refused: structured_outputs")


# ------------------------------------------------------------------------- following grammars


@pytest.fixture(scope="module")
def constraints(tiny_model: Path) -> Constraints:
    return Constraints(tiny_model, VOCABULARY)


def allowed(constraint: Constraint) -> set[int]:
    constraint.wait()
    assert constraint.done and not constraint.error
    bits = np.unpackbits(constraint.mask.view(np.uint8), bitorder="little")
    return set(np.flatnonzero(bits).tolist())


def test_masks_follow_the_tokens_and_are_published_with_their_length(constraints: Constraints) -> None:
    encode = byte_level_tokenizer().encode
    (grammar,) = compiled(StructuredOutputs(regex="ab(cd)?"))
    published: list[tuple[bytes, int]] = []
    for _ in range(2):  # the second time the grammar is known
        constraint = constraints.begin(grammar)
        assert allowed(constraint) == {*encode("a"), *encode("ab")}
        constraint.advance(
            encode("ab")[0], 7, lambda mask, length: published.append((mask.tobytes(), length))
        )
        (end,) = encode("<|im_end|>")
        assert allowed(constraint) == {*encode("c"), *encode("cd"), end}
        assert published.pop() == (constraint.mask.tobytes(), 7)
        constraint.advance(encode("cd")[0], 8, lambda *_: published.append((b"", 0)))
        constraint.wait()
        assert constraint.complete and not published


def test_a_token_that_does_not_fit_and_a_broken_grammar_are_errors(constraints: Constraints) -> None:
    (grammar,) = compiled(StructuredOutputs(regex="ab"))
    constraint = constraints.begin(grammar)
    constraint.wait()
    constraint.advance(byte_level_tokenizer().encode("x")[0], 1, lambda *_: pytest.fail("nothing may follow"))
    constraint.wait()
    assert constraint.error
    constraint = constraints.begin("start: nothing")
    constraint.wait()
    assert "nothing" in constraint.error


def test_a_vocabulary_of_another_size_than_the_tokenizer_has(tiny_model: Path) -> None:
    """Models pad theirs, and some tokenizers know more tokens than their models."""
    (grammar,) = compiled(StructuredOutputs(regex="[^x]+"))
    for vocab in (VOCABULARY - 40, VOCABULARY + 77):
        constraints = Constraints(tiny_model, vocab)
        constraint = constraints.begin(grammar)
        assert len(allowed(constraint)) > 200 and len(constraint.mask) == -(-vocab // 32)


def test_a_decoder_that_decodes_bytes_after_other_things(tiny_model: Path, tmp_path: Path) -> None:
    """As older versions of transformers convert GGUF files; blanks are marked in such a vocabulary."""
    tokenizer = json.loads((tiny_model / "tokenizer.json").read_text())
    blanks = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    decoders = [{"type": "ByteFallback"}, {"type": "Fuse"}, blanks, tokenizer["decoder"]]
    tokenizer["decoder"] = {"type": "Sequence", "decoders": decoders}
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    (grammar,) = compiled(StructuredOutputs(regex="[ ü]+"))
    found = allowed(Constraints(tmp_path, VOCABULARY).begin(grammar))
    assert found == allowed(Constraints(tiny_model, VOCABULARY).begin(grammar))
    assert set(byte_level_tokenizer().encode(" ")) <= found


def test_a_model_whose_tokenizer_cannot_be_used_has_no_constraints(tmp_path: Path) -> None:
    assert "llguidance cannot use the model's tokenizer" in Constraints(tmp_path, 512).missing
    for text in (
        "{}",
        "[]",
        '{"decoder": 5}',
        '{"decoder": {"decoders": [5]}}',
        '{"decoder": {"decoders": [{}]}}',
    ):
        (tmp_path / "tokenizer.json").write_text(text)
        assert "llguidance cannot use the model's tokenizer" in Constraints(tmp_path, 512).missing, text


# ----------------------------------------------------------------------------------- servers


@pytest.fixture(scope="module")
def server(launch: Launch, tiny_model: Path) -> Iterator[Server]:
    """A model with random weights, which wants anything but what a grammar wants."""
    with launch("--model", str(tiny_model), "--kv-size", "64MiB", "--max-model-len", "1024") as server:
        yield server
        assert_serves(server)
        assert "Traceback" not in server.stderr.read_text()


@pytest.fixture
def client(server: Server) -> Iterator[Client]:
    with Client(server.address, timeout=WAIT_S) as client:
        yield client


EMAIL = r"[a-z]{3,9}@[a-z]{2,5}\.(com|org)"
FORMS: dict[str, tuple[dict[str, Any], Callable[[str], object]]] = {
    "regex": ({"regex": EMAIL}, lambda text: re.fullmatch(EMAIL, text)),
    "choice": ({"choice": ["yes", 'no "x"', "naïve\n"]}, ["yes", 'no "x"', "naïve\n"].__contains__),
    "lark": (
        {"grammar": 'start: word (" " word){2}\nword: /[a-z]{1,3}/'},
        lambda text: re.fullmatch("[a-z]{1,3}( [a-z]{1,3}){2}", text),
    ),
    "gbnf": (
        {"grammar": 'root ::= "<" item "," item ">"\nitem ::= [0-9] | "x"'},
        lambda text: re.fullmatch("<[0-9x],[0-9x]>", text),
    ),
    "a schema as text": (
        {"json": '{"const": [1, {"a": null}]}'},
        lambda text: json.loads(text) == [1, {"a": None}],
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_answers_are_what_was_asked_for(client: Client, form: str) -> None:
    wanted, holds = FORMS[form]
    for options in ({"temperature": 0}, {"seed": 1}, {"seed": 2, "temperature": 5, "ignore_eos": True}):
        result = client.generate("Once", max_tokens=200, structured_outputs=wanted, **options)
        assert holds(result.text), result.text
        assert result.finish_reason == "stop"


def test_everything_else_has_its_effect_within_a_grammar(client: Client) -> None:
    form = {"regex": "[ab]{20}"}
    plain = client.generate("Once", temperature=0, max_tokens=50, structured_outputs=form)
    assert re.fullmatch("[ab]{20}", plain.text)
    (a,) = byte_level_tokenizer().encode("a")
    biased = client.generate(
        "Once", temperature=0, max_tokens=50, structured_outputs=form, logit_bias={a: 100.0}, logprobs=1
    )
    assert biased.text == "a" * 20
    assert biased.logprobs is not None and len(biased.logprobs) == len(biased.tokens)
    short = client.generate("Once", temperature=0, max_tokens=3, structured_outputs=form)
    assert short.finish_reason == "length" and plain.text.startswith(short.text)
    ended = client.generate(
        "Once", temperature=0, max_tokens=60, min_tokens=60, structured_outputs={"choice": ["yes"]}
    )
    assert (ended.text, ended.finish_reason) == ("yes", "stop"), "a complete text ends all the same"


def test_requests_without_a_grammar_have_the_tokens_that_they_have_alone(server: Server) -> None:
    async def ask(client: AsyncClient, number: int, **options: Any) -> Result:
        return await client.generate([5, number], max_tokens=60, seed=number, ignore_eos=True, **options)

    async def run() -> None:
        async with AsyncClient(server.address, timeout=WAIT_S) as client:
            alone = [await ask(client, number) for number in range(3)]
            form = {"regex": "[a-z ]{100}"}
            both = await asyncio.gather(
                *(ask(client, number) for number in range(3)),
                *(ask(client, number, structured_outputs=form) for number in range(5)),
            )
        assert [result.tokens for result in both[:3]] == [result.tokens for result in alone]
        assert all(re.fullmatch("[a-z ]{60,100}", result.text) for result in both[3:])

    asyncio.run(run())


def test_a_stream_with_a_grammar_may_be_left(client: Client) -> None:
    for _ in range(3):
        for _ in client.stream("Once", max_tokens=900, structured_outputs={"regex": "[a-z]{900}"}):
            break
    assert client.generate("Once", max_tokens=9, structured_outputs={"choice": ["yes"]}).text == "yes"


def test_a_grammar_that_kills_its_process_harms_nobody(client: Client) -> None:
    stream = client.stream([1, 2], max_tokens=100, ignore_eos=True)
    texts: list[str] = []
    reader = threading.Thread(target=lambda: texts.extend(piece.text for piece in stream))
    reader.start()
    with pytest.raises(InvalidRequest, match="nested too deeply"):
        client.generate("Once", structured_outputs={"grammar": CHAIN})
    assert client.generate("Once", max_tokens=9, structured_outputs={"choice": ["no"]}).text == "no"
    reader.join(WAIT_S)
    assert stream.result.usage.completion_tokens == 100


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_schemas_are_followed_on_a_gpu_beside_others(launch: Launch, smollm2: Path, dtype: str) -> None:
    """Several times as many as there are slots; those without a grammar go on."""
    rng = random.Random(2)
    schemas = [schema(rng) for _ in range(60)]
    options = ("--device", "cuda", "--dtype", dtype, "--max-model-len", "2048", "--kv-size", "1GiB")

    async def run(address: str) -> tuple[list[Result], list[Result]]:
        async with AsyncClient(address, timeout=WAIT_S) as client:
            others = [
                asyncio.create_task(client.generate("Once", max_tokens=400, ignore_eos=True))
                for _ in range(6)
            ]
            results = await asyncio.gather(
                *(
                    client.generate("JSON:", max_tokens=300, seed=number, structured_outputs={"json": wanted})
                    for number, wanted in enumerate(schemas)
                )
            )
            return results, await asyncio.gather(*others)

    with launch(*options, "--max-num-seqs", "16") as server:
        results, others = asyncio.run(run(server.address))
    assert all(len(result.tokens) == 400 for result in others)
    for wanted, result in zip(schemas, results, strict=True):
        assert result.finish_reason == "stop", result.text
        jsonschema.Draft202012Validator(wanted).validate(json.loads(result.text))


@pytest.mark.parametrize("count", [3, pytest.param(200, marks=pytest.mark.slow)])
def test_schemas_are_followed_by_the_default_model(launch: Launch, smollm2: Path, count: int) -> None:
    """Every answer is complete and valid, greedy or not, many at a time."""
    rng = random.Random(count)
    schemas = [(schema, object_schema)[number // 2 % 2](rng) for number in range(count)]

    async def ask(client: AsyncClient, number: int) -> Result:
        wanted = schemas[number]
        keys = ", ".join(wanted.get("properties", {}))
        text = f"Answer in JSON with {keys or 'a value'}."
        response_format = {"type": "json_schema", "json_schema": {"name": "x", "schema": wanted}}
        return await client.generate(
            [{"role": "user", "content": text}], max_tokens=300, temperature=number % 2, seed=number,
            response_format=response_format,
        )  # fmt: skip

    async def run(address: str) -> list[Result]:
        async with AsyncClient(address, timeout=10 * WAIT_S) as client:
            return await asyncio.gather(*(ask(client, number) for number in range(len(schemas))))

    with launch("--max-model-len", "1024", "--kv-size", "512MiB", "--max-num-seqs", "16") as server:
        results = asyncio.run(run(server.address))
    wrong = [
        (wanted, result.finish_reason, result.text)
        for wanted, result in zip(schemas, results, strict=True)
        if result.finish_reason != "stop" or not is_valid(wanted, result.text)
    ]
    assert not wrong


def is_valid(wanted: dict[str, Any], text: str) -> bool:
    """Whether a text is JSON that a schema allows, formats of texts included."""
    validator = jsonschema.Draft202012Validator
    checked: bool = validator(wanted, format_checker=validator.FORMAT_CHECKER).is_valid(json.loads(text))
    return checked
