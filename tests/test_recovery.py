"""Processes that die or hang are started again, and the requests of a worker go on as if nothing had been."""

import asyncio
import signal
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from msgspec.structs import replace

from clo.runtime.client import AsyncClient, Client, Result
from tests.faults import WAIT_S, assert_serves
from tests.server import Server
from tests.test_system import assert_all_free

Launch = Callable[..., AbstractContextManager[Server]]

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
    {"temperature": 1.0, "seed": 5, "stop": ["never in this text"]},
]


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(11)
    return [torch.randint(4, 300, (length,), generator=generator).tolist() for length in range(20, 900, 110)]


def worker_of(server: Server, number: int = 0) -> psutil.Process:
    """A worker's process, once it is there."""
    deadline = time.monotonic() + WAIT_S
    while True:
        for process in server.children("gpu_worker"):
            if f'"worker":{number},' in process.cmdline()[3]:
                return process
        assert time.monotonic() < deadline
        time.sleep(0.02)


async def answers(address: str, disturb: Callable[[int], None] | None = None) -> list[Result]:
    """All kinds of requests at once; ``disturb`` is called with each number of tokens that have come."""
    count = 0

    async def ask(client: AsyncClient, prompt: list[int], options: dict[str, Any]) -> Result:
        nonlocal count
        stream = client.stream(prompt, max_tokens=LONG, ignore_eos=True, **options)
        async for chunk in stream:
            for _ in chunk.tokens:
                count += 1
                if disturb is not None:
                    disturb(count)
        return stream.result

    async with AsyncClient(address, timeout=WAIT_S) as client:
        found = await asyncio.gather(
            *(ask(client, prompt, options) for prompt, options in zip(prompts(), KINDS, strict=True))
        )
        await assert_all_free(client)
    return found


def same(found: list[Result], expected: list[Result]) -> None:
    for mine, theirs in zip(found, expected, strict=True):
        assert (mine.text, mine.tokens) == (theirs.text, theirs.tokens)
        assert mine.finish_reason == theirs.finish_reason
        assert replace(mine.usage, cached_tokens=0) == replace(theirs.usage, cached_tokens=0)
        for ours, wanted in (
            (mine.logprobs, theirs.logprobs),
            (mine.prompt_logprobs, theirs.prompt_logprobs),
        ):
            assert (ours is None) == (wanted is None)
            for entry, reference in zip(ours or (), wanted or (), strict=True):
                assert (entry is None) == (reference is None)
                if entry is not None and reference is not None:
                    assert entry.token == reference.token
                    assert entry.logprob == pytest.approx(reference.logprob, abs=1e-3)


def test_answers_go_on_where_their_worker_is_killed(launch: Launch, tiny_model: Path) -> None:
    """Twice, in the midst of answers: each is as without, and the server has nothing else to say."""
    with launch("--model", str(tiny_model), *EXACT) as server:
        expected = asyncio.run(answers(server.address))
        killed: list[psutil.Process] = []

        def kill(count: int) -> None:
            if count in (40, 700):
                killed.append(worker_of(server))
                killed[-1].kill()

        same(asyncio.run(answers(server.address, kill)), expected)
        assert len({process.pid for process in killed}) == 2
        assert_serves(server)
        lines = server.stderr.read_text().splitlines()
        assert len(lines) == 2 and all("worker 0 was killed by SIGKILL" in line for line in lines)
        assert all(line.endswith("it is started again.") for line in lines)
        assert not list(server.runtime.glob("clo-*")), "the folder of its sockets is gone again"


def test_another_worker_takes_over(launch: Launch, tiny_model: Path) -> None:
    with launch("--model", str(tiny_model), *EXACT, "--workers", "2") as server:
        expected = asyncio.run(answers(server.address))
        first = worker_of(server, 1)

        def kill(count: int) -> None:
            if count == 100:
                first.kill()

        same(asyncio.run(answers(server.address, kill)), expected)
        with Client(server.address, timeout=WAIT_S) as client:
            deadline = time.monotonic() + WAIT_S
            while len(client.info().workers) < 2:  # its successor
                assert time.monotonic() < deadline
                time.sleep(0.1)
        same(asyncio.run(answers(server.address)), expected)


SILENT = """\
import sys
import clo.runtime.children, clo.launch
clo.runtime.children.SERVING_S = 3.0
sys.exit(clo.launch.main(sys.argv[1:]))
"""


def test_a_worker_that_does_not_answer_is_replaced(launch: Launch, tiny_model: Path) -> None:
    with launch("--model", str(tiny_model), *EXACT, program=("-c", SILENT)) as server:
        expected = asyncio.run(answers(server.address))

        def stop(count: int) -> None:
            if count == 100:
                worker_of(server).send_signal(signal.SIGSTOP)

        same(asyncio.run(answers(server.address, stop)), expected)
        errors = server.stderr.read_text()
        assert "worker 0 has not answered for 3 s; it is killed." in errors


HASTY = """\
import sys
import clo.runtime.supervisor, clo.launch
clo.runtime.supervisor._QUICK_ENDS = 2
clo.runtime.supervisor._BACK_OFF_S = 0.01
sys.exit(clo.launch.main(sys.argv[1:]))
"""


def test_a_worker_that_ends_again_and_again_ends_the_server(launch: Launch, tiny_model: Path) -> None:
    """With the sentence for the last end."""
    with launch("--model", str(tiny_model), *EXACT, program=("-c", HASTY)) as server:
        pids = set()
        deadline = time.monotonic() + WAIT_S
        while server.process.poll() is None:
            assert time.monotonic() < deadline
            for process in server.children("gpu_worker"):
                pids.add(process.pid)
                process.kill()
            time.sleep(0.05)
        assert server.wait() == 1
        assert len(pids) == 3
        last = server.stderr.read_text().splitlines()[-1]
        assert last.startswith("error: worker 0 was killed by SIGKILL")
        assert last.endswith("the server has stopped, start it again.")


def test_a_killed_gateway_is_replaced(launch: Launch, tiny_model: Path) -> None:
    """Its own requests end with their connections; those of other clients do not notice."""
    httpx = pytest.importorskip("httpx")
    body = {"prompt": "ab", "max_tokens": 4, "temperature": 0}
    with launch("--model", str(tiny_model), *EXACT, "--http", "0") as server:
        before = httpx.post(f"{server.url}/v1/completions", json=body, timeout=WAIT_S).json()
        expected = asyncio.run(answers(server.address))

        def kill(count: int) -> None:
            if count == 50:
                (gateway,) = server.children("runtime.http")
                gateway.kill()

        same(asyncio.run(answers(server.address, kill)), expected)
        # connections wait until the next gateway takes them
        after = httpx.post(f"{server.url}/v1/completions", json=body, timeout=WAIT_S).json()
        assert after["choices"] == before["choices"]
        assert "HTTP gateway was killed by SIGKILL" in server.stderr.read_text()
