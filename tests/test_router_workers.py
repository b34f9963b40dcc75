"""The router and its workers: they come, share the requests, say how they are, and are lost."""

import asyncio
import time
from typing import Any

import pytest
from msgspec.structs import replace

from clo.runtime import router as router_module
from clo.runtime.config import ResolvedModel
from clo.runtime.tokenizer import Tokenizer
from clo.runtime.wire.errors import WorkerDied
from clo.runtime.wire.messages import (
    GATEWAY_IDENTITY,
    NO_STATS,
    Abort,
    CacheStats,
    Cancel,
    Chunk,
    Done,
    Failed,
    Finished,
    GatewayReady,
    Info,
    Logprob,
    Ping,
    Pong,
    Prefilled,
    Progress,
    PromptChunk,
    PromptScored,
    Ready,
    Refused,
    SamplingParams,
    Step,
    Stepped,
    Usage,
    worker_identity,
)
from tests import routers
from tests.faults import WAIT_S
from tests.peers import Worker, running
from tests.routers import MODEL_LENGTH, SEVEN, STATS, ask, ids_of, in_loop

model, quiet, tokenizer = routers.model, routers.quiet, routers.tokenizer


# --------------------------------------------------------------- workers that come, and what they get


@in_loop
async def test_requests_wait_until_all_workers_are_ready(model: ResolvedModel) -> None:
    async with running(model, workers=2, ready=False) as wire:
        client, (first, second) = wire.client(), wire.workers
        for name in ("a", "b"):
            client.send(ask(name))
        client.send(Cancel("a"))
        assert await client.next() == Finished("a", "cancelled", Usage(5, 0), NO_STATS)
        first.ready()
        first.ready()  # a second time it counts no more
        info, before = await client.info()
        while isinstance(info, Info) and not info.workers:  # it has not heard of the first one
            info, before = await client.info()
        assert isinstance(info, Info) and [worker.worker for worker in info.workers] == [0]
        assert info.state == "starting"
        assert before == [] and first.heard == second.heard == []
        second.ready()
        assert await asyncio.wait_for(wire.router.ready(), WAIT_S) == 2000, "tokens of both stores"
        run = await first.order()
        first.send(Done(run.sequence, "stop", STATS))
        assert [type(message) for message in await client.to_end("b")] == [Finished]
        info, _ = await client.info()
        assert isinstance(info, Info) and info.state == "ready"
        assert (len(first.heard), len(second.heard)) == (1, 0), "the cancelled one reaches nobody"


