"""Values that nobody thought of, in every message, on every socket of a client, in options and model folders.

Some hundreds of each here, other ones in each run of ``python -m tests.fuzz``; see ``tests/fuzz.py``.
"""

import asyncio
import contextlib
import json
import os
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
import zmq
from hypothesis import given
from hypothesis import strategies as st
from msgspec import inspect
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from clo import launch as command_line
from clo.runtime.client import Client, _request
from clo.runtime.config import ModelConfig, ResolvedModel
from clo.runtime.model.files import resolve
from clo.runtime.model.generation import read_generation
from clo.runtime.model.model_config import read_config
from clo.runtime.tokenizer import Detokenizer, Tokenizer
from clo.runtime.wire import messages
from clo.runtime.wire.errors import CLOError, ConfigError, InvalidRequest, ProtocolError
from clo.runtime.wire.messages import Failed, Finished, Generate, Message, SamplingParams, StructuredOutputs
from clo.runtime.wire.sockets import Decoder, encode
from tests.conftest import VOCABULARY
from tests.faults import SMALL, WAIT_S, assert_serves, raw
from tests.fuzz import anything, drawn, frames, spoiled, values
from tests.peers import Wire, running
from tests.server import Server
from tests.soak import GROWTH_DESCRIPTORS, held
from tests.store import running_store
from tests.test_client import FakeServer
from tests.test_port import GREETING, READY, command

ASKED = messages.Allocate | messages.Free | messages.Commit | messages.Describe | messages.Push
"""What a worker asks a store all the time."""

UNIONS = (
    "ToRouter", "ToClient", "ToControl", "FromControl", "ToWorker", "LauncherToStore", "FromChild", "ToStore",
    "FromStore",
)  # fmt: skip


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
        assert len(str(error).splitlines()) == 1


@pytest.fixture(scope="module")
def server(launch: Callable[..., AbstractContextManager[Server]], tiny_model: Path) -> Iterator[Server]:
    with launch("--model", str(tiny_model), *SMALL) as server:
        assert_serves(server)
        with Client(server.address) as client:  # starts the process that looks at grammars
            client.generate("a", max_tokens=2, structured_outputs={"regex": "a+"})
        before = held(server)["descriptors"]
        yield server
        assert_serves(server)
        assert "Traceback" not in server.stderr.read_text()
        assert held(server)["descriptors"] <= before + GROWTH_DESCRIPTORS


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


def pieces() -> st.SearchStrategy[bytes]:
    """Parts of what a peer sends over TCP: frames of messages and commands, and what looks like them."""
    bodies = (
        st.binary(max_size=40)
        | frames(messages.ToRouter)
        | st.sampled_from([READY, b"\x05HELLO\x03clo\x01k", b"\x04PING\x00\x00x", b"\x08INITIATE"])
    )

    def framed(body: bytes, flags: int, size: int | None) -> bytes:
        size = len(body) if size is None else size
        return (struct.pack(">BQ", flags, size) if flags & 2 else bytes((flags, size & 255))) + body

    flags = st.sampled_from([0, 1, 2, 4, 6]) | st.integers(0, 255)
    sizes = st.none() | st.integers(0, 2**64 - 1)
    return st.sampled_from([GREETING, command(READY)]) | st.builds(framed, bodies, flags, sizes)


def test_anything_on_the_port_hurts_nobody(server: Server) -> None:
    """Greetings, commands and frames in any order, of any size, cut anywhere, with and without a farewell."""
    host, port = server.address.removeprefix("tcp://").split(":")
    began: st.SearchStrategy[list[bytes]] = st.sampled_from([[GREETING, command(READY)], []])

    @drawn(60)
    @given(began, st.lists(pieces(), max_size=6), st.booleans())
    def check(beginning: list[bytes], sent: list[bytes], aborts: bool) -> None:
        with socket.create_connection((host, int(port))) as peer:
            if aborts:
                peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            with contextlib.suppress(OSError):  # the server has closed it
                peer.sendall(b"".join([*beginning, *sent]))
        with Client(server.address, timeout=WAIT_S) as client:
            assert client.info().model

    check()


LAST = 2**62  # a sequence that is not drawn


