"""Faults at random moments under load: ``python -m tests.chaos --faults 1000``.

Eight clients ask for their kinds of answers again and again, one more asks over HTTP, and others come and go,
while processes of the server are killed, stopped for a while, or hang, and its workers are reloaded: one to
three faults within seconds, and the next after some tokens. The arena does not hold all answers together, so
some begin again. Each has to be what an undisturbed server gives that has room for it, and in the end all
blocks are free again. The moments differ from run to run; what happens, and in which order, depends on
``--seed`` alone. Writes ``benchmarks/results/chaos.json``.
"""

import argparse
import asyncio
import json
import random
import tempfile
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from msgspec.structs import replace

from benchmarks.result import Result, write
from clo.runtime.client import AsyncClient
from clo.runtime.client import Result as Answer
from clo.runtime.machine import control
from clo.runtime.stream import AsyncStream
from clo.runtime.wire.errors import InvalidRequest
from clo.runtime.wire.messages import Generate, Info, Reload, Reloaded, SamplingParams, Tokens
from tests.conftest import make_tiny_model
from tests.faults import WAIT_S, raw
from tests.server import Server, launch
from tests.test_system import assert_all_free

# A set that holds every row: that of a successor would hold others, and a random model prefers none.
EXACT = ("--kv-size", "16MiB", "--max-num-seqs", "8", "--select-k", "32", "--resident", "2048")
LONG = 150  # tokens of an answer
KINDS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0, "seed": 3},
    {"temperature": 0.9, "top_p": 0.9, "top_k": 40, "seed": 4, "logprobs": 2},
    {"temperature": 0.0, "repetition_penalty": 1.2, "frequency_penalty": 0.4, "presence_penalty": 0.3},
    {"temperature": 0.0, "logit_bias": {7: 3.0, 9: -4.0}, "min_tokens": 30},
    {"temperature": 0.0, "prompt_logprobs": 1},
    {"temperature": 0.0, "structured_outputs": {"regex": "(ab|cd|ef){70}"}},
    {"temperature": 1.0, "seed": 5, "stop": ["never in this text", "jdecI"]},  # late
]
FAULTS = {  # how many of each in a hundred: what, and to which process
    "killed gpu_worker": 7,
    "killed kvstore": 4,
    "killed gpu_worker,kvstore": 2,  # at the same moment
    "killed runtime.http": 8,
    "stopped gpu_worker": 12,
    "stopped kvstore": 10,
    "stopped runtime.http": 10,
    "hanging gpu_worker": 2,
    "hanging kvstore": 1,
    "hanging runtime.http": 1,
    "reloaded gpu_worker": 3,  # all of them, one after another, while other faults go on
    "gone client": 40,
}
TOGETHER, GAP_S, TOKENS = 3, 0.5, 300  # faults, between them, and until the next ones; all at most
STOPPED_S, SERVING_S, STARTING_S = 1.0, 5.0, 60.0  # a process may hang while it starts, too
PATIENCE_S = 10 * WAIT_S  # of a request, which may be hit again and again
# Of faults that have nothing to do with a request or with each other there may be any number.
PROGRAM = f"""\
import sys
import clo.runtime.children, clo.runtime.router, clo.runtime.supervisor, clo.launch
clo.runtime.children.SERVING_S, clo.runtime.children.STARTING_S = {SERVING_S}, {STARTING_S}
clo.runtime.router._MOST_LOSSES = clo.runtime.supervisor._QUICK_ENDS = 1_000_000
clo.runtime.supervisor._BACK_OFF_S = 0.0
sys.exit(clo.launch.main(sys.argv[1:]))
"""
SMALL = ("--kv-size", "5MiB")  # 10 blocks of 512 tokens, of which the answers want 16 in the end
OPTIONS = (*EXACT, *SMALL, "--workers", "2", "--http", "0")


def prompts() -> list[list[int]]:
    """One for each of ``KINDS``. Most of their answers begin in one block, or two, and need one more."""
    generator = torch.Generator().manual_seed(11)
    lengths = (20, 130, 390, 410, 430, 440, 880, 900)
    return [torch.randint(4, 300, (length,), generator=generator).tolist() for length in lengths]


def ask(client: AsyncClient, kind: int) -> AsyncStream:
    return client.stream(prompts()[kind], max_tokens=LONG, ignore_eos=True, **KINDS[kind])


