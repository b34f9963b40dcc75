"""host: what the host does while 24 sequences of 32K decode at the Llama-3-8B shape.

The worker's own loop and scheduler, and a real KV store; prompts count as prefilled, for the cache is filled
at random. A few requests end meanwhile, and others take their places.
"""

import os
import time
from collections.abc import Iterator
from contextlib import suppress
from itertools import count, pairwise
from typing import NamedTuple

import torch
import zmq
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.ceilings import seconds
from benchmarks.gpu.machine import Machine
from benchmarks.gpu.synthetic import LLAMA_8B, arena_of, filled_engine, random_decoder, replayed
from benchmarks.result import Result
from clo.gpu_worker.engine import Engine
from clo.gpu_worker.scheduler import Scheduler
from clo.gpu_worker.worker import Worker
from clo.kvstore.server import listen
from clo.runtime.config import CacheConfig
from clo.runtime.wire.messages import Attach, Done, FromWorker, Ready, Run, Sampling, Stepped, ToWorker
from clo.runtime.wire.sockets import DealerSocket
from tests.store import ARENA_BYTES, new_endpoint, running_store

CONTEXT, SEQUENCES = 32768, 24
ARENA_GIB = 98
ROWS = 23  # new ones a step and head: 9 % of k
_LONGEST = 512  # tokens that a request generates: more than there are steps
_WARM, _STEPS, _PROFILED = 20, 400, 50
_ENDING = 4  # requests that end while steps are timed: about as many as prefill could replace
_BURST = 20  # graphs launched one behind another
_SETTLED = 5  # steps after which the profiler's own start no longer shows


class Reading(NamedTuple):
    """What had been spent at a moment."""

    steps: int  # launched
    wall: float  # seconds
    worker: float  # CPU seconds of this process
    store: float  # CPU seconds of the KV store


class Served(NamedTuple):
    """A timed stretch of steps, and a profile of later ones."""

    begin: Reading
    end: Reading
    profile: profile
    profiled: int  # steps


class Prefilled:
    """In place of ``Prefill``: nothing is left to do."""

    def __init__(self, total: int, logits: Tensor) -> None:
        self.done = self.total = total
        self._logits = logits  # [1, vocab]

    def advance(self) -> Tensor:
        return self._logits


def measure(machine: Machine) -> list[Result]:
    model, max_tokens = LLAMA_8B, CONTEXT + _LONGEST
    arena = arena_of(machine.memory, model, SEQUENCES, max_tokens)
    config = CacheConfig(select_k=256, resident=2048)
    engine = filled_engine(random_decoder(model, max_tokens), arena, config, SEQUENCES, CONTEXT, max_tokens)

    def burst() -> None:
        for _ in range(_BURST):
            engine._graphs[SEQUENCES].replay()

    with replayed(ROWS):
        with torch.inference_mode():
            engine._capture(SEQUENCES)
        replay = seconds(burst, 3) / _BURST
        engine._mailbox.reset()
        engine._lengths.zero_()
        # a little apart, so that blocks fill up at different steps
        served = serve(engine, [CONTEXT - 20 * slot for slot in range(SEQUENCES)], max_tokens)

    wall = served.end.wall - served.begin.wall
    step = wall / (served.end.steps - served.begin.steps)
    return [
        Result("host", "step", step * 1e3, "ms", replay * 1e3, step / replay),
        Result("host", "GPU idle", 100 * (1 - replay / step), "%"),
        Result("host", "worker CPU", (served.end.worker - served.begin.worker) / wall, "CPU s/s"),
        Result("host", "store CPU", (served.end.store - served.begin.store) / wall, "CPU s/s"),
        *calls_of(served.profile, served.profiled),
    ]


