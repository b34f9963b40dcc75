"""Tokens/s of answers that follow a JSON schema, beside those of free answers in the same run.

    python -m benchmarks.structured

A real server with the default model, on a GPU where there is one. Rounds with and without a schema take
turns, and each has the same number of requests and tokens: the schema wants a list that is longer than any
answer. The median gap between two tokens of an answer makes the rate, so that compiling and prefill are not
in it; what a schema adds to the time to the first token is a figure of its own.
"""

import asyncio
import time
from itertools import pairwise
from statistics import median
from typing import Any, NamedTuple

import torch

from benchmarks.masks import PERSON
from benchmarks.result import Result, write
from benchmarks.serve.server import serving
from benchmarks.serve.tables import Server
from clo.runtime.client import AsyncClient

STREAMS, TOKENS, ROUNDS = (1, 8), {"cpu": 24, "cuda": 512}, 3
SCHEMA = {"type": "array", "items": PERSON, "minItems": 64}
_OPTIONS = "--max-model-len 2048 --max-num-seqs 8 --kv-size 1GiB"


class Round(NamedTuple):
    """Medians over all streams: seconds from one token to the next, and to the first one."""

    gap: float
    first: float


async def _ask(client: AsyncClient, number: int, tokens: int, form: dict[str, Any]) -> list[float]:
    """When each token of an answer came, and before them when it was asked for."""
    text = f"Write a list of {number + 3} people in JSON, with their names, ages, tags and addresses."
    times = [time.perf_counter()]
    stream = client.stream(
        [{"role": "user", "content": text}], max_tokens=tokens, seed=number, ignore_eos=True, **form
    )
    async for chunk in stream:
        times += [time.perf_counter()] * len(chunk.tokens)
    if len(times) != tokens + 1:
        raise RuntimeError(f"an answer has {len(times) - 1} tokens and not {tokens}")
    return times


async def _round(client: AsyncClient, streams: int, tokens: int, form: dict[str, Any]) -> Round:
    answers = await asyncio.gather(*(_ask(client, number, tokens, form) for number in range(streams)))
    gaps = [later - earlier for times in answers for earlier, later in pairwise(times[1:])]
    return Round(median(gaps), median(times[1] - times[0] for times in answers))


async def _measure(address: str, tokens: int) -> list[Result]:
    forms: tuple[dict[str, Any], ...] = ({}, {"structured_outputs": {"json": SCHEMA}})
    results = []
    async with AsyncClient(address, timeout=600.0) as client:
        for form in forms:
            await _round(client, 1, 8, form)  # compiles what is compiled once
        for streams in STREAMS:
            turns = [[await _round(client, streams, tokens, form) for form in forms] for _ in range(ROUNDS)]
            free, bound = (
                Round(*(median(values) for values in zip(*rounds, strict=True)))
                for rounds in zip(*turns, strict=True)
            )
            case, rate, reference = f"schema/{streams}", streams / bound.gap, streams / free.gap
            results += [
                Result(case, "rate", rate, "tokens/s", reference, rate / reference),
                Result(case, "first token", bound.first, "s", free.first, bound.first / free.first),
            ]
    return results


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with serving(Server((), _OPTIONS), device) as running:
        results = asyncio.run(_measure(running.address, TOKENS[device]))
    write("structured" if device == "cpu" else "gpu-structured", results)


if __name__ == "__main__":
    main()
