"""``benchmarks.serve`` as a client of other servers: a small HTTP server over a real socket answers it."""

import asyncio
import json
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

pytest.importorskip("aiohttp", reason="peers are asked with aiohttp: pip install -e '.[bench]'")

from benchmarks.result import Result
from benchmarks.serve.__main__ import measure_peer
from benchmarks.serve.cases import cases_of
from benchmarks.serve.endpoint import EndpointError
from benchmarks.serve.peer import EventStream, Peer, session
from benchmarks.serve.prompts import Prompts
from benchmarks.serve.traces import Trace
from tests.test_serve import TINY

WAIT_S = 30.0
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
END = b"0\r\n\r\n"

Answer = Callable[[asyncio.StreamWriter, dict], Awaitable[None]]


def event(text: str = "", finish: str | None = None, seen: int | None = None, choice: bool = True) -> bytes:
    """One event as vLLM sends it; ``seen`` is the number of tokens so far."""
    choices = [{"index": 0, "text": text, "logprobs": None, "finish_reason": finish}] if choice else []
    usage = None if seen is None else {"prompt_tokens": 3, "completion_tokens": seen}
    data = {"id": "cmpl-1", "object": "text_completion", "model": "m", "choices": choices, "usage": usage}
    return b"data: " + json.dumps(data).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"


async def send(writer: asyncio.StreamWriter, *pieces: bytes) -> None:
    """Each piece as a chunk of its own."""
    for piece in pieces:
        writer.write(b"%x\r\n%s\r\n" % (len(piece), piece))
        await writer.drain()
        await asyncio.sleep(0.01)


@asynccontextmanager
async def serving(answer: Answer) -> AsyncIterator[tuple[str, list[dict]]]:
    """A server that answers every request with ``answer(writer, body)``; yields its URL and the bodies that
    it was sent."""
    bodies: list[dict] = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"POST /v1/completions HTTP/1.1\r\n")
        length = next(
            int(line.partition(b":")[2])
            for line in head.split(b"\r\n")
            if line.lower().startswith(b"content-length:")
        )
        body = json.loads(await reader.readexactly(length))
        bodies.append(body)
        await answer(writer, body)
        writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}", bodies
    finally:
        server.close()


def ask(answer: Answer, tokens: int = 3) -> tuple[Trace, dict]:
    """The trace of one request, and what the server was sent."""

    async def run() -> tuple[Trace, dict]:
        async with serving(answer) as (url, bodies), session() as client:
            trace = Trace()
            peer = Peer(client, url + "/", "m")
            await asyncio.wait_for(trace.follow(peer.stream([5, 6, 7], tokens)), WAIT_S)
            return trace, bodies[0]

    return asyncio.run(run())


def counts(trace: Trace) -> list[int]:
    return [tokens for _, tokens in trace.arrivals]


def test_a_request_asks_for_exactly_these_tokens() -> None:
    async def answer(writer: asyncio.StreamWriter, body: dict) -> None:
        writer.write(HEAD)
        await send(writer, event("a", seen=1), event("b", seen=2), event("", finish="length", seen=3), DONE)
        writer.write(END)

    trace, body = ask(answer)
    assert counts(trace) == [1, 2, 3]
    assert body["prompt"] == [5, 6, 7] and body["model"] == "m"
    assert (body["max_tokens"], body["temperature"], body["ignore_eos"], body["stream"]) == (3, 0, True, True)


def test_tokens_that_come_together_are_counted_one_by_one() -> None:
    """One event may hold several, one chunk several events, and one event several chunks; between them come
    comments that keep the connection alive."""
    whole = event("cd", seen=6)

    async def answer(writer: asyncio.StreamWriter, body: dict) -> None:
        writer.write(HEAD)
        await send(writer, b": ping\n\n", event("", seen=0), event("ab", seen=2))
        await send(writer, event("x", seen=3) + event(seen=4))
        await send(writer, whole[:20], whole[20:-1], whole[-1:], event(choice=False, seen=6) + DONE)
        writer.write(END)

    assert counts(ask(answer, 6)[0]) == [2, 3, 4, 6]


def test_without_running_counts_an_event_is_a_token_and_the_last_count_holds() -> None:
    async def answer(writer: asyncio.StreamWriter, body: dict) -> None:
        writer.write(HEAD)
        await send(writer, event("a"), event(""), event("b"), event("", finish="length"))
        await send(writer, event(choice=False, seen=4), DONE)
        writer.write(END)

    assert counts(ask(answer, 4)[0]) == [1, 2, 3, 4]


async def dies(writer: asyncio.StreamWriter, body: dict) -> None:
    writer.write(HEAD)
    await send(writer, event("a", seen=1), event("b", seen=2)[:30])
    writer.transport.abort()


async def ends_early(writer: asyncio.StreamWriter, body: dict) -> None:
    writer.write(HEAD)
    await send(writer, event("a", seen=1))
    writer.write(END)


async def says_nothing(writer: asyncio.StreamWriter, body: dict) -> None:
    writer.transport.abort()


