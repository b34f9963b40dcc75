"""The router: every message in every state of a request, wrong messages, and many at random."""

import asyncio
import logging
import random
from collections.abc import Callable, Coroutine
from typing import Any

import msgspec
import pytest

from clo.runtime.config import ResolvedModel
from clo.runtime.wire.errors import ServerStopped
from clo.runtime.wire.messages import (
    Abort,
    Cancel,
    Chunk,
    Done,
    Failed,
    Finished,
    GetInfo,
    Prefilled,
    Progress,
    Reason,
    Refused,
    Run,
    SamplingParams,
    Step,
    Stepped,
    Usage,
)
from clo.runtime.wire.sockets import encode
from tests import routers
from tests.faults import WAIT_S
from tests.peers import Client, Wire, Worker, running
from tests.routers import STATS, ask, in_loop

model, quiet, tokenizer = routers.model, routers.quiet, routers.tokenizer


# ----------------------------------------------------------------------- every message in every state

STOP = [35, 36]
"""Ids of characters that are a stop string."""
Reached = tuple[Client, Worker, int]  # the sequence on the worker


async def to_queued(wire: Wire) -> Reached:
    """Its worker has it and has said nothing."""
    client, (worker,) = wire.client(), wire.workers
    client.send(ask(sampling=SamplingParams(max_tokens=7, stop=["DE"])))
    run = await worker.order()
    return client, worker, run.sequence


async def to_prefilling(wire: Wire) -> Reached:
    client, worker, sequence = await to_queued(wire)
    worker.send(Prefilled(sequence, 1, 5))
    assert await client.next() == Progress("r", "prefill", 1, 5)
    return client, worker, sequence


async def to_decoding(wire: Wire) -> Reached:
    client, worker, sequence = await to_prefilling(wire)
    worker.step(sequence, 65)
    assert (await client.next()).tokens == [65]
    return client, worker, sequence


async def to_cancelled(wire: Wire) -> Reached:
    """Its worker has been told, and has not ended it yet."""
    client, worker, sequence = await to_decoding(wire)
    client.send(Cancel("r"))
    assert await worker.order() == Abort(sequence)
    return client, worker, sequence


async def to_stopped(wire: Wire) -> Reached:
    """A stop string was found; its worker has been told."""
    client, worker, sequence = await to_decoding(wire)
    worker.step(sequence, *STOP)
    for token in STOP:
        assert await client.next() == Chunk("r", "", [token], None)
    assert await worker.order() == Abort(sequence)
    return client, worker, sequence


async def to_finished(wire: Wire) -> Reached:
    client, worker, sequence = await to_decoding(wire)
    worker.send(Done(sequence, "length", STATS))
    assert isinstance(await client.next(), Finished)
    return client, worker, sequence


Reach = Callable[[Wire], Coroutine[Any, Any, Reached]]
STATES: list[Reach] = [to_queued, to_prefilling, to_decoding, to_cancelled, to_stopped, to_finished]
in_every_state = pytest.mark.parametrize("reach", STATES, ids=[reach.__name__ for reach in STATES])
GENERATED: dict[Reach, int] = {
    to_queued: 0,
    to_prefilling: 0,
    to_decoding: 1,
    to_cancelled: 1,
    to_stopped: 1 + len(STOP),
}
REASONS: dict[Reach, Reason] = {to_cancelled: "cancelled", to_stopped: "stop"}  # whatever the worker says


async def assert_ends_once(
    reach: Reach, reached: Reached, answer: Done, reason: Reason, extra: int = 0
) -> None:
    """Once its worker says so, the request ends with ``reason``, and nothing follows."""
    client, worker, sequence = reached
    worker.send(answer)
    worker.step(sequence, 66)
    worker.send(Prefilled(sequence, 5, 5))
    worker.send(Done(sequence, "length", STATS))
    worker.send(Refused(sequence, "internal", "Too late."))
    _, messages = await client.info()
    if reach is not to_finished:
        usage = Usage(5, GENERATED[reach] + extra)
        assert messages.pop() == Finished("r", reason, usage, answer.cache)
    assert messages == []
    client.send(ask("r"))
    assert isinstance(await worker.order(), Run), "its name is free again"


