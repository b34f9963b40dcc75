"""tp: one model on two GPUs beside the same on one, at the Llama-3-8B shape; it needs two GPUs. With
``CLO_TP_PARTS=step,gather`` in the environment it measures these parts alone.

The reference of each figure is one GPU in the same run, where nothing else is said. The ranks are processes
with a GPU each, and read the same pinned memory, each its heads' rows of it.

- tp/step/2: a decode step of 24 sequences of 32K, of which each head fetches 9 % of its selection anew, and
  one of a single sequence (``one``).
  ``tp/all-reduce``: what a sum of the ranks takes in a graph of nothing else, and what all of them take in
  the step: by NCCL; through memory that both GPUs read, by PyTorch (symmetric); and there by the kernel that
  adds the residual and norms the sum as well (fused), which replaces kernels of a step without sums, so that
  less seems to be taken by it. Logits and tokens pass in the same way in all of them. ``tp/idle``: what is
  left of the latter beyond the former, if anything: a rank waits for the other.
- tp/prefill/2: a prompt of 32K tokens, dense, and one of 128K. Half of one GPU's time is the least that any
  division of a prompt among two GPUs could take: what is beyond it is the most that another one saves.
- tp/fit: sequences of 32K for which nine tenths of each GPU's memory have room, beside the weights and 1 GiB
  for what CUDA, NCCL and the memory that both GPUs read take; computed, not tried.
- tp/gather: 256 rows of each head, by both GPUs at once; the reference is each of them alone.
- tp/qwen3-32b: the same step of 12 sequences at the Qwen3-32B shape, with random weights, on two GPUs; the
  reference is the time in which a GPU copies as much as each has to read. tp/qwen3-32b/full: its rate beside
  the floor of full attention whose KV never left both GPUs, of this memory and of 80 GB, at the largest batch
  that fits.
"""

import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.gpu.baseline import release
from benchmarks.gpu.ceilings import full_attention, graph_of
from benchmarks.gpu.machine import Machine
from benchmarks.gpu.prefill import prefill
from benchmarks.gpu.step import CONFIG, CONTEXT, MAX_TOKENS, SELECTED
from benchmarks.gpu.synthetic import (
    LLAMA_8B,
    QWEN3_32B,
    Model,
    arena_of,
    filled_engine,
    index_bytes_read,
    random_decoder,
    replay,
)
from benchmarks.result import Result, write
from clo.gpu_worker.engine import Engine
from clo.gpu_worker.graphs import DecodeGraphs
from clo.gpu_worker.group import Group, Sum
from clo.gpu_worker.in_process import GREEDY
from clo.gpu_worker.memory import plan_gpu_memory
from clo.gpu_worker.model.decoder import Decoder
from clo.gpu_worker.pinning import pin
from clo.gpu_worker.prefill import CHUNK_TOKENS
from clo.kernels.fetch import fetch
from clo.kernels.resident import ResidentSet
from clo.kernels.update_resident import FetchList
from clo.kvstore.arena import Arena
from clo.runtime.config import EngineConfig
from clo.runtime.model.ranks import Rank

ARENA_GIB = 98
RANKS, SEQUENCES = 2, 24
LENGTH = CONTEXT - 300
LONGEST = 131072
PROMPTS = {"tp/prefill/2": (CONTEXT, 3), "tp/prefill/2/128k": (LONGEST, 1)}  # tokens, and how often
NEW_ROWS = round(SELECTED * 0.09)
_REPEATS, _ROUNDS = 16, 5  # steps one behind the other that are timed together, and how often
MEMORIES = {"of this memory": None, "of 80 GB": 80 * 10**9}  # of which full attention's GPUs are
_SUMS = 64  # of a graph
WAYS = "fused", "symmetric", "nccl"  # in which ranks add up, the one that is taken where it can be first
_ANSWER_S = 240  # for a rank to finish a part
_CONTEXT_BYTES = 2**30
_BLOCKS = 2**20  # of an arena that is no limit


class Place(NamedTuple):
    """Where a part is measured: one GPU, or one of several.

    Attributes:
        memory: [bytes] uint8, the pinned memory of all.
        hbm: bytes per second of a copy within GPU memory.
    """

    group: Group | None
    memory: Tensor
    hbm: float

    def arena(self, model: Model, sequences: int, tokens: int) -> Tensor:
        """This rank's heads of an arena."""
        arena = arena_of(self.memory, model.shape, sequences, tokens)
        return arena if self.group is None else arena[:, :, self.group.rank.kv_heads(model.kv_heads)]


Figures = dict[str, float]
"""What a part has measured, by name."""


# ------------------------------------------------------------------------------------------ parts


