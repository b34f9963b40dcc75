"""Values that nobody thought of, in every message, on every socket of a client, in options and model folders.

Some hundreds of each here, other ones in each run of ``python -m tests.fuzz``; see ``tests/fuzz.py``.
"""

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec import inspect
from transformers import LlamaConfig

from clo import launch as command_line
from clo.runtime.client import Client, _request
from clo.runtime.config import ModelConfig
from clo.runtime.model.files import resolve
from clo.runtime.model.generation import read_generation
from clo.runtime.tokenizer import Detokenizer, Tokenizer
from clo.runtime.wire import messages
from clo.runtime.wire.errors import CLOError, ConfigError, InvalidRequest, ProtocolError
from clo.runtime.wire.messages import Failed, Finished, Generate, Message, SamplingParams, StructuredOutputs
from clo.runtime.wire.sockets import Decoder, encode
from tests.conftest import VOCABULARY
from tests.faults import SMALL, WAIT_S, assert_serves, raw
from tests.fuzz import EXAMPLES, anything, frames, spoiled, values
from tests.server import Server

UNIONS = ("ToRouter", "ToClient", "ToWorker", "FromChild", "ToStore", "FromStore")


def drawn(examples: int) -> settings:
    """Settings of a test: the same values in each run, or more and other ones where ``tests.fuzz`` runs
    it."""
    many = os.environ.get(EXAMPLES)
    return settings(
        max_examples=int(many) if many else examples,
        derandomize=many is None,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


@pytest.mark.parametrize("union", UNIONS)
def test_what_arrives_at_a_socket_is_a_message_or_one_error(union: str) -> None:
    """A message that was read is the same again when it is sent on."""
    decode: Decoder[Message] = Decoder(getattr(messages, union))

    @drawn(150)
    @given(frames(getattr(messages, union)))
    def check(data: bytes) -> None:
        try:
            message = decode(data)
        except ProtocolError as error:
            assert str(error).startswith("The message could not be read: ")
        else:
            again = encode(message)
            assert encode(decode(again)) == again

    check()


@pytest.mark.parametrize("union", UNIONS)
def test_every_valid_message_is_read(union: str) -> None:
    """Or else what the test above draws would be garbage alone."""
    decode: Decoder[Message] = Decoder(getattr(messages, union))

    @drawn(50)
    @given(values(inspect.type_info(getattr(messages, union))))
    def check(message: dict[str, Any]) -> None:
        assert type(decode(msgspec.msgpack.encode(message))).__name__ == message["type"]

    check()


structures = st.dictionaries(
    st.sampled_from([*StructuredOutputs.__struct_fields__, "type", "json_schema", "schema"]),
    anything | st.sampled_from(["text", "json_object", "json_schema", "a+"]),
    max_size=2,
)
FIELDS = (*SamplingParams.__struct_fields__, "response_format", "n", "beams")


@drawn(300)
@given(
    anything | st.lists(st.dictionaries(st.sampled_from(["role", "content", "name"]), anything), max_size=2),
    st.dictionaries(st.sampled_from(FIELDS), anything | structures, max_size=3),
    st.none() | anything,
    st.none() | anything,
)
def test_whatever_a_program_gives_the_client_is_a_request_or_one_error(
    prompt: Any, sampling: dict[str, Any], continuation: Any, template: Any
) -> None:
    try:
        assert isinstance(_request(prompt, sampling, continuation, template), Generate)
    except InvalidRequest as error:
        assert "\n" not in str(error).replace(repr(prompt), "")


@pytest.fixture(scope="module")
def server(launch: Callable[..., AbstractContextManager[Server]], tiny_model: Path) -> Iterator[Server]:
    with launch("--model", str(tiny_model), *SMALL) as server:
        yield server
        assert_serves(server)
        assert "Traceback" not in server.stderr.read_text()


def short(message: Any) -> Any:
    """A request that soon ends, and whose id is known."""
    if isinstance(message, dict) and isinstance(message.get("sampling"), dict):
        message["sampling"]["max_tokens"] = 3
        if isinstance(least := message["sampling"].get("min_tokens"), int):
            message["sampling"]["min_tokens"] = min(least, 4)
    elif isinstance(message, dict) and message.get("type") == "Generate":
        message["sampling"] = {"max_tokens": 3}
    return message


def test_a_server_answers_every_request_and_lives(server: Server) -> None:
    """Each field of a request with every value that it may have, and with others. The connection is used for
    a normal request in between, so that nothing is lost."""
    generate = values(inspect.type_info(Generate))

    @drawn(60)
    @given(generate.map(short) | spoiled(generate).map(short), st.integers(0, 9))
    def check(message: Any, number: int) -> None:
        with raw(server.address) as client:
            client.socket.send(msgspec.msgpack.encode(message))
            while True:
                answer = client.receive()
                if isinstance(answer, Failed | Finished):
                    break
            if isinstance(answer, Failed):
                assert answer.code in ("invalid_request", "prompt_too_long", "protocol"), answer

    check()


def test_bytes_on_the_port_are_answered_each(server: Server) -> None:
    @drawn(60)
    @given(st.lists(spoiled(values(inspect.type_info(messages.ToRouter))) | anything, max_size=3))
    def check(sent: list[Any]) -> None:
        with Client(server.address, timeout=WAIT_S) as client, raw(server.address) as other:
            for message in sent:
                other.socket.send(msgspec.msgpack.encode(message))
            assert len(client.generate([1, 2], max_tokens=1).tokens) == 1

    check()


OPTIONS = [action.option_strings[0] for action in command_line.parser("launch.py")._actions[1:]]
LINES = st.text(st.characters(exclude_categories=["Cc", "Zl", "Zp"]), max_size=12)
WORDS = st.sampled_from(
    ["auto", "off", "0", "1", "-1", "1e999", "nan", "inf", "9" * 5000, "8GiB", "1e3GiB", "numa0", "", "tcp"]
)


@drawn(300)
@given(st.lists(st.tuples(st.sampled_from(OPTIONS), WORDS | LINES), max_size=4))
def test_any_command_line_is_a_configuration_or_one_sentence(line: list[tuple[str, str]]) -> None:
    try:
        command_line.config_from([word for pair in line for word in pair])
    except ConfigError as error:
        assert "\n" not in str(error)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzzed")


CONFIG = json.loads(
    LlamaConfig(vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=2).to_json_string(
        use_diff=False
    )
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=5,
)
ROPE = ("rope_type", "rope_theta", "factor", "original_max_position_embeddings", "beta_fast", "type")


@drawn(150)
@given(
    st.dictionaries(
        st.sampled_from([*CONFIG, "rope_scaling", "layer_types", "head_dim"]), json_values, max_size=2
    ),
    st.none()
    | st.dictionaries(st.sampled_from(ROPE), json_values | st.sampled_from(["yarn", "linear", "llama3"])),
)
def test_any_config_file_is_a_model_or_one_sentence(
    folder: Path, changes: dict[str, Any], rope: dict[str, Any] | None
) -> None:
    written = CONFIG | changes | ({} if rope is None else {"rope_parameters": rope})
    (folder / "config.json").write_text(json.dumps(written))
    with contextlib.suppress(ConfigError):
        resolve(ModelConfig(model=str(folder), device="cpu", load_format="dummy"))


@drawn(150)
@given(
    st.dictionaries(
        st.sampled_from(
            [
                *("eos_token_id", "temperature", "top_p", "top_k", "max_new_tokens", "min_p"),
                "repetition_penalty",
            ]
        ),
        json_values,
    )
    | json_values
)
def test_any_generation_config_is_read_or_one_sentence(folder: Path, written: Any) -> None:
    (folder / "generation_config.json").write_text(json.dumps(written))
    with contextlib.suppress(ConfigError):
        read_generation(folder)


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Tokenizer:
    return Tokenizer(tiny_model, VOCABULARY)


@drawn(150)
@given(values(inspect.type_info(messages.Text | messages.Chat | messages.Tokens)))
def test_any_prompt_is_tokens_or_one_error(tokenizer: Tokenizer, prompt: Any) -> None:
    typed = msgspec.convert(prompt, messages.Text | messages.Chat | messages.Tokens)
    with contextlib.suppress(CLOError):
        tokens = tokenizer.encode(typed, 1000)
        assert tokens and all(0 <= token < VOCABULARY for token in tokens)


TOKENS = st.lists(st.integers(0, VOCABULARY + 9), max_size=40)


@drawn(150)
@given(TOKENS, TOKENS, st.lists(st.text("ab\ufffd", min_size=1, max_size=3), max_size=2))
def test_the_pieces_of_any_answer_are_its_text_up_to_a_stop_string(
    tokenizer: Tokenizer, prompt: list[int], answer: list[int], stop: list[str]
) -> None:
    whole, plain = Detokenizer(tokenizer, prompt, stop), Detokenizer(tokenizer, prompt, [])
    found = "".join([whole.push(token) for token in answer]) + whole.flush()
    text = "".join([plain.push(token) for token in answer]) + plain.flush()
    assert text == tokenizer.decode([token for token in answer if token in tokenizer.spoken])
    assert text.startswith(found) and whole.stopped == (found != text)
    assert not any(string in found for string in stop)
