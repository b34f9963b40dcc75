"""The router and one request: what it may ask for, what a worker is told, what its tokens become."""

import asyncio
import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from clo.runtime.config import ResolvedModel
from clo.runtime.request import LIKELY_TOKENS
from clo.runtime.tokenizer import Detokenizer, Tokenizer
from clo.runtime.wire.errors import CLOError
from clo.runtime.wire.messages import (
    NO_STATS,
    Abort,
    Chunk,
    Done,
    Failed,
    Finished,
    Generate,
    Logprob,
    Prefilled,
    Progress,
    PromptChunk,
    PromptScored,
    Ready,
    Run,
    Sampling,
    SamplingParams,
    Step,
    Stepped,
    StructuredOutputs,
    Text,
    Tokens,
    Usage,
)
from tests import routers
from tests.conftest import VOCABULARY
from tests.peers import running
from tests.routers import MODEL_LENGTH, SEVEN, STATS, ask, ids_of, in_loop, model_in

model, quiet, tokenizer = routers.model, routers.quiet, routers.tokenizer


# ------------------------------------------------------------------------------------- whole requests


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


# --------------------------------------------------------------------------------- stop strings, text


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


# ----------------------------------------------------------------------------------------- what fails


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
