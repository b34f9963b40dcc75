"""Serving, from a client to its tokens, through launcher, router and worker processes.

    python -m benchmarks.serve [CASE ...]

On a GPU a Llama-3-8B shape with random weights and the default model; on the CPU (``--device cpu``) the
default model and a small table. This process is the client. ``--peer URL --model NAME`` asks the same of a
server that runs already and has the completions API of OpenAI, such as vLLM or SGLang.

- ttft/...: time to first token, one request at a time;
- short, long: throughput of many short and of a few long requests, sent at once;
- mixed: throughput of many short requests while a few very long ones decode;
- gaps: the gaps of streams that decode while a long prompt arrives, beside those without it, and the time to
  first token of that prompt, beside that without the streams;
- tokens: throughput of many streams, and the CPU time of router and client for each token;
- prefix/trace, where it is named and alone: a trace of agents, with reuse of prefixes and without; its sizes
  are the options --trace-....

In every case TTFT is the time from sending a request to its first token, and a gap that between two arrivals
of tokens of one request, several of which may come together.
"""

import argparse
import asyncio
import sys
from collections.abc import Iterable
from dataclasses import fields, replace

import torch

from benchmarks.result import Result, write
from benchmarks.serve.agents import Agents
from benchmarks.serve.cases import Bench, cases_of
from benchmarks.serve.endpoint import CLO, EndpointError
from benchmarks.serve.prompts import Prompts, text_of
from benchmarks.serve.replay import CASE, MODELS, measure_trace
from benchmarks.serve.server import Running, serving
from benchmarks.serve.tables import CPU, GPU, REFERENCE_NOTE, Table
from clo.runtime.client import AsyncClient
from clo.runtime.config import ModelConfig
from clo.runtime.machine.process import end_start_up
from clo.runtime.model.files import resolve
from clo.runtime.tokenizer import Tokenizer
from clo.runtime.wire.errors import CLOError


async def measure(bench: Bench, names: Iterable[str], results: list[Result]) -> None:
    """Measure cases one after another and add their figures to ``results``."""
    cases = cases_of(bench.table)
    await bench.ask(bench.table.warm)
    for name in names:
        print(f"measuring serve/{name}", file=sys.stderr, flush=True)
        found = await cases[name](bench)
        print(*found, sep="\n", file=sys.stderr, flush=True)
        results += found


async def measure_server(
    running: Running, table: Table, text: list[int], names: Iterable[str], results: list[Result]
) -> None:
    """``measure`` a server of CLO."""
    async with AsyncClient(running.address) as client:
        await measure(Bench(CLO(client), Prompts(text), table, running.launcher), names, results)


async def measure_peer(
    url: str, model: str, table: Table, text: list[int], names: Iterable[str], results: list[Result]
) -> None:
    """``measure`` another server."""
    from benchmarks.serve import peer  # here, since only this needs aiohttp

    async with peer.session() as session:
        await measure(Bench(peer.Peer(session, url, model), Prompts(text), table), names, results)


def run(table: Table, device: str, text: list[int], names: list[str], results: list[Result]) -> list[str]:
    """Start the table's servers one after another and measure cases on them.

    Args:
        device: "cuda" or "cpu".
        text: token ids to cut prompts from.
        names: of the cases.
        results: their figures are added here as they come.

    Returns:
        Notes to the figures.

    Raises:
        EndpointError, CLOError: a server does not start, or does not answer as it should.
    """
    notes = []
    for server in table.servers:
        wanted = [name for name in server.cases if name in names]
        if wanted:
            print(f"starting a server for {', '.join(wanted)}", file=sys.stderr, flush=True)
            with serving(server, device) as running:
                asyncio.run(measure_server(running, table, text, wanted, results))
            notes.append(server.note)
    if any(result.reference for result in results if result.case.partition("/")[2] in table.reference):
        notes.append(REFERENCE_NOTE)
    return notes


def chosen(table: Table, asked: list[str]) -> list[str]:
    """The cases of a table that are asked for by name, or by what stands before the slash of their names; all
    where nothing is asked for.

    Raises:
        ValueError: there is no such case.
    """
    groups = {case: (case, case.partition("/")[0]) for case in table.cases}
    for name in asked:
        if not any(name in group for group in groups.values()):
            raise ValueError(f"there is no case {name}, only {', '.join(table.cases)}")
    return [case for case, group in groups.items() if not asked or not {*group}.isdisjoint(asked)]


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serve",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "cases", nargs="*", metavar="CASE", help="all where none is named; ttft is all ttft/..."
    )
    parser.add_argument(
        "--peer", metavar="URL", help="a server that runs already, such as http://127.0.0.1:8000"
    )
    parser.add_argument("--model", metavar="NAME", help="the name under which the peer knows its model")
    parser.add_argument(
        "--device",
        choices=("cuda", "cpu"),
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="decides about the table, also for a peer",
    )
    for field in fields(Agents):
        option = f"--trace-{field.name.removesuffix('_s').replace('_', '-')}"
        number = type(field.default)
        parser.add_argument(
            option, dest=field.name, metavar="N", type=number, default=field.default, help=f"of {CASE}"
        )
    parser.add_argument(
        "--trace-model", choices=MODELS, default="llama-3-8b", help=f"the shape of {CASE} on a GPU"
    )
    given = parser.parse_args()
    table = GPU if given.device == "cuda" else CPU
    if (given.peer is None) != (given.model is None):
        parser.error("--peer and --model go together")
    agents = None
    try:
        if given.cases == [CASE] and given.peer is None:
            names, agents = [], Agents(**{field.name: getattr(given, field.name) for field in fields(Agents)})
        else:
            names = chosen(table, given.cases)
    except ValueError as error:
        parser.error(str(error))

    results: list[Result] = []
    notes: list[str] = []
    failed = 0
    try:
        default = resolve(ModelConfig(device="cpu"))
        text = text_of(Tokenizer(default.folder, default.vocab_size))
        end_start_up()
        if agents is not None:
            notes = measure_trace(agents, given.device, results, MODELS[given.trace_model])
        elif given.peer is None:
            notes = run(table, given.device, text, names, results)
        else:
            table = replace(table, reference={})
            asyncio.run(measure_peer(given.peer, given.model, table, text, names, results))
            notes = [f"Measured at {given.peer}, which serves {given.model}; the hardware is the client's."]
    except (EndpointError, CLOError) as error:
        print(f"error: {error}", file=sys.stderr)
        failed = 1
    if results:
        device = "gpu" if given.device == "cuda" else "cpu"
        name = "serve-peer" if given.peer else f"{device}-serve"
        write(name if agents is None else f"{device}-trace", results, notes)
    return failed


if __name__ == "__main__":
    sys.exit(main())