@torch.inference_mode()
def step(place: Place) -> Figures:
    """Milliseconds of a step, also of a single sequence, and microseconds of a sum."""
    decoder = random_decoder(LLAMA_8B, place.group)
    engine = decoding(place, LLAMA_8B, decoder, SEQUENCES)
    group, figures = place.group, {"step/one": step_ms(engine, 1)}
    if group is None:
        return {"step": step_ms(engine, SEQUENCES), **figures}
    meetings, shared = group.meetings, group.shared
    hidden = torch.randn(SEQUENCES, LLAMA_8B.hidden, dtype=torch.bfloat16, device="cuda")
    for way in WAYS if shared is not None else WAYS[-1:]:
        group.meetings = meetings if way == "fused" else None
        group.shared = None if way == "nccl" else shared
        figures[f"step/{way}"] = step_ms(engine, SEQUENCES)
        sum_all = partial(sums, group, hidden)
        sum_all()
        graph = graph_of(sum_all)
        figures[f"sum/{way}"] = 1e3 * together_ms(graph.replay) / _SUMS
        del graph
        said(f"{way}: {figures}")
    decoder.group = _Silent(group)  # type: ignore[assignment]
    figures["step/without"] = step_ms(engine, SEQUENCES)
    decoder.group = group
    group.meetings, group.shared = meetings, shared
    return figures


