"""Answers that do not fit into the arena together: they begin together, and end as they would without."""

import asyncio
import random
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from clo.runtime.client import AsyncClient, Client, Result
from tests.chaos import EXACT, assert_same, prompts
from tests.faults import WAIT_S, assert_serves, wait_until_idle
from tests.server import Server
from tests.soak import PREEMPTING_KINDS, held, run
from tests.test_system import assert_all_free

Launch = Callable[..., AbstractContextManager[Server]]

LONG = 700  # tokens of an answer
GROWTH_BYTES = 16 * 2**20  # of a process: noise of allocators
KINDS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0, "seed": 3},
    {"temperature": 0.0, "repetition_penalty": 1.2, "presence_penalty": 0.3},
    {"temperature": 0.9, "top_k": 40, "seed": 4, "logprobs": 2, "prompt_logprobs": 1},
]


async def answers(address: str) -> list[Result]:
    async with AsyncClient(address, timeout=WAIT_S) as client:
        found = await asyncio.gather(
            *(
                client.generate(prompt, max_tokens=LONG, ignore_eos=True, **kind)
                for prompt, kind in zip(prompts(), KINDS, strict=False)
            )
        )
        await assert_all_free(client)
    return found


@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_answers_that_make_room_for_others_are_the_same(
    launch: Launch, tiny_model: Path, workers: int
) -> None:
    assert_same_in_little_room(launch, tiny_model, "--workers", f"{workers}")


@pytest.mark.gpu
def test_answers_that_make_room_for_others_are_the_same_on_a_gpu(launch: Launch, tiny_model: Path) -> None:
    assert_same_in_little_room(launch, tiny_model, "--device", "cuda", "--dtype", "float32")


def assert_same_in_little_room(launch: Launch, model: Path, *others: str) -> None:
    """The arena holds all answers but for the longest one, so that one of them has to begin again."""
    with launch("--model", str(model), *EXACT, *others) as server:
        expected = asyncio.run(answers(server.address))
        with Client(server.address, timeout=WAIT_S) as client:
            info = client.info()
    (store,) = info.stores
    block_tokens = info.capacity_tokens // store.blocks
    ends = [-(-(len(prompt) + LONG) // block_tokens) for prompt in prompts()[: len(KINDS)]]
    size = store.block_bytes * (sum(ends) - max(ends))
    with launch("--model", str(model), *EXACT, *others, "--kv-size", f"{size}") as server:
        for mine, theirs in zip(asyncio.run(answers(server.address)), expected, strict=True):
            assert_same(mine, theirs)
        with Client(server.address, timeout=WAIT_S) as client:
            assert sum(worker.preemptions for worker in client.info().workers) > 0
        assert_serves(server)
        assert server.stderr.read_text() == ""


def assert_nothing_grows(server: Server) -> None:
    """A short form of ``tests.soak --preempting``: a hundred short requests and four long ones."""
    before = held(server)
    asyncio.run(run(server, PREEMPTING_KINDS, 104, random.Random(0)))
    with Client(server.address, timeout=WAIT_S) as client:
        wait_until_idle(client)  # all blocks are free
        assert sum(worker.preemptions for worker in client.info().workers) > 0
    deadline = time.monotonic() + WAIT_S
    while (after := held(server)).keys() != before.keys() or any(
        after[number].descriptors != process.descriptors for number, process in before.items()
    ):
        assert time.monotonic() < deadline, (before, after)
        time.sleep(0.05)
    for number, process in before.items():
        assert after[number].bytes < process.bytes + GROWTH_BYTES, (before, after)


def test_two_hundred_clients_share_four_blocks(launch: Launch, tiny_model: Path) -> None:
    """All are served, those that need the whole arena in their turn: what comes later passes one that waits
    with no more blocks in all than it needs itself (``BlockPool.grants``). Nothing grows, nor where long
    answers are preempted again and again."""
    clients, large, arena = 200, 40, ("--kv-size", "2MiB", "--max-num-seqs", "8")
    ended: list[int] = []

    async def ask(address: str, number: int) -> None:
        prompt, tokens = ([7] * 1600, 20) if number % large == 0 else ([5] * 20, 8)
        async with AsyncClient(address, timeout=WAIT_S) as client:
            result = await client.generate(prompt, max_tokens=tokens, ignore_eos=True, temperature=0)
        assert len(result.tokens) == tokens
        ended.append(number)

    async def ask_all(address: str) -> None:
        tasks = []
        for number in range(clients):
            tasks.append(asyncio.create_task(ask(address, number)))
            await asyncio.sleep(0.005)  # so that they come in this order, about
        await asyncio.gather(*tasks)
        async with AsyncClient(address, timeout=WAIT_S) as client:
            await assert_all_free(client)

    with launch("--model", str(tiny_model), *arena) as server:
        asyncio.run(ask_all(server.address))
        assert sorted(ended) == list(range(clients))
        for number in range(0, clients, large):
            assert ended.index(number) - number < 40, "it was passed by more than fit beside it"
        assert_nothing_grows(server)
        assert server.stderr.read_text() == ""
