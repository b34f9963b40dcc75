"""The cases: each sends its requests to an endpoint and gives its figures."""

import asyncio
import time
from collections.abc import Callable, Coroutine
from statistics import median
from typing import Any

from benchmarks.cpu_clock import cpu_seconds
from benchmarks.result import Result
from benchmarks.serve.endpoint import Endpoint, EndpointError
from benchmarks.serve.prompts import Prompts
from benchmarks.serve.tables import Load, Table
from benchmarks.serve.traces import Trace, gaps, percentile, rate_from_first, rate_of_all, seconds

_LOOK_S = 0.01  # between two looks at streams that go on

Case = Callable[["Bench"], Coroutine[Any, Any, list[Result]]]


class Bench:
    """An endpoint, and what is asked of it.

    Args:
        endpoint: what is measured.
        prompts: what it is asked.
        table: sizes of the cases.
        launcher: pid of the process with CLO's router; None for an endpoint of another kind.
    """

    def __init__(
        self, endpoint: Endpoint, prompts: Prompts, table: Table, launcher: int | None = None
    ) -> None:
        self.table, self.launcher = table, launcher
        self._endpoint, self._prompts = endpoint, prompts
        self._alone: dict[str, float] = {}  # times to first token

    async def ask(self, load: Load) -> list[Trace]:
        """Send all requests at once and read their answers.

        Raises:
            EndpointError, CLOError: an answer is not complete.
        """
        async with Streams(self._endpoint, self._prompts, load) as streams:
            await asyncio.gather(*streams.tasks)
        for trace in streams.traces:
            if trace.tokens != load.output:
                raise EndpointError(f"An answer ended after {trace.tokens} of {load.output} tokens.")
        return streams.traces

    def streams(self, load: Load) -> "Streams":
        """Requests that begin together when this is entered."""
        return Streams(self._endpoint, self._prompts, load)

    async def alone(self, name: str) -> float:
        """Median time to first token of a prompt of ``Table.ttft``, one request after another, in seconds."""
        if name not in self._alone:
            load = self.table.ttft[name]
            one = load._replace(requests=1)
            self._alone[name] = median([(await self.ask(one))[0].ttft for _ in range(load.requests)])
        return self._alone[name]

    def compared(self, case: str, metric: str, value: float, unit: str) -> Result:
        """A figure beside its reference, where the table has one."""
        reference = self.table.reference.get(case)
        ratio = None if reference is None else value / reference
        return Result(f"serve/{case}", metric, value, unit, reference, ratio)


class Streams:
    """Requests that are sent together, within an ``async with``; what has not ended at its end is cancelled.

    Attributes:
        traces: one for each request, which grow while it is read.
        tasks: those that read; each ends with its stream or its error.
    """

    def __init__(self, endpoint: Endpoint, prompts: Prompts, load: Load) -> None:
        self._endpoint, self._load = endpoint, load
        self._prompts = prompts.take(load.requests, load.prompt)

    async def __aenter__(self) -> "Streams":
        self.traces: list[Trace] = []
        self.tasks = [asyncio.create_task(self._read(prompt)) for prompt in self._prompts]
        return self

    async def _read(self, prompt: list[int]) -> None:
        trace = Trace()
        self.traces.append(trace)
        await trace.follow(self._endpoint.stream(prompt, self._load.output))

    async def __aexit__(self, *_: object) -> None:
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)

    async def until(self, reached: Callable[[Trace], bool]) -> None:
        """Wait until every request has come so far.

        Raises:
            EndpointError, CLOError: one has ended before.
        """
        while True:
            for task in self.tasks:
                if task.done():
                    task.result()
                    raise EndpointError("A stream ended while it was needed; give Table.streams more tokens.")
            if len(self.traces) == len(self.tasks) and all(map(reached, self.traces)):
                return
            await asyncio.sleep(_LOOK_S)


def streaming(case: str, traces: list[Trace]) -> list[Result]:
    """How the answers of requests that were sent together came."""
    waits, stalls = [trace.ttft for trace in traces], gaps(traces)
    figures = [("TTFT", "s", waits, 1.0), ("gap", "ms", stalls, 1e3)]
    return [
        Result(f"serve/{case}", f"{name} p{percent}", percentile(values, percent) * factor, unit)
        for name, unit, values, factor in figures
        for percent in (50, 99)
        if values
    ]


