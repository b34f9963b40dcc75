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

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu.baseline import release
from benchmarks.gpu.ceilings import seconds
from benchmarks.gpu.machine import Machine
from benchmarks.gpu.step import CONFIG, CONTEXT, MAX_TOKENS, SELECTED, step_seconds
from benchmarks.gpu.synthetic import (
    LLAMA_8B,
    ReplayLayer,
    arena_of,
    filled_engine,
    random_decoder,
    replay,
)
from benchmarks.result import Result
from clo.gpu_worker.cache.batch import Batch
from clo.gpu_worker.engine import Engine
from clo.gpu_worker.model.decoder import Decoder
from clo.kernels.score import Scores
from clo.kernels.update_resident import FetchList
from clo.runtime.config import CacheConfig

ARENA_GIB = 98

_SEQUENCES = 24
_SLOTS = list(range(_SEQUENCES))
_LENGTH = CONTEXT - 300
_STEPS = 20
_OWN_QUERY = CacheConfig(prefetch="off")


class InLineLayer(ReplayLayer):
    """Fetches before it attends to anything."""

    def update_resident(self, scores: Scores, reselect: Tensor, batch: Batch, latest: int) -> FetchList:
        fetch_list = super().update_resident(scores, reselect, batch, latest)
        super().fetch(fetch_list, batch, patient=False)
        return fetch_list

    def fetch(self, fetch_list: FetchList, batch: Batch, *, patient: bool) -> None:
        """Nothing to do: the rows are there."""


class WaitingLayer(ReplayLayer):
    """Lets the host wait for what it chooses."""

    def update_resident(self, scores: Scores, reselect: Tensor, batch: Batch, latest: int) -> FetchList:
        fetch_list = super().update_resident(scores, reselect, batch, latest)
        torch.cuda.current_stream().synchronize()
        return fetch_list


class CutLayer(ReplayLayer):
    """Once it has chosen its rows, calls ``cut`` where that is set, with no work left on a branch."""

    cut: Callable[[], None] | None = None

    def update_resident(self, scores: Scores, reselect: Tensor, batch: Batch, latest: int) -> FetchList:
        fetch_list = super().update_resident(scores, reselect, batch, latest)
        self.announce(fetch_list)
        if self.cut is not None:
            self._streams.recording.join()
            self.cut()
        return fetch_list

    def announce(self, fetch_list: FetchList) -> None:
        """Tell the host which rows are to be fetched; a GPU that reads them itself need not."""


