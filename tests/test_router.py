"""The router alone: real sockets, a real tokenizer, and clients and workers that do what a test says."""

import asyncio
import contextlib
import dataclasses
import functools
import itertools
import json
import logging
import random
import socket
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, ParamSpec

import msgspec
import pytest
from msgspec.structs import replace

from clo.runtime import router as router_module
from clo.runtime import tokenizer as tokenizer_module
from clo.runtime.client import AsyncClient
from clo.runtime.config import ResolvedModel, ServerConfig
from clo.runtime.request import LIKELY_TOKENS
from clo.runtime.router import Router
from clo.runtime.tokenizer import Detokenizer, Tokenizer
from clo.runtime.wire.errors import CLOError, ConfigError, ServerStopped, WorkerDied
from clo.runtime.wire.messages import (
    GATEWAY_IDENTITY,
    NO_STATS,
    Abort,
    CacheStats,
    Cancel,
    Chat,
    Chunk,
    Done,
    Failed,
    Finished,
    Function,
    GatewayReady,
    Generate,
    GetInfo,
    Info,
    Logprob,
    Ping,
    Pong,
    Prefilled,
    Progress,
    PromptChunk,
    PromptScored,
    Ready,
    Reason,
    Refused,
    Run,
    Sampling,
    SamplingParams,
    Step,
    Stepped,
    StructuredOutputs,
    Text,
    TextPart,
    Tokens,
    ToolCall,
    Turn,
    Usage,
    worker_identity,
)
from clo.runtime.wire.sockets import encode
from tests.conftest import TINY, VOCABULARY
from tests.faults import WAIT_S
from tests.peers import SLOTS, Client, Wire, Worker, running
from tests.store import KEY, new_endpoint

MODEL_LENGTH = 100
STATS = CacheStats(*[*range(1, 13), 0])
SEVEN = SamplingParams(max_tokens=7)

P = ParamSpec("P")


