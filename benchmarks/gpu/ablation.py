"""ablation: CLO taken apart at equal traffic (24 sequences of 32K, Llama-3-8B shape), in tokens per second.

Every head selects at every step; 9 % (``ablation/50%``: 50 %) of k rows come anew. The reference is always
``whole``: the faster of ``prefetch-off`` and ``prefetch-correct``, by what its metric says. Against it:

- no-prefetch: rows are fetched before attention instead of beside it;
- host-sync: the host waits in every layer for what is chosen; between two waits there is still a graph;
- host-sync/eager: the same without graphs, one launch after another;
- cpu-gather: host-sync, where the CPU gathers the chosen rows with all its threads into a pinned buffer, from
  which one copy brings them to the GPU;
- no-resident-set: the set is what was selected last, fetched as a whole at every step.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.gpu.ceilings import seconds
from benchmarks.gpu.machine import Machine
from benchmarks.gpu.step import CONTEXT, step_seconds
from benchmarks.gpu.synthetic import LLAMA_8B, arena_of, filled_engine, random_decoder, replayed
from benchmarks.gpu.throughput import CONFIG, MAX_TOKENS
from benchmarks.result import Result
from gpu_worker.cache import Batch
from gpu_worker.engine import Engine
from gpu_worker.streams import Branch
from kernels.select import Fresh
from runtime.config import CacheConfig

ARENA_GIB = 98

_SEQUENCES = 24
_LENGTH = CONTEXT - 300
_RECALL = 0.8  # of a predicted query: what the real one selects and the predicted one has fetched
_STEPS = 20


def measure(machine: Machine) -> list[Result]:
    arena = arena_of(machine.memory, LLAMA_8B, _SEQUENCES, MAX_TOKENS)
    decoder = random_decoder(LLAMA_8B, MAX_TOKENS)

    def engine_of(config: CacheConfig) -> Engine:
        return filled_engine(decoder, arena, config, _SEQUENCES, _LENGTH, MAX_TOKENS)

    engine = engine_of(CONFIG)
    times = {}
    for share in (9, 50):
        rows = CONFIG.select_k * share // 100
        times[share] = _complete(engine, rows) | _taken_apart(engine, machine.host, rows)
    del engine
    alone = _complete(engine_of(CacheConfig(select_k=256, resident=256, prefetch="off")), 256)
    times[9]["no-resident-set"] = min(alone.values())

    results = []
    for share, of_share in times.items():
        prefix = "ablation" if share == 9 else f"ablation/{share}%"
        fastest = min(("prefetch-off", "prefetch-correct"), key=of_share.__getitem__)
        whole = _SEQUENCES / of_share[fastest]
        results.append(Result(f"{prefix}/whole", fastest, whole, "tokens/s", whole, 1.0))
        for name, took in of_share.items():
            rate = _SEQUENCES / took
            results.append(Result(f"{prefix}/{name}", "rate", rate, "tokens/s", whole, rate / whole))
    return results


def _complete(engine: Engine, rows: int) -> dict[str, float]:
    """Seconds of a step with nothing taken away."""
    engine._lengths.fill_(_LENGTH)
    times = {}
    with replayed(rows):
        times["prefetch-off"] = step_seconds(engine, _SEQUENCES)
    with _predicted(engine, rows):
        times["prefetch-correct"] = step_seconds(engine, _SEQUENCES)
    return times


@torch.inference_mode()
def _taken_apart(engine: Engine, host: Tensor, rows: int) -> dict[str, float]:
    """Seconds of a step without one of the parts."""
    engine._lengths.fill_(_LENGTH)
    cache, times = engine.cache, {}
    with replayed(rows):
        with patch.object(cache, "_fetching", Branch(torch.device("cpu"))):  # does its work where it stands
            times["no-prefetch"] = step_seconds(engine, _SEQUENCES)
        times["host-sync"] = seconds(_cut(engine, lambda layer: None), _STEPS)
        with _waiting(engine):
            times["host-sync/eager"] = seconds(lambda: engine._step(_SEQUENCES), _STEPS)
        with _gathered_by_cpu(engine, host, rows) as gather:
            times["cpu-gather"] = seconds(_cut(engine, gather), _STEPS)
    return times


@contextmanager
def _predicted(engine: Engine, rows: int) -> Iterator[None]:
    """Within, captured steps prefetch: of the rows of a layer the predicted query brings ``_RECALL``."""
    cache, ahead = engine.cache, round(_RECALL * rows)
    prefetch, attend = cache.prefetch, cache.attend

    def early(layer: int, query: Tensor, batch: Batch) -> None:
        with replayed(ahead):
            prefetch(layer, query, batch)

    def late(layer: int, query: Tensor, kv: Tensor, batch: Batch, *, select: bool = True) -> Tensor:
        with replayed(rows if layer < CONFIG.prefetch_from else rows - ahead):
            return attend(layer, query, kv, batch, select=select)

    with (
        patch.object(engine, "_first_prefetched", CONFIG.prefetch_from),
        patch.object(cache, "prefetch", early),
        patch.object(cache, "attend", late),
    ):
        yield


@contextmanager
def _waiting(engine: Engine) -> Iterator[None]:
    """Within, the host waits for what each layer chooses."""
    select = engine.cache._select

    def select_and_wait(layer: int, query: Tensor, batch: Batch, tail: int) -> Fresh:
        fresh = select(layer, query, batch, tail)
        torch.cuda.current_stream().synchronize()
        return fresh

    with patch.object(engine.cache, "_select", select_and_wait):
        yield


def _cut(engine: Engine, between: Callable[[int], object]) -> Callable[[], None]:
    """A decode step as a chain of graphs, cut where a layer has chosen its rows.

    Args:
        engine: without prefetch.
        between: what the host does at each cut, once it has waited; gets the layer.
    """
    select = engine.cache._select
    stream, pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
    graphs = [torch.cuda.CUDAGraph()]

    def select_and_cut(layer: int, query: Tensor, batch: Batch, tail: int) -> Fresh:
        fresh = select(layer, query, batch, tail)  # has joined its branches
        graphs[-1].capture_end()
        graphs.append(torch.cuda.CUDAGraph())
        graphs[-1].capture_begin(pool)
        return fresh

    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        engine._step(_SEQUENCES)
        torch.cuda.synchronize()
        with patch.object(engine.cache, "_select", select_and_cut):
            graphs[0].capture_begin(pool)
            engine._step(_SEQUENCES)
            graphs[-1].capture_end()

    def step() -> None:
        for layer, graph in enumerate(graphs[:-1]):
            graph.replay()
            torch.cuda.current_stream().synchronize()
            between(layer)
        graphs[-1].replay()

    return step


@contextmanager
def _gathered_by_cpu(engine: Engine, host: Tensor, rows: int) -> Iterator[Callable[[int], None]]:
    """Within, a layer sends the positions of its chosen rows to the CPU and fetches them from pinned memory;
    in between, the function that this yields must gather them there.

    Args:
        host: the arena's memory [bytes] uint8 as the CPU sees it.
        rows: that each head fetches.
    """
    cache, shape = engine.cache, engine.cache.shape
    select, row = cache._select, 2 * shape.head_dim
    arena = host[: cache._arena.nbytes].view(shape.dtype).view(-1, row)
    # a head's rows lie together in the arena, and those of a sequence too, as its blocks follow one another
    tokens = len(cache._arena) // _SEQUENCES * shape.block_tokens
    heads = torch.arange(shape.layers * shape.kv_heads).view(shape.layers, 1, shape.kv_heads, 1)
    starts = (heads * _SEQUENCES + torch.arange(_SEQUENCES).view(-1, 1, 1)) * tokens
    lines = torch.arange(_SEQUENCES * shape.kv_heads, device="cuda").view(_SEQUENCES, -1, 1)
    sets = lines * cache._resident.shape[3] + cache._first
    positions = torch.zeros(_SEQUENCES, shape.kv_heads, rows, dtype=torch.int32, pin_memory=True)
    buffer = torch.zeros(positions.numel(), row, dtype=shape.dtype, pin_memory=True)
    slots = torch.zeros(positions.shape, dtype=torch.int64, device="cuda")

    def select_and_send(layer: int, query: Tensor, batch: Batch, tail: int) -> Fresh:
        fresh = select(layer, query, batch, tail)
        slots.copy_(fresh.slots[..., :rows])  # every head has as many
        positions.copy_(cache._members[layer].gather(2, slots), non_blocking=True)
        return fresh

    def gather(layer: int) -> None:
        torch.index_select(arena, 0, (starts[layer] + positions).flatten(), out=buffer)

    def take(layer: int, fresh: Fresh, batch: Batch) -> None:
        fetched = buffer.to("cuda", non_blocking=True)
        cache._resident[layer].view(-1, row).index_copy_(0, (sets + slots).flatten(), fetched)

    with patch.object(cache, "_select", select_and_send), patch.object(cache, "_fetch", take):
        yield gather
