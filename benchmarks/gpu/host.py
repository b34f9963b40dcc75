"""host: what the host does while 24 sequences of 32K decode at the Llama-3-8B shape.

The worker's own loop and scheduler, and a real KV store; prompts count as prefilled, for the cache is filled
at random. A few requests end meanwhile, and others take their places.
"""

import os
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from itertools import count, pairwise
from typing import Any, NamedTuple

import msgspec
import torch
import zmq
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from zmq.auth.thread import ThreadAuthenticator

from benchmarks.cpu_clock import cpu_seconds
from benchmarks.gpu.baseline import llama_config
from benchmarks.gpu.ceilings import seconds
from benchmarks.gpu.machine import Machine
from benchmarks.gpu.synthetic import LLAMA_8B, arena_of, filled_engine, random_decoder, replay
from benchmarks.result import Result
from clo.gpu_worker.engine import Engine
from clo.gpu_worker.prefill import Prefill
from clo.gpu_worker.startup import Started
from clo.gpu_worker.worker import Worker
from clo.kvstore.client import StoreClient
from clo.runtime.config import (
    BlockConfig,
    CacheConfig,
    ResolvedModel,
    StartedWorker,
    StoreConfig,
    WorkerConfig,
)
from clo.runtime.model.model_config import architecture
from clo.runtime.wire.messages import Attach, Done, FromWorker, Run, Sampling, Stepped

CONTEXT, SEQUENCES = 32768, 24
ARENA_GIB = 98
STORE_BYTES = 64 * 2**20  # of the KV store's own arena, which holds no rows
KEY = "the key of the benchmark"
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


class Prefilled(Prefill):
    """A prefill of which nothing is left to do.

    Args:
        total: tokens of the prompt; logits: [1, vocab].
    """

    def __init__(self, total: int, logits: Tensor) -> None:  # in place of that of Prefill, which would begin
        self.total, self._logits, self.scores = total, logits, None

    @property
    def done(self) -> int:
        return self.total

    @property
    def remaining_flops(self) -> float:
        return 0.0

    def unit(self, flops: float) -> tuple[int, float]:
        return self.total, 0.0

    def advance(self, tokens: int | None = None) -> Tensor:
        return self._logits


class PrefilledEngine(Engine):
    """Whose prompts count as prefilled, in the blocks that their slots have already. None is a short one."""

    def prefill(
        self,
        slot: int,
        tokens: list[int],
        blocks: list[int],
        last: int = 1,
        score: int | None = None,
        cached: int = 0,
    ) -> Prefill:
        return Prefilled(len(tokens), self._logits)

    def extend(self, slot: int, blocks: list[int]) -> None:
        """The slots have blocks for all tokens already."""

    @cached_property
    def _logits(self) -> Tensor:
        return torch.zeros(1, self.decoder.vocab, device=self.decoder.device)


class ObservedWorker(Worker):
    """A worker whose loop ends when ``figures`` has what it took, by a ``StopIteration``.

    Args:
        config, context, started: see ``Worker``.
        prompts: their lengths; they decode all at a time.
        store: pid of the KV store.
    """

    def __init__(
        self,
        config: WorkerConfig,
        context: zmq.Context[Any],
        started: Started,
        prompts: list[int],
        store: int,
    ) -> None:
        super().__init__(config, context, KEY, started)
        self.figures: list[Served] = []
        self._numbers, self._store_pid, self._replacement = count(), store, prompts[-1]
        self._script = self._observe()
        self._due = next(self._script)
        for turn, prompt in enumerate(prompts):
            ends = _WARM + (turn + 1) * _STEPS // (_ENDING + 1)
            self._begin(prompt, ends if turn < _ENDING else _LONGEST)

    def report(self, message: FromWorker) -> None:
        super().report(message)
        if isinstance(message, Done):
            self._begin(self._replacement, _LONGEST)
        if isinstance(message, Stepped) and self.scheduler.steps >= self._due:
            self._due = next(self._script)

    def _begin(self, prompt: int, tokens: int) -> None:
        sampling = Sampling(max_tokens=tokens, ignore_eos=True)
        self.scheduler.add(Run(next(self._numbers), [40_000] * prompt, sampling, seed=1, eos=[], forced=None))

    def _observe(self) -> Iterator[int]:
        """Yields the step before which it has nothing to do."""
        yield _WARM
        begin = self._read()
        yield _WARM + _STEPS
        end = self._read()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            first = self.scheduler.steps
            yield first + _PROFILED
            profiled = self.scheduler.steps - first
        self.figures.append(Served(begin, end, profiler, profiled))

    def _read(self) -> Reading:
        return Reading(
            self.scheduler.steps, time.perf_counter(), time.process_time(), cpu_seconds(self._store_pid)
        )


