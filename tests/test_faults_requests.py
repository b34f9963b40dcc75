"""What clients can do wrong, against one server that has to stay well; docs/errors.md lists the outcomes."""

import asyncio
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq

from clo.runtime.client import AsyncClient, Client, Result
from clo.runtime.router import OTHER_BYTES, TOKEN_BYTES
from clo.runtime.wire.errors import CLOError, InvalidRequest, PromptTooLong, ProtocolError, RequestTimeout
from clo.runtime.wire.messages import (
    MAX_MESSAGE_BYTES,
    Cancel,
    Chat,
    Chunks,
    Failed,
    Generate,
    GetInfo,
    Info,
    Progress,
    SamplingParams,
    Text,
    Tokens,
    Turn,
)
from tests.faults import ENDLESS, SMALL, WAIT_S, assert_serves, garbage, raw, wait_until_idle
from tests.server import ROOT, Server

GENERATE = {"type": "Generate", "request": "r", "prompt": {"type": "Text", "text": "a"}}


@pytest.fixture(scope="module")
def shared(launch: Callable[..., AbstractContextManager[Server]], tiny_model: Path) -> Iterator[Server]:
    with launch("--model", str(tiny_model), *SMALL) as server:
        yield server


@pytest.fixture
def server(shared: Server) -> Iterator[Server]:
    """The shared server, which must serve normally and hold no blocks after each test."""
    yield shared
    assert_serves(shared)


@pytest.fixture
def client(server: Server) -> Iterator[Client]:
    with Client(server.address, timeout=WAIT_S) as client:
        yield client


REFUSED: dict[str, tuple[Any, dict[str, Any], type[CLOError], str]] = {
    "empty text": ("", {}, InvalidRequest, "The prompt is empty"),
    "no tokens": ([], {}, InvalidRequest, "The prompt is empty"),
    "token out of vocabulary": ([5, 512], {}, InvalidRequest, "Token id 512 is not in the vocabulary"),
    "negative token": ([-1], {}, InvalidRequest, r"Expected `int` >= 0 - at `\$.prompt.ids"),
    "longer than the model": ([1] * 4000, {"max_tokens": 97}, PromptTooLong, "context length is 4096"),
    "text longer than the model": ("a" * 99_999, {}, PromptTooLong, "99999 characters cannot fit"),
    "larger than the arena": ([1] * 1949, {"max_tokens": 100}, PromptTooLong, "raise --kv-size"),
    "value of a wrong type": (
        "a",
        {"temperature": "hot"},
        InvalidRequest,
        "Expected `float | null`, got `str`",
    ),
    "value out of range": ("a", {"top_p": 0}, InvalidRequest, r"Expected `float` > 0.0 - at `\$.sampling"),
    "not a number": ("a", {"temperature": float("nan")}, InvalidRequest, "Expected `float` >= 0.0"),
    "unknown option": ("a", {"beams": 4}, InvalidRequest, "unknown field `beams`"),
    "no prompt at all": (3.5, {}, InvalidRequest, "Expected `array`, got `float`"),
    "text that is no Unicode": ("\ud800", {}, InvalidRequest, "surrogates not allowed"),
    "over 64 MiB": ("a" * MAX_MESSAGE_BYTES, {}, InvalidRequest, "at most 67108864 are sent"),
}


@pytest.mark.parametrize(("prompt", "sampling", "error", "text"), REFUSED.values(), ids=REFUSED)
def test_a_wrong_request_is_refused(
    shared: Server, prompt: Any, sampling: dict[str, Any], error: type[CLOError], text: str
) -> None:
    with Client(shared.address, timeout=WAIT_S) as client, pytest.raises(error, match=text) as caught:
        client.generate(prompt, **sampling)
    assert type(caught.value) is error


UNREADABLE: dict[str, tuple[dict[str, Any], str]] = {
    "unknown message type": ({"type": "Generated"}, "Invalid value 'Generated' - at `$.type`"),
    "message for another process": ({"type": "Abort", "sequence": 0}, "Invalid value 'Abort'"),
    "missing field": ({"type": "Generate", "request": "r"}, "missing required field `prompt`"),
    "wrong type": (GENERATE | {"request": 7}, "Expected `str`, got `int` - at `$.request`"),
    "unknown field": (GENERATE | {"more": 1}, "unknown field `more`"),
    "id too long": (GENERATE | {"request": "r" * 65}, "length <= 64"),
}


@pytest.mark.parametrize(("message", "text"), UNREADABLE.values(), ids=UNREADABLE)
def test_a_message_that_cannot_be_read_is_answered(shared: Server, message: Any, text: str) -> None:
    """It says what is wrong and where; the request id is empty, as none can be relied on."""
    with raw(shared.address) as client:
        client.send(message)
        failed = client.refusal()
    assert (failed.request, failed.code) == ("", ProtocolError.code)
    assert text in failed.text


