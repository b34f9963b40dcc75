"""The whole system on a GPU, over real sockets: requests that come and go, the CPU's tokens, a killed worker.

What a request gets must not depend on what runs beside it. But matrix products of another batch size round
in another way, so this is tested where rounding decides next to nothing:

- a tiny random model with a set as large as the context. No row is dropped, so there is no choice between
  rows that are worth the same, and its greedy tokens are far apart;
- a real model with most rows dropped. It prefers some rows to others; what rounding exchanges weighs little.

Two tokens as likely as each other may still go either way. There, and nowhere else, a stream may part from
the one generated alone: the probabilities of the two tokens lie within ``gap`` nats, and few streams part.
"""

import asyncio
import random
import time
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest
import torch

from clo.runtime.client import AsyncClient, Client, Result
from clo.runtime.tokenizer import Tokenizer
from clo.runtime.wire.errors import WorkerDied
from clo.runtime.wire.messages import Chunks, Generate, Progress, SamplingParams, Text, Tokens
from examples.document import document
from tests.faults import WAIT_S, assert_serves, error_of, raw, wait_until_idle
from tests.server import Server

pytestmark = pytest.mark.gpu

Launch = Callable[..., AbstractContextManager[Server]]

FLOAT32 = ("--device", "cuda", "--dtype", "float32")
REQUESTS = 100  # in each of two rounds
SLOTS = 24
BURSTS = (1, 2, 40, 3, 5, 9, 14, 20, 6)  # requests that come together
LONGEST_PROMPT = 3000
GREEDY: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True}
MIB = 2**20


@pytest.fixture(scope="module")
def pages(smollm2: Path) -> list[int]:
    """A real document as token ids."""
    return Tokenizer(smollm2, vocab_size=2**31).encode(Text(document("compound")), limit=10**6)


@dataclass(frozen=True)
class Order:
    """A request: what is asked and how it ends in a round."""

    prompt: list[int]
    tokens: int
    fate: str


def orders_of(source: list[int], seed: int) -> list[Order]:
    """Requests of random lengths; most stay to the end, the others leave in all ways there are."""
    rng = random.Random(seed)
    fates = ["stay"] * 14 + ["cancel at once", "cancel in prefill", "cancel", "cancel", "leave", "vanish"]
    orders = []
    for _ in range(REQUESTS):
        length = int(LONGEST_PROMPT ** rng.random())
        start = rng.randrange(len(source) - length)
        orders.append(Order(source[start : start + length], rng.randint(1, 64), rng.choice(fates)))
    return orders


def parted(tokens: list[int], alone: Result, gap: float) -> bool:
    """Whether tokens of a stream, maybe cut short, are others than those generated alone."""
    assert alone.logprobs is not None
    for token, entry in zip(tokens, alone.logprobs, strict=False):
        if token != entry.token:
            likely = dict(entry.top)
            assert token in likely and likely[entry.token] - likely[token] <= gap, (tokens, alone.tokens)
            return True
    return False


class Outcome(NamedTuple):
    """What came of a request: the tokens that arrived, and whether they parted from those generated alone."""

    fate: str
    tokens: int
    apart: bool


async def run(address: str, order: Order, alone: Result, gap: float) -> Outcome:
    """One request with a client of its own."""
    endless = GREEDY | {"max_tokens": 900}
    if order.fate == "vanish":
        await asyncio.to_thread(vanish, address, order)
        return Outcome(order.fate, 1, False)
    async with AsyncClient(address, timeout=WAIT_S) as client:
        if order.fate == "stay":
            result = await client.generate(order.prompt, **GREEDY, max_tokens=order.tokens)
            assert result.finish_reason == "length" and len(result.tokens) == order.tokens
            apart = parted(result.tokens, alone, gap)
            assert apart or result.text == alone.text
            return Outcome(order.fate, order.tokens, apart)
        if order.fate == "leave":
            with suppress(TimeoutError):
                await asyncio.wait_for(client.generate(order.prompt, **endless), order.tokens / 1000)
            return Outcome(order.fate, 0, False)

        cancels: list[asyncio.Task[None]] = []

        def on_progress(progress: Progress) -> None:
            if progress.stage == "prefill" and order.fate == "cancel in prefill" and not cancels:
                cancels.append(asyncio.create_task(stream.cancel()))

        stream = client.stream(order.prompt, **endless, on_progress=on_progress)
        if order.fate == "cancel at once":
            await stream.cancel()
        count = 0
        async for chunk in stream:
            count += len(chunk.tokens)
            if count >= order.tokens:
                await stream.cancel()
        result = stream.result
        fate = order.fate if result.finish_reason == "cancelled" else "cancel too late"
        return Outcome(fate, len(result.tokens), parted(result.tokens, alone, gap))


