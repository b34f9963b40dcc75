"""The whole system over real sockets: exact tokens, many clients at once, memory where it belongs."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch

from clo.runtime.client import AsyncClient, Client
from clo.runtime.wire.errors import PromptTooLong
from clo.runtime.wire.messages import Info
from tests.faults import WAIT_S
from tests.reference import load_transformers, transformers_greedy
from tests.server import Server

Launch = Callable[..., AbstractContextManager[Server]]


def prompts_of(lengths: tuple[int, ...], vocabulary: int, seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, vocabulary - 3, (n,), generator=generator).tolist() for n in lengths]


async def assert_all_free(client: AsyncClient) -> None:
    """Blocks of ended requests come back at once, those of cancelled ones within moments."""
    for _ in range(10 * WAIT_S):
        info: Info = await client.info()
        if info.stores and all(
            store.free_blocks == store.blocks and not store.sequences for store in info.stores
        ):
            return
        await asyncio.sleep(0.1)
    raise AssertionError(f"blocks are still held: {info.stores}")


@pytest.fixture(scope="module", params=["off", "verified"])
def exact(launch: Launch, tiny_model: Path, request: pytest.FixtureRequest) -> Iterator[Server]:
    """A set that holds every row: a random model's heads hardly prefer any, so rounding would choose."""
    options = ("--kv-size", "64MiB", "--select-k", "32", "--resident", "4096", "--prefetch", request.param)
    with launch("--model", str(tiny_model), *options) as server:
        yield server


def test_every_parameter_has_the_effect_that_it_has_in_transformers(exact: Server, tiny_model: Path) -> None:
    """Requests of all kinds at once; greedy, so that tokens can be compared."""
    model = load_transformers(str(tiny_model))
    prompts = prompts_of((5, 40, 600), 509, seed=8)
    bias = {token: 4.0 * (-1) ** token for token in range(0, 509, 7)}
    ends = transformers_greedy(model, prompts[0], 3)
    kinds: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({}, {}),
        ({"repetition_penalty": 1.3}, {"repetition_penalty": 1.3}),
        ({"logit_bias": bias}, {"sequence_bias": [[[token], value] for token, value in bias.items()]}),
        (
            {"min_tokens": 9, "stop_token_ids": ends},
            {"min_new_tokens": 9, "eos_token_id": ends},
        ),
        ({"min_p": 0.5, "top_k": 3, "seed": 1}, {}),
    ]

    def expected(prompt: list[int], options: dict[str, Any]) -> list[int]:
        ids = torch.tensor([prompt])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False, pad_token_id=0,
            **{"eos_token_id": None, **options},
        )  # fmt: skip
        tokens: list[int] = out[0, len(prompt) :].tolist()
        return tokens

    async def ask(address: str) -> list[list[int]]:
        common: dict[str, Any] = {"temperature": 0, "max_tokens": 24, "ignore_eos": True}
        async with AsyncClient(address, timeout=WAIT_S) as client:
            results = await asyncio.gather(
                *(client.generate(prompt, **common, **mine) for prompt in prompts for mine, _ in kinds)
            )
        return [result.tokens for result in results]

    wanted = [expected(prompt, theirs) for prompt in prompts for _, theirs in kinds]
    assert asyncio.run(ask(exact.address)) == wanted


