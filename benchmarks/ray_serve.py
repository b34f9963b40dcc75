"""Replicas on Ray, as clients of OpenAI's API see them, on two nodes that share one machine.

    python -m benchmarks.ray_serve

- streams/...: fifty clients stream, each one answer after another, over two replicas. A replica is killed in
  their midst; later a third node is added, on which the autoscaler then starts a replica;
- prefix/ROUTER: conversations that share documents, turn by turn, through each of Ray's routers: by prefixes,
  by two random replicas of which the less busy one is taken, and in turn. Each has replicas of its own.

The model is a small Llama with random weights, since all nodes share the CPU's cores.
"""

import argparse
import asyncio
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from openai import APIError, AsyncOpenAI

from benchmarks.cpu_clock import cpu_seconds
from benchmarks.gpu.synthetic import Model
from benchmarks.ray_cluster import Nodes, actors, nodes, wait_until
from benchmarks.result import Result, write
from benchmarks.serve.agents import Agents
from benchmarks.serve.server import write_model
from benchmarks.serve.traces import Trace, gaps, percentile

ROUTERS = {
    "prefix": None,  # the application's own
    "power of two": "ray.serve._private.request_router:PowerOfTwoChoicesRequestRouter",
    "round robin": "ray.serve.experimental.round_robin_router:RoundRobinRouter",
}
SMALL = Model("small", 8, 8, 4, 512, 1536, 49152, head_dim=64)
CPUS = 1.0  # of a node, by name
REPLICA = {"num_cpus": 0.6, "num_gpus": 0}  # so that a node has room for one
CLIENTS, ANSWER, STEADY_S = 50, 24, 30.0
CONVERSATIONS, TURNS, DOCUMENTS, SHARED, ADDED = 12, 3, 6, 1024, 64
THINK_S, APART_S = 2.0, 3.0
PORT = 8123
NAME = "model"


@dataclass
class Turn:
    """One request.

    Attributes:
        tokens: of the answer.
        prompt, cached: tokens of the prompt, and how many of these were in the cache.
        broken: the code of the error with which it ended; None for one that is whole.
    """

    trace: Trace = field(default_factory=Trace)
    tokens: list[int] = field(default_factory=list)
    prompt: int = 0
    cached: int = 0
    broken: str | None = None


async def ask(client: AsyncOpenAI, prompt: list[int], tokens: int) -> Turn:
    """One streamed answer."""
    turn = Turn()
    try:
        stream = await client.completions.create(
            model=NAME, prompt=prompt, max_tokens=tokens, temperature=0, stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True, "return_token_ids": True},
        )  # fmt: skip
        async for chunk in stream:
            if chunk.choices:
                turn.tokens += getattr(chunk.choices[0], "token_ids", None) or []
                turn.trace.arrivals.append((time.perf_counter(), len(turn.tokens)))
            if chunk.usage is not None:
                turn.prompt = chunk.usage.prompt_tokens
                details = chunk.usage.prompt_tokens_details
                turn.cached = (details.cached_tokens or 0) if details is not None else 0
    except APIError as error:
        turn.broken = str(error.code)
    return turn


class Clients:
    """Fifty of them, for as long as the block lasts.

    Attributes:
        turns: what they asked, those that have ended.
    """

    def __init__(self, client: AsyncOpenAI) -> None:
        self._client, self.turns = client, list[Turn]()
        self._tasks = [asyncio.create_task(self._ask(number)) for number in range(CLIENTS)]

    async def _ask(self, number: int) -> None:
        words, turn = Agents(seed=1), 0
        while True:
            turn += 1
            self.turns.append(await ask(self._client, words.tokens(f"{number} {turn}", 24), ANSWER))

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


def figures(case: str, turns: list[Turn], took: float) -> list[Result]:
    """Of the answers that ended in a stretch of ``took`` seconds."""
    whole = [turn.trace for turn in turns if turn.broken is None]
    if not whole:
        raise RuntimeError(f"{case}: no answer came to its end within {took:.0f} s; this machine is too slow")
    tokens = sum(len(turn.tokens) for turn in turns)
    return [
        Result(case, "seconds", took, "s"),
        Result(case, "whole answers", len(whole), "answers"),
        Result(case, "broken answers", len(turns) - len(whole), "answers"),
        Result(case, "rate", tokens / took, "tokens/s"),
        Result(case, "TTFT p50", percentile([trace.ttft for trace in whole], 50), "s"),
        Result(case, "TTFT p99", percentile([trace.ttft for trace in whole], 99), "s"),
        Result(case, "longest gap", max(gaps(whole)), "s"),
    ]