def vanish(address: str, order: Order) -> None:
    """A client that is gone in mid-stream and says nothing."""
    with raw(address) as client:
        client.send(Generate("r", Tokens(order.prompt), SamplingParams(**GREEDY, max_tokens=900)))
        while not isinstance(client.receive(), Chunks):
            pass


async def run_all(
    address: str, orders: list[Order], alone: list[Result], gap: float
) -> tuple[list[Outcome], Counter[int]]:
    """All requests, in bursts; what came of them, and how many were seen to run at a time."""
    running: Counter[int] = Counter()
    over = asyncio.Event()

    async def watch() -> None:
        async with AsyncClient(address) as client:
            while not over.is_set():
                running.update(worker.running for worker in (await client.info()).workers)
                await asyncio.sleep(0.005)

    watching = asyncio.create_task(watch())
    rng = random.Random(0)
    coming = iter(zip(orders, alone, strict=True))
    requests: list[asyncio.Task[Outcome]] = []
    for size in BURSTS:
        for order, reference in islice(coming, size):
            requests.append(asyncio.create_task(run(address, order, reference, gap)))
        await asyncio.sleep(0.2 * rng.random())
    await asyncio.wait(requests)
    over.set()
    await watching
    return [request.result() for request in requests], running


CASES = {
    "exact": (
        "--kv-size",
        "24MiB",
        "--select-k",
        "32",
        "--resident",
        "4096",
        "--prefetch",
        "verified",
        "--drift-check",
        "16",
    ),
    "rows dropped": ("--kv-size", "1GiB", "--select-k", "32", "--resident", "256"),
}


@pytest.mark.parametrize("case", CASES)
def test_requests_that_come_and_go_get_what_they_get_alone(
    launch: Launch, request: pytest.FixtureRequest, case: str
) -> None:
    """Two rounds of 100 requests over 24 slots and fewer blocks than they want, so that some wait for each.
    Slots, blocks and graphs are used again and again; in the end nothing is held and no memory has grown."""
    if case == "exact":
        model, gap = request.getfixturevalue("tiny_model"), 1e-3
        source = torch.randint(0, 509, (10_000,), generator=torch.Generator().manual_seed(0)).tolist()
    else:
        model, gap = request.getfixturevalue("smollm2"), 0.1
        source = request.getfixturevalue("pages")
    orders = orders_of(source, seed=1)
    assert len({order.fate for order in orders}) == 6
    slots = ("--max-num-seqs", str(SLOTS))
    with launch("--model", str(model), *FLOAT32, *CASES[case], *slots) as server:
        with Client(server.address, timeout=WAIT_S) as client:
            alone = [
                client.generate(order.prompt, **GREEDY, max_tokens=order.tokens, logprobs=4)
                for order in orders
            ]
            if case == "rows dropped":
                assert sum(result.cache.fetched_rows for result in alone) > 0
        held = []
        for _ in range(2):
            outcomes, running = asyncio.run(run_all(server.address, orders, alone, gap))
            assert len(outcomes) == REQUESTS
            assert sum(outcome.fate == "cancel too late" for outcome in outcomes) <= REQUESTS // 10
            assert sum(outcome.apart for outcome in outcomes) <= REQUESTS // 10, "ties are rare"
            assert running.keys() & {1, 2, 3, 4} and max(running) > 12, "graphs of few and of many slots"
            if case == "rows dropped":  # the tiny model's prefill is over before anybody can cancel it
                assert any(outcome[:2] == ("cancel in prefill", 0) for outcome in outcomes)
            with Client(server.address) as client:
                wait_until_idle(client)
                worker = client.info().workers[0]
            held.append((worker.private_bytes, worker.gpu_bytes))
            if (
                worker.drift_check is not None
            ):  # it compared steps with full attention, of which nothing is lost here
                assert worker.drift_check.checks > 0 and worker.drift_check.agreement > 0.99
                assert abs(worker.drift_check.mean_kl) < 1e-5
        assert_serves(server)  # worker and store check their books whenever they are idle
        first, second = held
        assert second[0] - first[0] < 128 * MIB, "memory of the process"
        assert 0 < second[1] < first[1] + 256 * MIB, "memory of the GPU, with what the allocator keeps"
        log = server.stderr.read_text()
        assert " ERROR " not in log and "Traceback" not in log