async def refuses(writer: asyncio.StreamWriter, body: dict) -> None:
    text = b'{"error": {"message": "This model\'s maximum context length is 2 tokens."}}'
    writer.write(b"HTTP/1.1 400 Bad Request\r\nContent-Length: %d\r\n\r\n%s" % (len(text), text))


async def fails(writer: asyncio.StreamWriter, body: dict) -> None:
    writer.write(HEAD)
    await send(writer, event("a", seen=1), b'data: {"error": {"message": "out of memory"}}\n\n')


async def talks_nonsense(writer: asyncio.StreamWriter, body: dict) -> None:
    writer.write(HEAD)
    await send(writer, event("a", seen=1), b"data: <html>\n\n")


FAULTS: dict[str, tuple[Answer, str]] = {
    "dies in mid-stream": (dies, r"broke off an answer after 1 of 3 tokens: .+\.$"),
    "ends without an end": (ends_early, r"broke off an answer after 1 of 3 tokens\.$"),
    "closes at once": (says_nothing, r"gave no answer after 0 of 3 tokens: .+\.$"),
    "refuses": (refuses, r"refused a request with status 400: .*maximum context length is 2 tokens"),
    "reports an error": (fails, "sent an error: .*out of memory"),
    "sends no JSON": (talks_nonsense, r"broke off an answer after 1 of 3 tokens: .*malformed"),
}


@pytest.mark.parametrize(("answer", "sentence"), FAULTS.values(), ids=FAULTS)
def test_a_server_that_fails_gives_one_sentence(answer: Answer, sentence: str) -> None:
    with pytest.raises(EndpointError, match=sentence) as caught:
        ask(answer)
    assert str(caught.value).startswith("http://127.0.0.1:")
    assert "\n" not in str(caught.value)


def test_no_server_at_all() -> None:
    async def run() -> None:
        async with serving(dies) as (url, _):
            pass
        async with session() as client:
            await Trace().follow(Peer(client, url, "m").stream([1], 1))

    with pytest.raises(EndpointError, match="gave no answer after 0 of 1 tokens: Cannot connect"):
        asyncio.run(run())


def test_a_stream_that_is_cancelled_closes_its_connection() -> None:
    """That is how other servers learn that nobody reads an answer any more."""

    async def run() -> None:
        gone = asyncio.Event()

        async def answer(writer: asyncio.StreamWriter, body: dict) -> None:
            writer.write(HEAD)
            await send(writer, event("a", seen=1))
            try:
                while True:
                    await send(writer, b": ping\n\n")
            except ConnectionError:
                gone.set()

        async with serving(answer) as (url, _), session() as client:
            trace = Trace()
            task = asyncio.create_task(trace.follow(Peer(client, url, "m").stream([1], 5)))
            while not trace.tokens:
                await asyncio.sleep(0.01)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await asyncio.wait_for(gone.wait(), WAIT_S)

    asyncio.run(run())


def test_a_whole_table_is_measured_at_a_peer() -> None:
    """With the same prompts as at CLO, and with no figures of processes that only CLO has."""

    async def answer(writer: asyncio.StreamWriter, body: dict) -> None:
        writer.write(HEAD)
        for token in range(1, body["max_tokens"] + 1):
            try:
                await send(writer, event("a", seen=token))
            except ConnectionError:  # a stream of ``gaps``, which need not be read to its end
                return
        await send(writer, DONE)
        writer.write(END)

    async def run() -> tuple[list[Result], list[list[int]]]:
        results: list[Result] = []
        async with serving(answer) as (url, bodies):
            await measure_peer(url, "m", TINY, text, [*cases_of(TINY)], results)
            return results, [body["prompt"] for body in bodies]

    text = list(range(700))
    results, asked = asyncio.run(asyncio.wait_for(run(), WAIT_S))
    assert {result.case.removeprefix("serve/") for result in results} == set(cases_of(TINY))
    metrics = {result.metric for result in results}
    assert "client CPU" in metrics and "router CPU" not in metrics
    prompts = Prompts(text)
    assert asked[:4] == [*prompts.take(1, 8), *(prompts.take(1, 16)[0] for _ in range(3))]


@pytest.mark.parametrize("seed", range(50))
def test_events_do_not_depend_on_how_their_bytes_are_cut(seed: int) -> None:
    rng = random.Random(seed)
    expected, stream = [], b""
    for number in range(rng.randrange(1, 12)):
        newline = rng.choice([b"\n", b"\r\n", b"\r"])
        lines = [f"{number}:{line} é".encode() for line in range(rng.randrange(1, 4))]
        fields = [rng.choice([b"data: ", b"data:"]) + line for line in lines]
        others = [b": comment", b":", b"event: message", b"id: 7", b"retry: 10", b"unknown", b"data-like: x"]
        for _ in range(rng.randrange(3)):
            fields.insert(rng.randrange(len(fields) + 1), rng.choice(others))
        stream += newline.join([*fields, b"", b""])
        stream += newline * rng.randrange(2)
        expected.append(b"\n".join(lines))
    stream += b"data: never ended"
    cuts = sorted(rng.sample(range(1, len(stream)), rng.randrange(min(40, len(stream)))))
    parser, found = EventStream(), []
    for begin, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        found += parser.feed(stream[begin:end])
    assert found == expected