def in_loop(test: Callable[P, Coroutine[Any, Any, None]]) -> Callable[P, None]:
    """Run a test in an event loop of its own."""

    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        asyncio.run(asyncio.wait_for(test(*args, **kwargs), 2 * WAIT_S))

    return run


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is said only because time has passed."""
    monkeypatch.setattr(router_module, "QUIET_S", 1e9)


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Iterator[Tokenizer]:
    """Loaded once for all routers of this file."""
    loaded = Tokenizer(tiny_model, VOCABULARY)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(router_module, "Tokenizer", lambda *_: loaded)
        yield loaded


@pytest.fixture
def model(tiny_model: Path, tokenizer: Tokenizer) -> ResolvedModel:
    return model_in(tiny_model)


def model_in(folder: Path) -> ResolvedModel:
    return ResolvedModel("tiny", str(folder), TINY, MODEL_LENGTH, "float32", "cpu", "auto", 0)


def router_of(port: int, folder: Path, host: str = "127.0.0.1") -> Router:
    return Router(ServerConfig(host=host, port=port), model_in(folder), new_endpoint(), KEY)


def ask(name: str = "r", tokens: int = 5, sampling: SamplingParams = SEVEN) -> Generate:
    return Generate(name, Tokens(list(range(1, tokens + 1))), sampling)


def ids_of(tokenizer: Tokenizer, text: str) -> list[int]:
    """A token for each character."""
    return [tokenizer.encode(Text(character), 10)[0] for character in text]


# ------------------------------------------------------------------------------------ whole requests


@in_loop
async def test_a_request_from_its_prompt_to_its_last_token(
    model: ResolvedModel, tokenizer: Tokenizer
) -> None:
    async with running(model) as wire:
        client, (worker,) = wire.client(), wire.workers
        sampling = SamplingParams(temperature=0.5, top_p=0.9, top_k=3, max_tokens=7, seed=11, logprobs=1)
        client.send(ask(sampling=sampling))
        run = await worker.order()
        decided = Sampling(temperature=0.5, top_p=0.9, top_k=3, max_tokens=7, logprobs=1)
        assert run == Run(run.sequence, [1, 2, 3, 4, 5], decided, 11, tokenizer.eos, None, run.client)
        worker.send(Prefilled(run.sequence, 2, 5))
        worker.send(Prefilled(run.sequence, 5, 5))
        one, two = ids_of(tokenizer, "H!")
        logprob = Logprob(one, -0.5, [(one, -0.5)])
        worker.step(run.sequence, one, logprob=logprob)
        worker.step(run.sequence, two)
        worker.send(Done(run.sequence, "length", STATS))
        assert await client.to_end("r") == [
            Progress("r", "prefill", 2, 5),
            Progress("r", "prefill", 5, 5),
            Chunk("r", "H", [one], [logprob]),
            Chunk("r", "!", [two], None),
            Finished("r", "length", Usage(5, 2), STATS),
        ]
        assert worker.heard == [run]


@pytest.mark.parametrize("seed", [None, -1])
@in_loop
async def test_a_text_is_tokenised_and_a_request_without_a_seed_gets_one(
    model: ResolvedModel, tokenizer: Tokenizer, seed: int | None
) -> None:
    async with running(model) as wire:
        client, (worker,) = wire.client(), wire.workers
        for name in ("a", "b"):
            client.send(Generate(name, Text("some text"), SamplingParams(max_tokens=7, seed=seed)))
        runs = [await worker.order(), await worker.order()]
        assert runs[0].tokens == tokenizer.encode(Text("some text"), 100)
        assert runs[0].sequence != runs[1].sequence
        assert runs[0].seed != runs[1].seed and 0 <= runs[0].seed < 2**63


@in_loop
async def test_any_other_seed_of_64_bits_is_kept(model: ResolvedModel) -> None:
    async with running(model) as wire:
        client, (worker,) = wire.client(), wire.workers
        for seed, kept in ((0, 0), (2**63 - 1, 2**63 - 1), (-2, 2**63 - 2), (-(2**63), 0)):
            client.send(ask(f"{seed}", sampling=SamplingParams(seed=seed)))
            assert (await worker.order()).seed == kept


@in_loop
async def test_a_continuation_is_forced(model: ResolvedModel) -> None:
    """As many tokens as it has, with log-probabilities, and no stop string ends it."""
    async with running(model) as wire:
        client, (worker,) = wire.client(), wire.workers
        sampling = SamplingParams(max_tokens=1, stop=["a"])
        client.send(Generate("r", Tokens([1, 2]), sampling, Tokens([3, 4, 5])))
        run = await worker.order()
        assert (run.tokens, run.forced) == ([1, 2], [3, 4, 5])
        assert (run.sampling.max_tokens, run.sampling.logprobs) == (3, 0)


@pytest.mark.parametrize(
    ("request_", "code", "text"),
    [
        (Generate("r", Text("")), "invalid_request", "prompt is empty"),
        (Generate("r", Tokens([VOCABULARY])), "invalid_request", "not in the vocabulary"),
        (Generate("r", Tokens([1]), SEVEN, Tokens([])), "invalid_request", "empty"),
        (ask(tokens=MODEL_LENGTH, sampling=SamplingParams()), "prompt_too_long", "leaves no room"),
        (ask(tokens=MODEL_LENGTH - 6), "prompt_too_long", "94 tokens and max_tokens is 7"),
        (Generate("r", Tokens([1] * 95), SEVEN, Tokens([1] * 6)), "prompt_too_long", "95 tokens"),
        (ask(sampling=SamplingParams(min_tokens=96)), "prompt_too_long", "room for an answer of 96 tokens"),
        (
            ask(sampling=SamplingParams(max_tokens=7, min_tokens=8)),
            "invalid_request",
            "min_tokens is 8 and max_tokens is 7; lower min_tokens.",
        ),
        (ask(sampling=SamplingParams(max_tokens=0)), "invalid_request", "set prompt_logprobs too"),
        (
            ask(sampling=SamplingParams(logit_bias={1: 1.0, VOCABULARY: 1.0})),
            "invalid_request",
            f"logit_bias has the token id {VOCABULARY}, which is not in the vocabulary; ids go up to "
            f"{VOCABULARY - 1}.",
        ),
        (
            ask(sampling=SamplingParams(stop_token_ids=[VOCABULARY])),
            "invalid_request",
            "stop_token_ids has the token id",
        ),
        (
            ask(sampling=SamplingParams(structured_outputs=StructuredOutputs())),
            "invalid_request",
            "takes one of json, json_object (true), regex, choice and grammar, and not none.",
        ),
        (
            ask(sampling=SamplingParams(structured_outputs=StructuredOutputs(regex="a", choice=["b"]))),
            "invalid_request",
            "and not regex and choice.",
        ),
    ],
)
@in_loop
async def test_what_can_never_run_is_refused_and_reaches_no_worker(
    model: ResolvedModel, request_: Generate, code: str, text: str
) -> None:
    async with running(model) as wire:
        client, (worker,) = wire.client(), wire.workers
        client.send(request_)
        (failed,) = await client.to_end("r")
        assert isinstance(failed, Failed) and failed.code == code and text in failed.text
        client.send(ask(tokens=MODEL_LENGTH - 7))  # the same name, and just short enough
        run = await worker.order()
        assert len(run.tokens) == MODEL_LENGTH - 7
        assert worker.heard == [run]


@pytest.mark.parametrize(
    ("written", "params", "expected"),
    [
        (None, SamplingParams(), Sampling(max_tokens=MODEL_LENGTH - 5)),
        ({}, SamplingParams(top_k=-1, max_tokens=7), Sampling(max_tokens=7)),
        (
            {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "do_sample": False, "max_new_tokens": 9},
            SamplingParams(),
            Sampling(temperature=0.6, top_p=0.95, top_k=20, max_tokens=9),
        ),
        (
            {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "max_new_tokens": 9},
            SamplingParams(temperature=0.0, top_p=1.0, top_k=-1, max_tokens=10),
            Sampling(temperature=0.0, max_tokens=10),
        ),
        (
            {"min_p": 0.1, "repetition_penalty": 1.05, "do_sample": True},
            SamplingParams(max_tokens=7),
            Sampling(min_p=0.1, repetition_penalty=1.05, max_tokens=7),
        ),
        (
            {"min_p": 0.1, "repetition_penalty": 1.05},
            SamplingParams(min_p=0.0, repetition_penalty=1.0, max_tokens=7, min_tokens=7),
            Sampling(max_tokens=7, min_tokens=7),
        ),
        (
            {"temperature": None, "top_k": -1, "max_new_tokens": 5000},
            SamplingParams(),
            Sampling(max_tokens=MODEL_LENGTH - 5),
        ),
    ],
)
@in_loop
async def test_what_a_request_leaves_open_the_model_decides(
    tiny_model: Path,
    tmp_path: Path,
    written: dict[str, Any] | None,
    params: SamplingParams,
    expected: Sampling,
    tokenizer: Tokenizer,
) -> None:
    """And where the model does not: as vLLM."""
    if written is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(written))
    async with running(model_in(tmp_path)) as wire:
        client, (worker,) = wire.client(), wire.workers
        client.send(ask(sampling=params))
        assert (await worker.order()).sampling == expected


@in_loop
async def test_a_worker_is_told_everything_about_sampling(model: ResolvedModel) -> None:
    async with running(model) as wire:
        client, (worker,) = wire.client(), wire.workers
        wanted: dict[str, Any] = {
            "temperature": 0.5, "top_p": 0.9, "top_k": 3, "min_p": 0.1, "presence_penalty": -2.0,
            "frequency_penalty": 2.0, "repetition_penalty": 1.5, "logit_bias": {3: -100.0, 4: 100.0},
            "max_tokens": 7, "min_tokens": 2, "stop_token_ids": [9], "ignore_eos": True, "logprobs": 1,
            "prompt_logprobs": 2, "cache_salt": "of a tenant",
        }  # fmt: skip
        assert wanted.keys() == set(Sampling.__struct_fields__) - {"grammar"}
        client.send(ask(sampling=SamplingParams(**wanted)))
        assert (await worker.order()).sampling == Sampling(**wanted)


@in_loop
async def test_a_stop_token_gives_no_text_and_the_prompt_comes_first_where_it_is_echoed(
    model: ResolvedModel, tokenizer: Tokenizer
) -> None:
    async with running(model) as wire:
        client, (worker,) = wire.client(), wire.workers
        a, b = ids_of(tokenizer, "ab")
        params = SamplingParams(max_tokens=7, stop_token_ids=[b], echo=True)
        for name, prompt in (("r", Text("a text")), ("s", Tokens(ids_of(tokenizer, "xyz")))):
            client.send(Generate(name, prompt, params))
            run = await worker.order()
            worker.step(run.sequence, a)
            worker.step(run.sequence, b)
            worker.send(Done(run.sequence, "stop", STATS))
            *chunks, finished = await client.to_end(name)
            assert [chunk.text for chunk in chunks] == ["a text" if name == "r" else "xyz", "a", ""]
            assert [chunk.tokens for chunk in chunks] == [[], [a], [b]]
            assert finished == Finished(name, "stop", Usage(len(run.tokens), 2), STATS)


@in_loop
async def test_log_probabilities_of_a_prompt_come_with_its_tokens(model: ResolvedModel) -> None:
    """The first token has none, whatever the pieces."""
    async with running(model) as wire:
        client, (worker,) = wire.client(), wire.workers
        scores = [Logprob(token, -float(token), []) for token in range(2, 6)]
        for name, cuts in (("r", [0, 4]), ("s", [0, 1, 4])):
            client.send(ask(name, sampling=SamplingParams(max_tokens=0, prompt_logprobs=0)))
            run = await worker.order()
            assert (run.sampling.max_tokens, run.sampling.prompt_logprobs) == (0, 0)
            for first, last in itertools.pairwise(cuts):
                worker.send(PromptScored(run.sequence, 1 + first, scores[first:last]))
            worker.send(Done(run.sequence, "length", NO_STATS))
            *pieces, finished = await client.to_end(name)
            assert [token for piece in pieces for token in piece.tokens] == [1, 2, 3, 4, 5]
            assert [entry for piece in pieces for entry in piece.logprobs] == [None, *scores]
            assert all(isinstance(piece, PromptChunk) for piece in pieces)
            assert finished == Finished(name, "length", Usage(5, 0), NO_STATS)
        client.send(ask("t", tokens=1, sampling=SamplingParams(max_tokens=0, prompt_logprobs=0)))
        run = await worker.order()
        worker.send(PromptScored(run.sequence, 1, []))
        worker.send(Done(run.sequence, "length", NO_STATS))
        assert (await client.to_end("t"))[0] == PromptChunk("t", [1], [None])


@in_loop
async def test_no_stop_string_ends_an_answer_before_the_least_number_of_tokens(
    model: ResolvedModel, tokenizer: Tokenizer
) -> None:
    """One that begins among them may end behind them."""
    async with running(model) as wire:
        client, (worker,) = wire.client(), wire.workers
        client.send(ask(sampling=SamplingParams(max_tokens=50, min_tokens=4, stop=["ab"])))
        run = await worker.order()
        for token in ids_of(tokenizer, "abxabz"):
            worker.step(run.sequence, token)
        worker.send(Done(run.sequence, "length", STATS))
        *chunks, finished = await client.to_end("r")
        assert "".join(chunk.text for chunk in chunks) == "abx"
        assert finished.reason == "stop"


@pytest.mark.parametrize(("length", "tokens", "answer"), [(100, 99, 1), (5000, 30, 970), (5000, 1200, 1)])
@in_loop
async def test_an_answer_without_a_length_fits_the_context_and_the_store(
    tiny_model: Path, tokenizer: Tokenizer, length: int, tokens: int, answer: int
) -> None:
    """The store of these tests holds 1,000 tokens; it says itself that a prompt is too long for it."""
    model = dataclasses.replace(model_in(tiny_model), max_model_len=length)
    async with running(model) as wire:
        client, (worker,) = wire.client(), wire.workers
        client.send(Generate("r", Tokens([1] * tokens)))
        assert (await worker.order()).sampling.max_tokens == answer


@in_loop
async def test_an_answer_without_a_length_may_have_all_but_counts_as_one_of_likely_length(
    tiny_model: Path, tokenizer: Tokenizer
) -> None:
    """Else a worker that has one would get no other request until its peer has those of hundreds."""
    model = dataclasses.replace(model_in(tiny_model), max_model_len=10**6)
    async with running(model, workers=2) as wire:
        client = wire.client()
        for number, worker in enumerate(wire.workers):
            worker.send(Ready(number, 1000 + number, f"numa{number}", 10**6, 2))
        while min(ready.capacity_tokens for ready in wire.router._ready_workers.values()) < 10**6:
            await asyncio.sleep(0)
        client.send(Generate("r", Tokens([1] * 10)))
        await client.info()
        (one,) = (worker for worker in wire.workers if worker.heard)
        (other,) = (worker for worker in wire.workers if worker is not one)
        assert (await one.order()).sampling.max_tokens == 10**6 - 10
        for name, worker in (("s", other), ("t", one)):
            before = len(worker.heard)
            client.send(Generate(name, Tokens([1] * (LIKELY_TOKENS + 10)), SEVEN))
            await client.info()
            assert len(worker.heard) == before + 1


@in_loop
async def test_a_tokenizer_that_breaks_ends_the_request_alone(
    model: ResolvedModel, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> list[int]:
        raise KeyError("nobody thought of that")

    async with running(model) as wire:
        client, (worker,) = wire.client(), wire.workers
        with monkeypatch.context() as patch:
            patch.setattr(tokenizer, "encode", broken)
            client.send(Generate("r", Text("a")))
            (failed,) = await client.to_end("r")
        assert isinstance(failed, Failed) and failed.code == CLOError.code
        client.send(ask())
        assert isinstance(await worker.order(), Run)


@pytest.mark.parametrize(
    ("chat", "apart"),
    [
        (Chat([Turn("user", "a")]), False),
        (Chat([Turn("user", "a" * 20_000)]), True),
        (Chat([Turn("user", [TextPart("a" * 20)] * 1000)]), True),
        (Chat([Turn("user", "")] * 100), False),
        (Chat([Turn("user", "")] * 1000), True),
        (Chat([Turn("u" * 20_000, "a")]), True),
        (Chat([Turn("user", "a", "b" * 20_000)]), True),
        (Chat([Turn("tool", "a", tool_call_id="1" * 20_000)]), True),
        (Chat([Turn("assistant", "a", reasoning_content="b" * 20_000)]), True),
        (Chat([Turn("user", "a")], '{"enable_thinking": false}'), True),
        (Chat([Turn("assistant", None, tool_calls=[ToolCall(Function("f", "{}"))])]), True),
    ],
)
@in_loop
async def test_chats_that_may_become_long_are_rendered_in_a_thread(
    model: ResolvedModel, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, chat: Chat, apart: bool
) -> None:
    threads: list[threading.Thread] = []

    def encode(*_: Any, **__: Any) -> list[int]:
        threads.append(threading.current_thread())
        return [1]

    async with running(model) as wire:
        client, (worker,) = wire.client(), wire.workers
        with monkeypatch.context() as patch:
            patch.setattr(tokenizer, "encode", encode)
            client.send(Generate("r", chat, SEVEN))
            await worker.order()
    assert (threads[0] is not threading.main_thread()) is apart


@in_loop
async def test_a_prompt_of_ids_is_made_into_text_in_a_thread(
    model: ResolvedModel, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids, decode, threads = ids_of(tokenizer, "xyz"), tokenizer.decode, []

    def record(tokens: list[int], **options: Any) -> str:
        if tokens == ids:
            threads.append(threading.current_thread())
        return decode(tokens, **options)

    async with running(model) as wire:
        client, (worker,) = wire.client(), wire.workers
        with monkeypatch.context() as patch:
            patch.setattr(tokenizer, "decode", record)
            client.send(Generate("r", Tokens(ids), SamplingParams(max_tokens=7, echo=True)))
            await worker.order()
    assert threads[0] is not threading.main_thread()


@in_loop
async def test_a_client_with_many_requests_leaves_room_for_others(model: ResolvedModel) -> None:
    """Its own wait in the router, in their order, where those that it cancels reach no worker."""
    async with running(model) as wire:
        greedy, other, (worker,) = wire.client(), wire.client(), wire.workers
        most = router_module.SPARE + 2 * SLOTS
        for number in range(most + 50):
            greedy.send(ask(f"{number}"))
        runs = [await worker.order() for _ in range(most)]
        for number in range(most, most + 47):
            greedy.send(Cancel(f"{number}"))
            assert isinstance(await greedy.next(), Finished)
        info, _ = await greedy.info()
        assert isinstance(info, Info) and info.waiting == 3
        assert len(worker.heard) == most
        other.send(ask("late"))
        assert (await worker.order()).client != runs[0].client
        for number in range(most, most + 3):
            worker.send(Done(runs.pop(0).sequence, "length", STATS))
            assert (await greedy.next()).request == f"{number - most}"
            runs.append(await worker.order())
            assert runs[-1].client == runs[0].client and len(worker.heard) == number + 2
        worker.send(Refused(runs[0].sequence, "internal", "x"))
        await greedy.next()
        info, _ = await greedy.info()
        assert isinstance(info, Info) and info.waiting == 0
        assert len(worker.heard) == most + 4


@in_loop
async def test_what_is_cancelled_while_it_is_tokenised_counts_as_open_until_then(
    model: ResolvedModel, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or else a client could have the router keep any number of prompts."""
    go_on = threading.Event()

    def slow(*_: Any, **__: Any) -> list[int]:
        go_on.wait(WAIT_S)
        return [1]

    monkeypatch.setattr(tokenizer, "encode", slow)
    monkeypatch.setattr(router_module, "OPEN_REQUESTS", 3)
    async with running(model) as wire:
        client, (worker,) = wire.client(), wire.workers
        for number in range(3):
            client.send(Generate(f"{number}", Text("x" * 20_000), SEVEN))
            client.send(Cancel(f"{number}"))
            assert isinstance(await client.next(), Finished)
        client.send(ask("more"))
        assert (await client.next()).code == "overloaded"
        go_on.set()
        while wire.router._accounts:
            await asyncio.sleep(0)
        client.send(ask("again"))
        assert (await worker.order()).sequence == 0