def test_the_worker_answers_as_one_on_the_cpu_does(launch: Launch, smollm2: Path, pages: list[int]) -> None:
    """The default model, free and teacher-forced: the same tokens, and log-probabilities within rounding."""
    prompts = [pages[:20], pages[1000:1100], pages[3000:3300]]
    size = ("--max-model-len", "512", "--resident", "512", "--kv-size", "256MiB")

    async def ask(address: str) -> list[Result]:
        async with AsyncClient(address, timeout=WAIT_S) as client:
            asked = [client.generate(prompt, **GREEDY, max_tokens=12, logprobs=4) for prompt in prompts]
            return await asyncio.gather(*asked)

    with launch("--model", str(smollm2), *size, "--device", "cpu") as server:
        expected = asyncio.run(ask(server.address))
    with launch("--model", str(smollm2), *size, *FLOAT32) as server:
        found = asyncio.run(ask(server.address))
        with Client(server.address, timeout=WAIT_S) as client:
            forced = [
                client.score(prompt, answer.tokens) for prompt, answer in zip(prompts, expected, strict=True)
            ]
    for mine, forced_mine, theirs in zip(found, forced, expected, strict=True):
        parted(mine.tokens, theirs, 5e-3)
        assert forced_mine.logprobs is not None and theirs.logprobs is not None
        for entry, reference in zip(forced_mine.logprobs, theirs.logprobs, strict=True):
            assert entry.token == reference.token
            assert entry.logprob == pytest.approx(reference.logprob, abs=5e-3)


def test_a_killed_worker_leaves_nothing_on_the_gpu(launch: Launch, tiny_model: Path) -> None:
    """In mid-decode: the stream ends with ``WorkerDied``, all GPU memory comes back and no process stays."""
    before, _ = torch.cuda.mem_get_info()
    with launch("--model", str(tiny_model), *FLOAT32, "--kv-size", "16MiB", "--recovery", "off") as server:
        assert before - torch.cuda.mem_get_info()[0] > 100 * MIB
        (worker,) = server.children("gpu_worker")
        family = [worker, *worker.children(recursive=True)]
        with Client(server.address, timeout=WAIT_S) as client:
            chunks = iter(client.stream("a", max_tokens=4000, ignore_eos=True))
            for _ in range(10):
                next(chunks)
            worker.kill()
            error = error_of(chunks)
        assert type(error) is WorkerDied
        assert str(error).startswith("worker 0 was killed by SIGKILL")
        assert server.wait() == 1
        assert f"error: {error}\n" in server.stderr.read_text()
    deadline = time.monotonic() + 10
    while any(map(lives, family)) or before - torch.cuda.mem_get_info()[0] > 16 * MIB:
        assert time.monotonic() < deadline, f"left behind: GPU memory, or one of {family}"
        time.sleep(0.1)


def lives(process: psutil.Process) -> bool:
    """Whether it runs; one that has ended may wait for a parent to ask for its exit code."""
    with suppress(psutil.NoSuchProcess):
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    return False