def test_random_bytes_from_a_client(server: Server) -> None:
    """Each message is answered, and the connection can still be used."""
    with raw(server.address) as client:
        for data in garbage():
            client.send(data)
            failed = client.refusal()
            assert (failed.request, failed.code) == ("", ProtocolError.code), data[:100]
        client.send(Generate("r", Tokens([1]), SamplingParams(max_tokens=2, ignore_eos=True)))
        assert client.last("r").usage.completion_tokens == 2


def test_several_frames(server: Server) -> None:
    with raw(server.address) as client:
        client.socket.send_multipart([b"", b"a"])
        assert "one frame, not 2" in client.refusal().text


@pytest.mark.parametrize(
    "data", [b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 100, bytes(5000)], ids=["http", "ff", "0"]
)
def test_bytes_that_are_no_zeromq(server: Server, data: bytes) -> None:
    host, port = server.address.removeprefix("tcp://").split(":")
    with socket.create_connection((host, int(port)), WAIT_S) as connection:
        connection.sendall(data)
        assert_serves(server)


def test_an_oversized_message_costs_only_its_sender_the_connection(server: Server, client: Client) -> None:
    chunks = iter(client.stream("a", **ENDLESS))
    next(chunks)
    with raw(server.address) as sender:
        monitor = sender.socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        sender.send(bytes(MAX_MESSAGE_BYTES + 1))
        assert monitor.poll(1000 * WAIT_S), "the server keeps the connection"
        sender.socket.disable_monitor()
    for _ in range(3):
        next(chunks)


def test_a_duplicate_request_id(server: Server) -> None:
    """The second is refused, the first goes on; an id may be used again after its end."""
    request = Generate("r", Text("a"), SamplingParams(max_tokens=30, ignore_eos=True))
    with raw(server.address) as client:
        client.send(request)
        client.send(request)
        failed = client.last("r")
        assert failed.code == InvalidRequest.code and "open already" in failed.text
        assert client.last("r").usage.completion_tokens == 30
        client.send(request)
        assert client.last("r").reason == "length"


def test_a_request_that_fits_after_others_end(server: Server) -> None:
    """It waits, its client hears "queued", and it completes."""

    async def run() -> None:
        waits = asyncio.Event()

        def on_progress(progress: Progress) -> None:
            if progress.stage == "queued":
                waits.set()

        async with AsyncClient(server.address, timeout=WAIT_S) as client:
            first = client.stream("a", **ENDLESS)
            second: asyncio.Task[Result] | None = None
            async for _ in first:
                if second is None:
                    second = asyncio.create_task(
                        client.generate([1] * 1600, max_tokens=5, ignore_eos=True, on_progress=on_progress)
                    )
                if waits.is_set():
                    waits.clear()
                    info = await client.info()
                    assert info.stores[0].free_blocks == 3
                    # At the store, or before it where other clients have asked for something lately.
                    assert info.workers[0].waiting == 1
                    assert not second.done()
                    await first.cancel()
            assert second is not None
            assert (await second).usage.completion_tokens == 5

    asyncio.run(run())


def test_a_cancelled_request(server: Server, client: Client) -> None:
    """In mid-stream it ends with what there is; while it waits it ends at once."""
    stream = client.stream("a", **ENDLESS)
    for number, _ in enumerate(stream, 1):
        if number == 3:
            waiting = client.stream("b", **ENDLESS)
            waiting.cancel()
            assert list(waiting) == []
            assert waiting.result.finish_reason == "cancelled"
            stream.cancel()
    assert stream.result.finish_reason == "cancelled"
    assert 3 <= stream.result.usage.completion_tokens < 1400


def test_a_request_cancelled_while_it_is_tokenised(server: Server) -> None:
    """A new one of the same id stands, although the first fails later."""
    with raw(server.address) as client:
        client.send(Generate("r", Text("é" * 11_000)))
        client.send(Cancel("r"))
        assert client.last("r").reason == "cancelled"
        client.send(Generate("r", Text("a"), SamplingParams(**ENDLESS)))
        steps = 0
        while steps < 50:  # by then the first is tokenised
            steps += isinstance(client.receive(), Chunks)
        client.send(Cancel("r"))
        assert client.last("r").reason == "cancelled"


def test_a_timeout_of_the_client_cancels_on_the_server(server: Server, client: Client) -> None:
    with pytest.raises(RequestTimeout, match=r"No answer within 0.5 s; the request was cancelled"):
        client.generate("a", timeout=0.5, **ENDLESS)
    with pytest.raises(RequestTimeout):
        client.generate("a", timeout=0, **ENDLESS)
    before = wait_until_idle(client)
    assert len(client.generate("a", max_tokens=2, ignore_eos=True).tokens) == 2
    assert wait_until_idle(client) == before + 2