@in_loop
async def test_open_requests_of_a_client_have_a_bound_in_bytes(
    model: ResolvedModel, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What would exceed it is refused until another one has ended; other clients are served meanwhile."""
    prompt = Text("x" * 20_000)
    monkeypatch.setattr(tokenizer, "encode", lambda *_, **__: [1])
    monkeypatch.setattr(router_module, "OPEN_BYTES", 2 * len(encode(Generate("a", prompt, SEVEN))))
    async with running(model) as wire:
        greedy, other, (worker,) = wire.client(), wire.client(), wire.workers
        for name in "ab":
            greedy.send(Generate(name, prompt, SEVEN))
        runs = [await worker.order() for _ in "ab"]
        for message in (Generate("c", prompt, SEVEN), ask("c"), GetInfo("c")):
            greedy.send(message)
            (failed,) = await greedy.to_end("c")
            assert isinstance(failed, Failed) and failed.code == "overloaded"
        other.send(Generate("a", prompt, SEVEN))
        assert (await worker.order()).client != runs[0].client
        worker.send(Done(runs[0].sequence, "length", STATS))
        await greedy.to_end("a")
        greedy.send(Generate("c", prompt, SEVEN))
        assert (await worker.order()).client == runs[0].client
        assert len(worker.heard) == 4


@in_loop
async def test_a_worker_hears_whose_a_request_is(model: ResolvedModel) -> None:
    async with running(model) as wire:
        one, other, (worker,) = wire.client(), wire.client(), wire.workers
        for client in (one, other, one):
            client.send(ask(f"{id(client)}-{len(worker.heard)}"))
            await worker.order()
        first, second, third = (run.client for run in worker.heard if isinstance(run, Run))
        assert first == third != second


# ---------------------------------------------------------------------- a request before its worker


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


@in_loop
async def test_a_long_prompt_is_tokenised_while_others_are_served(
    model: ResolvedModel, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is cancelled meanwhile, and its name given to another request; what comes of it is dropped."""
    monkeypatch.setattr(tokenizer_module, "LONG_CHARACTERS", 10)
    begun, go_on = threading.Event(), threading.Event()
    encode_prompt = tokenizer.encode

    def slow(prompt: Any, *arguments: Any, **options: Any) -> list[int]:
        if isinstance(prompt, Text):
            begun.set()
            go_on.wait(WAIT_S)
        return encode_prompt(prompt, *arguments, **options)

    monkeypatch.setattr(tokenizer, "encode", slow)
    async with running(model) as wire:
        client, (worker,) = wire.client(), wire.workers
        client.send(Generate("r", Text("x" * 20)))
        await asyncio.to_thread(begun.wait, WAIT_S)
        client.send(ask("other"))
        assert (await worker.order()).tokens == [1, 2, 3, 4, 5]
        client.send(Cancel("r"))
        assert await client.next() == Finished("r", "cancelled", Usage(0, 0), NO_STATS)
        client.send(ask("r", tokens=3))
        run = await worker.order()
        assert run.tokens == [1, 2, 3]
        go_on.set()
        worker.step(run.sequence, 1)
        worker.send(Done(run.sequence, "length", STATS))
        assert len(await client.to_end("r")) == 2
        _, before = await client.info()
        assert before == [] and len(worker.heard) == 2


@in_loop
async def test_long_prompts_of_a_client_are_tokenised_one_after_another(
    model: ResolvedModel, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In their order, so that the threads are there for other clients too."""
    begun: list[str] = []
    go_on = threading.Event()

    def slow(prompt: Text, *_: Any, **__: Any) -> list[int]:
        begun.append(prompt.text[0])
        go_on.wait(WAIT_S)
        return [1]

    monkeypatch.setattr(tokenizer, "encode", slow)
    async with running(model) as wire:
        greedy, other, (worker,) = wire.client(), wire.client(), wire.workers
        try:
            names = "012345"
            assert len(names) > router_module.THREADS
            for name in names:
                greedy.send(Generate(name, Text(name * 20_000), SEVEN))
            await greedy.info()  # all have arrived
            other.send(Generate("r", Text("r" * 20_000), SEVEN))
            while len(begun) < 2:
                await asyncio.sleep(0.001)
            assert set(begun) == {"0", "r"}
        finally:
            go_on.set()
        for _ in (*names, "r"):
            await worker.order()
        assert [name for name in begun if name != "r"] == list(names)


# ---------------------------------------------------------------------- every message in every state

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


# -------------------------------------------------------------------------------- stop strings, text


@in_loop
async def test_a_stop_string_ends_the_text_before_it(model: ResolvedModel, tokenizer: Tokenizer) -> None:
    """The worker is told, tokens that still come are dropped, and the reason is not the worker's."""
    async with running(model) as wire:
        client, (worker,) = wire.client(), wire.workers
        client.send(ask(sampling=SamplingParams(max_tokens=50, stop=["b-", "zzz"])))
        run = await worker.order()
        worker.step(run.sequence, *ids_of(tokenizer, "1b2b-3"))
        assert await worker.order() == Abort(run.sequence)
        worker.step(run.sequence, 66)
        worker.send(Done(run.sequence, "cancelled", STATS))
        *chunks, finished = await client.to_end("r")
        assert "".join(chunk.text for chunk in chunks if isinstance(chunk, Chunk)) == "1b2"
        assert finished == Finished("r", "stop", Usage(5, 5), STATS)
        assert len(worker.heard) == 2


@in_loop
async def test_text_that_was_held_back_comes_at_the_end(model: ResolvedModel, tokenizer: Tokenizer) -> None:
    """It might have become a stop string; with it, the last bytes that are no character yet."""
    async with running(model) as wire:
        client, (worker,) = wire.client(), wire.workers
        client.send(ask(sampling=SamplingParams(max_tokens=50, stop=["12345"])))
        run = await worker.order()
        worker.step(run.sequence, *ids_of(tokenizer, "a1234"))
        worker.send(Done(run.sequence, "length", STATS))
        *_, rest, finished = await client.to_end("r")
        assert rest == Chunk("r", "1234", [], None)
        assert finished == Finished("r", "length", Usage(5, 5), STATS)


@in_loop
async def test_a_stop_string_may_be_complete_at_the_end_only(
    model: ResolvedModel, tokenizer: Tokenizer
) -> None:
    """Bytes that are no character show when no more come."""
    async with running(model) as wire:
        client, (worker,) = wire.client(), wire.workers
        client.send(ask(sampling=SamplingParams(max_tokens=50, stop=["b\ufffd"])))
        run = await worker.order()
        tokens = [*ids_of(tokenizer, "ab"), *tokenizer.encode(Text("€"), 10)[:-1]]
        worker.step(run.sequence, *tokens)
        worker.send(Done(run.sequence, "length", STATS))
        *chunks, finished = await client.to_end("r")
        assert "".join(chunk.text for chunk in chunks if isinstance(chunk, Chunk)) == "a"
        assert finished == Finished("r", "stop", Usage(5, len(tokens)), STATS)


@in_loop
async def test_an_end_token_gives_no_text(model: ResolvedModel, tokenizer: Tokenizer) -> None:
    async with running(model) as wire:
        client, (worker,) = wire.client(), wire.workers
        client.send(ask())
        run = await worker.order()
        worker.step(run.sequence, *tokenizer.eos)
        worker.send(Done(run.sequence, "stop", STATS))
        assert await client.to_end("r") == [
            Chunk("r", "", tokenizer.eos, None),
            Finished("r", "stop", Usage(5, 1), STATS),
        ]


# -------------------------------------------------------------------------------------------- clients


@in_loop
async def test_two_clients_may_use_the_same_name(model: ResolvedModel) -> None:
    async with running(model) as wire:
        (worker,) = wire.workers
        clients = [wire.client(), wire.client()]
        for number, client in enumerate(clients, 1):
            client.send(ask("r", tokens=number))
            run = await worker.order()
            assert len(run.tokens) == number
            worker.step(run.sequence, 64 + number)
        clients[0].send(Cancel("r"))
        assert await worker.order() == Abort(0)
        worker.send(Done(1, "length", STATS))
        assert [type(message) for message in await clients[1].to_end("r")] == [Chunk, Finished]
        worker.send(Done(0, "cancelled", STATS))
        *_, finished = await clients[0].to_end("r")
        assert finished == Finished("r", "cancelled", Usage(1, 1), STATS)


@in_loop
async def test_tokens_of_one_step_go_to_their_clients_in_one_message_each(model: ResolvedModel) -> None:
    async with running(model) as wire:
        client, other, (worker,) = wire.client(), wire.client(), wire.workers
        for peer in (client, other):
            for name in ("a", "b"):
                peer.send(ask(name))
                await peer.info()
        runs = [await worker.order() for _ in range(4)]
        for _ in range(2):
            worker.send(Stepped([Step(run.sequence, 65 + run.sequence, None) for run in runs]))
        for peer, first in ((client, 65), (other, 67)):
            for _ in range(2):
                (a, b) = (await peer.message()).chunks
                assert (a.request, a.tokens, b.request, b.tokens) == ("a", [first], "b", [first + 1])


@in_loop
async def test_a_stop_string_in_a_step_ends_its_request_alone(
    model: ResolvedModel, tokenizer: Tokenizer
) -> None:
    """Also where the step brings another token of the same request, which is dropped."""
    async with running(model) as wire:
        client, (worker,) = wire.client(), wire.workers
        client.send(ask("a", sampling=SamplingParams(max_tokens=50, stop=["!"])))
        client.send(ask("b"))
        a, b = [(await worker.order()).sequence for _ in range(2)]
        one, end = ids_of(tokenizer, "1!")
        worker.send(Stepped([Step(a, one, None), Step(b, one, None), Step(a, end, None), Step(a, one, None)]))
        assert (await client.message()).chunks == [
            Chunk("a", "1", [one], None),
            Chunk("b", "1", [one], None),
            Chunk("a", "", [end], None),
        ]
        assert await worker.order() == Abort(a)
        worker.send(Done(a, "cancelled", STATS))
        assert await client.next() == Finished("a", "stop", Usage(5, 2), STATS)
        worker.step(b, end)
        assert await client.next() == Chunk("b", "!", [end], None)


@in_loop
async def test_a_client_that_vanishes_before_its_request_has_a_worker(model: ResolvedModel) -> None:
    """It cannot be seen yet that it is gone; its request runs until the router says something."""
    async with running(model, ready=False) as wire:
        client, other, (worker,) = wire.client(), wire.client(), wire.workers
        client.send(ask("r"))
        await client.info()
        client.socket.close(linger=0)
        await other.info()
        worker.ready()
        run = await worker.order()
        while Abort(run.sequence) not in worker.heard:
            worker.step(run.sequence, 66)
            await other.info()
        worker.send(Done(run.sequence, "cancelled", STATS))
        other.send(ask("r"))
        assert await worker.order() == Abort(run.sequence)
        assert isinstance(await worker.order(), Run)


@in_loop
async def test_a_client_that_does_not_read_loses_its_requests(
    model: ResolvedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of them, and it is told so once it reads; others go on."""
    monkeypatch.setattr(router_module, "UNREAD_BYTES", 1_000_000)
    monkeypatch.setattr(router_module, "TICK_S", 0.01)
    async with running(model) as wire:
        (worker,) = wire.workers
        deaf, other = wire.client(RCVHWM=1, RCVBUF=4096), wire.client()
        for name in ("a", "b"):
            deaf.send(ask(name))
        sequences = [(await worker.order()).sequence for _ in range(2)]
        other.send(ask("r"))
        kept = await worker.order()
        big = Logprob(1, -1.0, [(1, -1.0)] * 20_000)
        while not worker.heard[3:]:
            worker.step(sequences[0], 65, logprob=big)
            worker.step(kept.sequence, 66)
            assert (await other.next()).tokens == [66]
        assert {await worker.order(), await worker.order()} == {Abort(sequence) for sequence in sequences}
        for sequence in sequences:
            worker.step(sequence, 65)
            worker.send(Done(sequence, "cancelled", STATS))
        ends: list[Any] = []
        while len(ends) < 2:
            message = await deaf.next()
            ends += [message] if isinstance(message, Failed | Finished) else []
        assert {end.request for end in ends} == {"a", "b"}
        assert all(end.code == "overloaded" and "did not read its stream" in end.text for end in ends)
        worker.send(Done(kept.sequence, "length", STATS))
        assert isinstance((await other.to_end("r"))[-1], Finished)
        deaf.send(ask("a", tokens=9))
        assert len((await worker.order()).tokens) == 9, "it may try again"
        assert len(worker.heard) == 6


@in_loop
async def test_a_quiet_client_hears_how_far_its_request_is(
    model: ResolvedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(router_module, "QUIET_S", 0.02)
    monkeypatch.setattr(router_module, "TICK_S", 0.01)
    async with running(model, ready=False) as wire:
        client, (worker,) = wire.client(), wire.workers
        client.send(ask())
        assert await client.next() == Progress("r", "queued", 0, 5)
        worker.ready()
        run = await worker.order()
        assert await client.next() == Progress("r", "queued", 0, 5)
        worker.send(Prefilled(run.sequence, 2, 5))
        while await client.next() == Progress("r", "queued", 0, 5):
            pass
        for _ in range(3):
            assert await client.next() == Progress("r", "prefill", 2, 5)
        worker.send(Done(run.sequence, "length", STATS))
        while isinstance(message := await client.next(), Progress):
            pass
        assert isinstance(message, Finished)


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


# -------------------------------------------------------------------------------------------- workers


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


# ---------------------------------------------------------------------------------- start and the end


def test_what_a_router_cannot_start_with(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A port in use, and a folder without a tokenizer, which leaves the port free."""
    monkeypatch.setattr(router_module, "Tokenizer", Tokenizer)

    async def run() -> None:
        first = router_of(0, tiny_model)
        port = int(first.address.rpartition(":")[2])
        with pytest.raises(ConfigError, match=f"Port {port} of 127.0.0.1 cannot be used"):
            router_of(port, tiny_model)
        await first.close()
        with pytest.raises(ConfigError, match="tokenizer"):
            router_of(port, tmp_path)
        await router_of(port, tiny_model).close()

    asyncio.run(run())


@pytest.mark.parametrize(
    ("host", "sentence"),
    [
        ("256.1.1.1", "neither an address nor a name of this machine"),
        ("no-such-name.invalid", "neither an address nor a name of this machine"),
        ("", "neither an address nor a name of this machine"),
        ("*", "neither an address nor a name of this machine"),
        ("a b", "neither an address nor a name of this machine"),
        ("x" * 300, "neither an address nor a name of this machine"),
        ("[::1", "neither an address nor a name of this machine"),
        ("192.0.2.1", "is not an address of this machine"),
        ("2001:db8::1", "is not an address of this machine"),
    ],
)
def test_hosts_that_cannot_be_listened_on(tiny_model: Path, host: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        router_of(0, tiny_model, host)


def _has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


@pytest.mark.parametrize(
    ("host", "numeric"),
    [
        ("127.0.0.1", "127.0.0.1"),
        ("localhost", "127.0.0.1"),
        ("0.0.0.0", "0.0.0.0"),
        ("::1", "[::1]"),
        ("[::1]", "[::1]"),
    ],
)
def test_hosts_by_number_by_name_and_of_ipv6(tiny_model: Path, host: str, numeric: str) -> None:
    """The address of the ready line is one that a client can use."""
    if ":" in host and not _has_ipv6():
        pytest.skip("this machine has no IPv6")

    async def run() -> None:
        router = router_of(0, tiny_model, host)
        assert router.address.startswith(f"tcp://{numeric}:")
        serving = asyncio.create_task(router.serve())
        async with AsyncClient(router.address) as client:
            assert (await asyncio.wait_for(client.info(), WAIT_S)).model == "tiny"
        serving.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await serving
        await router.close()

    asyncio.run(run())


@pytest.mark.parametrize("method", ["push", "flush"])
@in_loop
async def test_text_that_cannot_be_made_ends_the_request_alone(
    model: ResolvedModel, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    def broken(*_: Any) -> str:
        raise KeyError("nobody thought of that")

    async with running(model) as wire:
        client, (worker,) = wire.client(), wire.workers
        client.send(ask())
        run = await worker.order()
        with monkeypatch.context() as patch:
            patch.setattr(Detokenizer, method, broken)
            worker.step(run.sequence, 65)
            if method == "push":
                assert await worker.order() == Abort(run.sequence)
            worker.send(Done(run.sequence, "cancelled", STATS))
            *_, failed = await client.to_end("r")
        assert isinstance(failed, Failed) and failed.code == CLOError.code and "into text" in failed.text
        client.send(ask())
        assert isinstance(await worker.order(), Run)


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


# ----------------------------------------------------------------------------------- lost workers

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