@in_every_state
@in_loop
async def test_its_worker_ends_it(model: ResolvedModel, reach: Reach) -> None:
    """What the client asked for, or a stop string, decides the reason, however the two cross."""
    async with running(model) as wire:
        reached = await reach(wire)
        reason = REASONS.get(reach, "length")
        await assert_ends_once(reach, reached, Done(reached[2], "length", STATS), reason)


@in_every_state
@in_loop
async def test_its_client_cancels(model: ResolvedModel, reach: Reach) -> None:
    """The worker is told once; the request ends when the worker says so."""
    async with running(model) as wire:
        reached = client, worker, sequence = await reach(wire)
        told = reach in (to_cancelled, to_stopped, to_finished)
        client.send(Cancel("r"))
        client.send(Cancel("r"))
        _, messages = await client.info()
        assert messages == []
        assert worker.heard.count(Abort(sequence)) == (reach is not to_finished)
        if not told:
            assert await worker.order() == Abort(sequence)
        worker.step(sequence, 66)  # the worker had not read it
        reason: Reason = "stop" if reach is to_stopped else "cancelled"
        await assert_ends_once(reach, reached, Done(sequence, "cancelled", STATS), reason)


@in_every_state
@in_loop
async def test_its_worker_refuses_it(model: ResolvedModel, reach: Reach) -> None:
    async with running(model) as wire:
        client, worker, sequence = await reach(wire)
        worker.send(Refused(sequence, "prompt_too_long", "Too long."))
        worker.send(Done(sequence, "length", STATS))
        _, messages = await client.info()
        expected = [] if reach is to_finished else [Failed("r", "prompt_too_long", "Too long.")]
        assert messages == expected


@in_every_state
@in_loop
async def test_its_worker_reports_progress_and_tokens(model: ResolvedModel, reach: Reach) -> None:
    """They reach the client as long as it has not cancelled and no stop string was found."""
    async with running(model) as wire:
        reached = client, worker, sequence = await reach(wire)
        goes_on = reach in (to_queued, to_prefilling, to_decoding)
        worker.step(sequence, 66)
        _, messages = await client.info()
        assert [message.tokens for message in messages if isinstance(message, Chunk)] == [[66]] * goes_on
        assert len(messages) == goes_on
        reason = REASONS.get(reach, "length")
        await assert_ends_once(reach, reached, Done(sequence, "length", STATS), reason, extra=goes_on)


@in_every_state
@in_loop
async def test_its_client_asks_for_another_one_of_the_same_name(model: ResolvedModel, reach: Reach) -> None:
    """It is refused while the first is open; that one goes on."""
    async with running(model) as wire:
        reached = client, _, sequence = await reach(wire)
        if reach is to_finished:
            return  # the name is free, see assert_ends_once
        client.send(ask("r"))
        failed = await client.next()
        assert isinstance(failed, Failed) and failed.code == "invalid_request"
        assert "A request 'r' is open already" in failed.text
        reason = REASONS.get(reach, "length")
        await assert_ends_once(reach, reached, Done(sequence, "length", STATS), reason)


@in_every_state
@in_loop
async def test_all_fails(model: ResolvedModel, reach: Reach) -> None:
    """Each open request is told once, and each later one at once; workers may still say what they like."""
    async with running(model) as wire:
        client, worker, sequence = await reach(wire)
        other = wire.client()
        await other.info()
        wire.router.fail_all(ServerStopped("The server was stopped."))
        worker.step(sequence, 66)
        worker.send(Done(sequence, "length", STATS))
        client.send(Cancel("r"))
        stopped = Failed("r", ServerStopped.code, "The server was stopped.")
        answer, messages = await client.info()
        assert messages == ([] if reach is to_finished else [stopped])
        assert isinstance(answer, Failed) and answer.code == ServerStopped.code
        orders = len(worker.heard)
        for peer in (client, other):
            peer.send(ask("r"))
            assert await peer.next() == stopped
        assert len(worker.heard) == orders