def test_a_store_lives_whatever_a_worker_asks() -> None:
    """And gives all blocks back when the worker attaches anew."""
    said = frames(messages.ToStore) | values(inspect.type_info(ASKED)).map(msgspec.msgpack.encode)

    with running_store() as store:
        worker, _ = store.worker(0)

        @drawn(100)
        @given(st.lists(said, max_size=8))
        def check(sent: list[bytes]) -> None:
            for data in sent:
                worker.socket.send(data)
            worker.send(messages.Attach(0, os.getpid()))  # the store forgets what it held
            worker.send(messages.Describe(LAST))
            worker.send(messages.GetStoreStats())
            while getattr(worker.receive(1000 * WAIT_S), "sequence", None) != LAST:
                pass
            report = worker.receive(1000 * WAIT_S)
            assert isinstance(report, messages.StoreReport)
            assert (report.stats.free_blocks, report.stats.waiting) == (report.stats.blocks, 0)

        check()


def test_a_router_lives_whatever_a_worker_says(tiny_model: Path) -> None:
    """Its client's request ends, and a later one is served."""
    model = ResolvedModel("tiny", str(tiny_model), VOCABULARY, 100, "float32", "cpu", "auto", 0)
    said = frames(messages.FromChild)

    async def one(wire: Wire, sent: list[bytes]) -> None:
        client, (worker,) = wire.client(), wire.workers
        for name, data in (("fuzzed", sent), ("plain", [])):
            client.send(Generate(name, messages.Tokens([1]), SamplingParams(max_tokens=2)))
            run = await worker.order()
            while not isinstance(run, messages.Run):  # an Abort of the last one
                run = await worker.order()
            for message in data:
                worker.socket.send(message)
            worker.step(run.sequence, 65)
            worker.send(messages.Done(run.sequence, "length", messages.NO_STATS))
            answers = await client.to_end(name)
        assert isinstance(answers[-1], Finished)
        client.socket.close()

    with asyncio.Runner() as runner:
        context = running(model)
        wire = runner.run(context.__aenter__())
        try:

            @drawn(100)
            @given(st.lists(said, max_size=8))
            def check(sent: list[bytes]) -> None:
                runner.run(one(wire, sent))

            check()
        finally:
            runner.run(context.__aexit__(None, None, None))


def test_a_client_ends_its_stream_whatever_a_server_says() -> None:
    """With a result, or with one error."""
    answer = frames(messages.ToClient) | values(inspect.type_info(messages.ToClient))

    with zmq.Context() as context:
        fake = FakeServer(context)

        @drawn(100)
        @given(st.lists(answer, max_size=5))
        def check(sent: list[Any]) -> None:
            with Client(fake.address, timeout=WAIT_S) as client:
                stream = client.stream("a")
                name = stream.name
                while fake.receive().request != name:  # a Cancel of the last client
                    pass
                for message in sent:
                    if isinstance(message, dict):  # of this request, or of another one
                        message = msgspec.msgpack.encode(named(message, name))
                    fake.send(message)
                fake.send(Finished(name, "stop", messages.Usage(1, 0), messages.NO_STATS))
                with contextlib.suppress(CLOError):
                    for chunk in stream:
                        assert isinstance(chunk, messages.Chunk)

        check()
        fake.socket.close()


def named(message: dict[str, Any], name: str) -> dict[str, Any]:
    """The same message, of this request."""
    chunks = [[name, *chunk[1:]] for chunk in message.get("chunks", ())]
    return message | ({"request": name} if "request" in message else {"chunks": chunks})


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
numbers = st.integers(-1, 2**40) | st.floats(0.5, 100) | st.floats()
scaled = st.fixed_dictionaries(
    dict.fromkeys(("rope_theta", "factor", "original_max_position_embeddings"), numbers)
    | {"rope_type": st.sampled_from(["yarn", "linear", "llama3"])},
    optional=dict.fromkeys(
        ("low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "attention_factor"), numbers
    ),
)


@drawn(150)
@given(
    st.dictionaries(
        st.sampled_from([*CONFIG, "rope_scaling", "layer_types", "head_dim"]), json_values, max_size=2
    ),
    st.none()
    | scaled
    | st.dictionaries(st.sampled_from(ROPE), json_values | st.sampled_from(["yarn", "linear", "llama3"])),
)
def test_any_config_file_is_a_model_or_one_sentence(
    folder: Path, changes: dict[str, Any], rope: dict[str, Any] | None
) -> None:
    written = CONFIG | changes | ({} if rope is None else {"rope_parameters": rope})
    (folder / "config.json").write_text(json.dumps(written))
    with contextlib.suppress(ConfigError):
        resolve(ModelConfig(model=str(folder), device="cpu", load_format="dummy"))
        read = read_config(folder)
        kind = read.rope_parameters["rope_type"]
        if kind != "default":  # what is accepted can be computed with
            frequencies, scale = ROPE_INIT_FUNCTIONS[kind](read, torch.device("cpu"))
            assert (frequencies * float(scale)).isfinite().all()


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