def test_a_client_that_vanishes_in_mid_stream(server: Server, client: Client) -> None:
    """Killed, so that nobody cancels: its blocks come back."""
    before = wait_until_idle(client)
    code = f"""
from clo.runtime.client import Client
for _ in Client({server.address!r}).stream("a", max_tokens=1400, ignore_eos=True):
    print("streams", flush=True)
"""
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "streams\n"
        assert client.info().stores[0].free_blocks == 3
        other.send_signal(signal.SIGKILL)
    assert wait_until_idle(client) - before < 1400


def test_a_client_that_stops_reading(server: Server, client: Client) -> None:
    """Its requests are dropped with ``overloaded``; others are served while it floods the server. On a busy
    machine a request may be complete before the flood is large enough: then with another one."""
    for _ in range(5):
        end = flooded(server, client)
        if isinstance(end, Failed):
            break
    assert end.code == "overloaded" and "did not read its stream" in end.text


def flooded(server: Server, client: Client) -> Any:
    """How a request ends whose sender floods the server and reads nothing meanwhile."""
    with raw(server.address, RCVHWM=1, RCVBUF=4096, SNDTIMEO=100) as deaf:
        deaf.send(Generate("r", Text("a"), SamplingParams(**ENDLESS)))
        served = threading.Event()

        def flood() -> None:
            while not served.is_set():
                try:
                    deaf.send(bytes(1000))
                except zmq.Again:
                    continue

        thread = threading.Thread(target=flood)
        thread.start()
        try:
            for _ in range(3):
                assert len(client.generate("b", max_tokens=5, ignore_eos=True).tokens) == 5
            wait_until_idle(client)
        finally:
            served.set()
            thread.join()
        return deaf.last("r")


def test_floods_whose_senders_go_away_without_reading(server: Server, client: Client) -> None:
    """The server lives, and others are served meanwhile."""
    for number in range(5):
        with raw(server.address, SNDHWM=0) as flooding:
            for _ in range(100_000):
                flooding.socket.send(b"a")
            if number % 2:
                assert len(client.generate("b", max_tokens=5, ignore_eos=True).tokens) == 5


READ_BYTES = OTHER_BYTES + TOKEN_BYTES * 4096 - 1000  # of a prompt that is decoded
TURN_BYTES = len(msgspec.msgpack.encode(Turn("user", "")))
HEAVY: dict[str, tuple[Any, str]] = {
    "900,000 empty turns": (Chat([Turn("user", "")] * 900_000), "prompt_too_long"),
    "a chat as long as is read": (Chat([Turn("user", "")] * (READ_BYTES // TURN_BYTES)), "prompt_too_long"),
    "60 MB of text": (Text("a" * 60_000_000), "prompt_too_long"),
    "60 MB of tokens": (Tokens([1] * 60_000_000), "prompt_too_long"),
    "tokens as many as are read": (Tokens([1] * READ_BYTES), "prompt_too_long"),
}


@pytest.mark.parametrize(("prompt", "code"), HEAVY.values(), ids=HEAVY)
def test_a_heavy_prompt_is_refused_and_names_its_request(server: Server, prompt: Any, code: str) -> None:
    """Before it is decoded, where its size says enough. The connection goes on."""
    with raw(server.address) as client:
        for number in range(4):
            client.send(Generate(f"heavy {number}", prompt))
        for number in range(4):
            assert client.last(f"heavy {number}").code == code
        client.send(Generate("light", Text("a"), SamplingParams(max_tokens=2, ignore_eos=True)))
        assert client.last("light").usage.completion_tokens == 2


def test_a_client_with_too_much_open_is_told_so(server: Server) -> None:
    """Here by questions, which are answered after 2 s while the worker is suspended. A machine that is too
    busy to take in 10,000 before may answer them all."""
    (worker,) = server.children("gpu_worker")
    with raw(server.address, SNDHWM=0, RCVHWM=0) as client:
        worker.suspend()
        try:
            began = time.monotonic()
            for number in range(10_050):
                client.send(GetInfo(f"{number}"))
            first = client.receive()
            quick = time.monotonic() - began < 1.5
        finally:
            worker.resume()
        ends = [first, *(client.receive() for _ in range(10_049))]
        refused = [end for end in ends if isinstance(end, Failed)]
        assert refused or not quick
        assert all(end.code == "overloaded" and "10000 requests" in end.text for end in refused)
        assert sum(isinstance(end, Info) for end in ends) >= 10_000
        client.send(GetInfo("again"))
        assert isinstance(client.receive(), Info)


def test_many_requests_at_once(server: Server) -> None:
    """None is lost on the way, however many a client sends before the server can look."""

    async def run() -> None:
        async with AsyncClient(server.address, timeout=WAIT_S) as client:
            for stream in [client.stream([600]) for _ in range(3000)]:
                with pytest.raises(InvalidRequest, match="Token id 600"):
                    await anext(aiter(stream))

    asyncio.run(run())
