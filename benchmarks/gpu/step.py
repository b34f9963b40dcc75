"""step/resident and step/fetch: a decode step of 24 sequences of 32K at the Llama-3-8B shape.

store/decode is step/resident beside the same step without writing its new rows to CPU memory. All steps run
in turn, several times around, so that they find the machine in the same state.
"""

from functools import partial

from torch import Tensor

from benchmarks.gpu.ceilings import gemm_step, in_turn, seconds
from benchmarks.gpu.machine import Machine
from benchmarks.gpu.synthetic import (
    LLAMA_8B,
    ReplayLayer,
    arena_of,
    filled_engine,
    index_bytes_read,
    random_decoder,
    replay,
)
from benchmarks.result import Result
from clo.gpu_worker.cache.batch import Batch
from clo.gpu_worker.engine import Engine
from clo.runtime.config import CacheConfig

CONTEXT, STEPS = 32768, 40
MAX_TOKENS = CONTEXT + 512
CONFIG = CacheConfig()
SELECTED = CONFIG.sizes(MAX_TOKENS, 1)[0].select_k  # k
ARENA_GIB = 98
SHARES = (0, 5, 9, 10, 20, 50, 100)  # of k, new rows a step and head, in percent


class StoringLayer(ReplayLayer):
    """Whose new rows go to the arena only where ``stores``."""

    stores = True

    def record(self, kv: Tensor, batch: Batch) -> None:
        if self.stores:
            super().record(kv, batch)
        else:
            self.index.write(kv, batch)


def measure(machine: Machine) -> list[Result]:
    model, sequences = LLAMA_8B, 24
    gemm = gemm_step(model, sequences)
    arena = arena_of(machine.memory, model.shape, sequences, MAX_TOKENS)
    decoder = random_decoder(model)
    engine = filled_engine(
        decoder, arena, CONFIG, sequences, CONTEXT - 300, MAX_TOKENS, layer_type=StoringLayer
    )
    read = index_bytes_read(engine, sequences, CONTEXT) + engine.cache.resident_bytes
    floor = gemm + read / machine.hbm
    replay(engine, 0)
    let_store(engine, False)
    steps = [engine.captured(sequences)]
    let_store(engine, True)
    for share in SHARES:
        replay(engine, round(SELECTED * share / 100))
        steps.append(engine.captured(sequences))
    without, resident, *fetching = in_turn([partial(step.replay, sequences) for step in steps])
    results = [
        Result("ceiling", "GEMM graph", gemm * 1e3, "ms"),
        Result("step/resident", "time", resident * 1e3, "ms", floor * 1e3, resident / floor),
        Result("store/decode", "time", resident * 1e3, "ms", without * 1e3, resident / without),
    ]
    for share, took in zip(SHARES[1:], fetching, strict=True):
        name = "step/fetch" if share == 9 else f"step/fetch/{share}%"
        results.append(Result(name, "time", took * 1e3, "ms", resident * 1e3, took / resident))
    return results


def let_store(engine: Engine, stores: bool) -> None:
    """Set ``stores`` of all layers, each an ``StoringLayer``."""
    for layer in engine.cache.layers:
        assert isinstance(layer, StoringLayer)
        layer.stores = stores


def step_seconds(engine: Engine, size: int) -> float:
    """Median seconds of a decode step, captured as it now is."""
    return seconds(partial(engine.captured(size).replay, size), STEPS)
