"""A long run of mixed requests against one server: ``python -m tests.soak --requests 50000``; with ``--http``
over HTTP, with ``--preempting`` 25 short ones for each long one, which do not fit into the arena together.

Requests are answered, cancelled, timed out, left, dropped unread and wrong in many ways, and their clients
close or vanish. At ten places on the way nothing may have grown: all blocks are free, and memory and
descriptors of the server are what they were once the first tenth had warmed everything up. The report is a
line of JSON for each place, and at last ``benchmarks/results/soak.json``, ``soak-http.json`` or
``soak-preempting.json``. The exit code is 1 where something grew, where nothing was preempted that should
have been, or where the log holds a traceback; a request that ends otherwise than it should raises.
"""

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import psutil
import pytest

from benchmarks.result import Result, write
from clo.runtime.client import AsyncClient, Client
from clo.runtime.wire.errors import CLOError, InvalidRequest, PromptTooLong, RequestTimeout, ServerUnreachable
from clo.runtime.wire.messages import Generate, SamplingParams, Tokens
from tests.conftest import make_tiny_model
from tests.faults import SMALL, WAIT_S, raw, wait_until_idle
from tests.server import Server, launch

Kind = Callable[[Any, random.Random], Awaitable[None]]
"""What a client does, once."""

CLIENTS = 8
PLACES = 10
GROWTH_BYTES = 48 * 2**20  # of all processes together, from the first place to the last: noise of allocators
GROWTH_DESCRIPTORS = 4

WRONG: list[tuple[Any, dict[str, Any], type[CLOError]]] = [
    ([], {}, InvalidRequest),
    ([600], {}, InvalidRequest),
    ("", {}, InvalidRequest),
    ("a", {"temperature": -1}, InvalidRequest),
    ("a", {"stop": [""]}, InvalidRequest),
    ([{"role": "user", "content": 5}], {}, InvalidRequest),
    ([{"role": "user", "content": "a"}], {"chat_template_kwargs": {"tokenize": True}}, InvalidRequest),
    ("a", {"min_tokens": 9, "max_tokens": 8}, InvalidRequest),
    ("a", {"logit_bias": {600: 1}}, InvalidRequest),
    ("a", {"structured_outputs": {"regex": "("}}, InvalidRequest),
    ([1] * 5000, {}, PromptTooLong),
    ([1] * 100, {"max_tokens": 4090}, PromptTooLong),
    ([1] * 2000, {"max_tokens": 1000}, PromptTooLong),
]


async def answered(client: AsyncClient, rng: random.Random) -> None:
    count = rng.randrange(1, 12)
    options: dict[str, Any] = {"max_tokens": count, "ignore_eos": True, "logprobs": rng.choice([None, 0, 20])}
    prompt: Any = rng.choice(
        ["a b", [1, 2, 3], [{"role": "user", "content": None}], [7] * rng.randrange(1, 300)]
    )
    result = await client.generate(prompt, top_k=-1, seed=rng.randrange(9), **options)
    assert len(result.tokens) == count


async def adjusted(client: AsyncClient, rng: random.Random) -> None:
    result = await client.generate(
        "a b", max_tokens=9, min_tokens=9, seed=rng.randrange(9), min_p=0.01, repetition_penalty=1.2,
        presence_penalty=rng.uniform(-2, 2), frequency_penalty=rng.uniform(-2, 2),
        logit_bias={rng.randrange(512): 3.0}, prompt_logprobs=rng.choice([None, 0]),
    )  # fmt: skip
    assert len(result.tokens) == 9


async def structured(client: AsyncClient, rng: random.Random) -> None:
    letters = rng.choice("abc") + rng.choice("xyz")
    wanted = {"regex": f"[{letters}]{{{rng.randrange(1, 30)}}}"}
    if rng.random() < 0.2:
        async for _ in client.stream("a", max_tokens=40, structured_outputs=wanted):
            return
    result = await client.generate("a", max_tokens=40, structured_outputs=wanted)
    assert result.finish_reason == "stop" and set(result.text) <= set(letters)


async def prompt_scored(client: AsyncClient, rng: random.Random) -> None:
    count = rng.randrange(1, 300)
    result = await client.generate([7] * count, max_tokens=0, prompt_logprobs=rng.choice([0, 20]))
    assert len(result.prompt_logprobs or ()) == count


async def scored(client: AsyncClient, rng: random.Random) -> None:
    assert len((await client.score("a", [5] * rng.randrange(1, 8))).logprobs or ()) > 0


async def stopped(client: AsyncClient, rng: random.Random) -> None:
    result = await client.generate("a", max_tokens=40, stop=rng.choice("abcdefgh"), seed=rng.randrange(9))
    assert result.finish_reason in ("stop", "length")


async def cancelled(client: AsyncClient, rng: random.Random) -> None:
    stream = client.stream("a", max_tokens=1000, ignore_eos=True)
    if rng.random() < 0.5:
        await stream.cancel()
    async for _ in stream:
        await stream.cancel()
    assert stream.result.finish_reason == "cancelled"