def measure(machine: Machine) -> list[Result]:
    arena = arena_of(machine.memory, LLAMA_8B.shape, _SEQUENCES, MAX_TOKENS)
    decoder = random_decoder(LLAMA_8B)
    results = []
    for share in (9, 50):
        prefix = "ablation" if share == 9 else f"ablation/{share}%"
        times = _taken_apart(decoder, arena, machine.host, SELECTED * share // 100)
        if share == 9:
            alone = CacheConfig(select_k=SELECTED, resident=SELECTED)
            times["no-resident-set"] = step_seconds(_engine(decoder, arena, alone, SELECTED), _SEQUENCES)
        whole = _SEQUENCES / times["whole"]
        for name, took in times.items():
            rate = _SEQUENCES / took
            results.append(Result(f"{prefix}/{name}", "rate", rate, "tokens/s", whole, rate / whole))
    return results


@torch.inference_mode()
def _taken_apart(decoder: Decoder, arena: Tensor, host: Tensor, rows: int) -> dict[str, float]:
    """Seconds of a step, whole and without one of the parts.

    Args:
        host: the arena's memory [bytes] uint8 as the CPU sees it.
        rows: that each head fetches.
    """
    gather_layer, gather = _gathering(arena, host, rows)

    def engine_of(layer_type: type[ReplayLayer]) -> Engine:
        return _engine(decoder, arena, _OWN_QUERY, rows, layer_type)

    return {
        "whole": step_seconds(_engine(decoder, arena, CONFIG, rows), _SEQUENCES),
        "no-prefetch": step_seconds(engine_of(ReplayLayer), _SEQUENCES),
        "no-overlap": step_seconds(engine_of(InLineLayer), _SEQUENCES),
        "host-sync": seconds(_chain(engine_of(CutLayer), lambda layer: None), _STEPS),
        "host-sync/eager": seconds(partial(engine_of(WaitingLayer).step, _SLOTS, MAX_TOKENS), _STEPS),
        "cpu-gather": seconds(_chain(engine_of(gather_layer), gather), _STEPS),
    }


def _engine(
    decoder: Decoder,
    arena: Tensor,
    config: CacheConfig,
    rows: int,
    layer_type: type[ReplayLayer] = ReplayLayer,
) -> Engine:
    """An engine that replays so many rows; the memory of the one before is given back first."""
    release()
    engine = filled_engine(decoder, arena, config, _SEQUENCES, _LENGTH, MAX_TOKENS, layer_type=layer_type)
    replay(engine, rows)
    return engine


def _chain(engine: Engine, between: Callable[[int], object]) -> Callable[[], None]:
    """A decode step as a chain of graphs, cut where a layer has chosen its rows.

    Args:
        engine: without prefetch, and with layers that can be cut.
        between: what the host does at each cut, once it has waited; gets the layer.
    """
    stream, pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
    graphs = [torch.cuda.CUDAGraph()]

    def cut() -> None:
        graphs[-1].capture_end()
        graphs.append(torch.cuda.CUDAGraph())
        graphs[-1].capture_begin(pool)

    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        engine.step(_SLOTS, MAX_TOKENS)
        torch.cuda.synchronize()
        for layer in engine.cache.layers:
            assert isinstance(layer, CutLayer)
            layer.cut = cut
        graphs[0].capture_begin(pool)
        engine.step(_SLOTS, MAX_TOKENS)
        graphs[-1].capture_end()

    def step() -> None:
        for layer, graph in enumerate(graphs[:-1]):
            graph.replay()
            torch.cuda.current_stream().synchronize()
            between(layer)
        graphs[-1].replay()

    return step


def _gathering(arena: Tensor, host: Tensor, rows: int) -> tuple[type[CutLayer], Callable[[int], None]]:
    """Layers that send the positions of their chosen rows to the CPU and fetch them from pinned memory, and
    the function that must gather them there in between; it gets the layer.

    Args:
        arena: as the GPU sees it.
        host: the arena's memory [bytes] uint8 as the CPU sees it.
        rows: that each head fetches.
    """
    shape, row = LLAMA_8B.shape, 2 * LLAMA_8B.head_dim
    rows_of_arena = host[: arena.nbytes].view(shape.dtype).view(-1, row)
    # a head's rows lie together in the arena, and those of a sequence too, as its blocks follow one another
    tokens = len(arena) // _SEQUENCES * shape.block_tokens
    heads = torch.arange(shape.layers * shape.kv_heads).view(shape.layers, 1, shape.kv_heads, 1)
    starts = (heads * _SEQUENCES + torch.arange(_SEQUENCES).view(-1, 1, 1)) * tokens
    first, capacity = CONFIG.sinks + CONFIG.recent, CONFIG.sizes(MAX_TOKENS, shape.layers)[0].resident
    lines = torch.arange(_SEQUENCES * shape.kv_heads, device="cuda").view(_SEQUENCES, -1, 1)
    sets = lines * (first + capacity) + first  # where the sets begin among the resident rows
    positions = torch.zeros(_SEQUENCES, shape.kv_heads, rows, dtype=torch.int32, pin_memory=True)
    buffer = torch.zeros(positions.numel(), row, dtype=shape.dtype, pin_memory=True)
    entries = torch.zeros(positions.shape, dtype=torch.int64, device="cuda")

    class GatherLayer(CutLayer):
        def announce(self, fetch_list: FetchList) -> None:
            entries.copy_(fetch_list.entries[..., :rows])  # every head has as many
            positions.copy_(self.resident.positions.gather(2, entries), non_blocking=True)

        def fetch(self, fetch_list: FetchList, batch: Batch, *, patient: bool) -> None:
            fetched = buffer.to("cuda", non_blocking=True)
            self.resident.rows.view(-1, row).index_copy_(0, (sets + entries).flatten(), fetched)

    def gather(layer: int) -> None:
        torch.index_select(rows_of_arena, 0, (starts[layer] + positions).flatten(), out=buffer)

    return GatherLayer, gather