async def first_token(name: str, bench: Bench) -> list[Result]:
    """Time to first token, one request at a time."""
    return [bench.compared(f"ttft/{name}", "TTFT, median", await bench.alone(name), "s")]


async def short(bench: Bench) -> list[Result]:
    """Throughput of many short requests."""
    load = bench.table.short
    traces = await bench.ask(load)
    rate = load.requests * load.output / seconds(traces)
    return [bench.compared("short", "rate", rate, "tokens/s"), *streaming("short", traces)]


async def long(bench: Bench) -> list[Result]:
    """How long a few long requests take, from the first token to the last one, and from sending them."""
    traces = await bench.ask(bench.table.long)
    answered = max(trace.last for trace in traces) - min(trace.first for trace in traces)
    return [
        bench.compared("long", "time", answered, "s"),
        Result("serve/long", "time from sending", seconds(traces), "s"),
        *streaming("long", traces),
    ]


async def mixed(bench: Bench) -> list[Result]:
    """Throughput of many short requests, sent at once while a few long ones decode."""
    load = bench.table.many
    async with bench.streams(bench.table.beside) as streams:
        await streams.until(lambda trace: trace.tokens > 0)
        before = sum(trace.tokens for trace in streams.traces)
        traces = await bench.ask(load)
        others = sum(trace.tokens for trace in streams.traces) - before
        if any(task.done() for task in streams.tasks):
            raise EndpointError("A long request ended before the short ones; give Table.beside more tokens.")
    took = seconds(traces)
    return [
        bench.compared("mixed", "rate", load.requests * load.output / took, "tokens/s"),
        Result("serve/mixed", "rate of the long ones beside", others / took, "tokens/s"),
        *streaming("mixed", traces),
    ]


async def tokens(bench: Bench) -> list[Result]:
    """Throughput of many streams, and the CPU time of what stands between a worker and who reads them."""
    load, launcher = bench.table.tokens, bench.launcher
    began = time.process_time(), 0.0 if launcher is None else cpu_seconds(launcher)
    traces = await bench.ask(load)
    count = load.requests * load.output
    client = (time.process_time() - began[0]) / count
    results = [
        Result("serve/tokens", "rate, first to last", rate_from_first(traces), "tokens/s"),
        Result("serve/tokens", "client CPU", client * 1e6, "us/token"),
    ]
    if (rate := rate_of_all(traces)) is not None:
        results.insert(1, Result("serve/tokens", "rate, all decoding", rate, "tokens/s"))
    if launcher is not None:
        router = (cpu_seconds(launcher) - began[1]) / count
        results.append(Result("serve/tokens", "router CPU", router * 1e6, "us/token"))
    return results + streaming("tokens", traces)


async def stalls(bench: Bench) -> list[Result]:
    """What a long prompt does to streams that decode, and they to it."""
    table = bench.table
    alone = await bench.alone(table.arriving)
    async with bench.streams(table.streams) as streams:
        await streams.until(lambda trace: trace.tokens > 0)
        begin, before = time.perf_counter(), {id(trace): trace.tokens for trace in streams.traces}
        await streams.until(lambda trace: trace.tokens >= before[id(trace)] + table.quiet)
        quiet = gaps(streams.traces, begin, time.perf_counter())
        (arrived,) = await bench.ask(table.ttft[table.arriving]._replace(requests=1))
        # a gap that is still open would not be seen
        await streams.until(lambda trace: trace.last > arrived.first)
        beside = gaps(streams.traces, arrived.sent, arrived.first)
    step = percentile(quiet, 50)
    figures = [
        ("gap p50", step, None),
        ("gap p99", percentile(quiet, 99), None),
        ("gap p50 beside a prompt", percentile(beside, 50), step),
        ("gap p99 beside a prompt", percentile(beside, 99), step),
    ]
    results = [
        Result("serve/gaps", name, gap * 1e3, "ms", than and than * 1e3, than and gap / than)
        for name, gap, than in figures
    ]
    return [
        *results,
        Result("serve/gaps", "TTFT beside streams", arrived.ttft, "s", alone, arrived.ttft / alone),
    ]


def cases_of(table: Table) -> dict[str, Case]:
    """All cases of a table by their names."""

    def ttft_case(name: str) -> Case:
        return lambda bench: first_token(name, bench)

    by_prompt = {f"ttft/{name}": ttft_case(name) for name in table.ttft}
    return {**by_prompt, "short": short, "long": long, "mixed": mixed, "gaps": stalls, "tokens": tokens}