async def answers(
    address: str, disturb: Callable[[int], None] | None = None, kinds: Sequence[int] = range(len(KINDS))
) -> list[Answer]:
    """All kinds of requests at once; ``disturb`` is called with each number of tokens that have come."""
    count = 0

    async def answer(client: AsyncClient, kind: int) -> Answer:
        nonlocal count
        stream = ask(client, kind)
        async for chunk in stream:
            for _ in chunk.tokens:
                count += 1
                if disturb is not None:
                    disturb(count)
        return stream.result

    async with AsyncClient(address, timeout=WAIT_S) as client:
        found = await asyncio.gather(*(answer(client, kind) for kind in kinds))
        await assert_all_free(client)
    return found


def assert_same(mine: Answer, theirs: Answer) -> None:
    """The two differ in nothing but in what was computed anew."""
    assert (mine.text, mine.tokens) == (theirs.text, theirs.tokens)
    assert mine.finish_reason == theirs.finish_reason
    assert replace(mine.usage, cached_tokens=0) == replace(theirs.usage, cached_tokens=0)
    for ours, wanted in ((mine.logprobs, theirs.logprobs), (mine.prompt_logprobs, theirs.prompt_logprobs)):
        assert (ours is None) == (wanted is None)
        for entry, reference in zip(ours or (), wanted or (), strict=True):
            assert (entry is None) == (reference is None)
            if entry is not None and reference is not None:
                assert entry.token == reference.token
                assert entry.logprob == pytest.approx(reference.logprob, abs=1e-3)