def sums(group: Group, hidden: Tensor) -> None:
    """Many sums, one behind the other."""
    for which in list(Sum) * (_SUMS // len(Sum)):
        if group.share(which, hidden) is None:
            group.sum(hidden)
        else:
            group.add_shares(which, hidden, hidden[0], 1e-5)


class _Silent:
    """A group whose ranks add nothing up."""

    def __init__(self, group: Group) -> None:
        self.rank, self.leads, self.join, self.take_from_first = (
            group.rank, group.leads, group.join, group.take_from_first,
        )  # fmt: skip

    def sum(self, share: Tensor) -> Tensor:
        return share

    def share(self, which: Sum, hidden: Tensor) -> None:
        """None of its own memory."""


@torch.inference_mode()
def prompt(place: Place) -> Figures:
    """Seconds of a prompt of each length."""
    decoder = random_decoder(LLAMA_8B, place.group)
    torch.manual_seed(0)  # the ranks draw the same prompts
    figures: Figures = {}
    for case, (length, times) in PROMPTS.items():
        room = length + 512
        engine = Engine(decoder, place.arena(LLAMA_8B, 1, room), CONFIG, 1, room)
        prefill(engine, length)  # compiles
        figures[case] = median(prefill(engine, length) for _ in range(times))
    return figures


@torch.inference_mode()
def fit(place: Place) -> Figures:
    """Sequences for which a GPU has room."""
    decoder = random_decoder(LLAMA_8B, place.group)

    def spare(sequences: int) -> int:
        engine = EngineConfig(max_num_seqs=sequences)
        total = torch.cuda.mem_get_info()[1]
        memory = total - torch.cuda.memory_reserved() - _CONTEXT_BYTES, total
        return plan_gpu_memory(
            decoder.shape, CONFIG, engine, _BLOCKS, MAX_TOKENS, decoder.vocab, memory
        ).spare

    return {"fit": 1 + spare(1) // (spare(1) - spare(2))}


@torch.inference_mode()
def gather(place: Place) -> Figures:
    """GB/s of rows of 12 sequences, with the other ranks and without."""
    sequences, layers, rows, capacity = 12, 8, 256, 2048
    model = replace(LLAMA_8B, layers=layers)
    arena = place.arena(model, sequences, CONTEXT)
    heads = arena.shape[2]
    table = torch.arange(len(arena), device="cuda").view(sequences, -1)
    sinks, recent = CONFIG.sinks, CONFIG.recent
    lines = (sequences, heads)
    rows_of_set = torch.zeros(*lines, sinks + recent + capacity, 2, 128, dtype=torch.bfloat16, device="cuda")
    entries = torch.arange(rows, device="cuda").int().expand(*lines, rows).contiguous()
    fetch_list = FetchList(entries, torch.full(lines, rows, dtype=torch.int32, device="cuda"))
    draws = []
    for _ in range(2 * layers):
        drawn = torch.rand(*lines, CONTEXT, device="cuda").argsort(-1)[..., :rows].sort(-1).values
        draws.append(torch.nn.functional.pad(drawn.int(), (0, capacity - rows)))

    def fetch_all() -> None:
        for turn, positions in enumerate(draws):
            resident = ResidentSet(rows_of_set, positions, positions, sinks, recent)
            fetch(fetch_list, resident, table, arena[:, turn % layers])

    graph = graph_of(fetch_all)
    size = len(draws) * entries.numel() * 2 * 128 * 2

    def rate() -> float:
        return size / together_ms(graph.replay) / 1e6

    if place.group is None:
        return {"together": rate()}
    figures = {"together": rate()}
    for number in range(place.group.rank.count):
        place.group.least(0)
        if number == place.group.rank.number:
            figures["alone"] = rate()
        place.group.least(0)
    return figures


@torch.inference_mode()
def qwen(place: Place) -> Figures:
    """Milliseconds of a step and its floor, and tokens/s of the floors of full attention."""
    group = place.group
    assert group is not None, "it is for several GPUs"
    sequences = SEQUENCES // 2  # which have as much KV as those of the smaller model
    share = QWEN3_32B.share(group.rank)
    full: Figures = {}
    for name, memory in MEMORIES.items():
        batch, full[f"full attention, {name}"] = full_attention(share, CONTEXT, place.hbm, memory)
        full[f"batch, {name}"] = batch
    decoder = random_decoder(QWEN3_32B, group)
    engine = decoding(place, QWEN3_32B, decoder, sequences)
    read = index_bytes_read(engine, sequences, CONTEXT) + engine.cache.resident_bytes // group.rank.count
    floor = 1e3 * (share.bytes_read + read) / place.hbm
    return {"step": step_ms(engine, sequences), "floor": floor, **full}


PARTS: dict[str, Callable[[Place], Figures]] = {
    "step": step,
    "prefill": prompt,
    "fit": fit,
    "gather": gather,
    "qwen": qwen,
}
_OF_RANKS = ("qwen",)  # parts that one GPU does not do


def decoding(place: Place, model: Model, decoder: Decoder, sequences: int) -> Engine:
    """An engine in the midst of decoding, whose heads fetch new rows at every step."""
    engine = filled_engine(
        decoder, place.arena(model, sequences, MAX_TOKENS), CONFIG, sequences, LENGTH, MAX_TOKENS
    )
    replay(engine, NEW_ROWS)
    return engine


def step_ms(engine: Engine, sequences: int) -> float:
    """Milliseconds of a decode step, captured as it now is."""
    graphs: DecodeGraphs = engine.captured(sequences)
    for slot in range(sequences):
        engine.activate(slot, LENGTH, GREEDY, seed=0)
    took = together_ms(partial(graphs.replay, sequences))
    torch.cuda.synchronize()
    graphs.destroy()
    return took


def together_ms(work: Callable[[], object]) -> float:
    """Milliseconds of ``work``, timed many times one behind the other: where the ranks meet in it, it does
    not matter which host was later."""
    times = []
    for _ in range(_ROUNDS):
        work()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(_REPEATS):
            work()
        end.record()
        end.synchronize()
        times.append(float(begin.elapsed_time(end)) / _REPEATS)
    return median(times)


def said(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# ------------------------------------------------------------------------------------------ ranks


def serve(
    rank: Rank, meeting: str, pid: int, fd: int, size: int, hbm: float, device: str, pipe: Connection
) -> None:
    """The process of a rank: does the parts whose names come through the pipe."""
    own = torch.device(device, rank.number) if device == "cuda" else torch.device(device)
    if device == "cuda":
        torch.cuda.set_device(own)
    longest = CHUNK_TOKENS["cuda"] * 2 * max(LLAMA_8B.hidden, QWEN3_32B.hidden)
    group = Group(rank, own, os.open(meeting, os.O_RDWR), longest)
    memory = Arena.open(pid, fd, size).tensor(torch.uint8, (size,))
    place = Place(group, pin(memory) if device == "cuda" else memory, hbm)
    pipe.send({})
    while name := pipe.recv():
        torch.manual_seed(rank.number)
        pipe.send(PARTS[name](place))
        if device == "cuda":
            release()
    sys.stderr.flush()
    os._exit(0)  # no graph is destroyed after its group


@contextmanager
def ranks_of(machine: Machine, device: str = "cuda") -> Iterator[Callable[[str], list[Figures]]]:
    """Processes with a GPU each: what is yielded has all of them do a part."""
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe() for _ in range(RANKS)]
    with tempfile.NamedTemporaryFile() as meeting:
        processes = [
            context.Process(
                target=serve,
                args=(
                    Rank(number, RANKS), meeting.name, os.getpid(), machine.arena.fd, machine.arena.size,
                    machine.hbm, device, theirs,
                ),
                daemon=True,
            )
            for number, (_, theirs) in enumerate(pipes)
        ]  # fmt: skip
        try:
            for process in processes:
                process.start()
            for _, theirs in pipes:
                theirs.close()
            answers_of(pipes)

            def work(name: str) -> list[Figures]:
                for ours, _ in pipes:
                    ours.send(name)
                return answers_of(pipes)

            yield work
            for ours, _ in pipes:
                ours.send("")
            for process in processes:
                process.join(_ANSWER_S)
        finally:
            for process in processes:
                process.kill()
                process.join()


def answers_of(pipes: list[tuple[Any, Any]]) -> list[Figures]:
    """What each rank says."""
    answers = []
    for ours, _ in pipes:
        if not ours.poll(_ANSWER_S):
            raise SystemExit(f"A rank has not answered for {_ANSWER_S} s.")
        answers.append(ours.recv())
    return answers


# ---------------------------------------------------------------------------------------- results


def measure(machine: Machine) -> list[Result]:
    if torch.cuda.device_count() < RANKS:
        said(f"tp needs {RANKS} GPUs, and PyTorch sees {torch.cuda.device_count()}: it is left out.")
        return []
    names = os.environ.get("CLO_TP_PARTS", ",".join(PARTS)).split(",")
    file = "gpu-tp" if set(names) == set(PARTS) else f"gpu-tp-{'-'.join(names)}"
    alone = Place(None, machine.memory, machine.hbm)
    results = list[Result]()
    with ranks_of(machine) as work:
        for name in names:
            said(f"tp: {name} on one GPU")
            one: Figures = {} if name in _OF_RANKS else PARTS[name](alone)
            release()
            said(f"tp: {name} on {RANKS} GPUs")
            results += results_of(name, one, work(name))
            write(file, [*machine.results(), *results], [NOTE])
    return []  # they are written


NOTE = (
    "Weights, rows and queries are random, also those of the Qwen3-32B shape; 9 % of the selected rows are "
    "new in each step, drawn at random."
)


def results_of(name: str, one: Figures, both: list[Figures]) -> list[Result]:
    """What a part says: of one GPU, and of each rank."""

    def compared(case: str, metric: str, value: float, unit: str, reference: float) -> Result:
        return Result(case, metric, value, unit, reference, value / reference)

    first = both[0]
    match name:
        case "step":
            return [
                *_of_step(one["step"], both),
                compared("tp/step/2/one", "time", first["step/one"], "ms", one["step/one"]),
            ]
        case "prefill":
            return [
                compared(case, "time", max(figures[case] for figures in both), "s", alone)
                for case, alone in one.items()
            ]
        case "fit":
            most = min(figures["fit"] for figures in both)
            return [compared("tp/fit", "sequences of 32K", most, "sequences", one["fit"])]
        case "gather":
            return [
                compared("tp/gather", f"GPU {rank}", figures["together"], "GB/s", figures["alone"])
                for rank, figures in enumerate(both)
            ] + [
                compared(
                    "tp/gather", "both", sum(figures["together"] for figures in both), "GB/s", one["together"]
                )
            ]
        case _:
            return list(_of_qwen(first))


def _of_qwen(first: Figures) -> Iterator[Result]:
    """The results of ``qwen``."""
    step, floor = first["step"], first["floor"]
    rate, most = (SEQUENCES / 2 / took * 1e3 for took in (step, floor))
    yield Result("tp/qwen3-32b", "random weights", rate, "tokens/s", most, rate / most)
    yield Result("tp/qwen3-32b", "step", step, "ms", floor, step / floor)
    for gpus in MEMORIES:
        full, batch = first[f"full attention, {gpus}"], first[f"batch, {gpus}"]
        yield Result(
            "tp/qwen3-32b/full",
            f"beside {batch} sequences on GPUs {gpus}",
            rate,
            "tokens/s",
            full,
            rate / full,
        )


def _of_step(one: float, both: list[Figures]) -> Iterator[Result]:
    """The results of ``step``. one: milliseconds on one GPU."""
    first = both[0]
    sums = 2 * LLAMA_8B.layers + 1
    used = next(way for way in WAYS if f"step/{way}" in first)
    took = first[f"step/{used}"]
    yield Result("tp/step/2", f"time, {used}", took, "ms", one, took / one)
    yield Result("tp/step/2", "rate", SEQUENCES / took * 1e3, "tokens/s", SEQUENCES / one * 1e3, one / took)
    for way in WAYS:
        if f"step/{way}" not in first:
            continue
        step, alone = first[f"step/{way}"], first[f"sum/{way}"]
        spent = step - first["step/without"]
        yield Result(f"tp/all-reduce/{way}", "one, in a graph", alone, "us")
        yield Result(f"tp/all-reduce/{way}", f"{sums} of a step", spent, "ms", step, spent / step)
        for rank, figures in enumerate(both):
            idle = figures[f"step/{way}"] - figures["step/without"] - sums * figures[f"sum/{way}"] / 1e3
            if idle > 0:
                yield Result(f"tp/idle/{way}", f"GPU {rank}", idle, "ms", step, idle / step)