async def timed_out(client: AsyncClient, rng: random.Random) -> None:
    with pytest.raises(RequestTimeout):
        await client.generate("a", max_tokens=1000, ignore_eos=True, timeout=rng.choice([0.0, 0.01, 0.05]))


async def left(client: AsyncClient, rng: random.Random) -> None:
    async for _ in client.stream("a", max_tokens=1000, ignore_eos=True):
        break


async def dropped(client: AsyncClient, rng: random.Random) -> None:
    client.stream("a", max_tokens=1000, ignore_eos=True)
    await asyncio.sleep(0.01 * rng.random())


async def wrong(client: AsyncClient, rng: random.Random) -> None:
    prompt, options, error = rng.choice(WRONG)
    with pytest.raises(error):
        await client.generate(prompt, **options)


async def closed(client: AsyncClient, rng: random.Random) -> None:
    async with AsyncClient(client.address) as other:
        request = asyncio.create_task(other.generate("a", max_tokens=1000, ignore_eos=True))
        await asyncio.sleep(0.02 * rng.random())
    with pytest.raises(ServerUnreachable):
        await request


async def vanished(client: AsyncClient, rng: random.Random) -> None:
    def send() -> None:
        with raw(client.address) as other:
            other.send(Generate("r", Tokens([1, 2]), SamplingParams(max_tokens=1000, ignore_eos=True)))
            other.send(rng.randbytes(rng.randrange(40)))
            other.receive()

    await asyncio.to_thread(send)


# ---------------------------------------------------------- answers that do not fit together


async def lengthy(client: AsyncClient, rng: random.Random) -> None:
    """Two of four blocks or more in the end, which the seven others want as well."""
    count = rng.randrange(400, 800)
    prompt = [rng.randrange(4, 300)] * rng.randrange(1, 300)
    result = await client.generate(prompt, max_tokens=count, ignore_eos=True, seed=rng.randrange(9))
    assert len(result.tokens) == count


# ---------------------------------------------------------------------------------- over HTTP


async def completed(client: httpx.AsyncClient, rng: random.Random) -> None:
    count = rng.randrange(1, 12)
    body = {"prompt": [7] * rng.randrange(1, 300), "max_tokens": count, "ignore_eos": True}
    answer = await client.post("/v1/completions", json=body | {"logprobs": rng.choice([None, 0, 5])})
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["completion_tokens"] == count


async def chatted(client: httpx.AsyncClient, rng: random.Random) -> None:
    messages = [{"role": "user", "content": "a b"}]
    body = {"messages": messages, "max_tokens": 9, "n": rng.randrange(1, 4), "seed": rng.randrange(9)}
    answer = await client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    assert len(answer.json()["choices"]) == body["n"]


async def streamed(client: httpx.AsyncClient, rng: random.Random) -> None:
    count = rng.randrange(1, 40)
    async with client.stream("POST", "/v1/completions", json=STREAM | {"max_tokens": count}) as answer:
        lines = [line async for line in answer.aiter_lines() if line]
    assert lines[-1] == "data: [DONE]"


async def left_in_the_middle(client: httpx.AsyncClient, rng: random.Random) -> None:
    async with client.stream("POST", "/v1/completions", json=STREAM) as answer:
        async for _ in answer.aiter_lines():
            if rng.random() < 0.2:
                break


async def read_slowly(client: httpx.AsyncClient, rng: random.Random) -> None:
    """A kilobyte a second, and not to the end."""
    read = 0
    async with client.stream("POST", "/v1/completions", json=STREAM) as answer:
        async for part in answer.aiter_raw(1000):
            read += len(part)
            await asyncio.sleep(len(part) / 1000)
            if read >= 3000:
                break


async def constrained(client: httpx.AsyncClient, rng: random.Random) -> None:
    body = {"prompt": "a", "max_tokens": 40, "structured_outputs": {"regex": "[ab]{5}"}}
    answer = await client.post("/v1/completions", json=body)
    assert answer.status_code == 200 and set(answer.json()["choices"][0]["text"]) <= set("ab")


async def refused(client: httpx.AsyncClient, rng: random.Random) -> None:
    path, body = rng.choice(REFUSED)
    answer = await client.post(path, content=body, headers={"content-type": "application/json"})
    assert answer.status_code in (400, 404) and answer.json()["error"]["message"], (body[:80], answer.text)


async def asked(client: httpx.AsyncClient, rng: random.Random) -> None:
    for path in ("/health", "/v1/models", "/metrics", "/load"):
        assert (await client.get(path)).status_code == 200


async def vanished_over_http(client: httpx.AsyncClient, rng: random.Random) -> None:
    _, writer = await asyncio.open_connection(client.base_url.host, client.base_url.port)
    body = json.dumps(STREAM).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: {len(body)}\r\n\r\n".encode()
    writer.write((head + body)[: rng.randrange(len(head + body) + 1)])
    await asyncio.sleep(0.02 * rng.random())
    writer.transport.abort()


