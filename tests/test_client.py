"""The client alone: servers that are not there, do not answer or go away, and a client that is closed."""

import asyncio
import gc
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
import zmq

from clo.runtime import connection
from clo.runtime.client import AsyncClient, Client
from clo.runtime.stream import AsyncStream
from clo.runtime.traffic import TrafficMeter
from clo.runtime.wire.errors import CLOError, InvalidRequest, ProtocolError, RequestTimeout, ServerUnreachable
from clo.runtime.wire.messages import (
    NO_STATS,
    Cancel,
    Chat,
    Chunk,
    Chunks,
    Failed,
    Finished,
    Generate,
    Info,
    Logprob,
    Message,
    Progress,
    PromptChunk,
    SamplingParams,
    StructuredOutputs,
    ToRouter,
    Usage,
)
from clo.runtime.wire.sockets import Decoder, configure, encode
from tests.faults import WAIT_S, error_of
from tests.server import ROOT


class FakeServer:
    """A router that answers what a test tells it to."""

    def __init__(self, context: zmq.Context) -> None:
        self.socket: zmq.Socket[bytes] = context.socket(zmq.ROUTER)
        configure(self.socket)
        self.address = f"tcp://127.0.0.1:{self.socket.bind_to_random_port('tcp://127.0.0.1')}"
        self._peer = b""
        self._decode: Decoder[ToRouter] = Decoder(ToRouter)

    def receive(self) -> ToRouter:
        assert self.socket.poll(1000 * WAIT_S), "the client sent nothing"
        self._peer, data = self.socket.recv_multipart()
        return self._decode(data)

    def send(self, message: Message | bytes) -> None:
        data = message if isinstance(message, bytes) else encode(message)
        self.socket.send_multipart([self._peer, data])


@pytest.fixture
def server() -> Iterator[FakeServer]:
    context: zmq.Context = zmq.Context()
    yield FakeServer(context)
    context.destroy(linger=0)


@pytest.mark.parametrize("address", ["nowhere", "tcp://127.0.0.1", "smtp://127.0.0.1:1"])
def test_an_address_that_is_none(address: str) -> None:
    threads = threading.active_count()
    with pytest.raises(ServerUnreachable, match=f"'{address}' is not an address"):
        Client(address)
    assert threading.active_count() == threads