@in_loop
async def test_all_fails_while_requests_wait_for_workers(model: ResolvedModel) -> None:
    async with running(model, ready=False) as wire:
        client, (worker,) = wire.client(), wire.workers
        for name in ("a", "b"):
            client.send(ask(name))
        await client.info()
        wire.router.fail_all(ServerStopped("No."))
        assert {(await client.next()).request for _ in range(2)} == {"a", "b"}
        worker.ready()
        await asyncio.wait_for(wire.router.ready(), WAIT_S)
        await client.info()
        assert worker.heard == []


@in_every_state
@in_loop
async def test_its_client_vanishes(model: ResolvedModel, reach: Reach) -> None:
    """The worker is told once to end the request, and another client's goes on."""
    async with running(model) as wire:
        client, worker, sequence = await reach(wire)
        other = wire.client()
        other.send(ask("other"))
        kept = await worker.order()
        client.socket.close(linger=0)
        while Abort(sequence) not in worker.heard and reach is not to_finished:
            worker.step(sequence, 66)  # the router finds out when it sends
            worker.send(Prefilled(sequence, 5, 5))
            await other.info()
        worker.step(kept.sequence, 66)
        worker.send(Done(sequence, "cancelled", STATS))
        worker.send(Done(kept.sequence, "length", STATS))
        assert [type(message) for message in await other.to_end("other")] == [Chunk, Finished]
        assert worker.heard.count(Abort(sequence)) == (reach is not to_finished)


# ------------------------------------------------------------------------------------- wrong messages


@in_loop
async def test_what_is_not_a_message(model: ResolvedModel, caplog: pytest.LogCaptureFixture) -> None:
    """A client is answered; of a worker's the log tells. Both connections go on."""
    async with running(model) as wire:
        client, (worker,) = wire.client(), wire.workers
        client.socket.send(b"\xc1")
        failed = await client.next()
        assert isinstance(failed, Failed) and (failed.request, failed.code) == ("", "protocol")
        client.socket.send(encode(Abort(0)))  # is for workers
        assert (await client.next()).code == "protocol"
        with caplog.at_level(logging.ERROR):
            worker.socket.send(b"\xc1")
            worker.socket.send(encode(GetInfo("x")))
            worker.step(0, 2**40)
            await client.info()
        assert caplog.text.count("worker-0 sent what cannot be read") == 3
        client.send(ask())
        assert isinstance(await worker.order(), Run)


@in_loop
async def test_reports_of_unknown_sequences_are_ignored(model: ResolvedModel) -> None:
    async with running(model) as wire:
        client, worker, sequence = await to_decoding(wire)
        for number in (sequence + 1, 99, 2**40, 2**63 - 1):
            worker.send(Prefilled(number, 1, 5))
            worker.send(Stepped([Step(number, 1, None), Step(sequence, 66, None)]))
            worker.send(Done(number, "stop", STATS))
            worker.send(Refused(number, "internal", "No."))
        worker.send(worker.report())  # nobody has asked
        _, messages = await client.info()
        assert [message.tokens for message in messages if isinstance(message, Chunk)] == [[66]] * 4
        assert len(messages) == 4


WRONG_NUMBERS = [
    {"type": "Ready", "worker": -1, "pid": 1000, "store": "numa0", "capacity_tokens": 1},
    {"type": "Ready", "worker": 0, "pid": 1000, "store": "numa0", "capacity_tokens": 2**63},
    {"type": "Stepped", "steps": [[0, 2**40, None]]},
    {"type": "Stepped", "steps": [[0, -1, None]]},
    {"type": "Stepped", "steps": [[-1, 1, None]]},
    {"type": "Stepped", "steps": [[0, 1, {"token": 2**40, "logprob": 0.0, "top": []}]]},
    {"type": "Stepped", "steps": [[0, 1, {"token": 1, "logprob": 0.0, "top": [[-1, 0.0]]}]]},
    {"type": "Prefilled", "sequence": 0, "done": -1, "total": 5},
    {"type": "Prefilled", "sequence": 0, "done": 1, "total": 2**64 - 1},
    {"type": "Done", "sequence": 0, "reason": "because", "cache": msgspec.to_builtins(STATS)},
    {"type": "Done", "sequence": 0, "reason": "stop", "cache": msgspec.to_builtins(STATS) | {"steps": -1}},
    {"type": "Refused", "sequence": 2**63, "code": "internal", "text": ""},
]