@in_loop
async def test_an_http_gateway_is_waited_for_and_asked_whether_it_is_alive(
    model: ResolvedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(router_module, "PING_S", 0.01)
    async with running(model, ready=False) as wire:
        wire.router.expect(GATEWAY_IDENTITY, "HTTP gateway", 4321)
        wire.workers[0].ready()
        waiting = asyncio.create_task(wire.router.ready())
        gateway = wire.gateway()
        gateway.send(GatewayReady(1234))  # another process
        info, _ = await wire.client().info()
        assert isinstance(info, Info) and info.state == "starting" and not waiting.done()
        gateway.send(GatewayReady(4321))
        assert await asyncio.wait_for(waiting, WAIT_S) == 1000
        watching = asyncio.create_task(wire.router.watch_children(give_up))
        for _ in range(2):
            assert await gateway.message() == Ping()
            gateway.send(Pong())
        watching.cancel()


def give_up(connection: bytes, error: WorkerDied) -> None:
    raise error


@in_loop
async def test_a_launcher_that_was_stopped_itself_takes_no_child_for_silent(
    model: ResolvedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However often; a child that is silent while the launcher runs is given up."""
    monkeypatch.setattr(router_module, "PING_S", 0.01)
    monkeypatch.setattr("clo.runtime.children.SERVING_S", 0.03)
    async with running(model) as wire:  # its worker answers no Ping
        watching = asyncio.create_task(wire.router.watch_children(give_up))
        for _ in range(20):  # two for each turn of what watches
            time.sleep(0.03)
            await asyncio.sleep(0)
        assert not watching.done()
        with pytest.raises(WorkerDied, match="worker 0 has not answered"):
            await asyncio.wait_for(watching, WAIT_S)


@in_loop
async def test_nobody_speaks_for_a_worker(model: ResolvedModel, caplog: pytest.LogCaptureFixture) -> None:
    """Whoever does not know the key, is no process that was started, or is not ready; also before the real
    worker is there. And a worker speaks of its own sequences alone."""
    async with running(model, workers=2, ready=False) as wire:
        client, workers = wire.client(), wire.workers
        strangers = [wire.stranger(number, key) for number in (0, 9) for key in (None, "another key")]
        for stranger in [*strangers, known := wire.stranger(9)]:
            stranger.ready()
            stranger.step(0, 65)
        workers[0].send(Ready(0, 4321, "numa0", 10**9, 2))  # another process
        workers[0].step(0, 65)
        client.send(ask())
        _, before = await client.info()
        assert before == [] and wire.router.capacity_tokens == 0
        for worker in workers:
            worker.ready()
        await wire.router.ready()
        while not any(worker.heard for worker in workers):
            await client.info()
        (own,) = (worker for worker in workers if worker.heard)
        (other,) = (worker for worker in workers if not worker.heard)
        sequence = own.heard[0].sequence  # type: ignore[union-attr]
        for stranger in (*strangers, known, other):
            stranger.send(Prefilled(sequence, 1, 5))
            stranger.step(sequence, 66)
            stranger.send(Done(sequence, "stop", STATS))
            stranger.send(Refused(sequence, "internal", "No."))
        await client.info()
        own.step(sequence, 65)
        own.send(Done(sequence, "length", STATS))
        assert [type(message) for message in await client.to_end("r")] == [Chunk, Finished]
        assert [stranger.heard for stranger in (*strangers, known, other)] == [[]] * 6
        for stranger in (*strangers, known):
            stranger.task.cancel()
    assert caplog.text.count("is not worker-9") == 1 and "Process 4321 is not worker-0" in caplog.text
    assert "worker-0 speaks before it is ready" in caplog.text


@in_loop
async def test_a_request_goes_to_the_worker_with_the_least_work_left(model: ResolvedModel) -> None:
    """That is prompt tokens not prefilled and tokens not generated."""
    async with running(model, workers=2) as wire:
        client = wire.client()

        async def assigned(name: str, tokens: int) -> tuple[Worker, int]:
            before = [len(worker.heard) for worker in wire.workers]
            client.send(ask(name, tokens, SamplingParams(max_tokens=10)))
            await client.info()
            (worker,) = (w for w, count in zip(wire.workers, before, strict=True) if len(w.heard) > count)
            return worker, worker.heard[-1].sequence  # type: ignore[union-attr]

        one, a = await assigned("a", 50)
        (other,) = (worker for worker in wire.workers if worker is not one)
        assert (await assigned("b", 20))[0] is other
        found, c = await assigned("c", 20)
        assert found is other, "60 are left in one and 30 in the other"
        one.send(Prefilled(a, 50, 50))
        one.step(a, 1, 2, 3)
        await client.info()
        assert (await assigned("d", 1))[0] is one, "7 are left"
        assert (await assigned("e", 40))[0] is one, "18 are left"
        other.send(Done(c, "stop", STATS))
        await client.info()
        assert (await assigned("f", 1))[0] is other


# -------------------------------------------------------------------------------------------- figures


@in_loop
async def test_traffic_is_counted_for_all_clients_together(
    model: ResolvedModel, tokenizer: Tokenizer
) -> None:
    async with running(model) as wire:
        (worker,) = wire.workers
        clients = wire.client(), wire.client()
        for client, tokens in zip(clients, (5, 6), strict=True):
            client.send(ask("a", tokens))
        runs = [await worker.order() for _ in clients]
        letter, *_ = ids_of(tokenizer, "a")
        for _ in range(3):
            worker.send(Stepped([Step(run.sequence, letter, None) for run in runs]))
        worker.step(runs[0].sequence, letter)
        worker.send(Done(runs[0].sequence, "length", STATS))
        worker.send(Done(runs[1].sequence, "stop", STATS))
        for client in clients:
            await client.to_end("a")
        clients[0].send(ask("too long", MODEL_LENGTH))
        clients[0].send(ask("cancelled"))
        run = await worker.order()
        clients[0].send(Cancel("cancelled"))
        await worker.order()
        worker.send(Done(run.sequence, "cancelled", NO_STATS))
        await clients[0].to_end("too long")
        await clients[0].to_end("cancelled")
        info, _ = await clients[0].info()
        assert isinstance(info, Info)
        traffic = info.traffic
        assert (traffic.prompt_tokens, traffic.generated_tokens) == (11, 7)
        assert traffic.ended == {"stop": 1, "length": 1, "cancelled": 1, "failed": 1}
        assert traffic.cache == CacheStats(*[*range(2, 26, 2), 0])
        counted = [sum(each.counts) for each in (traffic.first_token, traffic.token_gap, traffic.request)]
        assert counted == [2, 5, 4]
        assert traffic.step_tokens.counts[:2] == [1, 3] and traffic.step_tokens.sum == 7
        assert len(traffic.step_tokens.counts) == len(traffic.step_tokens.bounds) + 1


@in_loop
async def test_a_store_that_workers_share_counts_once(model: ResolvedModel) -> None:
    async with running(model, workers=3) as wire:
        assert wire.router.capacity_tokens == 2000
        info, _ = await wire.client().info()
        assert isinstance(info, Info)
        assert (info.capacity_tokens, info.model, info.max_model_len) == (2000, "tiny", MODEL_LENGTH)
        assert [worker.worker for worker in info.workers] == [0, 1, 2]
        assert [store.store for store in info.stores] == ["numa0", "numa1"]


@in_loop
async def test_a_worker_that_does_not_report_is_left_out(
    model: ResolvedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it says later is no answer to a later question."""
    monkeypatch.setattr(router_module, "INFO_S", 0.2)
    async with running(model, workers=2) as wire:
        client, (worker, other) = wire.client(), wire.workers
        other.silent = True
        info, _ = await client.info()
        assert isinstance(info, Info) and [found.worker for found in info.workers] == [0]
        await client.info()
        assert (worker.asked, other.asked) == (2, 1), "it is not asked again before it has answered"
        other.silent = False
        other.send(other.report())
        monkeypatch.setattr(router_module, "INFO_S", WAIT_S)
        while len(info.workers) < 2:
            info, _ = await client.info()
            assert isinstance(info, Info)
        assert other.asked >= 1


@in_loop
async def test_many_questions_at_once(model: ResolvedModel) -> None:
    async with running(model) as wire:
        clients = [wire.client() for _ in range(5)]
        answers = await asyncio.gather(*(client.info() for client in clients for _ in range(1)))
        for info, before in answers:
            assert isinstance(info, Info) and len(info.workers) == 1 and before == []
            assert info.workers[0] == wire.workers[0].report().worker


# --------------------------------------------------------------------------------------- lost workers

KILLED = WorkerDied("worker 0 was killed")


@in_loop
async def test_a_request_of_a_lost_worker_goes_on_with_another(
    model: ResolvedModel, tokenizer: Tokenizer
) -> None:
    """From the tokens that have come, with the same seed; what the lost one still says is not heard."""
    async with running(model, workers=2) as wire:
        client = wire.client()
        client.send(ask(sampling=SamplingParams(max_tokens=4, seed=11)))
        progress: list[asyncio.Task[Any]] = [asyncio.create_task(worker.order()) for worker in wire.workers]
        await asyncio.wait(progress, return_when=asyncio.FIRST_COMPLETED)
        number = progress.index(next(task for task in progress if task.done()))
        first, run = wire.workers[number], progress[number].result()
        letters = ids_of(tokenizer, "abcd")
        first.step(run.sequence, *letters[:2])
        assert [await client.next() for _ in range(2)] == [
            Chunk("r", letter, [token], None) for letter, token in zip("ab", letters[:2], strict=True)
        ]
        wire.router.lose(worker_identity(number), KILLED)
        again = await asyncio.wait_for(progress[1 - number], WAIT_S)
        assert again == replace(run, sequence=again.sequence, tokens=run.tokens + letters[:2], answered=2)
        assert again.sequence != run.sequence
        first.step(run.sequence, letters[3])
        other = wire.workers[1 - number]
        other.send(Prefilled(again.sequence, 7, 7))
        other.step(again.sequence, *letters[2:])
        other.send(Done(again.sequence, "length", STATS))
        messages = await client.to_end("r")
        chunks = [message for message in messages if isinstance(message, Chunk)]
        assert [chunk.tokens for chunk in chunks] == [[token] for token in letters[2:]]
        assert messages[-1] == Finished("r", "length", Usage(5, 4), STATS)


@in_loop
async def test_lost_requests_wait_for_the_successor_of_the_only_worker(model: ResolvedModel) -> None:
    """They may be cancelled meanwhile; new ones wait, too."""
    async with running(model) as wire:
        client, (worker,) = wire.client(), wire.workers
        client.send(ask("a"))
        client.send(ask("b"))
        old = [await worker.order() for _ in range(2)]
        wire.router.lose(worker_identity(0), KILLED)
        wire.router.expect(worker_identity(0), "worker 0", 1000)
        client.send(ask("c"))
        client.send(Cancel("b"))
        assert await client.next() == Finished("b", "cancelled", Usage(5, 0), NO_STATS)
        worker.ready()
        await asyncio.wait_for(wire.router.until_begun(worker_identity(0)), WAIT_S)
        new = [await worker.order() for _ in range(2)]
        assert [run.tokens for run in new] == [old[0].tokens, [1, 2, 3, 4, 5]]
        assert not {run.sequence for run in new} & {run.sequence for run in old}


@in_loop
async def test_what_was_complete_when_its_worker_was_lost_ends(
    model: ResolvedModel, tokenizer: Tokenizer
) -> None:
    """By its length, by an end token, and where it was cancelled."""
    async with running(model) as wire:
        client, (worker,) = wire.client(), wire.workers
        letter, *_ = ids_of(tokenizer, "a")
        sampling = SamplingParams(max_tokens=2, stop_token_ids=[letter])
        for name, params in (("long", SamplingParams(max_tokens=1)), ("end", sampling), ("stop", SEVEN)):
            client.send(ask(name, sampling=params))
        runs = [await worker.order() for _ in range(3)]
        for run in runs[:2]:
            worker.step(run.sequence, letter)
        for _ in range(2):
            assert isinstance(await client.next(), Chunk)
        client.send(Cancel("stop"))
        assert await worker.order() == Abort(runs[2].sequence)
        wire.router.lose(worker_identity(0), KILLED)
        ends = {message.request: message for message in [await client.next() for _ in range(3)]}
        assert {name: end.reason for name, end in ends.items()} == {
            "long": "length", "end": "stop", "stop": "cancelled"
        }  # fmt: skip


@in_loop
async def test_a_request_that_ends_its_workers_is_given_up(model: ResolvedModel) -> None:
    """After three of them; others go on."""
    async with running(model) as wire:
        client, (worker,) = wire.client(), wire.workers
        client.send(ask("bad"))
        for losses in range(3):
            await worker.order()
            if losses == 2:
                client.send(ask("good"))
                await worker.order()
            wire.router.lose(worker_identity(0), KILLED)
            wire.router.expect(worker_identity(0), "worker 0", 1000)
            worker.ready()
        failed = await client.next()
        assert isinstance(failed, Failed) and (failed.request, failed.code) == ("bad", WorkerDied.code)
        assert failed.text == "Workers ended 3 times while they had the request: worker 0 was killed"
        assert (await worker.order()).tokens == [1, 2, 3, 4, 5]


@in_loop
async def test_scores_of_a_prompt_that_are_known_do_not_come_again(model: ResolvedModel) -> None:
    async with running(model) as wire:
        client, (worker,) = wire.client(), wire.workers
        client.send(ask(sampling=SamplingParams(max_tokens=1, prompt_logprobs=0)))
        run = await worker.order()
        scores = [Logprob(token, -0.5, []) for token in range(2, 6)]
        worker.send(PromptScored(run.sequence, 1, scores[:2]))
        assert await client.next() == PromptChunk("r", [1, 2, 3], [None, *scores[:2]])
        wire.router.lose(worker_identity(0), KILLED)
        wire.router.expect(worker_identity(0), "worker 0", 1000)
        worker.ready()
        again = await worker.order()
        worker.send(PromptScored(again.sequence, 1, scores[:1]))
        worker.send(PromptScored(again.sequence, 2, scores[1:]))
        beyond = [Logprob(token, -0.5, []) for token in range(9)]  # an answer that its worker scored, too
        worker.send(PromptScored(again.sequence, 7, beyond))
        worker.step(again.sequence, 7)
        found = await client.next()
        while isinstance(found, Progress):
            found = await client.next()
        assert found == PromptChunk("r", [4, 5], [*scores[2:]])
        assert isinstance(await client.next(), Chunk)