def test_no_server_at_the_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error after 5 s of silence, here 0.3 s."""
    monkeypatch.setattr(connection, "SILENCE_SECONDS", 0.3)
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))  # it does not listen
        address = f"tcp://127.0.0.1:{reserved.getsockname()[1]}"
        with Client(address) as client:
            with pytest.raises(ServerUnreachable, match=f"No server answers at {address}"):
                client.info()
            with pytest.raises(ServerUnreachable, match=f"Nothing heard from {address} for 0.3 s"):
                client.generate("a")


@pytest.mark.parametrize("answer", [b"\xc1", encode(Cancel("a")), b"\xa4\xff\xff\xff\xff"])
def test_a_server_that_speaks_otherwise(server: FakeServer, answer: bytes) -> None:
    """An error at once, and the connection can still be used."""
    with Client(server.address) as client:
        stream = client.stream("a")
        server.receive()
        server.send(answer)
        assert type(error_of(stream)) is ProtocolError
        assert isinstance(server.receive(), Cancel)
        stream = client.stream("a")
        server.send(Finished(server.receive().request, "stop", Usage(1, 0), NO_STATS))
        assert list(stream) == []


TOOL_CALL = {"type": "function", "id": "1", "function": {"name": "f", "arguments": '{"x": 1}'}}


@pytest.mark.parametrize(
    ("prompt", "options", "fields"),
    [
        ("a", {"stop": "x"}, {"stop": ["x"]}),
        ("a", {"stop": ["x", "y"]}, {"stop": ["x", "y"]}),
        ("a", {"stop": None, "temperature": None, "max_tokens": None}, {}),
        (
            "a",
            {"top_k": -1, "temperature": 1, "logprobs": 0},
            {"top_k": -1, "temperature": 1.0, "logprobs": 0},
        ),
        (
            "a",
            {"presence_penalty": None, "logit_bias": None, "min_tokens": None, "stop_token_ids": None},
            {},
        ),
        ("a", {"logit_bias": {"15": -100, 7: 1}, "n": 1}, {"logit_bias": {15: -100.0, 7: 1.0}}),
        ("a", {"response_format": None}, {}),
        ("a", {"response_format": {"type": "text"}}, {}),
        (
            "a",
            {"response_format": {"type": "json_object"}},
            {"structured_outputs": StructuredOutputs(json_object=True)},
        ),
        (
            "a",
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "n", "strict": True, "schema": {"b": 1, "a": [2]}},
                }
            },
            {"structured_outputs": StructuredOutputs(json={"b": 1, "a": [2]})},
        ),
        (
            "a",
            {"structured_outputs": {"choice": ["x"]}, "response_format": {"type": "text"}},
            {"structured_outputs": StructuredOutputs(choice=["x"])},
        ),
        ([{"role": "tool", "content": None, "tool_call_id": "1"}], {}, {}),
        ([{"role": "assistant", "content": None, "tool_calls": [TOOL_CALL]}], {}, {}),
        ([{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]}], {}, {}),
        ([{"role": "user", "content": [{"type": "text", "text": "x"}], "name": "n"}], {}, {}),
        ([{"role": "user", "content": "x"}], {"chat_template_kwargs": {"enable_thinking": False}}, {}),
    ],
)
def test_requests_as_vllm_takes_them(
    server: FakeServer, prompt: Any, options: dict[str, Any], fields: dict[str, Any]
) -> None:
    with Client(server.address) as client:
        _stream = client.stream(prompt, **options)
        request = server.receive()
        assert isinstance(request, Generate)
        assert request.sampling == SamplingParams(**fields)
        if isinstance(request.prompt, Chat):
            variables = json.loads(request.prompt.chat_template_kwargs or "{}")
            assert variables == options.get("chat_template_kwargs", {})
            for turn, given in zip(request.prompt.turns, prompt, strict=True):
                assert (turn.role, turn.name) == (given["role"], given.get("name"))
                if turn.tool_calls is not None:
                    assert json.loads(turn.tool_calls[0].function.arguments) == {"x": 1}


@pytest.mark.parametrize(
    ("prompt", "options", "sentence"),
    [
        ("a", {"stop": ""}, "length >= 1"),
        ("a", {"stop": 5}, "Expected `array`, got `int`"),
        ("a", {"top_k": -2}, "`int` >= -1"),
        ("a", {"chat_template_kwargs": {"enable_thinking": False}}, "go with chat messages"),
        ("a", {"min_p": 1.5}, "`float` <= 1.0 - at `$.sampling.min_p`"),
        ("a", {"min_p": -0.1}, "`float` >= 0.0 - at `$.sampling.min_p`"),
        ("a", {"presence_penalty": 2.1}, "`float` <= 2.0 - at `$.sampling.presence_penalty`"),
        ("a", {"frequency_penalty": -2.1}, "`float` >= -2.0 - at `$.sampling.frequency_penalty`"),
        ("a", {"repetition_penalty": 0}, "`float` > 0.0 - at `$.sampling.repetition_penalty`"),
        ("a", {"repetition_penalty": float("nan")}, "`$.sampling.repetition_penalty`"),
        ("a", {"logit_bias": {5: 101}}, "`float` <= 100.0 - at `$.sampling.logit_bias"),
        ("a", {"logit_bias": {"x": 1}}, "Expected `int`, got `str` - at `key` in `$.sampling.logit_bias`"),
        ("a", {"logit_bias": {-1: 1}}, "Expected `int` >= 0 - at `key` in `$.sampling.logit_bias`"),
        ("a", {"logit_bias": dict.fromkeys(range(1025), 1.0)}, "`object` of length <= 1024"),
        ("a", {"min_tokens": -1}, "`int` >= 0 - at `$.sampling.min_tokens`"),
        ("a", {"max_tokens": -1}, "`int` >= 0 - at `$.sampling.max_tokens`"),
        ("a", {"stop_token_ids": [-1]}, r"`int` >= 0 - at `$.sampling.stop_token_ids"),
        ("a", {"stop_token_ids": [1] * 129}, "`array` of length <= 128"),
        ("a", {"prompt_logprobs": 21}, "`int` <= 20 - at `$.sampling.prompt_logprobs`"),
        ("a", {"n": 2}, "use generate() or streams() with n"),
        ("a", {"structured_outputs": {"xml": "a"}}, "unknown field `xml`"),
        ("a", {"structured_outputs": {"x\nml": "a"}}, "unknown field `x ml`"),  # in one line
        ("a", {"response_format": {"type": "xml"}}, "response_format is not valid: Invalid value 'xml'"),
        ("a", {"response_format": "json"}, "response_format is not valid"),
        ("a", {"response_format": {"type": "json_schema"}}, "missing required field `json_schema`"),
        (
            "a",
            {"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}},
            "say the same",
        ),
        ([{"role": "user", "content": 5}], {}, r"Expected `str | array | null`, got `int`"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], {}, "'image_url'"),
        ([{"role": "user", "content": "a"}], {"chat_template_kwargs": {"x": object()}}, "object"),
        ([{"role": "user", "content": "a"}], {"chat_template_kwargs": {"x": "\ud800"}}, "surrogates"),
        (
            [{"role": "user", "content": "a"}],
            {"chat_template_kwargs": {"x": "y" * 2**20}},
            "length <= 1048576",
        ),
        ([{"role": "user", "content": "a"}], {"chat_template_kwargs": 5}, "must be a dict"),
    ],
)
def test_requests_that_are_not_valid_are_not_sent(
    server: FakeServer, prompt: Any, options: dict[str, Any], sentence: str
) -> None:
    with Client(server.address) as client, pytest.raises(InvalidRequest, match=re.escape(sentence)):
        client.stream(prompt, **options)
    assert not server.socket.poll(0)


def test_a_connection_that_breaks_ends_every_open_request(server: FakeServer) -> None:
    with Client(server.address) as client:
        streams = [client.stream("a"), client.stream("b")]
        for _ in streams:
            server.receive()
        server.socket.close()
        for stream in streams:
            assert "was lost; is the server running?" in str(error_of(stream))


def test_an_error_without_a_request_ends_every_open_request(server: FakeServer) -> None:
    with Client(server.address) as client:
        streams = [client.stream("a"), client.stream("b")]
        for _ in streams:
            server.receive()
        server.send(Failed("", "a code of later versions", "No."))
        for stream in streams:
            error = error_of(stream)
            assert type(error) is CLOError and str(error) == "No."


def test_leaving_a_stream_early_cancels_it(server: FakeServer) -> None:
    with Client(server.address) as client:
        stream = client.stream("a")
        request = server.receive().request
        with pytest.raises(RuntimeError, match="has not ended"):
            _ = stream.result
        server.send(Chunks([Chunk(request, "x", [1], None)]))
        for chunk in stream:
            assert chunk.text == "x"
            break
        assert server.receive() == Cancel(request)
        server.send(Finished(request, "cancelled", Usage(1, 1), NO_STATS))


@pytest.mark.parametrize("timeout", [None, 1000.0])
def test_a_stream_that_is_dropped_unread_is_cancelled(server: FakeServer, timeout: float | None) -> None:
    """Of a client of each kind, also where a time limit would end it much later."""
    with Client(server.address, timeout=timeout) as client:
        stream = client.stream("a")
        request = server.receive().request
        server.send(Chunks([Chunk(request, "x", [1], None)]))
        del stream
        assert server.receive() == Cancel(request)
        server.send(Chunks([Chunk(request, "y", [2], None)]))
        server.send(Finished(request, "cancelled", Usage(1, 2), NO_STATS))
        kept = client.stream("b")
        server.send(Finished(server.receive().request, "stop", Usage(1, 0), NO_STATS))
        assert list(kept) == []

    async def run() -> None:
        async with AsyncClient(server.address, timeout=timeout) as client:
            stream = client.stream("a")
            request = (await asyncio.to_thread(server.receive)).request
            del stream
            assert await asyncio.to_thread(server.receive) == Cancel(request)

    asyncio.run(run())


def test_a_task_that_nobody_holds_gets_its_answer(server: FakeServer) -> None:
    async def run() -> None:
        async with AsyncClient(server.address) as client:
            answered: list[str] = []

            async def ask() -> None:
                answered.append((await client.generate("a")).finish_reason)

            asyncio.create_task(ask())  # noqa: RUF006
            request = (await asyncio.to_thread(server.receive)).request
            gc.collect()
            server.send(Finished(request, "stop", Usage(1, 0), NO_STATS))
            while not answered:
                await asyncio.sleep(0.01)
            assert answered == ["stop"]

    asyncio.run(run())


def test_closing_the_client_ends_its_open_streams(server: FakeServer) -> None:
    """A thread that reads one is told, and the server hears ``Cancel``."""
    client = Client(server.address)
    stream = client.stream("a")
    errors: list[CLOError] = []
    reader = threading.Thread(target=lambda: errors.append(error_of(stream)))
    reader.start()
    request = server.receive()
    assert isinstance(request, Generate)
    client.close()
    reader.join(WAIT_S)
    assert [str(error) for error in errors] == ["The client was closed."]
    assert server.receive() == Cancel(request.request)
    client.close()  # a second time does nothing


def test_closing_an_async_client_ends_its_open_requests(server: FakeServer) -> None:
    async def run() -> None:
        client = AsyncClient(server.address)
        request = asyncio.create_task(client.generate("a"))
        await asyncio.to_thread(server.receive)
        await client.close()
        with pytest.raises(ServerUnreachable, match="closed"):
            await request

    asyncio.run(run())


def test_threads_share_a_client(server: FakeServer) -> None:
    """Each gets the answer to its own request, in whatever order they come."""
    results: dict[str, str] = {}

    def ask(client: Client, prompt: str) -> None:
        results[prompt] = client.generate(prompt, timeout=WAIT_S).text

    with Client(server.address) as client:
        threads = [threading.Thread(target=ask, args=(client, str(number))) for number in range(8)]
        for thread in threads:
            thread.start()
        requests = [server.receive() for _ in threads]
        for request in reversed(requests):
            assert isinstance(request, Generate)
            chunk = Chunk(request.request, f"answer to {request.prompt.text}", [1], None)  # type: ignore[union-attr]
            server.send(Chunks([chunk]))
            server.send(Finished(request.request, "stop", Usage(1, 1), NO_STATS))
        for thread in threads:
            thread.join(WAIT_S)
    assert results == {str(number): f"answer to {number}" for number in range(8)}


# ------------------------------------------------------------------------------ several completions


def test_several_completions_are_requests_with_seeds_of_their_own(server: FakeServer) -> None:
    def answer(count: int) -> list[Generate]:
        requests = [server.receive() for _ in range(count)]
        for number, request in enumerate(requests):
            server.send(Chunks([Chunk(request.request, f"text {number}", [number], None)]))
            server.send(Finished(request.request, "stop", Usage(1, 1), NO_STATS))
        return [request for request in requests if isinstance(request, Generate)]

    async def run() -> None:
        async with AsyncClient(server.address) as client:
            asked = asyncio.create_task(client.generate("a", n=3, seed=2**63 - 2, top_p=0.5))
            requests = await asyncio.to_thread(answer, 3)
            params = [SamplingParams(seed=seed, top_p=0.5) for seed in (2**63 - 2, 2**63 - 1, 0)]
            assert [request.sampling for request in requests] == params
            result = await asked
            assert [choice.text for choice in result.choices] == ["text 0", "text 1", "text 2"]
            assert result.text == "text 0" and result.choices[1].choices == [result.others[0]]
            for seed, expected in ((-2, [-2, 2**63 - 1]), (-1, [-1, -1])):
                asked = asyncio.create_task(client.generate("a", n=2, seed=seed))
                requests = await asyncio.to_thread(answer, 2)
                assert [request.sampling.seed for request in requests] == expected
                await asked

    asyncio.run(run())
    with Client(server.address) as client:
        streams = client.streams("a", n=2)
        assert [request.sampling for request in answer(2)] == [SamplingParams()] * 2, "each gets its own"
        assert [[piece.text for piece in stream] for stream in streams] == [["text 0"], ["text 1"]]


def test_where_one_of_several_completions_fails_the_others_are_cancelled(server: FakeServer) -> None:
    async def run() -> None:
        async with AsyncClient(server.address) as client:
            asked = asyncio.create_task(client.generate("a", n=3))
            requests = [(await asyncio.to_thread(server.receive)).request for _ in range(3)]
            server.send(Failed(requests[1], "overloaded", "No."))
            with pytest.raises(CLOError, match="No"):
                await asked
            left = {(await asyncio.to_thread(server.receive)).request for _ in range(2)}
            assert left == {requests[0], requests[2]}

    asyncio.run(run())


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"n": 0}, "n is 0, and must be a whole number from 1 to 128"),
        ({"n": 129}, "n is 129"),
        ({"n": "2"}, "n is '2'"),
        ({"n": 2, "temperature": 0}, "all completions are the same"),
    ],
)
def test_numbers_of_completions_that_cannot_be(
    server: FakeServer, options: dict[str, Any], sentence: str
) -> None:
    with Client(server.address) as client, pytest.raises(InvalidRequest, match=sentence):
        client.generate("a", **options)


def test_log_probabilities_of_the_prompt_are_part_of_the_result(server: FakeServer) -> None:
    scores = [None, Logprob(2, -1.0, []), Logprob(3, -2.0, [])]
    with Client(server.address) as client:
        stream = client.stream([1, 2, 3], max_tokens=0, prompt_logprobs=0)
        request = server.receive().request
        server.send(PromptChunk(request, [1, 2], scores[:2]))
        server.send(PromptChunk(request, [3], scores[2:]))
        server.send(Finished(request, "length", Usage(3, 0), NO_STATS))
        assert list(stream) == []
        assert (stream.result.prompt_tokens, stream.result.prompt_logprobs) == ([1, 2, 3], scores)
        assert (stream.result.tokens, stream.result.text) == ([], "")


# ------------------------------------------------------------------------------------ pieces


def scored(request: str, text: str, token: int) -> Chunk:
    return Chunk(request, text, [token], [Logprob(token, -float(token), [])])


def test_what_arrives_together_is_one_piece_and_nothing_is_lost(server: FakeServer) -> None:
    """For a stream of each kind, however the tokens come."""

    async def read(client: AsyncClient) -> None:
        stream = client.stream("a")
        request = (await asyncio.to_thread(server.receive)).request
        server.send(Chunks([scored(request, "x", 1), scored("somebody else", "?", 9)]))
        pieces = aiter(stream)
        assert await anext(pieces) == scored(request, "x", 1)
        server.send(Chunks([scored(request, "y", 2), scored(request, "", 3)]))
        server.send(Chunks([scored(request, "z", 4)]))
        server.send(Finished(request, "stop", Usage(1, 4), NO_STATS))
        rest = [piece async for piece in pieces]
        assert "".join(piece.text for piece in rest) == "yz"
        assert [token for piece in rest for token in piece.tokens] == [2, 3, 4]
        assert [entry.token for piece in rest for entry in piece.logprobs or ()] == [2, 3, 4]
        assert (stream.result.text, stream.result.tokens) == ("xyz", [1, 2, 3, 4])
        assert stream.result.logprobs is not None
        assert [entry.logprob for entry in stream.result.logprobs] == [-1.0, -2.0, -3.0, -4.0]

    async def run() -> None:
        async with AsyncClient(server.address) as client:
            await read(client)

    asyncio.run(run())
    with Client(server.address) as client:
        stream = client.stream("a")
        request = server.receive().request
        for token in range(1, 200):
            server.send(Chunks([Chunk(request, f"{token} ", [token], None)]))
        server.send(Chunks([Chunk(request, "end", [], None)]))
        server.send(Finished(request, "length", Usage(1, 199), NO_STATS))
        pieces = list(stream)
        expected = "".join(f"{token} " for token in range(1, 200)) + "end"
        assert "".join(piece.text for piece in pieces) == stream.result.text == expected
        assert [token for piece in pieces for token in piece.tokens] == list(range(1, 200))
        assert stream.result.tokens == list(range(1, 200)) and stream.result.logprobs is None


def test_a_stream_that_was_read_gives_nothing_more(server: FakeServer) -> None:
    """Its result stays; the error of one that failed is raised again."""

    async def run() -> None:
        async with AsyncClient(server.address) as client:
            stream = client.stream("a")
            server.send(
                Finished((await asyncio.to_thread(server.receive)).request, "stop", Usage(1, 0), NO_STATS)
            )
            for _ in range(2):
                assert [piece async for piece in stream] == []
                assert stream.result.finish_reason == "stop"

    asyncio.run(run())
    with Client(server.address) as client:
        stream, failing = client.stream("a"), client.stream("b")
        requests = [server.receive().request for _ in range(2)]
        server.send(Chunks([Chunk(requests[0], "x", [1], None)]))
        server.send(Finished(requests[0], "stop", Usage(1, 1), NO_STATS))
        server.send(Failed(requests[1], "internal", "No."))
        assert [piece.text for piece in stream] == ["x"]
        assert list(stream) == []
        assert stream.result.text == "x"
        for _ in range(2):
            assert str(error_of(failing)) == "No."


def test_a_stream_that_was_left_can_be_read_to_its_end(server: FakeServer) -> None:
    with Client(server.address) as client:
        stream = client.stream("a")
        request = server.receive().request
        server.send(Chunks([Chunk(request, "x", [1], None)]))
        assert next(iter(stream)).text == "x"
        assert server.receive() == Cancel(request)
        server.send(Chunks([Chunk(request, "y", [2], None)]))
        server.send(Finished(request, "cancelled", Usage(1, 2), NO_STATS))
        assert [piece.text for piece in stream] == ["y"]
        assert (stream.result.text, stream.result.finish_reason) == ("xy", "cancelled")


def test_a_server_that_ends_a_request_with_something_else(server: FakeServer) -> None:
    info = Info("", "ready", "tiny", 1, 1, "clo", [], [], 0, TrafficMeter().traffic())
    with Client(server.address) as client:
        stream = client.stream("a")
        server.send(msgspec.structs.replace(info, request=server.receive().request))
        assert type(error_of(stream)) is ProtocolError
        errors: list[CLOError] = []

        def ask() -> None:
            with pytest.raises(ProtocolError) as caught:
                client.info()
            errors.append(caught.value)

        asking = threading.Thread(target=ask)
        asking.start()
        server.send(Finished(server.receive().request, "stop", Usage(1, 0), NO_STATS))
        asking.join(WAIT_S)
        assert "GetInfo with Finished" in str(errors[0])


def test_two_tasks_cannot_read_one_stream(server: FakeServer) -> None:
    """The second is told; the first goes on."""

    async def read(stream: AsyncStream) -> list[str]:
        return [piece.text async for piece in stream]

    async def run() -> None:
        async with AsyncClient(server.address) as client:
            stream = client.stream("a")
            request = (await asyncio.to_thread(server.receive)).request
            first = asyncio.create_task(read(stream))
            await asyncio.sleep(0)
            with pytest.raises(RuntimeError, match="read already"):
                await read(stream)
            server.send(Chunks([Chunk(request, "x", [1], None)]))
            server.send(Finished(request, "stop", Usage(1, 1), NO_STATS))
            assert "".join(await first) == "x"

    asyncio.run(run())


# -------------------------------------------------------------------------- progress, silence, time


def test_progress_goes_to_whoever_wants_it(server: FakeServer) -> None:
    """Before the pieces that come after it, also for those who want the whole answer. An error of theirs ends
    the request."""

    async def run() -> None:
        async with AsyncClient(server.address) as client:
            heard: list[Progress] = []
            asked = asyncio.create_task(client.generate("a", on_progress=heard.append))
            request = (await asyncio.to_thread(server.receive)).request
            progress = [Progress(request, "queued", 0, 5), Progress(request, "prefill", 5, 5)]
            for message in progress:
                server.send(message)
            while heard != progress:
                await asyncio.sleep(0.01)
            server.send(Chunks([Chunk(request, "x", [1], None), Chunk(request, "y", [2], None)]))
            server.send(Finished(request, "stop", Usage(5, 2), NO_STATS))
            assert (await asked).text == "xy"

            def refuse(_: Progress) -> None:
                raise KeyError("not that")

            asked = asyncio.create_task(client.generate("a", on_progress=refuse))
            request = (await asyncio.to_thread(server.receive)).request
            server.send(Progress(request, "queued", 0, 5))
            with pytest.raises(KeyError):
                await asked
            assert await asyncio.to_thread(server.receive) == Cancel(request)

    asyncio.run(run())
    told: list[str] = []

    def refuse_first(progress: Progress) -> None:
        told.append(progress.stage)
        if len(told) == 1:
            raise KeyError("not yet")

    with Client(server.address) as client:
        stream = client.stream("a", on_progress=refuse_first)
        request = server.receive().request
        server.send(Progress(request, "queued", 0, 5))
        with pytest.raises(KeyError):
            next(iter(stream))
        assert server.receive() == Cancel(request)
        server.send(Progress(request, "prefill", 5, 5))
        server.send(Chunks([Chunk(request, "x", [1], None)]))
        server.send(Finished(request, "cancelled", Usage(5, 1), NO_STATS))
        assert [piece.text for piece in stream] == ["x"]
        assert (stream.result.text, told) == ("x", ["queued", "prefill"])


def test_a_request_of_which_nothing_is_heard_fails_alone(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server goes on about another one."""
    monkeypatch.setattr(connection, "SILENCE_SECONDS", 1.0)

    async def run() -> None:
        async with AsyncClient(server.address) as client:
            heard = asyncio.create_task(client.generate("a"))
            request = (await asyncio.to_thread(server.receive)).request
            silent = asyncio.create_task(client.generate("b"))
            forgotten = (await asyncio.to_thread(server.receive)).request
            while not silent.done():
                server.send(Chunks([Chunk(request, "", [1], None)]))
                await asyncio.sleep(0.05)
            with pytest.raises(ServerUnreachable, match="for 1 s"):
                await silent
            assert await asyncio.to_thread(server.receive) == Cancel(forgotten)
            server.send(Finished(request, "stop", Usage(1, 1), NO_STATS))
            assert (await heard).finish_reason == "stop"

    asyncio.run(run())


