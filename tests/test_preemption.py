"""Answers that do not fit into the arena together: they begin together all the same, and end as they would."""

import asyncio
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from clo.runtime.client import Client
from tests.chaos import EXACT, LONG, answers, assert_same, prompts
from tests.faults import WAIT_S, assert_serves
from tests.server import Server

Launch = Callable[..., AbstractContextManager[Server]]


@pytest.mark.parametrize("workers", [1, 2])
def test_answers_that_make_room_for_others_are_the_same(
    launch: Launch, tiny_model: Path, workers: int
) -> None:
    with launch("--model", str(tiny_model), *EXACT) as server:
        expected = asyncio.run(answers(server.address))
        with Client(server.address, timeout=WAIT_S) as client:
            info = client.info()
    (store,) = info.stores
    block_tokens = info.capacity_tokens // store.blocks
    held = sum(-(-len(prompt) // block_tokens) + 1 for prompt in prompts())
    grown = sum(-(-(len(prompt) + LONG) // block_tokens) for prompt in prompts())
    size = store.block_bytes * ((held + grown) // 2)
    options = (*EXACT, "--kv-size", f"{size}", "--workers", f"{workers}")
    with launch("--model", str(tiny_model), *options) as server:
        for mine, theirs in zip(asyncio.run(answers(server.address)), expected, strict=True):
            assert_same(mine, theirs)
        with Client(server.address, timeout=WAIT_S) as client:
            assert sum(worker.preemptions for worker in client.info().workers) > 0
        assert_serves(server)
        assert server.stderr.read_text() == ""
