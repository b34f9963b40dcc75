"""ablation: CLO taken apart at equal traffic (24 sequences of 32K, Llama-3-8B shape), in tokens per second.

Every head selects at every step; 9 % (``ablation/50%``: 50 %) of k rows come anew. Against ``whole``:

- no-prefetch: a layer selects with its own query, so that fetching hides behind nothing but its attention;
- no-overlap: nor does it hide behind that;
- host-sync: no-prefetch, and the host waits in every layer for what is chosen; between two waits there is
  still a graph;
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
from benchmarks.gpu.step import CONFIG, CONTEXT, MAX_TOKENS, SELECTED, step_seconds
from benchmarks.gpu.synthetic import LLAMA_8B, arena_of, filled_engine, random_decoder, replayed
from benchmarks.result import Result
from clo.gpu_worker import cache as cache_module
from clo.gpu_worker.cache.query_prediction import QuerySource
from clo.gpu_worker.engine import Engine
from clo.gpu_worker.side_stream import SideStream
from clo.kernels.update_resident import FetchList
from clo.runtime.config import CacheConfig

ARENA_GIB = 98

_SEQUENCES = 24
_LENGTH = CONTEXT - 300
_STEPS = 20


def measure(machine: Machine) -> list[Result]:
    arena = arena_of(machine.memory, LLAMA_8B, _SEQUENCES, MAX_TOKENS)
    decoder = random_decoder(LLAMA_8B, MAX_TOKENS)

    def engine_of(config: CacheConfig) -> Engine:
        return filled_engine(decoder, arena, config, _SEQUENCES, _LENGTH, MAX_TOKENS)

    engine = engine_of(CONFIG)
    times = {share: _taken_apart(engine, machine.host, SELECTED * share // 100) for share in (9, 50)}
    del engine
    alone = engine_of(CacheConfig(select_k=256, resident=256))
    with replayed(256):
        times[9]["no-resident-set"] = step_seconds(alone, _SEQUENCES)

    results = []
    for share, of_share in times.items():
        prefix = "ablation" if share == 9 else f"ablation/{share}%"
        whole = _SEQUENCES / of_share["whole"]
        for name, took in of_share.items():
            rate = _SEQUENCES / took
            results.append(Result(f"{prefix}/{name}", "rate", rate, "tokens/s", whole, rate / whole))
    return results


@torch.inference_mode()
def _taken_apart(engine: Engine, host: Tensor, rows: int) -> dict[str, float]:
    """Seconds of a step, whole and without one of the parts."""
    engine._lengths.fill_(_LENGTH)
    cache, times = engine.cache, {}
    with replayed(rows):
        times["whole"] = step_seconds(engine, _SEQUENCES)
        with patch.object(engine, "_sources", (QuerySource.OWN,) * LLAMA_8B.layers):
            times["no-prefetch"] = step_seconds(engine, _SEQUENCES)
            in_line = SideStream(torch.device("cpu"))  # does its work where it stands
            with patch.object(cache, "_fetching", (in_line, in_line)):
                times["no-overlap"] = step_seconds(engine, _SEQUENCES)
            times["host-sync"] = seconds(_cut(engine, lambda layer: None), _STEPS)
            with _waiting():
                times["host-sync/eager"] = seconds(lambda: engine._step(_SEQUENCES), _STEPS)
            with _gathered_by_cpu(engine, host, rows) as gather:
                times["cpu-gather"] = seconds(_cut(engine, gather), _STEPS)
    return times


@contextmanager
def _waiting() -> Iterator[None]:
    """Within, the host waits for what each layer chooses."""
    choose: Callable[..., FetchList] = vars(cache_module)["update_resident"]

    def choose_and_wait(*args: object) -> FetchList:
        fetch_list = update_resident(*args)
        torch.cuda.current_stream().synchronize()
        return fetch_list

    with patch.object(cache_module, "update_resident", choose_and_wait):
        yield


def _cut(engine: Engine, between: Callable[[int], object]) -> Callable[[], None]:
    """A decode step as a chain of graphs, cut where a layer has chosen its rows.

    Args:
        engine: without prefetch.
        between: what the host does at each cut, once it has waited; gets the layer.
    """
    choose: Callable[..., FetchList] = vars(cache_module)["update_resident"]
    stream, pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
    graphs = [torch.cuda.CUDAGraph()]

    def choose_and_cut(*args: object) -> FetchList:
        fetch_list = update_resident(*args)
        engine.cache._recording.join()
        graphs[-1].capture_end()
        graphs.append(torch.cuda.CUDAGraph())
        graphs[-1].capture_begin(pool)
        return fetch_list

    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        engine._step(_SEQUENCES)
        torch.cuda.synchronize()
        with (
            patch.object(cache_module, "update_resident", choose_and_cut),
            patch.object(engine.cache, "end_step", lambda: None),  # joined at the last cut
        ):
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
    choose: Callable[..., FetchList] = vars(cache_module)["update_resident"]
    cache, shape = engine.cache, engine.cache.shape
    row = 2 * shape.head_dim
    arena = host[: cache._arena.nbytes].view(shape.dtype).view(-1, row)
    # a head's rows lie together in the arena, and those of a sequence too, as its blocks follow one another
    tokens = len(cache._arena) // _SEQUENCES * shape.block_tokens
    heads = torch.arange(shape.layers * shape.kv_heads).view(shape.layers, 1, shape.kv_heads, 1)
    starts = (heads * _SEQUENCES + torch.arange(_SEQUENCES).view(-1, 1, 1)) * tokens
    lines = torch.arange(_SEQUENCES * shape.kv_heads, device="cuda").view(_SEQUENCES, -1, 1)
    sets = lines * cache._resident[0].shape[2] + cache._first
    positions = torch.zeros(_SEQUENCES, shape.kv_heads, rows, dtype=torch.int32, pin_memory=True)
    buffer = torch.zeros(positions.numel(), row, dtype=shape.dtype, pin_memory=True)
    slots = torch.zeros(positions.shape, dtype=torch.int64, device="cuda")

    def choose_and_send(*args: Tensor) -> FetchList:
        fetch_list = update_resident(*args)
        slots.copy_(fetch_list.entries[..., :rows])  # every head has as many
        positions.copy_(args[4].gather(2, slots), non_blocking=True)  # of the positions
        return fetch_list

    def gather(layer: int) -> None:
        torch.index_select(arena, 0, (starts[layer] + positions).flatten(), out=buffer)

    def take(*args: Tensor, patient: bool) -> None:  # what ``fetch`` takes; there is no prefetch
        fetched = buffer.to("cuda", non_blocking=True)
        args[4].view(-1, row).index_copy_(0, (sets + slots).flatten(), fetched)

    with (
        patch.object(cache_module, "update_resident", choose_and_send),
        patch.object(cache_module, "fetch", take),
    ):
        yield gather