class Chaos:
    """One server, what it answers, and what is done to it.

    Attributes:
        counts: of the answers, by who got them, of their tokens, of the HTTP requests whose connection
            ended, of reloads, and of preemptions, as far as their workers lived to tell of them.
        longest_s: that a client waited for its next token.
    """

    def __init__(self, server: Server, seed: int) -> None:
        self._server, self._rng = server, random.Random(seed)
        self._over = False
        self._preempted: dict[int, int] = {}  # what each worker said last
        self.counts: Counter[str] = Counter()
        self.longest_s = 0.0

    async def run(self, faults: int) -> None:
        """Raises ``AssertionError`` where an answer is another one, or a block is lost."""
        address = self._server.address
        half = len(KINDS) // 2  # of the kinds, which the arena holds
        expected = await answers(address, kinds=range(half))
        expected += await answers(address, kinds=range(half, len(KINDS)))
        async with AsyncClient(address, timeout=WAIT_S) as client:
            info = await client.info()
        workers = len(info.workers)
        assert not any(worker.preemptions for worker in info.workers)
        coming = [fault for fault, share in FAULTS.items() for _ in range(share * faults // 100)]
        self._rng.shuffle(coming)
        async with asyncio.TaskGroup() as group, AsyncClient(address, timeout=WAIT_S) as client:
            for kind, answer in enumerate(expected):
                group.create_task(self._ask_on(kind, answer))
            group.create_task(self._ask_over_http(expected[0]))
            while coming:
                for _ in range(min(len(coming), self._rng.randint(1, TOGETHER))):
                    what, whom = coming.pop().split()
                    if what == "reloaded":
                        group.create_task(self._reload())
                    else:
                        await self._do(what, whom)
                    await asyncio.sleep(GAP_S * self._rng.random())
                await self._tokens(self._rng.randint(1, TOKENS))
                self._count_preemptions(await client.info())
                print(f"{faults - len(coming)} of {faults} faults: {dict(self.counts)}", flush=True)
            self._over = True
        async with AsyncClient(address, timeout=WAIT_S) as client:
            deadline = time.monotonic() + WAIT_S
            while len((await client.info()).workers) < workers:
                assert time.monotonic() < deadline, f"one is missing: {self._server.stderr.read_text()}"
                await asyncio.sleep(0.1)
            await assert_all_free(client)
        for mine, theirs in zip(await answers(address), expected, strict=True):
            assert_same(mine, theirs)

    async def _tokens(self, more: int) -> None:
        """Wait until clients have got so many more tokens."""
        enough, deadline = self.counts["tokens"] + more, time.monotonic() + WAIT_S
        while self.counts["tokens"] < enough:
            assert time.monotonic() < deadline, f"nothing goes on: {self._server.stderr.read_text()}"
            await asyncio.sleep(0.02)

    async def _ask_on(self, kind: int, expected: Answer) -> None:
        while not self._over:
            async with AsyncClient(self._server.address, timeout=PATIENCE_S) as client:
                stream = ask(client, kind)
                last = time.monotonic()
                async for chunk in stream:
                    self.counts["tokens"] += len(chunk.tokens)
                    now = time.monotonic()
                    self.longest_s, last = max(self.longest_s, now - last), now
            assert_same(stream.result, expected)
            self.counts["answers"] += 1

    async def _ask_over_http(self, expected: Answer) -> None:
        body = {"prompt": prompts()[0], "max_tokens": LONG, "ignore_eos": True, "temperature": 0}

        def post() -> str:
            headers = {"Content-Type": "application/json"}
            request = urllib.request.Request(
                f"{self._server.url}/v1/completions", json.dumps(body).encode(), headers
            )
            with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:
                return str(json.load(answer)["choices"][0]["text"])

        while not self._over:
            try:
                text = await asyncio.to_thread(post)
            except urllib.error.HTTPError as error:
                raise AssertionError(f"{error.code}: {error.read().decode()}") from None
            except (OSError, HTTPException):  # its gateway was killed
                self.counts["connections over HTTP that ended"] += 1
                continue
            assert text == expected.text
            self.counts["answers over HTTP"] += 1

    async def _do(self, what: str, whom: str) -> None:
        if whom == "client":
            await asyncio.to_thread(self._come_and_go)
            return
        processes = [self._rng.choice(await self._children(name)) for name in whom.split(",")]
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                match what:
                    case "killed":
                        process.kill()
                    case "hanging":
                        process.suspend()
                    case "stopped":
                        process.suspend()
                        await asyncio.sleep(STOPPED_S * self._rng.random())
                        process.resume()

    async def _reload(self) -> None:
        """Have all workers restarted. What runs when it is asked for is gone in the end, whatever else has
        happened meanwhile."""
        before = self._server.children("gpu_worker")
        try:
            await asyncio.to_thread(control.ask, self._server.address, Reload(), Reloaded, lambda news: None)
        except InvalidRequest:
            self.counts["reloads refused, as one was under way"] += 1
            return
        assert not {*before} & {*self._server.children("gpu_worker")}
        self.counts["reloads"] += 1

    def _count_preemptions(self, info: Info) -> None:
        for worker in info.workers:
            said = self._preempted.get(worker.worker, 0)
            self._preempted[worker.worker] = worker.preemptions
            new = worker.preemptions - (said if said <= worker.preemptions else 0)  # it was started again
            self.counts["preemptions"] += new

    async def _children(self, name: str) -> list[psutil.Process]:
        """The server's processes of a kind, once there is one."""
        deadline = time.monotonic() + WAIT_S
        while not (processes := self._server.children(name)):
            assert time.monotonic() < deadline, f"{name}: {self._server.stderr.read_text()}"
            await asyncio.sleep(0.02)
        return processes

    def _come_and_go(self) -> None:
        """A client that asks for much and is gone in the midst of it."""
        with raw(self._server.address) as peer:
            for number in range(self._rng.randrange(1, 4)):
                prompt = Tokens(self._rng.choices(range(4, 300), k=self._rng.randrange(1, 900)))
                peer.send(Generate(f"{number}", prompt, SamplingParams(max_tokens=1000, ignore_eos=True)))
            peer.socket.poll(int(1000 * self._rng.random()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--faults", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", default="chaos", help="of the file in benchmarks/results")
    arguments, options = parser.parse_known_args()  # the others are the server's, such as --device cuda
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        make_tiny_model(Path(folder))
        with launch("--model", folder, *OPTIONS, *options, program=("-c", PROGRAM)) as server:
            chaos = Chaos(server, arguments.seed)
            asyncio.run(chaos.run(arguments.faults))
    shares = ((fault, share * arguments.faults // 100) for fault, share in FAULTS.items())
    results = [Result("chaos", fault, count, "faults") for fault, count in shares]
    results += [Result("chaos", what, count, "times") for what, count in sorted(chaos.counts.items())]
    results += [
        Result("chaos", "longest wait for a token", chaos.longest_s, "s"),
        Result("chaos", "time", time.monotonic() - began, "s"),
    ]
    write(arguments.name, results)


if __name__ == "__main__":
    main()
