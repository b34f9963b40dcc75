"""step/resident and step/fetch: a decode step of 24 sequences of 32K at the Llama-3-8B shape.

store/decode is step/resident beside the same step without writing its new rows to CPU memory.
"""

from unittest.mock import patch

import torch

from benchmarks.gpu.ceilings import gemm_step, seconds
from benchmarks.gpu.machine import Machine
from benchmarks.gpu.synthetic import LLAMA_8B, arena_of, filled_engine, random_decoder, replayed
from benchmarks.result import Result
from gpu_worker import cache as cache_module
from gpu_worker.engine import Engine
from runtime.config import CacheConfig

CONTEXT, STEPS = 32768, 40
MAX_TOKENS = CONTEXT + 512
SELECTED = 256  # k
CONFIG = CacheConfig(select_k=SELECTED, resident=2048)
ARENA_GIB = 98
SHARES = (0, 5, 9, 10, 20, 50, 100)  # of k, new rows a step and head, in percent


def measure(machine: Machine) -> list[Result]:
    model, sequences = LLAMA_8B, 24
    gemm = gemm_step(model, sequences)
    arena = arena_of(machine.memory, model, sequences, MAX_TOKENS)
    engine = filled_engine(
        random_decoder(model, MAX_TOKENS), arena, CONFIG, sequences, CONTEXT - 300, MAX_TOKENS
    )
    read = sequences * CONTEXT * engine.cache.index_token_bytes + engine.cache.resident_bytes
    floor, resident = gemm + read / machine.hbm, 0.0
    results = [Result("ceiling", "GEMM graph", gemm * 1e3, "ms")]
    for share in SHARES:
        with replayed(round(SELECTED * share / 100)):
            took = step_seconds(engine, sequences)
        if share == 0:
            resident = took
            results.append(Result("step/resident", "time", took * 1e3, "ms", floor * 1e3, took / floor))
            with replayed(0), patch.object(cache_module, "store_new", lambda *_: None):
                without = step_seconds(engine, sequences)
            results.append(Result("store/decode", "time", took * 1e3, "ms", without * 1e3, took / without))
        else:
            name = "step/fetch" if share == 9 else f"step/fetch/{share}%"
            results.append(Result(name, "time", took * 1e3, "ms", resident * 1e3, took / resident))
    return results


@torch.inference_mode()
def step_seconds(engine: Engine, size: int) -> float:
    """Median seconds of a decode step, captured as it now is."""
    engine._capture(size)
    return seconds(engine._graphs[size].replay, STEPS)