async def streams(found: Nodes, client: AsyncOpenAI) -> list[Result]:
    """Clients before a replica is killed, until it is there again, until there is a third one, and then."""
    results: list[Result] = []
    clients = Clients(client)

    async def stretch(case: str, work: Awaitable[Any]) -> None:
        clients.turns.clear()
        begun, used = time.perf_counter(), cpu()
        await work
        took, used = time.perf_counter() - begun, cpu() - used
        results.extend(figures(f"streams/{case}", clients.turns, took))
        pieces = sum(len(turn.trace.arrivals) for turn in clients.turns)
        results.append(Result(f"streams/{case}", "entrance CPU", 1e6 * used / pieces, "us/event"))
        codes = {turn.broken for turn in clients.turns if turn.broken is not None}
        if codes - {"worker_died"}:
            raise RuntimeError(f"answers ended with other errors: {codes}")

    def cpu() -> float:  # of the process that passes everything on; Ray's proxy before it is another one
        return sum(cpu_seconds(actor.pid) for actor in actors("OpenAI"))

    def wait(replicas: int) -> Awaitable[None]:
        return asyncio.to_thread(found.wait_for, replicas)

    async def replace() -> None:
        actors()[0].kill()
        await asyncio.to_thread(wait_until, lambda: found.replicas() < 2, "Serve sees that one is dead")
        await wait(2)

    try:
        await asyncio.sleep(THINK_S)
        await stretch("two replicas", asyncio.sleep(STEADY_S))
        await stretch("one killed, until it is back", replace())
        found.add(CPUS)
        await stretch("a node added, until its replica is there", wait(3))
        await stretch("three replicas", asyncio.sleep(STEADY_S))
    finally:
        await clients.stop()
    return results


async def conversations(router: str, found: Nodes, client: AsyncOpenAI) -> list[Result]:
    """Conversations about documents, all at once."""
    turns: list[Turn] = []
    words = Agents()

    async def talk(number: int) -> None:
        await asyncio.sleep(APART_S * number)
        document = words.tokens(f"document {number % DOCUMENTS}", SHARED)
        prompt = document + words.tokens(f"{number} 0", ADDED)
        for turn in range(1, TURNS + 1):
            turns.append(await ask(client, prompt, ANSWER))
            if turns[-1].broken is not None:
                raise RuntimeError(f"a turn ended with {turns[-1].broken}")
            prompt = prompt + words.tokens(f"{number} {turn}", ADDED)
            await asyncio.sleep(THINK_S)

    begun = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for number in range(CONVERSATIONS):
            group.create_task(talk(number))
    took = time.perf_counter() - begun
    case, ttft = f"prefix/{router}", [turn.trace.ttft for turn in turns]
    cached = 100 * sum(turn.cached for turn in turns) / sum(turn.prompt for turn in turns)
    return [
        Result(case, "cached", cached, "% of prompt tokens"),
        Result(case, "TTFT p50", percentile(ttft, 50), "s"),
        Result(case, "TTFT p90", percentile(ttft, 90), "s"),
        Result(case, "seconds", took, "s"),
    ]


def application(scaling: dict[str, Any], router: str | None) -> dict[str, Any]:
    """A configuration for ``Nodes.deploy``."""
    replicas = {"name": "CLO", "ray_actor_options": REPLICA, **scaling}
    if router is not None:
        replicas["request_router_config"] = {"request_router_class": router}
    return {
        "route_prefix": "/",
        "import_path": "clo.ray:app",
        "deployments": [replicas, {"name": "OpenAI", "ray_actor_options": {"num_cpus": 0.1}}],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ray_serve",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.parse_args()
    options: dict[str, Any] = {
        "served-model-name": NAME,
        "device": "cpu",
        "max-model-len": 2048,
        "max-num-seqs": 32,
        "select-k": 32,
        "resident": 128,
        "tail": 512,
        "kv-size": "1GiB",
    }
    results: list[Result] = []

    def measure(
        config: dict[str, Any], work: Callable[[Nodes, AsyncOpenAI], Awaitable[list[Result]]]
    ) -> None:
        async def run(found: Nodes) -> list[Result]:
            async with AsyncOpenAI(
                base_url=f"{found.url}/v1", api_key="none", max_retries=0, timeout=600
            ) as client:
                await asyncio.gather(*(ask(client, Agents().tokens(f"warm {n}", 16), 4) for n in range(8)))
                return await work(found, client)

        with tempfile.TemporaryDirectory() as folder, nodes(2, CPUS, PORT) as found:
            write_model(SMALL, Path(folder))
            config["args"] = {**options, "model": folder, "load-format": "dummy"}
            found.deploy(config, replicas=2)
            measured = asyncio.run(run(found))
        print(*measured, sep="\n", flush=True)
        results.extend(measured)

    scaling = {
        "autoscaling_config": {
            "min_replicas": 2,
            "max_replicas": 3,
            "target_ongoing_requests": 8,
            "upscale_delay_s": 2,
        }
    }
    measure(application(scaling, None), streams)
    fixed = {"autoscaling_config": {"min_replicas": 2, "max_replicas": 2}}
    for name, router in ROUTERS.items():
        measure(application(fixed, router), partial(conversations, name))
    write(
        "ray",
        results,
        [
            f"All nodes share the cores of one machine, so that more replicas are not faster here. "
            f"The model has {SMALL.layers} layers, a hidden size of {SMALL.hidden} and random weights; "
            f"options {' '.join(f'--{key} {value}' for key, value in options.items())}.",
            f"streams: {CLIENTS} clients, prompts of 24 random tokens, answers of {ANSWER}; the figures of a "
            "stretch are of answers that ended in it.",
            f"prefix: {CONVERSATIONS} conversations of {TURNS} turns that begin {APART_S:g} s apart, about "
            f"{DOCUMENTS} documents of {SHARED} random tokens with which prompts begin; each turn adds "
            f"{ADDED}, {THINK_S:g} s after an answer. Answers, of {ANSWER} tokens, are not sent back.",
        ],
    )


if __name__ == "__main__":
    main()