@in_loop
async def test_every_number_of_a_worker_is_checked(
    model: ResolvedModel, caplog: pytest.LogCaptureFixture
) -> None:
    async with running(model) as wire:
        client, worker, sequence = await to_decoding(wire)
        assert sequence == 0
        for number in WRONG_NUMBERS:
            worker.socket.send(msgspec.msgpack.encode(number))
        worker.step(sequence, 66)
        assert await client.next() == Chunk("r", "c", [66], None)
    assert caplog.text.count("worker-0 sent what cannot be read") == len(WRONG_NUMBERS)


# ------------------------------------------------------------------------------------------ at random


async def work(worker: Worker, rng: random.Random) -> None:
    """Serve in random order what comes; tokens of a sequence count up from 65."""
    left: dict[int, int] = {}
    total: dict[int, int] = {}

    async def hear() -> None:
        while True:
            order = await worker.order()
            if isinstance(order, Run):
                assert order.sequence not in total, "run twice"
                left[order.sequence] = total[order.sequence] = order.sampling.max_tokens
            else:
                assert order.sequence in total, "ended before it was run"
                if order.sequence in left:
                    del left[order.sequence]
                    worker.send(Done(order.sequence, "cancelled", STATS))

    hearing = asyncio.create_task(hear())
    try:
        while True:
            await asyncio.sleep(0.001 * rng.random())
            if hearing.done():
                hearing.result()
            for sequence in [sequence for sequence in left if rng.random() < 0.4]:
                if not left[sequence]:
                    del left[sequence]
                    worker.send(Done(sequence, "length", STATS))
                elif rng.random() < 0.1 and left[sequence] == total[sequence]:
                    worker.send(Prefilled(sequence, 1, 5))
                else:
                    worker.step(sequence, 65 + total[sequence] - left[sequence])
                    left[sequence] -= 1
    finally:
        hearing.cancel()


async def use(wire: Wire, rng: random.Random) -> None:
    """A client that sends requests, cancels some, and may be gone before their end."""
    client = wire.client()
    names = [f"request {number}" for number in range(rng.randint(1, 6))]
    wanted = {name: rng.randint(1, 20) for name in names}
    got: dict[str, list[int]] = {name: [] for name in names}
    vanishes = rng.random() < 0.3
    for name in names:
        client.send(ask(name, rng.randint(1, 50), SamplingParams(max_tokens=wanted[name])))
    open_ = set(names)
    cancelled: set[str] = set()
    while open_:
        if vanishes and rng.random() < 0.05:
            client.socket.close(linger=0)
            return
        if rng.random() < 0.05:
            cancelled.add(name := rng.choice(names))
            client.send(Cancel(name))
        message = await client.next()
        assert message.request in open_, f"{message} after the end"
        match message:
            case Chunk():
                got[message.request] += message.tokens
            case Finished():
                open_.remove(message.request)
                count = len(got[message.request])
                assert message.usage.completion_tokens == count
                assert got[message.request] == list(range(65, 65 + count))
                if message.reason == "length":
                    assert count == wanted[message.request]
                else:
                    assert message.reason == "cancelled" and message.request in cancelled
            case Failed():
                raise AssertionError(message)


@pytest.mark.parametrize("seed", range(3))
@in_loop
async def test_random_requests_end_once_each(model: ResolvedModel, seed: int) -> None:
    rng = random.Random(seed)
    async with running(model, workers=2) as wire:
        working = [asyncio.create_task(work(worker, random.Random(rng.random()))) for worker in wire.workers]
        await asyncio.gather(*(use(wire, random.Random(rng.random())) for _ in range(30)))
        for task in working:
            assert not task.done() or task.result() is None
            task.cancel()
        runs = [order for worker in wire.workers for order in worker.heard if isinstance(order, Run)]
        assert len({run.sequence for run in runs}) == len(runs)
        for worker in wire.workers:
            aborts = [order.sequence for order in worker.heard if isinstance(order, Abort)]
            assert len(aborts) == len(set(aborts)), "ended twice"