STREAM = {"prompt": "a", "max_tokens": 1000, "ignore_eos": True, "stream": True}
REFUSED = [
    ("/v1/completions", b"{"),
    ("/v1/completions", b'{"prompt": 5}'),
    ("/v1/completions", b'{"prompt": "a", "model": "another"}'),
    ("/v1/completions", b'{"prompt": "a", "max_tokens": -1}'),
    ("/v1/completions", json.dumps({"prompt": [1] * 5000}).encode()),
    ("/v1/chat/completions", b'{"messages": []}'),
    ("/v1/chat/completions", b'{"messages": [{"role": "user", "content": 5}]}'),
]
HTTP_KINDS: dict[Kind, int] = {
    completed: 8, chatted: 4, streamed: 6, left_in_the_middle: 4, read_slowly: 1, constrained: 2, refused: 4,
    asked: 1, vanished_over_http: 2,
}  # fmt: skip

PREEMPTING_KINDS: dict[Kind, int] = {answered: 25, lengthy: 1}
KINDS: dict[Kind, int] = {
    answered: 8, adjusted: 2, structured: 2, prompt_scored: 1, scored: 1, stopped: 2, cancelled: 2,
    timed_out: 1, left: 1, dropped: 1, wrong: 3, closed: 1,
    vanished: 1,
}  # fmt: skip
"""How often each comes."""


async def run(server: Server, weights: dict[Kind, int], requests: int, rng: random.Random) -> Counter[str]:
    """Some requests of each kind, ``CLIENTS`` at a time; how many there were of each."""
    total = sum(weights.values())
    shares = [-(-requests * weight // total) for weight in weights.values()]
    kinds = rng.sample(list(weights), requests, counts=shares)
    counts: Counter[str] = Counter(kind.__name__ for kind in kinds)

    def connect() -> Any:
        if weights is HTTP_KINDS:
            return httpx.AsyncClient(base_url=server.url, timeout=WAIT_S)
        return AsyncClient(server.address, timeout=WAIT_S)

    async def work() -> None:
        async with connect() as client:
            while kinds:
                await kinds.pop()(client, rng)

    async with asyncio.TaskGroup() as group:
        for _ in range(CLIENTS):
            group.create_task(work())
    return counts


class Held(NamedTuple):
    """What a process holds: bytes of its own, and descriptors."""

    bytes: int
    descriptors: int


def held(server: Server) -> dict[int, Held]:
    """What each of a server's processes holds, by its number."""
    found = {}
    for process in (psutil.Process(server.process.pid), *server.children()):
        with suppress(psutil.NoSuchProcess):
            memory = process.memory_info()
            found[process.pid] = Held(memory.rss - memory.shared, process.num_fds())
    return found


def held_by_all(server: Server) -> Held:
    """What they hold together."""
    return Held(*map(sum, zip(*held(server).values(), strict=True)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=50_000)
    parser.add_argument("--seed", type=int, default=0)
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--http", action="store_true", help="over HTTP")
    form.add_argument("--preempting", action="store_true", help="short and long ones in little room")
    arguments = parser.parse_args()
    case, weights = "soak", KINDS
    if arguments.http:
        case, weights = "soak-http", HTTP_KINDS
    elif arguments.preempting:
        case, weights = "soak-preempting", PREEMPTING_KINDS
    rng, first, now = random.Random(arguments.seed), None, dict[str, int]()
    preemptions = 0
    total, began_all = Counter[str](), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        make_tiny_model(Path(folder))
        with launch("--model", folder, *SMALL, *(("--http", "0") if arguments.http else ())) as server:
            for place in range(1, PLACES + 1):
                began = time.monotonic()
                counts = asyncio.run(run(server, weights, arguments.requests // PLACES, rng))
                total += counts
                with Client(server.address, timeout=WAIT_S) as client:
                    wait_until_idle(client)
                    info = client.info()
                (store,) = info.stores
                preemptions = sum(worker.preemptions for worker in info.workers)
                now = held_by_all(server)._asdict() | {"free blocks": store.free_blocks}
                first = first or now
                seconds = time.monotonic() - began
                report = {"place": place, **now, "preemptions": preemptions, **counts}
                print(json.dumps(report | {"seconds": round(seconds)}), flush=True)
                if now["bytes"] > first["bytes"] + GROWTH_BYTES:
                    print("error: memory has grown", file=sys.stderr)
                    return 1
                if now["descriptors"] > first["descriptors"] + GROWTH_DESCRIPTORS:
                    print("error: descriptors have grown", file=sys.stderr)
                    return 1
            if arguments.preempting and not preemptions:
                print("error: nothing was preempted", file=sys.stderr)
                return 1
            if "Traceback" in (log := server.stderr.read_text()):
                print(log, file=sys.stderr)
                return 1
    assert first is not None
    results = [
        Result(case, f"requests {kind}", number, "requests") for kind, number in sorted(total.items())
    ] + [
        Result(case, "requests", sum(total.values()), "requests"),
        Result(case, "preemptions", preemptions, "preemptions"),
        Result(case, "time", time.monotonic() - began_all, "s"),
        *(
            Result(case, name, now[name], name.split()[-1], first[name], now[name] / first[name])
            for name in ("bytes", "descriptors", "free blocks")
        ),
    ]
    write(
        case, results, ["The reference is the state after the first tenth. All blocks were free each time."]
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