def measure(machine: Machine) -> list[Result]:
    model, max_tokens = LLAMA_8B, CONTEXT + _LONGEST
    arena = arena_of(machine.memory, model.shape, SEQUENCES, max_tokens)
    config = CacheConfig()
    decoder = random_decoder(model)
    engine = filled_engine(
        decoder, arena, config, SEQUENCES, CONTEXT, max_tokens, engine_type=PrefilledEngine
    )
    replay(engine, ROWS)
    engine.capture([SEQUENCES])
    slots = list(range(SEQUENCES))

    def burst() -> None:
        for _ in range(_BURST):
            engine.step(slots, max_tokens)

    step = seconds(burst, 3) / _BURST
    engine.suspend(torch.ones(SEQUENCES, dtype=torch.bool, device="cuda"))
    # a little apart, so that blocks fill up at different steps
    served = serve(engine, [CONTEXT - 20 * slot for slot in slots], max_tokens)

    wall = served.end.wall - served.begin.wall
    served_step = wall / (served.end.steps - served.begin.steps)
    return [
        Result("host", "step", served_step * 1e3, "ms", step * 1e3, served_step / step),
        Result("host", "GPU idle", 100 * (1 - step / served_step), "%"),
        Result("host", "worker CPU", (served.end.worker - served.begin.worker) / wall, "CPU s/s"),
        Result("host", "store CPU", (served.end.store - served.begin.store) / wall, "CPU s/s"),
        *calls_of(served.profile, served.profiled),
    ]


def serve(engine: Engine, prompts: list[int], max_tokens: int) -> Served:
    """Let a worker serve prompts of these lengths, all at a time, in its own loop."""
    shape = engine.decoder.shape
    # as many blocks as the arena has; the store only counts them
    block_bytes = STORE_BYTES // (len(prompts) * -(-max_tokens // shape.block_tokens))
    router = f"ipc://@clo-benchmark-{uuid.uuid4()}"
    architecture_8b = architecture(llama_config(LLAMA_8B))
    model = ResolvedModel("", "", architecture_8b, max_tokens, "bfloat16", "cuda", "dummy", seed=0)
    context: zmq.Context[Any] = zmq.Context()
    with running_store(BlockConfig(shape.layers, shape.kv_heads, shape.block_tokens, block_bytes)) as (
        endpoint,
        pid,
    ):
        try:
            store = StoreClient(context, endpoint, KEY)
            store.attach(Attach(0, os.getpid()), 20.0)
            started = Started(engine, None, None, store, "numa0", len(prompts) * max_tokens)
            config = WorkerConfig(0, router, {0: endpoint}, model)
            with silent_router(context, router):
                worker = ObservedWorker(config, context, started, prompts, pid)
                with suppress(StopIteration):
                    worker.serve()
        finally:
            context.destroy(linger=0)
    return worker.figures[0]


@contextmanager
def silent_router(context: zmq.Context[Any], endpoint: str) -> Iterator[None]:
    """Lets a worker connect, and reads nothing of what it sends, which costs this process no time."""
    keys = ThreadAuthenticator(context)
    keys.start()
    try:
        keys.configure_plain(passwords={"clo": KEY})
        with context.socket(zmq.ROUTER) as socket:
            socket.plain_server = True
            socket.setsockopt(zmq.RCVHWM, 0)
            socket.bind(endpoint)
            yield
    finally:
        keys.stop()


@contextmanager
def running_store(block: BlockConfig) -> Iterator[tuple[str, int]]:
    """A KV store process; yields its address and pid."""
    endpoint = f"ipc://@clo-benchmark-{uuid.uuid4()}"
    config = StoreConfig(
        "numa0", 0, STORE_BYTES, endpoint, "ipc://@nobody", block, {0: StartedWorker(os.getpid(), 0)}
    )
    line = [sys.executable, "-m", "clo.kvstore", msgspec.json.encode(config).decode(), str(os.getpid())]
    process = subprocess.Popen(line, stdin=subprocess.PIPE, text=True)
    assert process.stdin is not None
    process.stdin.write(KEY)
    process.stdin.close()
    try:
        yield endpoint, process.pid
    finally:
        process.kill()
        process.wait()


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
