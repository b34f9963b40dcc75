"""``prefix/trace``: a trace of agents on a server that reuses prefixes, and on one that does not."""

import asyncio
import random
import sys
from dataclasses import asdict, dataclass, field

from tqdm import tqdm

from benchmarks.gpu.synthetic import LLAMA_8B, QWEN_HALF_B, Model
from benchmarks.result import Result
from benchmarks.serve.agents import Agents
from benchmarks.serve.endpoint import EndpointError
from benchmarks.serve.server import serving
from benchmarks.serve.tables import Server
from benchmarks.serve.traces import Trace, percentile, seconds
from clo.runtime.client import AsyncClient
from clo.runtime.machine.host_memory import available_memory

CASE = "prefix/trace"
MODELS = {model.name: model for model in (LLAMA_8B, QWEN_HALF_B)}  # whose shapes a GPU can play it with


@dataclass
class Replayed:
    """What a server made of a trace.

    Attributes:
        traces: of all turns.
        prompt_tokens, cached_tokens: of all prompts, and how many of these came from the prefix cache.
    """

    traces: list[Trace] = field(default_factory=list)
    prompt_tokens: int = 0
    cached_tokens: int = 0


async def replay(client: AsyncClient, agents: Agents) -> Replayed:
    """Play all sessions at once; they begin at random moments of one think time.

    Raises:
        EndpointError, CLOError: an answer is not complete.
    """
    found = Replayed()
    starts = random.Random(agents.seed)
    delays = [starts.uniform(0, agents.think_s) for _ in range(agents.sessions)]

    async def session(number: int) -> None:
        await asyncio.sleep(delays[number])
        prompt = agents.opening(number)
        for turn in range(agents.turns):
            trace = Trace()
            found.traces.append(trace)
            stream = client.stream(prompt, max_tokens=agents.answer, temperature=0.0, ignore_eos=True)
            await trace.follow(len(chunk.tokens) async for chunk in stream)
            result = stream.result
            if len(result.tokens) != agents.answer:
                raise EndpointError(f"An answer ended after {len(result.tokens)} of {agents.answer} tokens.")
            found.prompt_tokens += result.usage.prompt_tokens
            found.cached_tokens += result.usage.cached_tokens
            bar.update()
            if turn + 1 < agents.turns:
                prompt = prompt + list(result.tokens) + agents.added(number, turn + 1)
                await asyncio.sleep(agents.think_s)

    turns = agents.sessions * agents.turns
    with tqdm(total=turns, desc="Turns", mininterval=10) as bar:
        async with asyncio.TaskGroup() as group:
            for number in range(agents.sessions):
                group.create_task(session(number))
    return found


def figures(reused: Replayed, plain: Replayed) -> list[Result]:
    """The figures of a server that reuses prefixes beside those of the same server without."""
    results: list[Result] = []
    for percent in (50, 99):
        with_, without = (percentile([t.ttft for t in found.traces], percent) for found in (reused, plain))
        results.append(Result(CASE, f"TTFT p{percent}", with_, "s", without, with_ / without))
    took, than = seconds(reused.traces), seconds(plain.traces)
    computed = reused.prompt_tokens - reused.cached_tokens
    return [
        *results,
        Result(CASE, "wall time", took, "s", than, took / than),
        Result(CASE, "cached", 100 * reused.cached_tokens / reused.prompt_tokens, "% of prompt tokens"),
        Result(
            CASE, "prefill tokens", computed, "tokens", plain.prompt_tokens, computed / plain.prompt_tokens
        ),
        Result(CASE, "prefill tokens saved", reused.cached_tokens, "tokens"),
        Result(CASE, "requests", len(reused.traces), "requests"),
    ]


def servers(agents: Agents, device: str, model: Model, options: str = "") -> list[Server]:
    """The servers of a trace, with and without reuse: random weights on a GPU, with room for the rows of all
    sessions where the machine has it, and the default model on the CPU.

    Args:
        device: "cuda" or "cpu".
        model: the shape on a GPU.
        options: further ones of ``launch.py``.
    """
    room = agents.last + agents.answer
    sizes = f"--max-model-len {room} --max-num-seqs {agents.sessions}"
    if device == "cuda":
        shape = model.shape
        wanted = agents.sessions * -(-room // shape.block_tokens) * shape.block_bytes
        held = -(-min(wanted, available_memory([[0]])[0] * 3 // 4) // 2**30)
        sizes = f"--dtype bfloat16 {sizes} --kv-size {held}GiB"
    return [
        Server(
            (CASE,),
            f"{sizes} --prefix-caching {caching} {options}".strip(),
            model if device == "cuda" else None,
        )
        for caching in ("on", "off")
    ]


def measure_trace(
    agents: Agents, device: str, results: list[Result], model: Model = LLAMA_8B, options: str = ""
) -> list[str]:
    """Start both servers one after the other, play the trace on each, and add the figures to ``results``.

    Returns:
        Notes to the figures.

    Raises:
        EndpointError, CLOError: a server does not start, or does not answer as it should.
    """

    async def play(address: str) -> Replayed:
        async with AsyncClient(address) as client:
            warm = agents.tokens("warm", 64)
            await client.generate(warm, max_tokens=4, temperature=0.0, ignore_eos=True)
            return await replay(client, agents)

    found, notes = [], []
    for server in servers(agents, device, model, options):
        print(f"starting a server: {server.options}", file=sys.stderr, flush=True)
        with serving(server, device) as running:
            found.append(asyncio.run(play(running.address)))
        notes.append(server.note)
    results += figures(*found)
    trace = ", ".join(f"{name} {value:g}" for name, value in asdict(agents).items())
    return [
        f"{CASE}: a generated trace ({trace}; {agents.answer} tokens in each answer) of RANDOM TOKENS, after "
        "statistics that vLLM and Mooncake published in May 2026. The references are the same server without "
        "reuse of prefixes.",
        *notes,
    ]