def test_a_client_that_is_busy_for_long_does_not_blame_the_server(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What has arrived meanwhile is read before anything is said about silence."""
    monkeypatch.setattr(connection, "SILENCE_SECONDS", 0.3)

    async def run() -> None:
        async with AsyncClient(server.address) as client:
            for busy in (0.31, 0.5, 2.0):
                asked = asyncio.create_task(client.generate("a"))
                await asyncio.sleep(0)
                request = server.receive().request
                time.sleep(busy / 2)
                server.send(Progress(request, "queued", 0, 5))
                time.sleep(busy / 2)
                server.send(Finished(request, "stop", Usage(1, 0), NO_STATS))
                assert (await asked).finish_reason == "stop"

    asyncio.run(run())


@pytest.mark.parametrize("times", [1, 2])
def test_an_answer_that_is_late_because_the_client_was_stopped_counts(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    """ZeroMQ's thread was stopped as well and hands it over a moment after the event loop has gone on; the
    process may be stopped again before that."""
    monkeypatch.setattr(connection, "SILENCE_SECONDS", 0.3)

    async def run() -> None:
        async with AsyncClient(server.address) as client:
            asked = asyncio.create_task(client.generate("a"))
            await asyncio.sleep(0)
            request = server.receive().request
            for _ in range(times):
                time.sleep(0.5)
                for _ in range(3):  # turns of the event loop, in which the silence is seen
                    await asyncio.sleep(0)
            await asyncio.sleep(0.03)
            server.send(Finished(request, "stop", Usage(1, 0), NO_STATS))
            assert (await asked).finish_reason == "stop"

    asyncio.run(run())


def test_a_client_process_that_was_stopped_for_long_gets_its_answer(server: FakeServer) -> None:
    """By a signal, for longer than a silent server is trusted."""
    code = f"""
from clo.runtime import connection
from clo.runtime.client import Client
connection.SILENCE_SECONDS = 1.0
with Client({server.address!r}) as client:
    print(client.generate("a").finish_reason)
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        request = server.receive().request
        process.send_signal(signal.SIGSTOP)
        time.sleep(1.5)
        server.send(Finished(request, "stop", Usage(1, 0), NO_STATS))
        time.sleep(0.1)
        process.send_signal(signal.SIGCONT)
        assert process.communicate(timeout=WAIT_S)[0] == "stop\n"


def test_a_request_that_takes_too_long_is_cancelled(server: FakeServer) -> None:
    """Whatever the server says, and also where nobody reads the stream; what comes in time counts."""
    with Client(server.address, timeout=WAIT_S) as client:
        stream = client.stream("a", timeout=0.3)
        request = server.receive().request
        server.send(Chunks([Chunk(request, "x", [1], None)]))
        assert server.receive() == Cancel(request)
        pieces = iter(stream)
        assert next(pieces).text == "x"
        with pytest.raises(RequestTimeout, match=r"No answer within 0\.3 s"):
            next(pieces)
        stream = client.stream("a", timeout=1.0)
        server.send(Finished(server.receive().request, "stop", Usage(1, 0), NO_STATS))
        time.sleep(1.1)
        assert list(stream) == [] and stream.result.finish_reason == "stop"


def test_a_closed_client_says_so(server: FakeServer) -> None:
    async def run() -> None:
        client = AsyncClient(server.address)
        await client.close()
        await client.close()
        for work in (client.generate("a"), client.info()):
            with pytest.raises(ServerUnreachable, match="closed"):
                await work

    asyncio.run(run())


@pytest.mark.parametrize("use", ["list(iter(client.stream('a')))", "client.stream('a')", "client.info()"])
def test_a_process_ends_though_its_client_was_not_closed(server: FakeServer, use: str) -> None:
    """With a thread that is in the middle of something."""
    code = f"""
import threading
from clo.runtime.client import Client
client = Client({server.address!r})
threading.Thread(target=lambda: {use}, daemon=True).start()
input()
"""
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE) as process:
        server.receive()
        assert process.stdin is not None
        process.stdin.write(b"\n")
        process.stdin.close()
        assert process.wait(WAIT_S) == 0