def serve(engine: Engine, prompts: list[int], max_tokens: int) -> Served:
    """Let a worker serve prompts of these lengths, all at a time, in its own loop."""
    shape = engine.decoder.shape
    logits = torch.zeros(1, engine.decoder.vocab, device=engine.decoder.device)
    setattr(engine, "prefill", lambda _, tokens, __: Prefilled(len(tokens), logits))  # noqa: B010
    numbers, due = count(), 0
    figures: list[Served] = []

    def request(prompt: int, tokens: int) -> Run:
        sampling = Sampling(max_tokens=tokens, ignore_eos=True)
        return Run(next(numbers), [40_000] * prompt, sampling, seed=1, eos=[], forced=None)

    def report(message: FromWorker) -> None:
        nonlocal due
        router.send(message)
        if isinstance(message, Done):
            scheduler.add(request(prompts[-1], _LONGEST))
        if isinstance(message, Stepped) and scheduler.steps >= due:
            due = next(script)  # after its last part, StopIteration ends the worker's loop

    def observe() -> Iterator[int]:
        """Yields the step before which it has nothing to do."""

        def read() -> Reading:
            return Reading(scheduler.steps, time.perf_counter(), time.process_time(), cpu_seconds(pid))

        pid = store.process.pid
        yield _WARM
        begin = read()
        yield _WARM + _STEPS
        end = read()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            first = scheduler.steps
            yield first + _PROFILED
            profiled = scheduler.steps - first
        figures.append(Served(begin, end, profiler, profiled))

    with running_store() as store, zmq.Context() as context:
        client = store.client()
        # as many blocks as the arena has; the store only counts them
        block_bytes = ARENA_BYTES // (len(prompts) * -(-max_tokens // shape.block_tokens))
        client.attach(Attach(0, os.getpid(), shape.block_tokens, block_bytes), 20.0)
        endpoint = new_endpoint()
        with listen(context, endpoint):
            router: DealerSocket[FromWorker, ToWorker] = DealerSocket(
                context, endpoint, ToWorker, b"worker-0"
            )
            scheduler = Scheduler(engine, len(prompts), max_tokens, report, client.send)
            script = observe()
            due = next(script)
            for turn, prompt in enumerate(prompts):
                ends = _WARM + (turn + 1) * _STEPS // (_ENDING + 1)
                scheduler.add(request(prompt, ends if turn < _ENDING else _LONGEST))
            worker = Worker.__new__(Worker)  # but for its model, as it is once it has started
            worker._scheduler, worker._router, worker._store = scheduler, router, client
            worker._ready = Ready(0, os.getpid(), "numa0", len(prompts) * max_tokens)
            with suppress(StopIteration):
                worker.serve()
            router.close()
    return figures[0]


def cpu_seconds(pid: int) -> float:
    """CPU seconds of another process so far, by the clock of clock_getcpuclockid(3)."""
    return time.clock_gettime(~pid << 3 | 2)


def calls_of(profiler: profile, steps: int) -> list[Result]:
    """What the host asked of CUDA, a step, and how long the GPU waited between two steps."""
    events = sorted(profiler.events() or (), key=lambda event: event.time_range.start)
    names = [event.name for event in events if event.device_type.name == "CPU"]
    launches = [at for at, name in enumerate(names) if name.startswith("cudaGraphLaunch")]
    within = names[launches[0] : launches[-1]]  # the profiler itself synchronises when it ends
    waits = [name for name in within if name.endswith("Synchronize") or name == "cudaMemcpy"]
    others = [name for name in within if name.startswith(("cudaLaunch", "cuLaunch", "cudaMem"))]
    work = [event for event in events if event.device_type.name == "CUDA"]
    ends = [event.time_range.end for event in work if event.name == "post"]  # a step's last kernel
    gaps = [
        later.time_range.start - earlier.time_range.end
        for earlier, later in pairwise(work)
        if earlier.name == "post"
    ][_SETTLED : len(ends) - 1]
    return [
        Result("host", "graph launches", len(launches) / steps, "per step"),
        Result("host", "other launches and copies", len(others) / len(launches), "per step"),
        Result("host", "synchronising calls", len(waits) / len(launches), "per step"),
        Result("host", "GPU idle between steps", 100 * sum(gaps) / (ends[-1] - ends[_SETTLED]), "%"),
    ]