def test_prompts_are_scored_as_by_transformers_beside_streams(exact: Server, tiny_model: Path) -> None:
    """With an answer and without; of any length."""
    model = load_transformers(str(tiny_model))
    prompts = prompts_of((1, 2, 300, 513, 2500), 509, seed=9)

    async def ask(address: str) -> list[Any]:
        async with AsyncClient(address, timeout=WAIT_S) as client:
            stream = asyncio.create_task(client.generate([1, 2], max_tokens=100, ignore_eos=True))
            results = await asyncio.gather(
                *(
                    client.generate(prompt, max_tokens=count, prompt_logprobs=1, ignore_eos=True)
                    for prompt in prompts
                    for count in (0, 3)
                )
            )
            assert len((await stream).tokens) == 100
            await assert_all_free(client)
            return results

    results = asyncio.run(ask(exact.address))
    for number, result in enumerate(results):
        prompt = prompts[number // 2]
        assert (result.prompt_tokens, len(result.tokens)) == (prompt, 3 * (number % 2))
        with torch.inference_mode():
            reference = model(torch.tensor([prompt])).logits[0].log_softmax(-1)
        first, *rest = result.prompt_logprobs
        assert first is None and len(rest) == len(prompt) - 1
        for position, entry in enumerate(rest):
            assert abs(entry.logprob - float(reference[position, prompt[position + 1]])) < 2e-3
            assert abs(entry.top[0][1] - float(reference[position].max())) < 2e-3


def test_completions_of_one_prompt_are_those_of_their_seeds(exact: Server) -> None:
    with Client(exact.address, timeout=WAIT_S) as client:
        options: dict[str, Any] = {"max_tokens": 12, "echo": True}
        together = client.generate("Once", n=3, seed=41, **options)
        alone = [client.generate("Once", seed=41 + number, **options) for number in range(3)]
    assert [choice.tokens for choice in together.choices] == [result.tokens for result in alone]
    assert len({tuple(choice.tokens) for choice in together.choices}) == 3
    assert all(choice.text.startswith("Once") for choice in together.choices)


def test_concurrent_streams_equal_the_ones_generated_alone(exact: Server) -> None:
    """Eight clients of different lengths, one cancelled, one refused."""
    lengths = (5, 40, 180, 513, 700, 1100, 2000, 3000)
    prompts = prompts_of(lengths, 512, seed=3)
    options: dict[str, Any] = {"temperature": 0.0, "max_tokens": 40, "ignore_eos": True}

    async def together(address: str) -> list[str]:
        async def one(number: int) -> str:
            async with AsyncClient(address, timeout=WAIT_S) as client:
                if number == 3:
                    stream = client.stream(prompts[number], **{**options, "max_tokens": 900})
                    count = 0
                    async for _ in stream:
                        count += 1
                        if count == 10:
                            await stream.cancel()
                    assert stream.result.finish_reason == "cancelled"
                    return "cancelled"
                if number == 5:
                    with pytest.raises(PromptTooLong, match="4096"):
                        await client.generate(prompts[number], **{**options, "max_tokens": 4096})
                    return "refused"
                return (await client.generate(prompts[number], **options)).text

        texts = await asyncio.gather(*(one(number) for number in range(len(prompts))))
        async with AsyncClient(address) as client:
            await assert_all_free(client)
        return texts

    with Client(exact.address, timeout=WAIT_S) as client:
        alone = [client.generate(prompt, **options).text for prompt in prompts]
    alone[3], alone[5] = "cancelled", "refused"
    assert asyncio.run(together(exact.address)) == alone
    assert asyncio.run(together(exact.address)) == alone, "a second time, over slots that were used"


def test_sampling_is_repeatable_and_logprobs_are_those_of_the_model(exact: Server, tiny_model: Path) -> None:
    prompt = prompts_of((50,), 512, seed=9)[0]
    model = load_transformers(str(tiny_model))
    with Client(exact.address, timeout=WAIT_S) as client:
        first = client.generate(prompt, seed=4, max_tokens=20, temperature=0.9, ignore_eos=True)
        again = client.generate(prompt, seed=4, max_tokens=20, temperature=0.9, ignore_eos=True)
        other = client.generate(prompt, seed=5, max_tokens=20, temperature=0.9, ignore_eos=True)
        assert first.tokens == again.tokens != other.tokens

        continuation = prompts_of((12,), 512, seed=10)[0]
        scored = client.score(prompt, continuation)
        assert scored.tokens == continuation
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + continuation])).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, torch.tensor(continuation).unsqueeze(1)).squeeze(1)
        assert scored.logprobs is not None
        got = torch.tensor([entry.logprob for entry in scored.logprobs])
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)


NODES_UNKNOWN = """
import sys
from pathlib import Path
from clo import launch
from clo.runtime.machine import numa
numa._NODES = Path("/nowhere")
sys.exit(launch.main(sys.argv[1:]))
"""
"""A launcher on a machine that does not say which nodes it has."""


def test_two_workers_and_two_stores_serve_the_same_tokens(launch: Launch, tiny_model: Path) -> None:
    """A node to which they cannot be bound costs each process one warning."""
    prompts = prompts_of((30, 200, 600, 900), 512, seed=5)
    options: dict[str, Any] = {"temperature": 0.0, "max_tokens": 20, "ignore_eos": True}
    model = load_transformers(str(tiny_model))
    expected = [transformers_greedy(model, prompt, 20) for prompt in prompts]

    async def run(address: str) -> None:
        async with AsyncClient(address, timeout=WAIT_S) as client:
            results = await asyncio.gather(*(client.generate(prompt, **options) for prompt in prompts))
            assert [result.tokens for result in results] == expected
            info = await client.info()
            assert sorted(worker.worker for worker in info.workers) == [0, 1]
            assert sorted(store.store for store in info.stores) == ["numa0", "numa1"]
            assert all(worker.generated_tokens > 0 for worker in info.workers)
            await assert_all_free(client)

    arguments = (
        "--model",
        str(tiny_model),
        "--kv-size",
        "64MiB",
        "--workers",
        "2",
        "--kvstore",
        "numa0,numa1",
    )
    with launch(*arguments, "--resident", "2000", program=("-c", NODES_UNKNOWN)) as server:
        asyncio.run(run(server.address))
        if not Path("/sys/devices/system/node/node1").exists():
            text = server.stderr.read_text()
            assert text.count("NUMA node 1") == 2, text  # one for the store, one for the worker
